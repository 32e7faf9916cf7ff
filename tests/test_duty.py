"Duty: each chore is isolated, done by one controller at a time, and what is running survives a stop."

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from mlops_workbench.alerts import read_alerts
from mlops_workbench.core import WorkbenchError
from mlops_workbench.duty import CHORES, Chore, Desk, do_chore, do_each, do_round, keep_watch
from mlops_workbench.launch import unfinished
from mlops_workbench.retraining import fire_trigger, read_decisions, read_trigger_file
from mlops_workbench.runs import read_runs
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, read_rows, transaction
from mlops_workbench.tracking import open_tracking

NIGHT = datetime(2026, 3, 2, 2, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path, store):
    (tmp_path / "settings.ini").write_text("[local]\n")
    (tmp_path / "params" / "triggers").mkdir(parents=True)
    return Settings("local", tmp_path, tmp_path / ".workbench", store.url)


@pytest.fixture
def desk(store, settings):
    return Desk(store, None, settings, "controller-1", NIGHT)


def fail(desk):
    raise KeyError("price")


def test_a_chore_that_fails_raises_one_alert_and_the_others_are_done(store, desk):
    done = []
    chores = [
        Chore("first", lambda d: done.append(1) or ""),
        Chore("bad", fail),
        Chore("last", lambda d: done.append(2) or ""),
    ]
    for _ in range(2):
        assert [d.outcome for d in do_round(desk, chores)] == ["done", "failed", "done"]
    [alert] = read_alerts(store)
    assert (alert.name, dict(alert.labels), done) == ("chore_failed", {"chore": "bad"}, [1, 2, 1, 2])
    assert "KeyError" in alert.words and alert.run == "workbench controller --once"
    assert do_chore(desk, Chore("bad", lambda d: "mended")).outcome == "done"
    assert read_alerts(store) == []


def test_a_chore_whose_hour_has_not_come_waits_also_for_another_controller(store, desk):
    turns = []
    chore = Chore("hourly", lambda d: turns.append(d.at) or "done", 3600)
    for minutes in (0, 30, 59, 60, 61, 130):
        do_chore(replace(desk, store=Store(store.url), now=NIGHT + timedelta(minutes=minutes)), chore)
    assert [int((at - NIGHT).total_seconds() / 60) for at in turns] == [0, 60, 130]


def test_a_turn_in_the_future_of_a_wrong_clock_does_not_stop_a_chore(desk):
    chore = Chore("hourly", lambda d: "done", 3600)
    assert do_chore(replace(desk, now=NIGHT + timedelta(days=900)), chore).outcome == "done"
    assert do_chore(desk, chore).outcome == "done"
    assert do_chore(desk, chore).outcome == "not yet"


def test_of_many_controllers_one_does_a_chore(store, desk):
    begun, go = [], threading.Barrier(6)

    def slow(desk):
        begun.append(1)
        time.sleep(0.4)
        return "done"

    def controller():
        go.wait()
        results.append(do_chore(replace(desk, store=Store(store.url)), Chore("slow", slow, 60)).outcome)

    results = []
    threads = [threading.Thread(target=controller) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(begun) == 1 and results.count("done") == 1 and set(results) <= {"done", "busy", "not yet"}


def test_a_database_that_is_away_fails_the_round_and_ends_nothing(settings):
    away = Desk(Store("postgresql://nobody@127.0.0.1:1/none"), None, settings, "c", NIGHT)
    done = do_round(away, CHORES)
    assert {d.outcome for d in done} == {"failed"} and len(done) == len(CHORES)
    assert all("not reachable" in d.said for d in done)
    stop, told = threading.Event(), []

    def tell(done, given):
        told.append([d.chore for d in done])
        if len(told) == 2:
            stop.set()

    keep_watch(away, CHORES[:1], 0.01, stop, tell)
    assert told == [["aggregate", "crew"]] * 2


def test_what_goes_wrong_with_one_of_several_is_told_after_the_others_are_done():
    done = []

    def act(name):
        if name == "b":
            raise WorkbenchError("b is broken")
        done.append(name)
        return "fine"

    with pytest.raises(WorkbenchError, match="b: b is broken; a: fine; c: fine"):
        do_each("abc", act)
    assert done == ["a", "c"]


def test_a_round_of_all_chores_in_an_empty_project_repeats(store, settings):
    desk = Desk(store, open_tracking(store, settings), settings, "controller-1")
    (settings.root / "params" / "triggers" / "toy.yaml").write_text("when: {schedule: '0 0 1 1 *'}")
    for _ in range(2):
        done = do_round(desk, CHORES)
        assert {d.outcome for d in done} <= {"done", "not yet"}, done
    [kept] = read_decisions(store)
    assert (kept["outcome"], kept["times"]) == ("wait", 2)
    with transaction(store) as connection:
        rows = read_rows(
            connection, "SELECT chore, turns, failures FROM exp.chores WHERE chore IN ('triggers', 'ledger')"
        )
    assert {r["chore"]: r["turns"] for r in rows} == {"triggers": 2, "ledger": 1}


# The command, with processes of its own

SLOW = """
import time
from mlops_workbench.settings import read_settings
from mlops_workbench.stage import record_outputs
from mlops_workbench.store import open_store
from mlops_workbench.tracking import open_run, open_tracking
settings = read_settings()
run = open_run(open_tracking(open_store(settings), settings), settings, "t", "t")
while not (settings.root / "go").exists():
    time.sleep(0.1)
record_outputs(run, passed=True)
"""
CONTROLLER = """
from mlops_workbench.automation import _say_round, _stopped
from mlops_workbench.duty import Chore, Desk, ask_triggers, keep_watch
from mlops_workbench.settings import read_settings
from mlops_workbench.store import open_store
settings = read_settings()
with open_store(settings) as store:
    chores = (Chore("triggers", ask_triggers),)
    keep_watch(Desk(store, None, settings, "controller"), chores, 0.5, _stopped(), lambda d, g: _say_round(d, g, True))
"""


@pytest.fixture
def toy(settings, store, monkeypatch):
    "A pipeline of one notebook that waits for a file, and a trigger that people fire."
    shape = {"cell_type": "code", "outputs": [], "execution_count": None}
    cells = [
        shape | {"id": "p", "metadata": {"tags": ["parameters"]}, "source": "a: int = 1  # nothing"},
        shape | {"id": "c", "metadata": {}, "source": SLOW},
    ]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    path = settings.root / "nbs" / "pipelines" / "judge.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})
    )
    (settings.root / "params" / "toy.yaml").write_text("task: mlops_workbench.planner\nstages:\n  judge: {}\n")
    (settings.root / "params" / "triggers" / "toy.yaml").write_text("when: manual")
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)
    monkeypatch.setenv("WORKBENCH_ROOT", str(settings.root))
    monkeypatch.setenv("WORKBENCH_HOME", str(settings.home))
    return read_trigger_file(settings, "toy")


def wait_for(found, seconds=150):
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)
    return value


def test_a_controller_that_is_stopped_leaves_its_run_to_the_next_one(store, settings, toy):
    open_tracking(store, settings)
    fire_trigger(store, toy, "ann", "new menu")

    def controller():
        return subprocess.Popen(
            [sys.executable, "-c", CONTROLLER], stdout=subprocess.PIPE, text=True, cwd=settings.root
        )

    first = controller()
    wait_for(lambda: [r for r in read_runs(store) if r["status"] == "running" and r["stages"]])
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=150)
    assert first.returncode == 0 and '"toy#1"' in said and "stopping" in said
    assert [d["status"] for d in unfinished(store)] == ["running"]
    assert [r["status"] for r in read_runs(store)] == ["cancelled"]
    (settings.root / "go").touch()
    second = controller()
    [done] = wait_for(lambda: [d for d in read_decisions(store, "toy", outcome="start") if d["ended_at"]])
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=150)
    assert (done["status"], done["attempts"], second.returncode) == ("finished", 2, 0)
    assert [(r["run_id"], r["status"]) for r in read_runs(store)] == [(done["run_id"], "finished")]
