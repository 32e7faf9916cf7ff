"""A rollout on PostgreSQL and MLflow: what is decided is done once, by one controller, and survives a crash at any point."""

import importlib.util
import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from mlops_workbench import controller
from mlops_workbench.controller import abort_rollout, pause_rollout, resume_rollout, start_rollout, step_rollout
from mlops_workbench.core import WorkbenchError, utc_now
from mlops_workbench.events import Event, write_events
from mlops_workbench.experiment import pause_experiment, read_experiment
from mlops_workbench.gauge import kept_warm, read_decisions, read_evidence, read_rollout, read_rollouts, shadowed
from mlops_workbench.ledger import read_ledger, verify_ledger
from mlops_workbench.policy import promote, read_policy_version, read_production
from mlops_workbench.registry import read_version
from mlops_workbench.rollout import Evidence, Sample, Step, make_plan
from mlops_workbench.store import Store, transaction


def load_benchmark():
    "Import benchmarks/rollout.py, which belongs to no package that is installed: its simulated people are ours too."
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "rollout.py"
    spec = importlib.util.spec_from_file_location("rollout_benchmark", path)
    sys.modules["rollout_benchmark"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load_benchmark()
PLAN = replace(bench.PLAN, candidate=2, key="planner-2", steps=(Step(2_000, 0, 0), Step(10_000, 0, 0)))


@pytest.fixture(scope="module")
def begun(server, tmp_path_factory):
    "Name a database with a policy in production and a candidate; making MLflow's tables takes seconds, copying them does not."
    url = server.new_database(urlsplit(server.template).path[1:])
    stage = bench.Stage(Store(url), tmp_path_factory.mktemp("begun"))
    stage.production("first")
    stage.candidate("second")
    stage.store.close()
    name = urlsplit(url).path[1:]
    with psycopg.connect(server.url, autocommit=True) as connection:  # MLflow keeps connections, a template has none
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
    yield name
    server.drop(url)


@pytest.fixture
def stage(server, begun, tmp_path):
    url = server.new_database(begun)
    yield bench.Stage(Store(url), tmp_path)
    server.drop(url)


def canned(monkeypatch, **samples):
    "Let every look find the same numbers."

    def evidence(tracking, store, rollout):
        return Evidence(rollout.step, rollout.started_at, rollout.step_at, 10**6, samples, 0.5)

    monkeypatch.setattr(controller, "read_evidence", evidence)


ALIKE = {"acceptance": (Sample(9000, 0.7, 0.005), Sample(9000, 0.7, 0.005))}
WORSE = {"acceptance": (Sample(2000, 0.7, 0.01), Sample(2000, 0.55, 0.011))}
SHORT = replace(PLAN, guardrails=PLAN.guardrails[:1])


def look(stage, plan=PLAN, **more):
    return step_rollout(stage.tracking, stage.store, plan.key, "controller", **more)


def start(stage, plan=PLAN):
    return start_rollout(stage.tracking, stage.store, plan, "ada")


def actions(stage, prefix="rollout."):
    with transaction(stage.store) as connection:
        assert verify_ledger(connection).ok
        return [e.action for e in read_ledger(connection) if e.action.startswith(prefix)]


def test_evidence_is_what_people_did(stage):
    start(stage)
    served = stage.traffic(PLAN.key, 1_200, bench.World(accepted=0.5), seed=3)
    found = read_evidence(stage.tracking, stage.store, read_rollout(stage.store, PLAN.key))
    control, treatment = found.samples["acceptance"]
    with transaction(stage.store) as connection:
        sql = """SELECT experiments ->> 'planner-2' AS arm, count(*) AS n, avg((metrics ->> 'accepted')::float8) AS accepted
                 FROM exp.events WHERE type = 'plan_decided' GROUP BY 1 ORDER BY 1"""
        truth = {r["arm"]: r for r in connection.execute(sql).fetchall()}
    assert (control.n, treatment.n) == (truth["control"]["n"], truth["treatment"]["n"])
    assert treatment.n == served
    assert control.estimate == pytest.approx(truth["control"]["accepted"])
    assert treatment.estimate == pytest.approx(truth["treatment"]["accepted"])
    p = treatment.estimate
    assert treatment.se == pytest.approx((p * (1 - p) / (served - 1)) ** 0.5, rel=1e-6)
    assert all(pair[1] is not None for pair in found.samples.values())
    assert found.n == min(control.n, treatment.n)
    assert found.problems == ()


def test_a_bad_candidate_is_taken_back_and_says_why(stage):
    start(stage)
    stage.traffic(PLAN.key, 1_500, bench.World(accepted=0.5), seed=3)
    decision = look(stage)
    assert decision.action == "roll back"
    assert read_production(stage.store, "planner").version == 1
    assert read_policy_version(stage.store, "planner", 2).status == "rolled_back"
    assert read_version(stage.tracking, "planner", 2).stage == "rolled_back"
    assert read_experiment(stage.store, PLAN.key).status == "completed"
    with transaction(stage.store) as connection:
        entry = next(e for e in read_ledger(connection) if e.action == "rollout.rollback")
    assert entry.evidence["reasons"][0] == decision.reasons[0]
    assert entry.evidence["guardrails"][0]["harm"] >= 20
    assert read_decisions(stage.store, PLAN.key)[-1]["entry"] == entry.seq
    assert look(stage) == decision  # over is over
    assert actions(stage) == ["rollout.start", "rollout.rollback"]


def test_a_good_candidate_reaches_everybody(stage, monkeypatch):
    start(stage, SHORT)
    canned(monkeypatch, **ALIKE)
    assert [look(stage, SHORT).action for _ in range(2)] == ["raise", "finish"]
    assert [p.coverage for p in read_experiment(stage.store, SHORT.key).phases] == [2_000, 10_000]
    serving = read_production(stage.store, "planner")
    assert (serving.version, read_version(stage.tracking, "planner", 2).stage) == (2, "production")
    assert read_policy_version(stage.store, "planner", 1).status == "retired"
    assert look(stage, SHORT).action == "finish"
    assert actions(stage) == ["rollout.start", "rollout.raise", "rollout.finish"]


def test_starting_twice_is_starting_once(stage):
    assert start(stage) == start(stage)
    assert actions(stage) == ["rollout.start"]
    with pytest.raises(WorkbenchError, match="has another plan"):
        start(stage, replace(PLAN, max_days=3))
    with pytest.raises(WorkbenchError, match="rollout 'planner-2' of policy 'planner' is not over"):
        start(stage, replace(PLAN, key="another", candidate=2))


def test_a_second_controller_says_so_and_does_nothing(stage):
    start(stage)
    with controller._alone(stage.store, PLAN.key):
        for act in (lambda: look(stage), lambda: start(stage)):
            with pytest.raises(WorkbenchError, match="another controller is working on rollout 'planner-2'"):
                act()
    assert look(stage).action == "wait" or look(stage).action == "hold"


@pytest.mark.parametrize("path, step", [("roll back", 1), ("finish", 3)])
def test_a_crash_at_any_point_changes_nothing_in_the_end(stage, path, step):
    # `python -m benchmarks.rollout --only kill` does the same with kill -9 at all points
    before = 1
    for point in range(1, bench.PATHS[path] + 1, step):
        key = f"planner-{stage.candidate(f'{path}-{point}').version}"
        with pytest.raises(bench.Killed):
            bench.live(stage, key, path, point)
        bench.live(stage, key, path)
        assert bench.disagreements(stage, key, path, before) == [], point
        before = read_production(stage.store, "planner").version


def test_paused_serves_nobody_and_resumed_begins_the_step_anew(stage):
    start(stage)
    began = read_rollout(stage.store, PLAN.key).step_at
    paused = pause_rollout(stage.tracking, stage.store, PLAN.key, "ada", "a release of the app")
    assert (paused.status, read_experiment(stage.store, PLAN.key).status) == ("paused", "paused")
    assert look(stage).reasons == ("it is paused: a release of the app",)
    resumed = resume_rollout(stage.tracking, stage.store, PLAN.key, "ada")
    assert resumed == resume_rollout(stage.tracking, stage.store, PLAN.key, "ada")
    assert (resumed.status, resumed.step_at > began) == ("active", True)
    assert actions(stage) == ["rollout.start", "rollout.pause", "rollout.resume"]


def test_an_aborted_candidate_stays_a_candidate(stage):
    start(stage)
    for _ in range(2):
        done = abort_rollout(stage.tracking, stage.store, PLAN.key, "ada", "the wrong week for this")
    assert done.status == "aborted"
    assert read_policy_version(stage.store, "planner", 2).status == "candidate"
    assert read_version(stage.tracking, "planner", 2).stage == "candidate"
    assert actions(stage) == ["rollout.start", "rollout.abort"]
    with pytest.raises(WorkbenchError, match="is aborted: pause needs one that is active"):
        pause_rollout(stage.tracking, stage.store, PLAN.key, "ada", "too late")
    start(stage, replace(PLAN, key="again"))


def test_a_problem_holds_and_is_told_once(stage):
    start(stage)
    pause_experiment(stage.store, PLAN.key, "somebody")
    for _ in range(3):
        assert look(stage).action == "hold"
    assert look(stage).reasons[0] == "its experiment is paused: resume it, or abort the rollout"
    assert actions(stage) == ["rollout.start", "rollout.hold"]


def test_another_production_version_in_the_meantime_holds(stage):
    start(stage)
    version = read_version(stage.tracking, "planner", stage.candidate("third").model_version)
    promote(stage.tracking, stage.store, version, stage.passed, "bob")
    assert "planner@3 is in production, not version 1" in look(stage).reasons[0]


def test_a_model_that_was_deleted_holds(stage):
    start(stage)
    stage.tracking.client.delete_model_version("planner", "2")
    assert any("the model of planner@2 is gone" in reason for reason in look(stage).reasons)


def test_an_uneven_split_holds(stage):
    start(stage)
    stage.traffic(PLAN.key, 400, bench.World(), seed=3)
    with transaction(stage.store) as connection:
        gone = "DELETE FROM exp.assignments WHERE variant = 'treatment' AND bucket % 5 <> 0"
        connection.execute(gone)
    found = look(stage)
    assert (found.action, "not split as planned" in found.reasons[0]) == ("hold", True)


def test_a_clock_that_was_set_back_waits(stage):
    start(stage)
    found = look(stage, now=utc_now() - timedelta(hours=3))
    assert (found.action, "before this step began" in found.reasons[0]) == ("wait", True)


def test_what_never_was_proposed_or_was_taken_back_is_not_rolled_out(stage, monkeypatch):
    with pytest.raises(WorkbenchError, match="policy 'planner' has no version 9"):
        start(stage, replace(PLAN, candidate=9))
    with pytest.raises(WorkbenchError, match="planner@1 is 'production': only a candidate is rolled out"):
        start(stage, replace(PLAN, candidate=1))
    start(stage, SHORT)
    canned(monkeypatch, **WORSE)
    look(stage, SHORT)
    with pytest.raises(WorkbenchError, match="planner@2 is 'rolled_back'"):
        start(stage, replace(PLAN, key="again"))
    with pytest.raises(WorkbenchError, match="there is no rollout 'planer-2': did you mean 'planner-2'"):
        step_rollout(stage.tracking, stage.store, "planer-2", "ada")


def test_a_plan_and_a_decision_stay_as_they_were_written(stage, monkeypatch):
    start(stage, SHORT)
    canned(monkeypatch, **ALIKE)
    look(stage, SHORT)
    for sql in (
        "UPDATE exp.rollouts SET plan = '{}'",
        "UPDATE exp.rollout_decisions SET action = 'finish'",
        "DELETE FROM exp.rollout_decisions",
    ):
        with pytest.raises(psycopg.errors.RaiseException), transaction(stage.store) as connection:
            connection.execute(sql)


# The other two modes


def served(stage, type_, n, version, **metrics):
    now = utc_now()
    context = {"source": "simulation", "policy_version": version}
    write_events(
        stage.store, [Event(type_, "household", f"h{i}", now, context=context, metrics=metrics) for i in range(n)]
    )


def switch(**changes):
    values = {"key": "planner-2-switch", "policy": "planner", "candidate": 2, "mode": "blue-green"}
    values["steps"] = [{"coverage": 10_000, "min_hours": 0, "min_n": 300}]
    return make_plan(values | changes)


def test_blue_green_switches_everybody_at_once_and_back(stage):
    plan = switch()
    start(stage, plan)
    assert read_production(stage.store, "planner").version == 2
    assert [p.version for p in kept_warm(stage.store, "planner")] == [2, 1]
    served(stage, "plan_proposed", 200, 2, latency_ms=900.0)
    assert look(stage, plan).action == "wait"
    served(stage, "plan_proposed", 40, "planner@2", latency_ms=4_000.0)
    assert look(stage, plan).action == "roll back"
    assert read_production(stage.store, "planner").version == 1
    assert read_policy_version(stage.store, "planner", 2).status == "rolled_back"
    assert [p.version for p in kept_warm(stage.store, "planner")] == [1]


def test_blue_green_that_keeps_its_limit_stays(stage):
    plan = switch()
    start(stage, plan)
    served(stage, "plan_proposed", 500, 2, latency_ms=900.0)
    assert look(stage, plan).action == "finish"
    assert read_rollout(stage.store, plan.key).status == "finished"
    assert read_production(stage.store, "planner").version == 2


def test_blue_green_is_aborted_by_switching_back(stage):
    plan = switch()
    start(stage, plan)
    abort_rollout(stage.tracking, stage.store, plan.key, "ada", "people complain")
    assert read_production(stage.store, "planner").version == 1


def test_a_shadow_is_computed_and_never_served(stage):
    values = {"key": "planner-2-shadow", "policy": "planner", "candidate": 2, "mode": "shadow"}
    plan = make_plan(
        values | {"steps": [{"coverage": 0, "min_hours": 0, "min_n": 300}], "guardrails": ["latency_p50", "cost"]}
    )
    assert shadowed(stage.store, "planner") is None
    start(stage, plan)
    assert shadowed(stage.store, "planner").version == 2
    assert read_production(stage.store, "planner").version == 1
    both = {"latency_ms": 400.0, "production.latency_ms": 410.0, "cost_eur": 0.002, "production.cost_eur": 0.002}
    served(stage, "shadow", 400, 2, **both)
    decision = look(stage, plan)
    assert decision.action == "finish", decision.reasons
    assert (decision.guardrails[0].control, decision.guardrails[0].treatment) == (410.0, 400.0)
    assert read_production(stage.store, "planner").version == 1
    assert read_policy_version(stage.store, "planner", 2).status == "candidate"
    assert shadowed(stage.store, "planner") is None


def test_records_are_what_json_says_of_them(stage):
    start(stage)
    (found,) = read_rollouts(stage.store, "planner")
    assert found.plan == PLAN
    assert json.loads(json.dumps(PLAN.to_dict())) == json.loads(json.dumps(found.plan.to_dict()))
