"""An approval binds what was approved, comes from somebody else, and is asked for where the environment says so."""

import pytest

from benchmarks.crash import PASSED, POLICY, Copies, connect_world
from mlops_workbench.core import WorkbenchError
from mlops_workbench.gate import Verdict
from mlops_workbench.ledger import read_ledger
from mlops_workbench.policy import approve, promote, propose_policy, read_policy_version, read_production, rollback
from mlops_workbench.registry import current_actor, settle
from mlops_workbench.settings import read_settings
from mlops_workbench.store import transaction


@pytest.fixture(scope="module")
def copies(server, tmp_path_factory):
    found = Copies(server.url, tmp_path_factory.mktemp("copies"))
    yield found
    found.drop(found.migrated)


@pytest.fixture
def world(copies, tmp_path):
    "An environment that asks for approvals."
    url = copies.make(copies.migrated)
    yield connect_world(url, tmp_path, required=True)
    copies.drop(url)


def candidate(world, text="first"):
    return settle(world.tracking, world.store, world.trained(text), PASSED, "ana")


def say_yes(world, version, actor="ben", reason="read the report"):
    return approve(world.tracking, world.store, version, actor, reason)


def attempt(world, version, settings=None):
    return promote(world.tracking, world.store, version, PASSED, "ana", settings)


def entries(world, action):
    with transaction(world.store) as connection:
        return [e for e in read_ledger(connection) if e.action == action]


def test_without_an_approval_the_version_is_proposed_and_waits(world):
    version = candidate(world)
    for _ in range(2):
        with pytest.raises(
            WorkbenchError, match="planner@1 has no approval: let somebody .* `workbench approve planner@1"
        ):
            attempt(world, version, {"batch_size": 8})
    assert read_production(world.store, POLICY) is None
    assert len(entries(world, "policy.propose")) == 1
    given = say_yes(world, version)
    assert given == say_yes(world, read_policy_version(world.store, POLICY, 1)), "asking twice writes one entry"
    assert attempt(world, version).key == "planner@1"
    (entry,) = entries(world, "policy.promote")
    assert entry.evidence["approval"] == given.seq and entry.evidence["outcome"] == "pass"


def test_who_trained_or_proposed_it_cannot_approve_it(world):
    version = candidate(world)
    proposed = propose_policy(world.tracking, world.store, version, {}, "cleo")
    for actor, did in ((current_actor(), "trained"), ("cleo", "proposed")):
        with pytest.raises(WorkbenchError, match=f"{actor} {did} planner@1: somebody else has to approve it"):
            say_yes(world, proposed, actor)
    assert entries(world, "policy.approve") == []


def test_other_settings_are_another_version_that_nobody_approved(world):
    version = candidate(world)
    say_yes(world, propose_policy(world.tracking, world.store, version, {"batch_size": 8}, "ana"))
    with pytest.raises(WorkbenchError, match="planner@2 has no approval"):
        attempt(world, version, {"batch_size": 64})
    assert attempt(world, version, {"batch_size": 8}).version == 1


NEW_ROW = """
INSERT INTO exp.replay_results (run_id, model_name, model_version, baseline, dataset_fingerprint, metric, estimate, n)
VALUES ('r', 'planner', '1', 'rule', 'd', 'plan_alignment', 0.4, 100)
"""


def unlocked(table, statement):
    return f"ALTER TABLE {table} DISABLE TRIGGER USER; {statement}; ALTER TABLE {table} ENABLE TRIGGER USER"


CHANGES = {
    "evidence": NEW_ROW,
    "policy": unlocked("exp.policy_versions", "UPDATE exp.policy_versions SET settings = '{\"batch_size\": 9}'"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_approval_is_void_when_what_it_binds_changes(world, what):
    version = candidate(world)
    say_yes(world, propose_policy(world.tracking, world.store, version, {"batch_size": 8}, "ana"))
    with transaction(world.store) as connection:
        connection.execute(CHANGES[what])
    with pytest.raises(
        WorkbenchError, match=f"the approval of planner@1 by ben is void, since then the {what} changed"
    ):
        attempt(world, version)
    say_yes(world, version, reason="looked again")
    assert attempt(world, version).version == 1


def test_a_new_verdict_voids_an_approval(world):
    version = candidate(world)
    say_yes(world, propose_policy(world.tracking, world.store, version, {}, "ana"))
    again = Verdict(outcome="pass", reasons=("plan_alignment is just above the baseline",))
    settle(world.tracking, world.store, version, again, "evaluate")
    with pytest.raises(WorkbenchError, match="since then the evidence changed"):
        attempt(world, version)


def test_what_was_never_proposed_serves_or_failed_cannot_be_approved(world):
    version = candidate(world)
    with pytest.raises(WorkbenchError, match="planner v1 was not proposed"):
        say_yes(world, version)
    with pytest.raises(ValueError, match="reason is empty"):
        say_yes(world, version, reason="")
    say_yes(world, propose_policy(world.tracking, world.store, version, {}, "ana"))
    attempt(world, version)
    with pytest.raises(WorkbenchError, match="planner@1 is 'production': only what is proposed"):
        say_yes(world, version)


def test_going_back_needs_no_approval(world):
    for text in ("first", "second"):
        version = candidate(world, text)
        say_yes(world, propose_policy(world.tracking, world.store, version, {}, "ana"))
        attempt(world, version)
    assert rollback(world.tracking, world.store, POLICY, "ana", "it burns").version == 1


@pytest.mark.parametrize(
    "value, words", [("required", ""), ("", ""), ("yes", "approval is 'yes': write approval = required")]
)
def test_the_settings_say_whether_it_is_asked_for(tmp_path, value, words):
    (tmp_path / "settings.ini").write_text(f"[local]\napproval = {value}\n")
    if words:
        with pytest.raises(ValueError, match=words):
            read_settings(root=tmp_path, variables={})
    else:
        assert read_settings(root=tmp_path, variables={}).approval == value
