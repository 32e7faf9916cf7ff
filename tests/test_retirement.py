"Retirement: never what serves, once, and clean-up never breaks a lineage."

import subprocess
import sys
import zipfile
from datetime import timedelta

import pytest

from mlops_workbench.binder import write_binder
from mlops_workbench.core import WorkbenchError, utc_now
from mlops_workbench.ledger import append_entry, read_ledger
from mlops_workbench.reach import clean_up, find_use, plan_cleanup
from mlops_workbench.retirement import parse_version, retire_version
from mlops_workbench.settings import Settings
from mlops_workbench.standing import one_policy, serve_policy, write_policy
from mlops_workbench.store import transaction
from mlops_workbench.tracking import end_run, log_file, open_tracking, start_run


@pytest.fixture
def settings(tmp_path):
    return Settings("local", tmp_path, tmp_path)


def propose(store, n=3):
    "Propose rules for a policy; the first serves."
    with transaction(store) as connection:
        connection.execute("INSERT INTO exp.policies (policy, task) VALUES ('planner', 'mlops_workbench.planner')")
        made = [write_policy(connection, "planner", (None, None), {"n": i}, "ana") for i in range(n)]
        serve_policy(connection, made[0], ("retired", "archived"), "ana", {"reason": "first"})


def test_what_serves_is_never_retired(store):
    propose(store)
    with pytest.raises(WorkbenchError, match="planner@1 serves everybody"):
        retire_version(store, None, "planner@1", "ana", "old")


def test_what_a_rollout_needs_is_not_retired(store):
    propose(store)
    with transaction(store) as connection:
        connection.execute(
            "INSERT INTO exp.rollouts (rollout, policy, candidate, control, mode, plan, status, started_at, step_at, actor) "
            "VALUES ('r', 'planner', 2, 1, 'canary', '{}', 'active', now(), now(), 'ana')"
        )
    with pytest.raises(WorkbenchError, match="planner@2 is needed by rollout r"):
        retire_version(store, None, "planner@2", "ana", "old")
    retire_version(store, None, "planner@3", "ana", "old")


def test_retiring_twice_is_retiring_once(store):
    propose(store)
    for _ in range(2):
        retire_version(store, None, "planner@2", "ana", "nobody wants it")
    with transaction(store) as connection:
        assert one_policy(connection, "planner", 2).status == "archived"
        assert [e.action for e in read_ledger(connection)].count("policy.archive") == 1


@pytest.mark.parametrize(
    "name", ["planner", "planner@", "@3", "planner@x", "planner@-1", "pl anner@1", "planner@1; DROP TABLE x"]
)
def test_a_version_must_be_named(name):
    with pytest.raises(ValueError, match="write planner@3"):
        parse_version(name)


def test_files_of_what_led_to_nothing_are_freed_and_all_others_stay(store, settings):
    tracking, note = open_tracking(store, settings), settings.home / "note.txt"
    note.write_text("x" * 100)
    runs = {}
    for name in ("lost", "evidence", "parent", "recent"):
        run = start_run(tracking, "planner", name, {})
        log_file(run, note)
        end_run(run)
        runs[name] = run.run_id
        (settings.home / "runs" / f"p-{name}").mkdir(parents=True)
    old, later = utc_now() - timedelta(days=400), utc_now() + timedelta(days=500)
    row = "INSERT INTO exp.runs (run_id, pipeline, profile, task, status, started_at, mlflow_run_id, parent) "
    with transaction(store) as connection:
        for name, at, parent in (
            ("lost", old, None),
            ("evidence", old, "p-parent"),
            ("parent", old, None),
            ("recent", later, None),
        ):
            values = (f"p-{name}", at, runs[name], parent)
            connection.execute(row + "VALUES (%s, 'planner', 'full', 't', 'finished', %s, %s, %s)", values)
        connection.execute(
            "INSERT INTO exp.datasets (task, version, fingerprint, query, rows, schema, path) "
            "VALUES ('t', 'd', 'f', '', 1, '{}', '')"
        )
        connection.execute(
            "INSERT INTO exp.run_stages (run_id, position, name, status, outputs) "
            "VALUES ('p-evidence', 0, 'prep', 'finished', '{\"fingerprint\": \"f\"}')"
        )
    free = plan_cleanup(store, tracking, settings, 365, later)
    assert {(f.what, f.name) for f in free} == {("run", "p-lost"), ("artefacts", runs["lost"])}
    assert clean_up(store, tracking, settings, free, "ana") > 0
    assert plan_cleanup(store, tracking, settings, 365, later) == []
    kept = find_use(store, tracking, later - timedelta(days=365)).runs
    assert {"p-evidence", "p-parent", "p-recent"} <= kept
    assert tracking.client.get_run(runs["lost"]).data.tags["workbench.freed"] == "true"
    assert plan_cleanup(store, tracking, settings, 0, later) == []


def test_a_binder_is_checked_without_the_package_and_a_change_is_found(store, settings):
    tracking = open_tracking(store, settings)
    with transaction(store) as connection:
        for n in range(5):
            append_entry(connection, "policy.propose", "ana", {"policy": "planner", "version": n}, {})
    write_binder(store, tracking, settings, settings.home / "a.zip")
    with zipfile.ZipFile(settings.home / "a.zip") as packed:
        packed.extractall(settings.home)
    command = [sys.executable, "-S", "-E", settings.home / "a" / "verify.py"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert subprocess.run([*command, "2:" + "0" * 64], capture_output=True).returncode == 1
    (settings.home / "a" / "policies.json").write_text("[]")
    assert b"policies.json is missing or was changed" in subprocess.run(command, capture_output=True).stdout
    with pytest.raises(WorkbenchError, match="exists"):
        write_binder(store, tracking, settings, settings.home / "a.zip")
