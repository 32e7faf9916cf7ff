"""The rollout commands: what they print, what they return, and that a mistake is one line."""

import json
from dataclasses import replace

import pytest
from test_controller import ALIKE, WORSE, begun, bench, canned, stage  # noqa: F401
from typer.testing import CliRunner

from mlops_workbench import ramping
from mlops_workbench.policy import read_production

PLAN = """
steps:
  - {coverage: 2000, min_hours: 0, min_n: 0}
  - {coverage: 10000, min_hours: 0, min_n: 0}
guardrails: [acceptance]
"""


@pytest.fixture
def run(stage, monkeypatch):  # noqa: F811
    "Run `workbench rollout …` on the stage's database."
    monkeypatch.setattr(ramping, "read_settings", lambda: stage.settings)
    monkeypatch.setenv("WORKBENCH_ACTOR", "ada")
    (stage.folder / "plan.yaml").write_text(PLAN)

    def run(*arguments, code=0):
        given = [str(stage.folder / "plan.yaml") if a == "PLAN" else a for a in arguments]
        result = CliRunner().invoke(ramping.app, given)
        assert result.exit_code == code, (result.output, result.exception)
        return result.output if code in (0, 3) else str(result.exception)

    return run


def test_a_rollout_is_watched_to_its_good_end(run, stage, monkeypatch):  # noqa: F811
    canned(monkeypatch, **ALIKE)
    assert "rollout planner-2 (canary) of planner@2 is active, step 1 of 2, share 10%" in run(
        "start", "planner", "2", "--plan", "PLAN"
    )
    lines = run("watch", "planner-2", "--every", "0").splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["raise", "finish"]
    assert lines[0].startswith(" 50%  raise      1 fine  ← no guardrail shows harm")
    assert lines[2] == "rollout planner-2 (canary) of planner@2 is finished, step 2 of 2, share 50%"
    assert read_production(stage.store, "planner").version == 2


def test_a_candidate_that_was_taken_back_is_exit_code_3(run, stage, monkeypatch):  # noqa: F811
    canned(monkeypatch, **WORSE)
    run("start", "planner", "2", "--plan", "PLAN")
    assert "roll back" in run("watch", "planner-2", "--every", "0", code=3)
    assert "roll back" in run("step", "planner-2", code=3)  # over is over
    shown = run("status", "planner-2")
    assert "is rolled_back" in shown
    assert "acceptance is 0.55 against 0.7" in shown


def test_every_command_speaks_json(run, monkeypatch):
    canned(monkeypatch, **ALIKE)
    keys = {"rollout", "policy", "candidate", "control", "mode", "status", "step", "steps", "share"}
    keys |= {"started_at", "step_at", "ended_at", "pending", "reason"}
    assert set(json.loads(run("start", "planner", "2", "--plan", "PLAN", "--json"))) == keys
    assert json.loads(run("pause", "planner-2", "--reason", "a release", "--json"))["status"] == "paused"
    assert json.loads(run("resume", "planner-2", "--json"))["status"] == "active"
    step = json.loads(run("step", "planner-2", "--json"))
    assert (step["action"], set(step)) == ("raise", {"rollout", "action", "reasons", "step", "guardrails"})
    found = json.loads(run("status", "planner-2", "--json"))
    assert [d["action"] for d in found["decisions"]] == ["pause", "resume", "raise"]
    assert json.loads(run("abort", "planner-2", "--reason", "enough", "--json"))["status"] == "aborted"
    assert [r["rollout"] for r in json.loads(run("status", "--json"))] == ["planner-2"]


def test_watching_can_stop_after_some_looks(run, monkeypatch):
    canned(monkeypatch, **ALIKE)
    run("start", "planner", "2", "--plan", "PLAN")
    assert len(run("watch", "planner-2", "--every", "0", "--looks", "1").splitlines()) == 3


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("start", "planner", "9"), "policy 'planner' has no version 9: it has 1, 2"),
        (("start", "planner", "2", "--mode", "purple"), "choose canary, blue-green or shadow"),
        (("start", "planner", "2", "--plan", "nowhere.yaml"), "plan 'nowhere.yaml' cannot be read"),
        (("step", "nothing"), "there is no rollout 'nothing'"),
        (("watch", "planner-2", "--every", "-1"), "pass seconds and a number that are not negative"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, words):
    said = run(*arguments, code=1)
    assert words in said
    assert "\n" not in said


def test_the_default_plan_can_be_started(run, stage):  # noqa: F811
    assert "share 10%" in run("start", "planner", "2")
    assert "hours on this step" in run("step", "planner-2")
    line = ramping.look_line(replace(bench.PLAN, candidate=2), bench.decide_step(bench.PLAN, empty(), bench.START))
    assert line.startswith(" 10%  hold       acceptance ?")


def empty():
    return bench.Evidence(0, bench.START, bench.START - bench.timedelta(days=3), 500, {})
