"""Sweeps and backfills: choices are checked, shared work is done once, an interruption costs nothing that was finished."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from mlops_workbench.choice import Choice, combinations, is_choice, read_choice, read_dates
from mlops_workbench.core import WorkbenchError, read_parameters
from mlops_workbench.runs import RunStopped, read_runs
from mlops_workbench.settings import Settings
from mlops_workbench.study import (
    BackfillOptions,
    Goal,
    SweepOptions,
    end_trial,
    hold_study,
    plot_trials,
    propose,
    trial_table,
)
from mlops_workbench.sweep import plan_sweep, read_metric, run_backfill, run_sweep
from mlops_workbench.tracking import end_run, log_metrics, open_tracking, start_run

KNOWN = read_parameters("""
rank: int = 16  # of the adapter, in [1, 512]
learning_rate: float = 1e-3  # peak
method: Literal["full", "lora"] = "lora"  # what is trained
shuffle: bool = False  # the rows
until: str | None = None  # last day
names: list = []  # of columns
""")


# Choices

GOOD = [
    ("train.rank=8,16,32", Choice("train.rank", (8, 16, 32))),
    ("train.rank=10..60", Choice("train.rank", low=10, high=60)),
    ("train.rank=log:1..100", Choice("train.rank", low=1, high=100, log=True)),
    ("train.learning_rate=log:1e-5..1e-2", Choice("train.learning_rate", low=1e-5, high=1e-2, log=True)),
    ("train.learning_rate=1..10", Choice("train.learning_rate", low=1.0, high=10.0)),
    ("train.learning_rate=-.5..0.5", Choice("train.learning_rate", low=-0.5, high=0.5)),
    ("train.learning_rate=1e-3,1", Choice("train.learning_rate", (1e-3, 1.0))),
    ("train.method=full,lora", Choice("train.method", ("full", "lora"))),
    ("train.shuffle=true,false", Choice("train.shuffle", (True, False))),
    ("train.until=null,2026-03-01", Choice("train.until", (None, "2026-03-01"))),
]


@pytest.mark.parametrize(("text", "expected"), GOOD)
def test_a_choice_has_the_type_of_its_parameter(text, expected):
    found = read_choice(text, KNOWN)
    assert found == expected
    assert [type(v) for v in (found.low, found.high)] == [type(v) for v in (expected.low, expected.high)]
    assert is_choice(text)


BAD = [
    ("train.rnk=8,16", "has no parameter 'rnk': did you mean 'rank'"),
    ("train.rank=60..10", "60 is not below 10"),
    ("train.rank=10..10", "10 is not below 10"),
    ("train.rank=0.5..3", "rank is 0.5 (float)"),
    ("train.rank=0..64", "rank is 0"),
    ("train.rank=8,1000", "rank is 1000"),
    ("train.rank=8,sixteen", "rank is 'sixteen' (str)"),
    ("train.rank=8,8", "has 8 twice"),
    ("train.rank=8,", "expected int"),
    ("train.rank=8..", "write a range as low..high"),
    ("train.rank=8..16..32", "write a range as low..high"),
    ("train.rank=8...32", "write a range as low..high"),
    ("train.rank=log:8", "write a range as low..high"),
    ("train.learning_rate=log:0..1", "a range with log: begins above 0"),
    ("train.learning_rate=log:-1..1", "a range with log: begins above 0"),
    ("train.learning_rate=0..inf", "write a range as low..high"),
    ("train.learning_rate=nan..1", "write a range as low..high"),
    ("train.method=1..2", "method is 1 (int)"),
    ("train.method=lora,prefix", "method is 'prefix' (str)"),
    ("train.shuffle=0..1", "shuffle is 0 (int)"),
    ("train.names=a,b", "names is 'a' (str)"),
    ("train=8,16", "write it as stage.parameter=values"),
    ("train.rank=", "write it as stage.parameter=values"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_a_bad_choice_is_told_on_one_line(text, words):
    with pytest.raises(ValueError) as caught:
        read_choice(text, KNOWN)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_values_are_no_choices():
    plain = ["8", "1e-3", "../models/base", "/data/a..b", "[8, 16]", '"a,b"', "2026-03-01", "secret://NAME", "", "lora"]
    assert [value for value in plain if is_choice(f"train.x={value}")] == []


def test_combinations_are_counted_only_where_they_can_be():
    rank, scale = Choice("a.rank", low=1, high=3), Choice("a.scale", low=0.0, high=1.0)
    assert [c["a.rank"] for c in combinations([rank], 3)] == [1, 2, 3]
    assert combinations([rank], 2) == []
    assert combinations([rank, scale], 100) == []


DATES = [
    (("2026-03-01", "2026-03-03", "1d"), ["2026-03-01T00:00", "2026-03-02T00:00", "2026-03-03T00:00"]),
    (("2026-03-01", "2026-03-10", "1w"), ["2026-03-01T00:00", "2026-03-08T00:00"]),
    (("2026-03-01T12:00+02:00", "2026-03-02", "7h"), ["2026-03-01T10:00", "2026-03-01T17:00", "2026-03-02T00:00"]),
    (("2026-03-01", "2026-03-01", "99w"), ["2026-03-01T00:00"]),
    (("2026-01-01", "2028-09-26", "1d"), None),
]


@pytest.mark.parametrize(("asked", "expected"), DATES)
def test_dates_are_at_equal_distances_in_utc(asked, expected):
    found = read_dates(*asked)
    assert len(found) == 1000 if expected is None else [f"{at:%Y-%m-%dT%H:%M}" for at in found] == expected
    assert all(str(at.tzinfo) == "UTC" for at in found)


BAD_DATES = [
    (("2026-13-01", "2026-03-03", "1d"), "from is '2026-13-01'"),
    (("2026-03-01", "2026-03-03T12:00", "1d"), "to is '2026-03-03T12:00'"),
    (("2026-03-01", "2026-02-01", "1d"), "write the earlier one first"),
    (("2026-03-01", "2026-04-01", "0d"), "write hours, days or weeks"),
    (("2026-03-01", "2026-04-01", "1m"), "write hours, days or weeks"),
    (("2026-03-01", "2026-04-01", ""), "write hours, days or weeks"),
    (("2026-01-01", "2028-09-27", "1d"), "makes 1001 runs, at most 1000"),
]


@pytest.mark.parametrize(("asked", "words"), BAD_DATES)
def test_bad_dates_are_told_on_one_line(asked, words):
    with pytest.raises(ValueError) as caught:
        read_dates(*asked)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# Studies, without running anything

MIXED = (Choice("a.x", low=1e-5, high=1.0, log=True), Choice("a.n", low=1, high=9), Choice("a.k", ("u", "v", "w")))


def finish(study, n=None):
    "Work on a study, for `n` trials or to its end."
    done = 0
    while (n is None or done < n) and (trial := propose(study)):
        bad = trial.params["a.n"] == 5
        end_trial(
            study, trial, None if bad else trial.params["a.x"] * trial.params["a.n"], "five is odd" if bad else ""
        )
        done += 1


def test_a_study_that_is_killed_again_and_again_ends_like_one_that_is_not(store, tmp_path):
    goal = Goal("whole", MIXED, SweepOptions("p", n_trials=24, seed=3))
    with hold_study(store, goal) as study:
        finish(study)
        whole = trial_table(study).to_csv()
    broken = replace(goal, study="broken")
    for n in (0, 1, 11, 4):
        with hold_study(store, broken) as study:
            finish(study, n)
            assert propose(study) is not None, "left running, as a killed driver leaves it"
    with hold_study(store, broken) as study:
        finish(study)
        assert trial_table(study).to_csv() == whole
    with hold_study(store, replace(goal, study="other", options=SweepOptions("p", n_trials=24, seed=4))) as study:
        finish(study)
        assert trial_table(study).to_csv() != whole


def test_more_trials_go_on_where_fewer_ended(store):
    goal = Goal("few", MIXED, SweepOptions("p", n_trials=5))
    with hold_study(store, goal) as study:
        finish(study)
    with hold_study(store, replace(goal, options=SweepOptions("p", n_trials=9))) as study:
        finish(study)
        assert list(study.trials) == list(range(9))
    with hold_study(store, goal) as study:
        assert propose(study) is None, "fewer than there are already"


def test_few_combinations_are_each_tried_once(store):
    goal = Goal("grid", (Choice("a.k", ("u", "v")), Choice("a.n", low=1, high=3)), SweepOptions("p", n_trials=6))
    with hold_study(store, goal) as study:
        end_trial(study, propose(study), 1.0)
        propose(study)
    with hold_study(store, goal) as study:
        while trial := propose(study):
            end_trial(study, trial, 1.0)
        tried = [tuple(t.params.values()) for t in study.trials.values()]
    assert sorted(tried) == sorted({(k, n) for k in "uv" for n in (1, 2, 3)})


def test_a_study_belongs_to_one_driver_and_one_definition(store):
    goal = Goal("mine", MIXED, SweepOptions("p"), "a")
    with hold_study(store, goal), pytest.raises(WorkbenchError, match="'mine' is running already"):
        hold_study(store, goal).__enter__()
    with pytest.raises(ValueError, match="begun with other choices"):
        hold_study(store, replace(goal, definition="b")).__enter__()
    with hold_study(store, goal):
        pass


@pytest.mark.parametrize("n", [1, 7])
def test_every_mixture_of_ends_can_be_drawn(store, tmp_path, n):
    goal = Goal("drawn", MIXED, SweepOptions("p", n_trials=n + 2))
    with hold_study(store, goal) as study:
        propose(study)
        end_trial(study, propose(study), None, "stopped", pruned=True)
        finish(study)
        plot_trials(goal, trial_table(study)).savefig(tmp_path / "trials.png")
    assert (tmp_path / "trials.png").stat().st_size > 1000


# Sweeps of real notebooks

TELL = """
import json, os, time

def tell(**outputs):
    said = {"outputs": outputs, "files": [], "modules": []}
    json.dump(said, open(os.environ["WORKBENCH_OUTPUTS"], "w"))

def mark(name):
    open(os.path.join(os.environ["WORKBENCH_ROOT"], name), "a").write("x")
"""

TRAIN = """
from IPython.display import display

mark(f"begun-{rank}")
assert rank % 13, "thirteen brings bad luck"
for step in range(1, 4):
    values = {"loss": 1.0, "validation_loss": rank / step}
    facts = {"step": step, "max_steps": 3, "values": values, "left_s": None}
    display({"text/plain": f"step {step}", "application/vnd.workbench.progress+json": facts}, raw=True)
    time.sleep(5 if rank > 50 else nap)
mark(f"ended-{rank}")
"""


def write_notebook(root, name, parameters, *code):
    def cell(source, *tags):
        metadata = {"tags": list(tags)}
        return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": [], "execution_count": None}

    cells = [cell(parameters, "parameters"), cell(TELL), *map(cell, code)]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    path = root / "nbs" / "pipelines" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def settings(tmp_path, store, monkeypatch):
    "Give a project whose `train` is the better, the smaller its rank; `promote` changes the world."
    (tmp_path / "settings.ini").write_text("[local]\n")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "toy.yaml").write_text(
        "task: mlops_workbench.planner\n"
        "stages:\n"
        "  prep: {}\n"
        "  train:\n    needs: {n_rows: prep.n_rows}\n"
        "  promote:\n    needs: {loss: train.validation_loss}\n    effect: true\n"
    )
    prepare = (
        "mark('prep')\nassert until != '2026-03-08T00:00:00+00:00', 'no data on that day'\ntell(n_rows=len(until))"
    )
    write_notebook(tmp_path, "prep", "until: str = ''  # ISO time", prepare)
    schema = "n_rows: int = 0  # rows\nrank: int = 16  # of the adapter\nnap: float = 0.0  # seconds a step"
    write_notebook(tmp_path, "train", schema, TRAIN, "tell(validation_loss=rank / 3, rows=n_rows, name='x')")
    write_notebook(tmp_path, "promote", "loss: float = 0.0  # of the model", "mark('promoted')\ntell(done=True)")
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)
    return Settings("local", tmp_path, tmp_path / ".workbench", store.url)


def marks(settings, name):
    "Count how often a notebook left a mark."
    path = settings.root / name
    return len(path.read_text()) if path.exists() else 0


def test_shared_stages_run_once_and_the_world_stays_as_it_is(settings, store):
    heard = []
    result = run_sweep(settings, SweepOptions("toy", ("train.rank=4,8,2,6",), n_trials=4, jobs=2), heard.append)
    assert marks(settings, "prep") == 1
    assert marks(settings, "promoted") == 0
    assert [marks(settings, f"begun-{rank}") for rank in (2, 4, 6, 8)] == [1, 1, 1, 1]
    assert result.best["train.rank"] == 2 and result.best["train.validation_loss"] == pytest.approx(2 / 3)
    assert {e["trial"] for e in heard if e["event"] == "stage_started" and e["stage"] == "train"} == {0, 1, 2, 3}
    assert (result.folder / "trials.csv").read_text().splitlines()[
        0
    ] == "trial,status,train.rank,train.validation_loss,step,error"
    assert (result.folder / "trials.png").read_bytes()[:4] == b"\x89PNG"
    again = run_sweep(settings, SweepOptions("toy", ("train.rank=4,8,2,6",), n_trials=4, maximise=True))
    assert again.best["train.rank"] == 8
    assert marks(settings, "begun-8") == 1, "another study finds the same runs in the cache"


def test_mlflow_nests_sweep_trial_and_stage(settings, store):
    result = run_sweep(settings, SweepOptions("toy", ("train.rank=4,8", "train.nap=0.01"), n_trials=2))
    client = open_tracking(store, settings).client
    sweep = client.get_run(result.mlflow_run_id)
    assert sweep.info.status == "FINISHED"
    assert sweep.data.params == {"train.rank": "4,8", "train.nap": "0.01"}
    assert sweep.data.metrics == {"best.train.validation_loss": pytest.approx(4 / 3)}
    assert {f.path for f in client.list_artifacts(result.mlflow_run_id)} == {"trials.csv", "figures"}
    trials = [r for r in read_runs(store) if client.get_run(r["mlflow_run_id"]).data.params]
    assert len(trials) == 2
    for trial in trials:
        recorded = client.get_run(trial["mlflow_run_id"]).data
        assert recorded.tags["mlflow.parentRunId"] == result.mlflow_run_id
        assert recorded.metrics["train.validation_loss"] == pytest.approx(int(recorded.params["train.rank"]) / 3)
        stage = client.get_run(trial["stages"][-1]["mlflow_run_id"])
        assert stage.data.tags["mlflow.parentRunId"] == trial["mlflow_run_id"]


@pytest.mark.slow
def test_a_hopeless_trial_is_pruned_and_a_bad_one_fails_while_the_sweep_goes_on(settings, store):
    ranks = (1, 2, 3, 4, 5, 60, 13, 6)
    options = SweepOptions("toy", (f"train.rank={','.join(map(str, ranks))}", "train.nap=0.01"), n_trials=8)
    result = run_sweep(settings, options)
    status = dict(zip(result.trials["train.rank"], result.trials["status"], strict=True))
    assert status[60] == "pruned" and status[13] == "failed"
    assert [status[rank] for rank in (1, 2, 3, 4, 5)] == ["finished"] * 5
    assert marks(settings, "begun-60") == 1 and marks(settings, "ended-60") == 0
    errors = dict(zip(result.trials["train.rank"], result.trials["error"], strict=True))
    assert errors[60] == "validation_loss 60 at step 1 is worse than the median"
    assert "thirteen brings bad luck" in errors[13]
    pruned = next(r for r in read_runs(store) if r["status"] == "pruned")
    assert open_tracking(store, settings).client.get_run(pruned["mlflow_run_id"]).info.status == "KILLED"


def test_a_sweep_in_which_everything_fails_says_so(settings):
    with pytest.raises(WorkbenchError, match="no trial of sweep 'toy-full-.*bad luck"):
        run_sweep(settings, SweepOptions("toy", ("train.rank=13,26",), n_trials=2))


def test_a_metric_that_does_not_exist_ends_the_sweep_at_its_first_trial(settings):
    options = SweepOptions("toy", ("train.rank=4,8",), metric="train.validation_los")
    with pytest.raises(WorkbenchError, match="gave no number 'validation_los': did you mean 'validation_loss'"):
        run_sweep(settings, options)
    assert marks(settings, "begun-8") == 0


REFUSED = [
    (("train.rank=8,16",), {"metric": "validation_loss"}, "write it as stage.name"),
    (("train.rank=8,16",), {"metric": "trian.validation_loss"}, "did you mean 'train'"),
    (("trian.rank=8,16",), {}, "did you mean 'train'"),
    (("train.rank=8",), {}, "a sweep needs a choice"),
    ((), {}, "a sweep needs a choice"),
    (("train.rank=8,16", "train.rank=1..4"), {}, "train.rank has two choices"),
    (("train.rank=8,16",), {"metric": "prep.n_rows"}, "would change nothing"),
    (("promote.loss=1.0,2.0",), {"metric": "promote.done"}, "leaves out stages that change the world"),
    (("train.rank=8,16", "train.nop=1"), {}, "did you mean 'nap'"),
    (("train.rank=8,16",), {"n_trials": 0}, "numbers from 1 up"),
    (("train.rank=8,16",), {"jobs": 0}, "numbers from 1 up"),
]


@pytest.mark.parametrize(("parameters", "others", "words"), REFUSED)
def test_a_sweep_that_cannot_work_is_refused_before_it_begins(settings, store, parameters, others, words):
    with pytest.raises(ValueError) as caught:
        run_sweep(settings, SweepOptions("toy", parameters, **others))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert read_runs(store) == []


def test_a_study_is_found_by_what_its_trials_mean(settings):
    options = SweepOptions("toy", ("train.rank=8,16",))
    name = plan_sweep(settings.root, options).goal.study
    same = [replace(options, n_trials=3), replace(options, jobs=4), replace(options, engine="ray")]
    others = [
        replace(options, seed=1),
        replace(options, maximise=True),
        replace(options, parameters=("train.rank=8,32",)),
    ]
    others += [replace(options, parameters=("train.rank=8,16", "train.nap=1")), replace(options, metric="train.rows")]
    others += [replace(options, parameters=("train.rank=8,16", "prep.until=x"))]
    assert {plan_sweep(settings.root, o).goal.study for o in same} == {name}
    assert name not in {plan_sweep(settings.root, o).goal.study for o in others}
    path = settings.root / "nbs" / "pipelines" / "train.ipynb"
    before = path.read_text()
    path.write_text(before.replace("rank / 3", "rank / 4"))
    assert plan_sweep(settings.root, options).goal.study != name, "the code of a notebook counts"
    path.write_text(
        before.replace('"outputs": []', '"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]')
    )
    assert plan_sweep(settings.root, options).goal.study == name, "what it printed does not"


def test_a_metric_may_come_from_mlflow_and_must_be_a_number(settings, store):
    tracking = open_tracking(store, settings)
    run = start_run(tracking, "toy", "train", {})
    log_metrics(run, {"result.f1": 0.5, "broken": float("nan")})
    end_run(run)
    stage = {"name": "train", "status": "finished", "outputs": {"name": "x", "fine": True}, "mlflow_run_id": run.run_id}
    done = {"stages": [stage]}
    assert read_metric(done, tracking, "train.result.f1") == 0.5
    assert read_metric(done, tracking, "train.fine") == 1.0
    for name, kind, words in [("name", WorkbenchError, "no number 'name'"), ("broken", RunStopped, "broken is nan")]:
        with pytest.raises(kind, match=words):
            read_metric(done, tracking, f"train.{name}")
    with pytest.raises(RunStopped, match="stage 'evaluate' did not run"):
        read_metric(done, tracking, "evaluate.f1")


DRIVER = """
import sys
from mlops_workbench.settings import read_settings
from mlops_workbench.study import SweepOptions
from mlops_workbench.sweep import run_sweep
def say(event):
    print(event["event"], event.get("trial", ""), flush=True)
jobs = int(sys.argv[1])
run_sweep(read_settings(), SweepOptions("toy", ("train.rank=5,4,3,2", "train.nap=0.3"), n_trials=4, jobs=jobs), say)
"""


def start_sweep(settings, jobs, until):
    "Start a sweep in a process of its own and wait until it has said something."
    command = [sys.executable, "-c", DRIVER, str(jobs)]
    driver = subprocess.Popen(
        command, cwd=settings.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    for line in driver.stdout:
        if line.strip() == until:
            return driver
    raise AssertionError(driver.stderr.read())


def settled(settings, name):
    "Wait until a notebook that was begun has ended or is dead, and count its ends."
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not marks(settings, name):
        time.sleep(0.2)
    return marks(settings, name)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_goes_on_with_the_same_command(settings, store, jobs):
    driver = start_sweep(settings, jobs, "trial_started 2")
    time.sleep(1.0)
    driver.kill()
    driver.wait()
    finished = [rank for rank in (5, 4, 3, 2) if marks(settings, f"ended-{rank}")]
    options = SweepOptions("toy", ("train.rank=5,4,3,2", "train.nap=0.3"), n_trials=4, jobs=jobs)
    result = run_sweep(settings, options)
    assert result.trials["status"].tolist() == ["finished"] * 4
    assert result.trials["train.rank"].tolist() == [5, 4, 3, 2]
    assert finished and [marks(settings, f"begun-{rank}") for rank in finished] == [1] * len(finished)
    runs = open_tracking(store, settings).client.search_runs(
        [open_tracking(store, settings).client.get_experiment_by_name("toy").experiment_id]
    )
    assert [r for r in runs if r.info.status == "RUNNING"] == []
    assert len([r for r in runs if "workbench.sweep" in r.data.tags and "mlflow.parentRunId" not in r.data.tags]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_sweep_stops_at_once_and_keeps_its_trials_open(settings, store, jobs):
    driver = start_sweep(settings, jobs, "trial_started 1")
    time.sleep(0.5)
    driver.send_signal(signal.SIGINT)
    begun = time.monotonic()
    driver.communicate(timeout=30)
    assert driver.returncode != 0 and time.monotonic() - begun < 15
    assert {r["status"] for r in read_runs(store)} <= {"finished", "cancelled"}
    options = SweepOptions("toy", ("train.rank=5,4,3,2", "train.nap=0.3"), n_trials=4, jobs=jobs)
    result = run_sweep(settings, options)
    assert result.trials["status"].tolist() == ["finished"] * 4
    assert result.trials["train.rank"].tolist() == [5, 4, 3, 2]


# Backfills


def test_a_backfill_runs_each_date_once_and_tells_which_failed(settings, store):
    options = BackfillOptions("toy", "2026-03-01", "2026-03-15", "7d", metrics=("train.validation_loss", "prep.n_rows"))
    result = run_backfill(settings, options)
    assert result.rows["date"].tolist() == ["2026-03-01", "2026-03-08", "2026-03-15"]
    assert result.rows["status"].tolist() == ["finished", "failed", "finished"]
    (told,) = result.failed
    assert told.startswith("2026-03-08: stage 'prep' failed") and "no data on that day" in told
    assert marks(settings, "promoted") == 0
    assert (result.folder / "runs.csv").read_text().splitlines()[
        0
    ] == "date,status,train.validation_loss,prep.n_rows,error"
    client = open_tracking(store, settings).client
    dated = [client.get_run(r["mlflow_run_id"]).data.tags for r in read_runs(store)]
    assert {tags["mlflow.parentRunId"] for tags in dated} == {result.mlflow_run_id}
    assert sorted(tags["workbench.date"][:10] for tags in dated) == ["2026-03-01", "2026-03-08", "2026-03-15"]
    before = marks(settings, "prep")
    again = run_backfill(settings, options)
    assert marks(settings, "prep") == before + 1, "only the date that failed is tried again"
    assert (again.folder / "runs.csv").read_bytes() == (result.folder / "runs.csv").read_bytes()


def test_a_backfill_that_cannot_work_is_refused_before_it_begins(settings, store):
    good = BackfillOptions("toy", "2026-03-01", "2026-03-15")
    for bad, words in [
        (replace(good, parameter="prep.untill"), "did you mean 'until'"),
        (replace(good, parameter="perp.until"), "did you mean 'prep'"),
        (replace(good, parameter="train.rank"), "rank is '2026-03-01T00:00:00+00:00' (str)"),
        (replace(good, pipeline="tou"), "did you mean 'toy'"),
        (replace(good, every="1 day"), "write hours, days or weeks"),
    ]:
        with pytest.raises(ValueError) as caught:
            run_backfill(settings, bad)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert read_runs(store) == []
