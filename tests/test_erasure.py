"Erasure: every place, once, after every crash, and nothing of anybody else."

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from mlops_workbench import erasure
from mlops_workbench.absence import erased_among
from mlops_workbench.core import WorkbenchError, as_utc, new_id, stable_id
from mlops_workbench.dataset import freeze_dataset, newest_dataset, plan_split, typed_examples
from mlops_workbench.erasure import erase_unit, find_unit, guess_type, resume_erasures
from mlops_workbench.events import Event, read_events, write_events
from mlops_workbench.kitchen import write_simulation
from mlops_workbench.ledger import mark_unit, read_ledger, verify_ledger
from mlops_workbench.planner import task
from mlops_workbench.retention import EventClass, Retention, apply_retention, read_archive
from mlops_workbench.settings import Settings
from mlops_workbench.store import read_rows, transaction
from mlops_workbench.trace import Trace, clean_file
from mlops_workbench.tracking import end_run, log_parameters, log_table, open_tracking, start_run

UNIT, OTHER, SOURCE = "demo/household-0001", "demo/household-0002", "demo"
AT = as_utc("2026-03-02T08:00:00Z")


@pytest.fixture
def settings(tmp_path):
    return Settings("local", tmp_path, tmp_path)


@pytest.fixture
def tracking():
    "Stand for an MLflow in which no model is registered; the one test that is about MLflow opens a real one."
    return SimpleNamespace(client=SimpleNamespace(search_model_versions=lambda *_, **__: []))


def propose(context):
    return task.rule(context)


def live(store, settings):
    "Give some households a history, a dataset and traces in files."
    write_simulation(store, SOURCE, 110, 0, propose)
    examples = task.read_examples(store, SOURCE, None)
    dataset = freeze_dataset(
        store, settings, "planner", SOURCE, examples, plan_split(typed_examples(examples)["decided_at"])
    )
    folder = settings.home / "runs" / "r1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").write_text(f"unit_id,n\n{UNIT},1\n{OTHER},2\n")
    (folder / "0-prep.state").write_bytes(pickle.dumps({"rows": examples}))
    return dataset


def text_of(store):
    "Copy every table as text."
    with transaction(store) as connection:
        listed = "SELECT schemaname || '.' || tablename AS name FROM pg_tables WHERE schemaname IN ('exp', 'mlflow')"
        names = [r["name"] for r in read_rows(connection, listed)]
        return "\n".join(str(r) for n in names for r in read_rows(connection, f"SELECT t::text FROM {n} AS t"))


def files_of(settings, suffixes=(".csv", ".md", ".json", ".jsonl", ".ipynb", ".html", ".state", ".lines")):
    "Read every file as text, tables decoded."
    home = settings.home
    plain = [p.read_bytes().decode("utf-8", "replace") for p in home.rglob("*") if p.suffix in suffixes]
    return "\n".join([*plain, *(pd.read_parquet(p).to_csv() for p in home.rglob("*.parquet"))])


def test_nothing_leads_to_the_unit_and_everything_of_others_is_as_it_was(store, settings):
    dataset, tracking = live(store, settings), open_tracking(store, settings)
    run = start_run(tracking, "planner", "look", {})
    log_parameters(run, {"unit": UNIT, "other": OTHER})
    log_table(run, pd.read_parquet(dataset.path / "data.parquet"), "rows")
    end_run(run)
    plans = [p["plan_id"] for p in read_events(store, "plan_proposed").query("unit_id == @UNIT")["payload"]]
    others = read_events(store, "plan_decided").query("unit_id != @UNIT")["payload"].tolist()
    erased = erase_unit(store, tracking, settings, "household", UNIT, "ada")
    said, files = text_of(store), files_of(settings)
    assert not [needle for needle in (UNIT, *plans) if needle in said or needle in files]
    assert OTHER in said and OTHER in files
    assert read_events(store, "plan_decided")["payload"].tolist() == others
    assert tracking.client.get_run(run.run_id).data.params == {"unit": "(erased)", "other": OTHER}
    assert erased.datasets == (dataset.name,)


def test_the_proof_names_nobody_and_its_mark_leads_nowhere(store, tracking, settings):
    live(store, settings)
    erased = erase_unit(store, tracking, settings, "household", UNIT, "ada")
    with transaction(store) as connection:
        (entry,) = [e for e in read_ledger(connection) if e.action == "unit.erase"]
        assert (entry.seq, entry.subject) == (erased.entry, {"unit": erased.mark})
        assert UNIT not in json.dumps(entry.evidence) and entry.evidence["n_traces"] == erased.n_traces > 20
        assert mark_unit(connection, "household", UNIT) != erased.mark
        assert verify_ledger(connection).ok
        assert [dict(r) for r in read_rows(connection, "SELECT subject FROM exp.erasures")] == [{"subject": None}]


def test_a_withdrawn_dataset_keeps_its_record_and_is_made_anew_under_another_name(store, tracking, settings):
    before = live(store, settings)
    erase_unit(store, tracking, settings, "household", UNIT, "ada")
    assert not before.path.exists()
    with transaction(store) as connection:
        (row,) = read_rows(connection, "SELECT fingerprint, withdrawn_at FROM exp.datasets")
    assert row["fingerprint"] == before.fingerprint and row["withdrawn_at"]
    after = live(store, settings)
    assert after.version != before.version
    assert newest_dataset(store, "planner") == after.version


def test_a_repeated_simulation_brings_nobody_back(store, tracking, settings):
    live(store, settings)
    erase_unit(store, tracking, settings, "household", UNIT, "ada")
    assert write_simulation(store, SOURCE, 110, 0, propose) == 0
    assert UNIT not in text_of(store)
    with transaction(store) as connection:
        assert erased_among(connection, "household", [UNIT, OTHER]) == {UNIT}


STEPS = ["find_datasets", "taint_models", "aggregate", "search_files", "rewrite_tables", "remember_erased"]


@pytest.mark.parametrize("step", STEPS)
def test_whatever_step_fails_the_same_command_goes_on(store, tracking, settings, monkeypatch, step):
    live(store, settings)
    with monkeypatch.context() as patched:
        patched.setattr(erasure, step, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            erase_unit(store, tracking, settings, "household", UNIT, "ada")
    assert guess_type(store, UNIT) == "household"
    (done,) = resume_erasures(store, tracking, settings)
    assert done.entry and UNIT not in text_of(store) + files_of(settings)
    assert resume_erasures(store, tracking, settings) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from mlops_workbench import erasure
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store

settings = Settings("local", Path(sys.argv[2]), Path(sys.argv[2]))
tracking = SimpleNamespace(client=SimpleNamespace(search_model_versions=lambda *_, **__: []))
erasure.search_files = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
with Store(sys.argv[1]) as store:
    erasure.erase_unit(store, tracking, settings, "household", sys.argv[3], "ada")
"""


def test_after_a_kill_another_process_finishes(store, tracking, settings):
    live(store, settings)
    command = [sys.executable, "-c", KILLED, store.url, str(settings.home), UNIT]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, env=os.environ, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-500:]
    assert UNIT in text_of(store)  # the journal knows whom it is about
    (done,) = resume_erasures(store, tracking, settings)
    assert done.entry and UNIT not in text_of(store) + files_of(settings)


def test_a_run_under_way_is_waited_for(store, tracking, settings):
    live(store, settings)
    going = "INSERT INTO exp.runs (run_id, pipeline, profile, task, status) VALUES ('r9', 'p', 'full', 'planner', 'running')"
    with transaction(store) as connection:
        connection.execute(going)
    with transaction(store) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('run:r9', 0))")
        with pytest.raises(WorkbenchError, match="run r9 is under way"):
            erase_unit(store, tracking, settings, "household", UNIT, "ada")
    assert erase_unit(store, tracking, settings, "household", UNIT, "ada").entry


def test_an_archive_is_written_again_with_its_digest_in_the_ledger(store, tracking, settings):
    events = [Event("visit", "household", u, AT, id=stable_id("visit", u)) for u in (UNIT, OTHER)]
    write_events(store, events)
    apply_retention(
        store, settings, Retention((EventClass("*", 30, "archive"),)), "ada", as_utc("2026-09-01T00:00:00Z")
    )
    erase_unit(store, tracking, settings, "household", UNIT, "ada")
    with transaction(store) as connection:
        (archive,) = read_rows(connection, "SELECT * FROM exp.event_archives")
        assert "events.rewrite" in [e.action for e in read_ledger(connection)]
    assert read_archive(settings, archive)["unit_id"].tolist() == [OTHER]
    assert archive["n_rows"] == 1


def test_looking_changes_nothing(store, tracking, settings):
    live(store, settings)
    before = text_of(store), files_of(settings)
    found = find_unit(store, tracking, settings, "household", UNIT)
    assert (text_of(store), files_of(settings)) == before
    assert {f.place for f in found.found} >= {"exp.households", "exp.pantries", "runs/r1/rows.csv"}
    assert found.entry is None and found.n_traces > 20


def test_a_mention_in_the_ledger_is_told_and_stays(store, tracking, settings):
    from mlops_workbench.ledger import append_entry

    write_events(store, [Event("visit", "household", UNIT, AT)])
    with transaction(store) as connection:
        append_entry(connection, "experiment.stop", "ada", {"experiment": "tone"}, {"reason": f"{UNIT} complained"})
    erased = erase_unit(store, tracking, settings, "household", UNIT, "ada")
    assert any("the chain cannot forget" in told for told in erased.kept)


def test_a_unit_of_another_type_with_the_same_id_stays(store, tracking, settings):
    write_events(store, [Event("visit", "household", "abcdef", AT), Event("visit", "user", "abcdef", AT)])
    with pytest.raises(ValueError, match="units of types household, user have this id"):
        guess_type(store, "abcdef")
    erase_unit(store, tracking, settings, "household", "abcdef", "ada")
    assert read_events(store, "visit")["unit_type"].tolist() == ["user"]


@pytest.mark.parametrize(
    "unit", ["42", "x' OR '1'='1", "a%_b\\c", "Zoë/日本", 'q"u<o>&te', "../../etc/passwd", "a.b*c(d"]
)
def test_any_id_is_erased_and_nothing_else(store, tracking, settings, unit):
    events = [
        Event("visit", "user", unit, AT, {"n": 42, "about": unit}),
        Event("visit", "user", "someone", AT, {"n": 42, "x": "42"}),
    ]
    write_events(store, events)
    (settings.home / "n.json").write_text(json.dumps([{"user_id": unit, "n": 1}, {"user_id": "someone", "n": 42}]))
    erase_unit(store, tracking, settings, "user", unit, "ada")
    left = read_events(store, "visit")
    assert (left["unit_id"].tolist(), left["payload"].tolist()) == (["someone"], [{"n": 42, "x": "42"}])
    assert json.loads((settings.home / "n.json").read_text()) == [{"user_id": "someone", "n": 42}]


@pytest.mark.parametrize(
    "name", ["cut.ipynb", "cut.json", "cut.jsonl", "x.csv", "x.html", "x.md", "x.log", "x", "x.svg"]
)
def test_a_file_that_is_cut_short_or_odd_is_still_cleaned(name):
    trace = Trace("user", "ada@example.org")
    for content in (
        b'{"cells": [{"source": "ada@example.org"',
        b"<tr><td>ada@example.org",
        b"",
        b"ada@example.org\nbob\n",
        b"[1,",
    ):
        cleaned = clean_file(name, content, trace)
        assert b"ada@example.org" not in (content if cleaned.content is None and not cleaned.n else cleaned.content)


def test_neighbours_in_spelling_stay():
    trace = Trace("user", "user-1")
    for text in ("user-12", "user-1-b", "superuser-1", "xuser-1", "user-1_b"):
        assert not trace.is_in(f"seen {text} today"), text
    assert trace.is_in("seen user-1, today") and trace.is_in("/users/user-1/plans")


def test_new_events_of_an_erased_unit_are_a_new_unit(store, tracking, settings):
    write_events(store, [Event("visit", "household", UNIT, AT)])
    erase_unit(store, tracking, settings, "household", UNIT, "ada")
    write_events(store, [Event("visit", "household", UNIT, AT, id=new_id())])
    assert len(read_events(store, "visit")) == 1
    again = erase_unit(store, tracking, settings, "household", UNIT, "ada")
    assert again.entry and len(read_events(store, "visit")) == 0
