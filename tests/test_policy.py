"""Stages and policies: what each step changes, that repeating it changes nothing, and what it refuses."""

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psycopg
import pytest

from benchmarks.crash import Copies
from mlops_workbench.core import WorkbenchError
from mlops_workbench.gate import Verdict
from mlops_workbench.ledger import read_ledger, verify_ledger
from mlops_workbench.policy import (
    promote,
    propose_policy,
    read_policies,
    read_policy_version,
    read_production,
    rollback,
    withdraw,
)
from mlops_workbench.production import follow_production
from mlops_workbench.registry import (
    current_actor,
    fetch_model,
    read_stages,
    read_version,
    read_versions,
    reconcile,
    register_model,
    settle,
)
from mlops_workbench.settings import Settings
from mlops_workbench.state import ask_states, read_states
from mlops_workbench.store import Store, advisory_lock, transaction
from mlops_workbench.tracking import end_run, open_tracking, start_run

PASSED = Verdict(outcome="pass", reasons=("plan_alignment is above the baseline",))
UNSURE = Verdict(outcome="not enough evidence", reasons=("plan_alignment could be either",))


class Bench:
    def __init__(self, store, folder):
        self.store, self.folder = store, folder
        self.settings = Settings("local", folder, folder / "home", store.url)
        self.tracking = open_tracking(store, self.settings)
        self.doors = (self.tracking, store)

    def trained(self, text):
        files = self.folder / text
        files.mkdir()
        (files / "model.json").write_text(json.dumps(text))
        run = start_run(self.tracking, "planner", "train", {})
        version = register_model(run, SimpleNamespace(name="planner"), "mlops_workbench.planner", files, "d" * 64)
        end_run(run)
        return version

    def settled(self, text):
        return settle(*self.doors, self.trained(text), PASSED, "ana")

    def promoted(self, *texts):
        return [promote(*self.doors, self.settled(text), PASSED, "ana", {"batch_size": 32}) for text in texts]

    def rollback(self, to=None, reason="worse than it looked", actor="ben"):
        return rollback(*self.doors, "planner", actor, reason, to)

    def statuses(self):
        return {p.version: p.status for p in read_policies(self.store, "planner")}

    def stages(self):
        with transaction(self.store) as connection:
            return {n: stage for n, (stage, _) in read_stages(connection, "planner").items()}

    def ledger(self):
        with transaction(self.store) as connection:
            return read_ledger(connection)

    def agrees(self):
        "Ledger, registry and policy tell the same story."
        serving = read_production(self.store, "planner")
        stages = {v.version: v.stage for v in read_versions(self.tracking, "planner")}
        assert stages == self.stages() and reconcile(*self.doors, "planner") == []
        behind = [serving.model_version] if serving.model_name else []
        assert [n for n, stage in stages.items() if stage == "production"] == behind
        aliases = self.tracking.client.get_registered_model("planner").aliases
        assert [int(v) for k, v in aliases.items() if k == "production"] == behind
        with transaction(self.store) as connection:
            assert verify_ledger(connection).ok
        promoted = [e.subject["version"] for e in self.ledger() if e.action == "policy.promote"]
        assert promoted[-1] == serving.version


@pytest.fixture(scope="module")
def copies(server, tmp_path_factory):
    "Databases that have MLflow's tables already: making them takes seconds."
    found = Copies(server.url, tmp_path_factory.mktemp("copies"))
    yield found
    found.drop(found.migrated)


@pytest.fixture
def bench(copies, tmp_path):
    url = copies.make(copies.migrated)
    yield Bench(Store(url), tmp_path)
    copies.drop(url)


def test_every_arrow_is_in_the_ledger_once_and_the_training_since_it_happened(bench):
    first, second = bench.promoted("first", "second")
    promote(*bench.doors, read_version(bench.tracking, "planner", 2), PASSED, "ana", {"batch_size": 32})
    bench.rollback()
    actions = [(e.action, e.subject["version"]) for e in bench.ledger()]
    one, two = (
        [("model.trained", n), ("model.candidate", n), ("policy.propose", n), ("policy.promote", n)] for n in (1, 2)
    )
    back = [("policy.rollback", 2), ("policy.promote", 1), ("model.rolled_back", 2), ("model.production", 1)]
    assert actions == [*one, ("model.production", 1), *two, ("model.archived", 1), ("model.production", 2), *back]
    trained = bench.ledger()[0]
    assert trained.held_from < trained.written_at and trained.actor == current_actor()
    assert bench.statuses() == {1: "production", 2: "rolled_back"}
    assert bench.stages() == {1: "production", 2: "rolled_back"}
    assert (first.key, second.key) == ("planner@1", "planner@2") and first.digest != second.digest
    bench.agrees()


def test_an_unsure_verdict_promotes_nobody(bench):
    version = settle(*bench.doors, bench.trained("unsure"), UNSURE, "t")
    assert version.stage == "rejected"
    for verdict in (UNSURE, PASSED):
        with pytest.raises(WorkbenchError):
            promote(*bench.doors, version, verdict, "t")
    assert read_production(bench.store, "planner") is None and read_policies(bench.store) == []


def test_a_model_that_learned_from_an_erased_unit_is_not_promoted_any_more(bench):
    version = bench.settled("good")
    row = ("model", version.name, str(version.version), "somebody", 1)
    with transaction(bench.store) as connection:
        sql = "INSERT INTO exp.taints (kind, name, version, mark, entry) VALUES (%s, %s, %s, %s, %s)"
        connection.execute(sql, row)
    with pytest.raises(WorkbenchError, match="has learned from a unit that was erased since: train it again"):
        promote(*bench.doors, version, PASSED, "ana")
    assert bench.statuses() == {}


def test_a_tag_in_mlflow_makes_no_candidate(bench):
    version = bench.trained("sneaked in")
    bench.tracking.client.set_model_version_tag("planner", "1", "workbench.stage", "candidate")
    with pytest.raises(WorkbenchError, match="is 'trained': only a candidate"):
        promote(*bench.doors, read_version(bench.tracking, "planner", version.version), PASSED, "t")


def test_the_database_allows_one_production_version_and_no_change_of_what_a_key_says(bench):
    bench.promoted("one")
    second = "INSERT INTO exp.policy_versions (policy, version, status) VALUES ('planner', 2, 'production')"
    with pytest.raises(psycopg.errors.UniqueViolation), transaction(bench.store) as connection:
        connection.execute(second)
    for statement in ("UPDATE exp.policy_versions SET settings = '{}'", "DELETE FROM exp.policy_versions"):
        with pytest.raises(psycopg.errors.RaiseException, match="for ever"), transaction(bench.store) as connection:
            connection.execute(statement)


def test_the_same_model_with_the_same_settings_is_the_same_proposal(bench):
    version = bench.settled("first")
    proposed = [propose_policy(*bench.doors, version, {"batch_size": n}, "ana") for n in (8, 16, 8)]
    assert [p.version for p in proposed] == [1, 2, 1] and len({p.digest for p in proposed}) == 2
    assert bench.statuses() == {1: "candidate", 2: "candidate"}
    assert promote(*bench.doors, version, PASSED, "ana", {"batch_size": 8}).version == 1
    other = promote(*bench.doors, version, PASSED, "ana", {"batch_size": 16})
    assert (other.version, bench.statuses()) == (2, {1: "retired", 2: "production"})
    assert bench.rollback().version == 1 and bench.stages() == {1: "production"}
    with pytest.raises(WorkbenchError, match="planner@2 was rolled back"):
        promote(*bench.doors, version, PASSED, "ana", {"batch_size": 16})
    bench.agrees()


def test_going_back_goes_on_to_what_served_before_and_at_last_to_the_rule(bench):
    bench.promoted("first", "second", "third")
    assert [bench.rollback(reason=f"again {n}").label for n in range(3)] == [
        "planner policy 2 (planner v2)",
        "planner policy 1 (planner v1)",
        "planner policy 4 (the rule)",
    ]
    bench.agrees()
    with pytest.raises(WorkbenchError, match="nothing to go back to"):
        bench.rollback(reason="further")
    assert bench.rollback(3, "it was not the model").version == 3, "a person may name what was rolled back"
    bench.agrees()
    assert bench.statuses() == {1: "rolled_back", 2: "rolled_back", 3: "production", 4: "rolled_back"}


def test_a_rolled_back_model_is_not_promoted_again_by_a_pipeline(bench):
    bench.promoted("first", "second")
    bench.rollback()
    version = settle(*bench.doors, read_version(bench.tracking, "planner", 2), PASSED, "evaluate")
    assert version.stage == "rolled_back"
    with pytest.raises(WorkbenchError, match="is 'rolled_back': only a candidate can be promoted, or go back to it"):
        promote(*bench.doors, version, PASSED, "pipeline")


def refused(bench, words, *arguments):
    before = bench.ledger()
    with pytest.raises(WorkbenchError, match=words) as told:
        bench.rollback(*arguments)
    assert "\n" not in str(told.value) and bench.ledger() == before


def test_a_wrong_goal_is_refused_in_one_line(bench):
    with pytest.raises(WorkbenchError, match="has nothing in production"):
        bench.rollback()
    bench.promoted("first", "second")
    propose_policy(*bench.doors, bench.settled("third"), {}, "ana")
    refused(bench, "planner@2 serves already", 2)
    refused(bench, "has no version 9: it has 1, 2, 3", 9)
    refused(bench, "planner@3 is 'candidate' and never served", 3)
    with pytest.raises(ValueError, match="reason is empty"):
        bench.rollback(reason=" ")
    (stored,) = [p for p in bench.settings.home.glob("artifacts/**/model.json") if "first" in p.read_text()]
    whole = stored.read_text()
    stored.write_text("tampered")
    refused(bench, "planner@1 cannot serve again: files of planner v1 have changed", 1)
    shutil.rmtree(stored.parent)
    refused(bench, "planner@1 cannot serve again: files of planner v1 cannot be fetched")
    stored.parent.mkdir()
    stored.write_text(whole)
    bench.tracking.client.delete_model_version("planner", "1")
    refused(bench, "planner@1 cannot serve again: model 'planner' has no version 1", 1)
    assert read_production(bench.store, "planner").version == 2


def test_a_version_without_a_passed_verdict_on_record_does_not_serve_again(bench):
    bench.promoted("first", "second")
    with transaction(bench.store) as connection:
        connection.execute("ALTER TABLE exp.ledger DISABLE TRIGGER USER")
        connection.execute("DELETE FROM exp.ledger WHERE action = 'model.candidate' AND subject @> '{\"version\": 1}'")
    with pytest.raises(WorkbenchError, match="planner v1 has no passed verdict on record"):
        bench.rollback()


def test_a_repeated_step_that_names_its_goal_changes_nothing(bench):
    bench.promoted("first", "second")
    assert bench.rollback(1).version == 1
    before = bench.ledger()
    assert bench.rollback(1).version == 1 and bench.ledger() == before
    refused(bench, "planner@1 serves already", 1, "another reason")


def test_two_who_go_back_at_once_go_back_one_step(bench, monkeypatch):
    bench.promoted("first", "second", "third")
    both = threading.Barrier(2)
    chosen = sys.modules["mlops_workbench.policy"]._check_return

    def together(*arguments):
        chosen(*arguments)
        both.wait(20)

    monkeypatch.setattr("mlops_workbench.policy._check_return", together)
    with ThreadPoolExecutor(2) as pool:
        tries = [pool.submit(bench.rollback, None, f"seen by {who}", who) for who in ("ana", "ben")]
        errors = [t.exception() for t in tries]
    (told,) = [e for e in errors if e]
    assert "planner@3 no longer serves, planner@2 does: somebody was faster" in str(told)
    assert bench.statuses() == {1: "retired", 2: "production", 3: "rolled_back"}
    bench.agrees()


def test_of_two_promotions_at_once_one_waits_and_one_version_serves(bench):
    bench.promoted("first")
    versions = [bench.settled(text) for text in ("second", "third")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda v: promote(*bench.doors, v, PASSED, "ana"), versions))
    assert sorted(bench.statuses().values()) == ["production", "retired", "retired"]
    bench.agrees()


def test_a_withdrawn_arm_serves_nobody_and_production_stays(bench):
    bench.promoted("first")
    proposed = propose_policy(*bench.doors, bench.settled("second"), {}, "ana")
    gone = [withdraw(*bench.doors, proposed, "controller", "acceptance fell by 12 %") for _ in range(2)]
    assert [p.status for p in gone] == ["rolled_back"] * 2
    assert bench.stages() == {1: "production", 2: "rolled_back"}
    assert [e.subject["version"] for e in bench.ledger() if e.action == "policy.rollback"] == [2]
    with pytest.raises(WorkbenchError, match="planner@1 serves everybody"):
        withdraw(*bench.doors, read_policy_version(bench.store, "planner", 1), "controller", "x")
    bench.agrees()


def test_reconciling_mends_what_somebody_changed_in_mlflow_and_tells_what_it_cannot(bench):
    bench.promoted("first", "second")
    client = bench.tracking.client
    client.set_model_version_tag("planner", "1", "workbench.stage", "production")
    client.set_registered_model_alias("planner", "production", "1")
    mended = reconcile(*bench.doors, "planner")
    assert mended == ["planner v1: production → archived", "alias production of planner: 1 → 2"]
    bench.agrees()
    client.delete_model_version("planner", "2")
    assert "planner v2 is in stage 'production', and MLflow has no such version" in reconcile(*bench.doors, "planner")


def test_a_registry_that_was_made_anew_is_not_taken_for_the_old_one(bench):
    bench.promoted("first")
    bench.tracking.client.delete_registered_model("planner")
    version = bench.trained("other")
    assert version.version == 1
    with pytest.raises(WorkbenchError, match="the ledger knows planner v1 with other files"):
        settle(*bench.doors, version, PASSED, "t")


def test_a_rollback_makes_the_baseline_what_serves(bench):
    bench.promoted("first", "second", "third")

    def baseline(candidate):
        question = ask_states(["baseline"], "mlops_workbench.planner", {"model_version": candidate})
        with transaction(bench.store) as connection:
            return json.loads(read_states(connection, question)["baseline"])[0][1]

    propose_policy(*bench.doors, bench.settled("fourth"), {}, "ana")
    assert (baseline(4), baseline(3)) == (3, 2), "a proposal serves nobody"
    bench.rollback(1)
    assert (baseline(4), baseline(3)) == (1, 1)


FOLLOW = """
import sys, time
from mlops_workbench.production import follow_production
from mlops_workbench.store import Store
with follow_production(Store(sys.argv[1]), "planner") as followed:
    seen = None
    while seen != "planner@1 again":
        now = followed.production.key + (" again" if seen == "planner@2" and followed.may_serve(2) is False else "")
        if now != seen:
            seen = now
            print(seen, flush=True)
        time.sleep(0.01)
"""


def test_another_process_sees_a_change(bench):
    bench.promoted("first")
    command = [sys.executable, "-c", FOLLOW, bench.store.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        said = [other.stdout.readline()]
        bench.promoted("second")
        said.append(other.stdout.readline())
        bench.rollback()
        said.append(other.stdout.readline())
    assert [s.strip() for s in said] == ["planner@1", "planner@2", "planner@1 again"]


def wait_until(condition):
    for _ in range(400):
        if condition():
            return True
        threading.Event().wait(0.05)
    return False


def test_a_change_is_seen_without_messages_and_after_the_database_was_away(bench, monkeypatch):
    away, connect = threading.Event(), sys.modules["mlops_workbench.production"].connect

    def silent(connection, timeout, stop_after):
        if away.wait(0.1):
            raise psycopg.OperationalError("the connection is lost")
        return []

    def unreachable(store):
        if away.is_set():
            raise WorkbenchError("database is not reachable")
        return connect(store)

    monkeypatch.setattr(psycopg.Connection, "notifies", silent)
    monkeypatch.setattr("mlops_workbench.production.connect", unreachable)
    bench.promoted("first")
    with follow_production(bench.store, "planner", 0.1) as followed:
        bench.promoted("second")
        assert wait_until(lambda: followed.production.version == 2)
        away.set()
        assert wait_until(lambda: "may be old: database is not reachable" in followed.error)
        bench.rollback()
        assert followed.production.version == 2, "what was known is kept"
        away.clear()
        assert wait_until(lambda: followed.production.version == 1 and not followed.error)


def test_mlflow_is_not_waited_for_by_who_goes_back(bench):
    bench.promoted("first", "second")
    with transaction(bench.store) as connection, advisory_lock(connection, "registry:planner"):
        step = threading.Thread(target=bench.rollback, daemon=True)
        step.start()
        assert wait_until(lambda: read_production(bench.store, "planner").version == 1)
    step.join(20)
    bench.agrees()


def test_who_acts_is_the_variable_or_the_user(monkeypatch):
    assert current_actor({"WORKBENCH_ACTOR": "ana"}) == "ana"
    monkeypatch.setattr("getpass.getuser", lambda: "ben")
    assert current_actor({"WORKBENCH_ACTOR": " "}) == "ben"


def test_files_that_changed_are_not_used(bench):
    version = bench.trained("good")
    kept = fetch_model(bench.tracking, bench.settings, version)
    (kept / "model.json").write_text("tampered")
    assert (fetch_model(bench.tracking, bench.settings, version) / "model.json").read_text() == '"good"'
    (stored,) = bench.settings.home.glob("artifacts/**/model.json")
    stored.write_text("tampered")
    (kept / "model.json").write_text("tampered")
    with pytest.raises(WorkbenchError, match="have changed since it was registered"):
        fetch_model(bench.tracking, bench.settings, version)
