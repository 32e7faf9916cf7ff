"Reports: what differs between two runs is found, told where it is, and nothing else is told."

import json

import pytest
from psycopg.conninfo import make_conninfo
from test_page import DOT, sources

from mlops_workbench.core import WorkbenchError
from mlops_workbench.page import Figure
from mlops_workbench.report import (
    Difference,
    change,
    compare_code,
    compare_runs,
    diff_html,
    diff_text,
    find_run,
    flatten,
    pair_figures,
    read_packages,
    shorten,
    shorten_pair,
)
from mlops_workbench.runs import hold_run, note_stage
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, transaction
from mlops_workbench.tracking import end_run, log_metrics, open_tracking, start_run

KEY = {
    "notebook": "4e1c" * 16,
    "code": {"helpers": "a1b2" * 16, "helpers.deep": "c3d4" * 16},
    "parameters": {"rank": 16, "nested": {"a": 1, "b": 2}},
    "inputs": {"data/rows.csv": "e5f6" * 16},
    "reads": {"events": "1500 rows"},
    "environment": "0a0b" * 16,
}


@pytest.fixture
def settings(store, tmp_path):
    return Settings("test", tmp_path, tmp_path, store.url)


@pytest.fixture
def write_run(store, settings):
    "Write a run of two stages; what is given replaces what the stage `train` would have."

    def write(code="fit(rank)", packages="numpy==2.3.1\n", picture=DOT, run_id="", parameters=None, **train):
        columns = {"pipeline": "planner", "profile": "smoke", "task": "mlops_workbench.planner"}
        with hold_run(store, columns | {"parameters": parameters or {}}, run_id) as record:
            kept = settings.home / "runs" / record.run_id
            kept.mkdir(parents=True)
            if packages:
                (kept / "environment.txt").write_text(packages)
            for position, name in enumerate(("prep", "train")):
                notebook = f"{position}-{name}.ipynb"
                stage = {"status": "finished", "seconds": 2.0, "notebook": f"runs/{record.run_id}/{notebook}"}
                stage |= {"outputs": {"loss": 0.5}, "key": KEY, "files": [{"place": "model", "digest": "ab" * 32}]}
                note_stage(store, record.run_id, name, position, stage | (train if name == "train" else {}))
                write_notebook(kept / notebook, code if name == "train" else "build()", picture)
            record.status, record.error = "finished", None
        return record.run_id

    return write


def write_notebook(path, code, picture):
    output = {"output_type": "display_data", "metadata": {}, "data": {"image/png": picture}}
    cells = [{"cell_type": "markdown", "source": "## Act"}]
    cells += [
        {"cell_type": "code", "metadata": {"tags": ["injected-parameters"]}, "source": path.parent.name, "outputs": []}
    ]
    cells += [{"cell_type": "code", "metadata": {}, "source": code, "outputs": [output] if picture else []}]
    path.write_text(json.dumps({"cells": cells}))


@pytest.fixture
def compare(store, settings):
    return lambda a, b, tracking=None: compare_runs(store, settings, tracking, a, b)


def told(comparison):
    return [(d.section, d.place, d.a, d.b) for d in comparison.differences]


def test_two_equal_runs_differ_in_nothing(write_run, compare):
    comparison = compare(write_run(), write_run())
    assert told(comparison) == [] and comparison.code == {} and comparison.untold == ()
    assert diff_text(comparison).splitlines()[2:] == ["", "nothing differs"]
    assert "Nothing differs." in diff_html(comparison)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"key": KEY | {"parameters": {"rank": 8, "nested": {"a": 1, "b": 2}}}}, ("parameters", "train.rank", 16, 8)),
        ({"key": KEY | {"parameters": {"rank": 16, "nested": {"a": 1}}}}, ("parameters", "train.nested.b", 2, None)),
        ({"key": KEY | {"notebook": "ff" * 32}}, ("code", "train.notebook", "4e1c" * 16, "ff" * 32)),
        (
            {"key": KEY | {"code": KEY["code"] | {"helpers.deep": "ff" * 32}}},
            ("code", "train.helpers.deep", "c3d4" * 16, "ff" * 32),
        ),
        ({"key": KEY | {"inputs": {}}}, ("data", "train.inputs data/rows.csv", "e5f6" * 16, None)),
        ({"key": KEY | {"reads": {"events": "1600 rows"}}}, ("data", "train.reads events", "1500 rows", "1600 rows")),
        ({"files": [{"place": "model", "digest": "cd" * 32}]}, ("data", "train.file model", "ab" * 32, "cd" * 32)),
        ({"outputs": {"loss": 0.25}}, ("outputs", "train.loss", 0.5, 0.25)),
        ({"status": "failed"}, ("outcome", "train.status", "finished", "failed")),
        ({"error": "no rows"}, ("outcome", "train.error", None, "no rows")),
        ({"packages": "numpy==2.4.0\n"}, ("environment", "numpy", "2.3.1", "2.4.0")),
        ({"packages": "numpy==2.3.1\nray==2.50\n"}, ("environment", "ray", None, "2.50")),
    ],
)
def test_each_part_that_differs_is_found_alone(write_run, compare, changes, expected):
    assert told(compare(write_run(), write_run(**changes))) == [expected]


def test_a_cached_stage_does_not_differ_from_the_one_it_was_taken_from(write_run, compare, settings):
    first = write_run()
    second = write_run(status="cached", cached_from=first, notebook=None)
    (settings.home / "runs" / second / "1-train.ipynb").unlink()
    comparison = compare(first, second)
    assert told(comparison) == [] and comparison.untold == ()
    assert comparison.notebooks["train"][0] == comparison.notebooks["train"][1]


def test_runs_without_keys_are_compared_by_what_they_were_given(write_run, compare):
    first = write_run(key=None, parameters={"train": {"rank": 16}})
    second = write_run(key=None, parameters={"train": {"rank": 8}})
    assert told(compare(first, second)) == [("parameters", "train.rank", 16, 8)]


def test_a_stage_of_one_run_only_is_told_once(store, write_run, compare):
    first, second = write_run(), write_run()
    note_stage(store, second, "promote", 2, {"status": "finished"})
    comparison = compare(first, second)
    assert told(comparison) == [("outcome", "promote.status", None, "finished")]
    assert comparison.untold == ()


def test_what_could_not_be_compared_is_said(write_run, compare, settings):
    first, second = write_run(packages=""), write_run()
    (settings.home / "runs" / second / "1-train.ipynb").unlink()
    said = diff_text(compare(first, second))
    assert "not compared: the packages: a run kept no list of them" in said
    assert "not compared: the notebooks of 'train': a run kept none" in said


def test_code_is_compared_without_the_injected_parameters(write_run, compare):
    comparison = compare(write_run(), write_run(code="rank = 8\nfit(rank)"))
    assert list(comparison.code) == ["train"]
    assert comparison.code["train"].splitlines()[1:] == ["+rank = 8", " fit(rank)"]


def test_a_damaged_notebook_is_told(write_run, compare, settings):
    first, second = write_run(), write_run()
    (settings.home / "runs" / second / "1-train.ipynb").write_text("{")
    with pytest.raises(WorkbenchError, match="1-train.ipynb is not a notebook"):
        compare(first, second)


def test_metrics_are_compared_where_both_logged_some(store, settings, write_run, compare):
    tracking, ids = open_tracking(store, settings), []
    for loss in (0.5, 0.25, None):
        run = start_run(tracking, "planner", "train", {})
        log_metrics(run, {"loss": loss, "rows": 3} if loss else {})
        end_run(run)
        ids.append(write_run(mlflow_run_id=run.run_id))
    assert told(compare(ids[0], ids[1], tracking)) == [("metrics", "train.loss", 0.5, 0.25)]
    assert told(compare(ids[0], ids[2], tracking)) == []
    assert "-0.25 (-50.0%)" in diff_text(compare(ids[0], ids[1], tracking))


def test_a_run_is_found_by_a_part_of_its_id(store, write_run):
    for run_id in ("01a1fc99-aaaa", "01a1fc99-bbbb"):
        write_run(run_id=run_id)
    assert find_run(store, "bbbb")["run_id"] == "01a1fc99-bbbb"
    for part, many in (("01a1", "several runs"), ("zzz", "no run"), ("", "several runs")):
        with pytest.raises(ValueError, match=f"^{many} match {part!r}"):
            find_run(store, part)


def test_the_page_shows_figures_side_by_side_and_loads_nothing(write_run, compare):
    html = diff_html(compare(write_run(), write_run(outputs={"text": "<script>go()</script>"}, picture="")))
    assert sources(html) == [] and "go()" in html
    figures = html[html.index("Figures") :]
    assert figures.count("data:image/png") == 2 and figures.count("<i>none</i>") == 2


def test_equal_figures_are_said_to_be_equal(write_run, compare):
    assert diff_html(compare(write_run(), write_run())).count("the same in both") == 2


def test_a_comparison_can_be_written_as_json(write_run, compare):
    found = json.loads(json.dumps(compare(write_run(), write_run(outputs={"loss": 0.25})).as_dict()))
    expected = {"section": "outputs", "stage": "train", "name": "loss", "a": 0.5, "b": 0.25}
    assert found["differences"]["outputs"] == [expected]
    assert found["seconds"] == {"prep": [2.0, 2.0], "train": [2.0, 2.0]}


def test_comparing_writes_nothing(store, settings, write_run):
    runs = write_run(), write_run()
    reading = "-c default_transaction_read_only=on"
    with Store(make_conninfo(store.url, options=reading)) as closed:
        with pytest.raises(WorkbenchError, match="read-only"), transaction(closed) as connection:
            connection.execute("DELETE FROM exp.run_stages")
        assert compare_runs(closed, settings, None, *runs).differences == ()


# Words


def test_values_are_aligned_below_each_other(write_run, compare):
    key = KEY | {"parameters": {"rank": 8, "nested": {"a": 10, "b": 2}}}
    lines = diff_text(compare(write_run(), write_run(key=key))).splitlines()
    assert lines[2:] == ["", "parameters", "  train.nested.a  1   10", "  train.rank      16  8"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (0.123456789, "0.123457"),
        (True, "True"),
        ("a\n b", "a b"),
        ("ab" * 32, "abababababab"),
        ("x" * 50, "x" * 39 + "…"),
    ],
)
def test_a_value_is_shortened(value, text):
    assert shorten(value) == text


def test_long_values_are_shown_where_they_differ():
    a, b = shorten_pair(Difference("outputs", "", "x", "n" * 100 + "1" + "m" * 100, "n" * 100 + "2" + "m" * 100))
    assert a != b and max(len(a), len(b)) <= 40


def test_only_measured_numbers_change_by_an_amount():
    assert change(Difference("metrics", "", "loss", 0.5, 0.25)) == "-0.25 (-50.0%)"
    assert change(Difference("metrics", "", "loss", 0.0, 0.25)) == "+0.25"
    assert change(Difference("parameters", "", "rate", 0.5, 0.25)) == ""
    assert change(Difference("metrics", "", "loss", None, 0.25)) == ""


def test_names_are_flattened_and_empty_values_kept():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert flatten(None) == {}


def test_figures_are_matched_by_heading_and_order():
    a, b, c = Figure(1, "Loss", "1"), Figure(2, "Loss", "2"), Figure(3, "Rows", "3")
    assert pair_figures([a, b], [a, c]) == [("Loss", a, a), ("Loss", b, None), ("Rows", None, c)]


def test_packages_are_read_by_name(tmp_path):
    (tmp_path / "environment.txt").write_text("a==1\n\n# note\nb==2.0+cpu\n")
    assert read_packages(tmp_path / "environment.txt") == {"a": "1", "b": "2.0+cpu"}
    assert read_packages(tmp_path / "missing.txt") == {}


def test_the_code_of_one_notebook_does_not_differ_from_itself(tmp_path):
    write_notebook(tmp_path / "n.ipynb", "fit()", DOT)
    assert compare_code(tmp_path / "n.ipynb", tmp_path / "n.ipynb") == ""
