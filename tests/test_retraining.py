"Retraining: every decision is made once, kept with its reason, and carried out once, also when controllers are killed."

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from mlops_workbench import launch, retraining
from mlops_workbench.alerts import read_alerts
from mlops_workbench.events import Event, write_events
from mlops_workbench.launch import TAG, carry_out, name_decision, unfinished
from mlops_workbench.ledger import read_ledger, verify_ledger
from mlops_workbench.retraining import decide_trigger, fire_trigger, read_decisions, read_trigger_file, trigger_names
from mlops_workbench.runs import hold_run, read_runs
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, read_rows, transaction, write_rows
from mlops_workbench.trigger import read_trigger

MONDAY = datetime(2026, 3, 2, 3, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
NIGHTLY = read_trigger("planner", {"when": {"any_of": [{"schedule": "0 3 * * *"}, "drift", "manual"]}})


@pytest.fixture
def settings(tmp_path, store):
    (tmp_path / "settings.ini").write_text("[local]\n")
    (tmp_path / "params" / "triggers").mkdir(parents=True)
    return Settings("local", tmp_path, tmp_path / ".workbench", store.url)


@pytest.fixture
def at(store, settings):
    "Look at a trigger at a time."

    def look(now, trigger=NIGHTLY, actor="controller-1"):
        return decide_trigger(store, settings, trigger, actor, now)

    return look


def finish(store, settings, decision, run_id):
    return {"run_id": f"run of {name_decision(decision)}", "status": "finished"}


@pytest.fixture
def run_at(store, settings, at):
    "Look at a trigger, and let its run finish at once."

    def look(now, trigger=NIGHTLY):
        made = at(now, trigger)
        return carry_out(store, settings, made, finish, now) if made["outcome"] == "start" else made

    return look


def report(store, number, created_at, severity="none", broken=False, policy="planner"):
    row = {"report_id": f"r{number}", "policy": policy, "task": "t", "reference": "d", "window_from": created_at - DAY}
    row |= {"window_until": created_at, "created_at": created_at, "severity": severity, "broken": broken}
    with transaction(store) as connection:
        write_rows(connection, "exp.monitor_reports", [row | {"n_rows": 9, "words": f"{severity} in r{number}"}])


def send(store, n, received_at, event_at=None, accepted=1, unit="h"):
    at, metrics = event_at or received_at, {"accepted": accepted}
    units = [f"{unit}{i}" for i in range(n)]
    write_events(
        store, [Event("plan_decided", "household", u, at, received_at=received_at, metrics=metrics) for u in units]
    )


def test_a_no_that_is_repeated_is_one_row_with_its_count_and_its_newest_words(store, at):
    for i in range(5):
        at(MONDAY + i * HOUR)
    at(MONDAY + 5 * HOUR, actor="controller-2")
    [kept] = read_decisions(store)
    assert (kept["outcome"], kept["times"], kept["decided_at"]) == ("wait", 6, MONDAY)
    assert kept["last_at"] == MONDAY + 5 * HOUR and "2026-03-03 03:00" in kept["reason"]


def test_another_no_is_another_row(store, run_at):
    trigger = read_trigger("planner", {"when": {"schedule": "0 3 * * *"}, "cooldown": "36h"})
    hours = {-9: "wait", 0: "start", 1: "wait", 23: "wait", 24: "held", 35: "held", 36: "start", 37: "wait"}
    assert {h: run_at(MONDAY + h * HOUR, trigger)["outcome"] for h in hours} == hours
    kept = [(d["outcome"], d["times"]) for d in reversed(read_decisions(store))]
    assert kept == [("wait", 1), ("start", 1), ("wait", 2), ("held", 2), ("start", 1), ("wait", 1)]


def test_eight_controllers_at_once_start_one_run(store, settings):
    fire_trigger(store, NIGHTLY, "ann", "new menu")
    stores = [Store(store.url) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda s: decide_trigger(s, settings, NIGHTLY, "c", MONDAY), stores))
        assert [d["outcome"] for d in made].count("start") == 1
        begun = []

        def slow(store, settings, decision, run_id):
            begun.append(run_id)
            time.sleep(0.3)
            return {"run_id": "r", "status": "finished"}

        [decision] = unfinished(store)
        done = list(pool.map(lambda s: carry_out(s, settings, decision, slow, MONDAY), stores))
    assert begun == [""] and {d["status"] for d in done} >= {"finished"}
    assert carry_out(store, settings, decision, slow)["status"] == "finished" and begun == [""]
    assert [s.close() for s in stores]


def test_a_start_is_in_the_ledger_with_its_end_and_cannot_be_changed(store, run_at):
    run_at(MONDAY - HOUR)
    done = run_at(MONDAY)
    with transaction(store) as connection:
        entries = read_ledger(connection)
        assert verify_ledger(connection).ok
    assert [(e.action, e.subject["trigger"]) for e in entries] == [
        ("trigger.start", "planner"),
        ("trigger.end", "planner"),
    ]
    assert entries[0].seq == done["entry"] and entries[0].evidence["causes"] == ["schedule 2026-03-02T03:00Z"]
    for change in ("reason = 'because'", "key = 'x'", "status = 'pending'", "decided_at = now()"):
        with pytest.raises(psycopg.Error, match="what was decided|is over"), transaction(store) as connection:
            connection.execute(f"UPDATE exp.trigger_decisions SET {change} WHERE outcome = 'start'")


def test_the_database_itself_refuses_a_second_start_for_a_cause(store, run_at):
    run_at(MONDAY - HOUR)
    run_at(MONDAY)
    copy = "INSERT INTO exp.trigger_decisions SELECT (jsonb_populate_record(d, %s)).* "
    copy += "FROM exp.trigger_decisions AS d WHERE outcome = 'start'"
    with pytest.raises(psycopg.errors.UniqueViolation, match="one_start_a_cause"), transaction(store) as connection:
        connection.execute(copy, (json.dumps({"seq": 99}),))


def test_broken_data_blocks_says_so_and_is_made_up_for_once(store, at, run_at):
    run_at(MONDAY - HOUR)
    report(store, 1, MONDAY - HOUR, broken=True)
    blocked = [run_at(MONDAY + i * DAY) for i in range(3)]
    assert {d["outcome"] for d in blocked} == {"blocked"} and blocked[2]["times"] == 3
    assert "report r1" in blocked[0]["reason"]
    assert [a.name for a in read_alerts(store)] == ["retraining_blocked"]
    report(store, 2, MONDAY + 2 * DAY + HOUR)
    done = run_at(MONDAY + 2 * DAY + 2 * HOUR)
    assert (done["status"], done["causes"]) == ("finished", ["schedule 2026-03-04T03:00Z"])
    assert "2 before it" in done["reason"] and read_alerts(store) == []
    assert run_at(MONDAY + 2 * DAY + 3 * HOUR)["outcome"] == "wait"


def test_a_silent_feed_blocks_until_rows_arrive(store, run_at):
    trigger = read_trigger(
        "planner", {"when": {"schedule": "0 3 * * *"}, "guard": {"feed": "plan_decided", "gap": "2d"}}
    )
    send(store, 3, MONDAY - 2 * DAY - HOUR)
    run_at(MONDAY - HOUR, trigger)
    assert run_at(MONDAY, trigger)["outcome"] == "blocked"
    send(store, 1, MONDAY + HOUR, event_at=MONDAY - 20 * DAY)  # late labels are arrivals too
    assert run_at(MONDAY + 2 * HOUR, trigger)["outcome"] == "start"
    assert [d["outcome"] for d in reversed(read_decisions(store))] == ["wait", "blocked", "start"]


def test_rows_are_counted_by_their_arrival_since_the_last_start(store, run_at):
    trigger = read_trigger("planner", {"when": {"new_data": {"event": "plan_decided", "rows": 10}}})
    run_at(MONDAY, trigger)
    send(store, 9, MONDAY + HOUR, event_at=MONDAY - 14 * DAY)
    assert "9 of 10 rows" in run_at(MONDAY + 2 * HOUR, trigger)["reason"]
    send(store, 1, MONDAY + 3 * HOUR)
    send(store, 50, MONDAY + 9 * HOUR)  # not yet known at the next look
    assert run_at(MONDAY + 4 * HOUR, trigger)["outcome"] == "start"
    assert run_at(MONDAY + 5 * HOUR, trigger)["outcome"] == "wait"
    assert run_at(MONDAY + 9 * HOUR, trigger)["outcome"] == "start"


def test_days_are_counted_as_days_of_data(store, run_at):
    trigger = read_trigger("planner", {"when": {"new_data": {"event": "plan_decided", "days": 3}}})
    run_at(MONDAY, trigger)
    for i in range(2):
        send(store, 5, MONDAY + HOUR, event_at=MONDAY - i * DAY)
    assert "2 of 3 days" in run_at(MONDAY + 2 * HOUR, trigger)["reason"]
    send(store, 1, MONDAY + 3 * HOUR, event_at=MONDAY - 9 * DAY)
    assert run_at(MONDAY + 4 * HOUR, trigger)["outcome"] == "start"


def test_reports_from_before_the_last_start_do_not_start_another(store, run_at):
    trigger = read_trigger("planner", {"when": "drift"})
    run_at(MONDAY, trigger)
    for i in (1, 2):
        report(store, i, MONDAY + i * DAY, "high")
        report(store, 10 + i, MONDAY + i * DAY, "high", policy="recommender")
    assert run_at(MONDAY + 2 * DAY, trigger)["causes"] == ["report r2"]
    report(store, 3, MONDAY + 3 * DAY, "high")
    assert run_at(MONDAY + 3 * DAY, trigger)["outcome"] == "wait"


def test_a_regression_is_found_with_units_as_clusters_and_after_the_delay(store, run_at):
    said = {"event": "plan_decided", "metric": "accepted", "promised": 0.9, "loss": 0.05, "units": 50, "delay_days": 7}
    trigger = read_trigger("planner", {"when": {"regression": said}})
    run_at(MONDAY, trigger)
    for day in range(1, 5):
        send(store, 40, MONDAY + day * DAY, accepted=0)
        send(store, 40, MONDAY + day * DAY, accepted=1, unit="g")
    assert "0 of 50 units" in run_at(MONDAY + 5 * DAY, trigger)["reason"]
    done = run_at(MONDAY + 12 * DAY, trigger)
    assert done["outcome"] == "start" and "accepted is 0.5, expected 0.9: a loss of 0.4 ± 0.17" in done["reason"]
    # 80 households, half of them always yes: sqrt(0.25 * 80 / 79 / 80) = 0.0563 is the standard error, not that of 320 rows
    assert run_at(MONDAY + 13 * DAY, trigger)["outcome"] == "wait"


def test_requests_of_people_and_of_erasures_are_answered_once(store, run_at):
    fire_trigger(store, NIGHTLY, "ann", "new menu")
    with transaction(store) as connection:
        sql = "INSERT INTO exp.retrain_requests (policy, reason, by) VALUES (%s, 'a version is tainted', 'erasure')"
        connection.execute(sql, ("planner",))
        connection.execute(sql, ("recommender",))
    done = run_at(MONDAY)
    assert (
        done["causes"] == ["request 1", "retrain request 1"] and "erasure asks: a version is tainted" in done["reason"]
    )
    assert run_at(MONDAY + HOUR)["outcome"] == "wait"
    with transaction(store) as connection:
        rows = read_rows(connection, "SELECT policy, answer FROM exp.retrain_requests ORDER BY request")
    assert rows == [
        {"policy": "planner", "answer": {"trigger": "planner", "decision": 1}},
        {"policy": "recommender", "answer": None},
    ]


def test_a_trigger_without_manual_takes_no_requests(store):
    with pytest.raises(ValueError, match="add manual to the conditions"):
        fire_trigger(store, read_trigger("t", {"when": "drift"}), "ann", "please")


def test_an_hour_back_starts_nothing_twice_and_says_so(store, run_at):
    run_at(MONDAY - HOUR)
    assert run_at(MONDAY + timedelta(minutes=10))["status"] == "finished"
    for minutes in (-50, -30, 0, 5, 15, 60):
        run_at(MONDAY + timedelta(minutes=minutes))
    said = [d for d in read_decisions(store) if d["outcome"] == "clock"]
    assert len(said) == 1 and "went back by 1 h" in said[0]["reason"]
    assert len(read_decisions(store, outcome="start")) == 1
    assert run_at(MONDAY + DAY)["status"] == "finished"


def test_years_forward_and_back_again_start_one_run_and_then_the_schedule_goes_on(store, run_at):
    run_at(MONDAY - HOUR)
    run_at(MONDAY)
    assert run_at(MONDAY + 1500 * DAY)["status"] == "finished"
    assert run_at(MONDAY + HOUR)["outcome"] == "wait"
    assert run_at(MONDAY + DAY)["causes"] == ["schedule 2026-03-03T03:00Z"]
    assert run_at(MONDAY + DAY + HOUR)["outcome"] == "wait"


def test_the_default_clock_is_the_databases(store, settings):
    before = datetime.now(UTC)
    made = decide_trigger(store, settings, NIGHTLY, "c")
    assert abs(made["decided_at"] - before) < timedelta(minutes=5)


def test_a_file_that_is_not_yaml_names_itself(settings):
    folder = settings.root / "params" / "triggers"
    (folder / "a.yaml").write_text("when: [")
    (folder / "b.yaml").write_text("when: code")
    assert trigger_names(settings) == ["a", "b"]
    with pytest.raises(ValueError, match=r"trigger a\.yaml cannot be read"):
        read_trigger_file(settings, "a")
    for name in ("c", "../../settings", ""):
        with pytest.raises(ValueError, match="there is no trigger"):
            read_trigger_file(settings, name)


def test_the_shipped_trigger_names_what_exists(settings):
    from mlops_workbench.plan import read_pipeline

    root = Path(__file__).resolve().parent.parent
    for name in trigger_names(Settings("local", root, root / ".workbench")):
        found = read_trigger_file(Settings("local", root, root / ".workbench"), name)
        assert read_pipeline(root, found.pipeline, found.profile, found.parameters).stages


def test_nothing_here_can_promote():
    names = {
        "promote",
        "propose_policy",
        "write_stage",
        "settle",
        "bar_version",
        "rollback",
        "approve",
        "start_rollout",
    }
    assert names.isdisjoint(vars(retraining)) and names.isdisjoint(vars(launch))


# Carrying out


def test_a_run_that_fails_has_ended_and_is_told(store, settings, at):
    def broken(*_):
        raise RuntimeError("no such column: price")

    fire_trigger(store, NIGHTLY, "ann", "new menu")
    done = carry_out(store, settings, at(MONDAY), broken, MONDAY)
    assert (done["status"], done["error"]) == ("failed", "RuntimeError: no such column: price")
    assert [(a.name, a.run) for a in read_alerts(store)] == [("retraining_failed", "workbench trigger fire planner")]
    assert unfinished(store) == [] and at(MONDAY + HOUR)["outcome"] == "wait"
    fire_trigger(store, NIGHTLY, "ann", "mended")
    assert carry_out(store, settings, at(MONDAY + 2 * HOUR), finish, MONDAY)["status"] == "finished"
    assert read_alerts(store) == []


def test_an_interrupted_run_stays_open_and_is_given_up_after_three_beginnings(store, settings, at):
    def interrupted(*_):
        raise KeyboardInterrupt

    fire_trigger(store, NIGHTLY, "ann", "new menu")
    made = at(MONDAY)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            carry_out(store, settings, made, interrupted)
        assert [d["status"] for d in unfinished(store)] == ["running"]
    done = carry_out(store, settings, made, interrupted, MONDAY)
    assert done["status"] == "failed" and "begun 3 times" in done["error"]


CONTROLLER = """
import os, signal, sys
from datetime import UTC, datetime
from mlops_workbench.launch import TAG, carry_out, name_decision, unfinished
from mlops_workbench.retraining import decide_trigger
from mlops_workbench.runs import hold_run
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store
from mlops_workbench.trigger import read_trigger
from pathlib import Path

url, root, where = sys.argv[1:]
store, settings = Store(url), Settings("local", Path(root), Path(root), url)

def start(store, settings, decision, run_id):
    if where == "before the run":
        os.kill(os.getpid(), signal.SIGKILL)
    columns = {"pipeline": "planner", "profile": "full", "task": "t", "options": {"tags": {TAG: name_decision(decision)}}}
    with hold_run(store, columns) as record:
        if where == "in the run":
            os.kill(os.getpid(), signal.SIGKILL)
        record.status = "finished"
    if where == "after the run":
        os.kill(os.getpid(), signal.SIGKILL)

made = decide_trigger(store, settings, read_trigger("planner", {"when": "manual"}), "c")
carry_out(store, settings, made, start)
"""


@pytest.mark.parametrize(
    "where, called_with",
    [("before the run", [""]), ("in the run", ["the run"]), ("after the run", [])],
)
def test_what_a_killed_controller_left_is_finished_once(store, settings, where, called_with):
    manual = read_trigger("planner", {"when": "manual"})
    fire_trigger(store, manual, "ann", "new menu")
    command = [sys.executable, "-c", CONTROLLER, store.url, str(settings.root), where]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert decide_trigger(store, settings, manual, "c2")["outcome"] == "wait"
    [left], runs, calls = unfinished(store), [r["run_id"] for r in read_runs(store)], []

    def start(store, settings, decision, run_id):
        calls.append("the run" if run_id and run_id in runs else run_id)
        columns = {
            "pipeline": "planner",
            "profile": "full",
            "task": "t",
            "options": {"tags": {TAG: name_decision(decision)}},
        }
        with hold_run(store, columns, run_id) as record:
            record.status = "finished"
        return {"run_id": record.run_id, "status": "finished"}

    done = carry_out(store, settings, left, start)
    assert (done["status"], calls) == ("finished", called_with)
    assert carry_out(store, settings, left, start)["status"] == "finished" and calls == called_with
    assert len(read_runs(store)) == 1 and len(read_decisions(store, outcome="start")) == 1
    assert done["run_id"] == read_runs(store)[0]["run_id"]


# The real thing

NOTEBOOK = """
from mlops_workbench.settings import read_settings
from mlops_workbench.stage import record_outputs
from mlops_workbench.store import open_store
from mlops_workbench.tracking import open_run, open_tracking
settings = read_settings()
run = open_run(open_tracking(open_store(settings), settings), settings, "t", "t")
record_outputs(run, passed=a > 1)
"""


@pytest.fixture
def project(settings, store, monkeypatch):
    "A pipeline whose gate says no to a = 1."

    def cell(source, *tags):
        shape = {"cell_type": "code", "id": f"c{len(source)}", "outputs": [], "execution_count": None}
        return shape | {"metadata": {"tags": list(tags)}, "source": source}

    for stage, code in (("judge", NOTEBOOK), ("promote", "open('promoted', 'w').close()")):
        cells = [cell("a: int = 1  # what is judged", "parameters"), cell(code)]
        kernel = {"display_name": "python3", "language": "python", "name": "python3"}
        path = settings.root / "nbs" / "pipelines" / f"{stage}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
        path.write_text(json.dumps(content))
    (settings.root / "params" / "toy.yaml").write_text(
        "task: mlops_workbench.planner\nstages:\n  judge: {parameters: {a: 1}}\n"
        "  promote: {when: judge.passed, effect: true, needs: {}}\n"
    )
    (settings.root / "params" / "triggers" / "toy.yaml").write_text("when: {any_of: [code, manual]}\n")
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)
    monkeypatch.setenv("WORKBENCH_ROOT", str(settings.root))
    return settings


def test_a_triggered_run_is_a_run_like_any_other_and_its_gate_can_refuse(store, project):
    toy = read_trigger_file(project, "toy")
    assert "no code has changed" in decide_trigger(store, project, toy, "c")["reason"]
    notebook = project.root / "nbs" / "pipelines" / "judge.ipynb"
    notebook.write_text(notebook.read_text().replace("a > 1", "a > 1 and a > 0"))
    made = decide_trigger(store, project, toy, "c")
    assert made["outcome"] == "start" and "code changed: nbs/pipelines/judge.ipynb" in made["reason"]
    done = carry_out(store, project, made)
    assert done["status"] == "refused", done["error"]
    run = read_runs(store, done["run_id"])[0]
    assert [s["status"] for s in run["stages"]] == ["finished", "skipped"] and run["options"]["tags"][TAG] == "toy#2"
    assert not list(project.root.rglob("promoted"))
    assert "no code has changed" in decide_trigger(store, project, toy, "c")["reason"]
