"""A step that is killed with SIGKILL leaves one production version, and repeating it gives what it gives without a kill."""

import os
from contextlib import suppress

import pytest

from benchmarks.crash import POLICY, SCENARIOS, Copies, Scenario, judge_kill, judge_repeat, sweep
from mlops_workbench.policy import read_policy_version
from mlops_workbench.standing import set_status
from mlops_workbench.store import transaction

STEPS = {s.name: s for s in SCENARIOS}


@pytest.fixture(scope="module")
def copies(server, tmp_path_factory):
    found = Copies(server.url, tmp_path_factory.mktemp("crash"))
    yield found
    with suppress(Exception):
        found.drop(found.migrated)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is forked")
@pytest.mark.parametrize(
    "name, judge", [("promote", judge_repeat), ("rollback", judge_kill), ("rollback", judge_repeat)]
)
def test_a_killed_step_leaves_one_story_and_can_be_repeated(copies, tmp_path, name, judge):
    n, tried, wrong = sweep(STEPS[name], copies, tmp_path, 3, (judge,))
    assert wrong == [] and tried == 3 and n >= 40


def torn(world):
    "What a step must not be: what serves leaves in one transaction and its successor comes in another."
    for version, status in ((3, "retired"), (2, "production")):
        with transaction(world.store) as connection:
            set_status(connection, read_policy_version(world.store, POLICY, version), status)


def test_the_harness_finds_a_step_that_is_torn(copies, tmp_path):
    scenario = Scenario("torn", STEPS["rollback"].prepare, torn, (3, 2))
    _, _, wrong = sweep(scenario, copies, tmp_path, 3, (judge_kill,))
    assert any("0 production versions" in told for told in wrong)
