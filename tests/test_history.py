"Explaining the past: worked out again, compared with what was stored, and the history of a policy."

import types
from datetime import timedelta

import pytest

from benchmarks.ledger import plant
from mlops_workbench.core import WorkbenchError, as_utc, stable_id
from mlops_workbench.design import Design, MetricPlan, Variant
from mlops_workbench.events import Event, write_events
from mlops_workbench.experiment import Experiment, allocation_at
from mlops_workbench.explanation import Question, explain_unit, read_policy_task
from mlops_workbench.features import FeatureSet
from mlops_workbench.history import Search, find_entries, policy_history
from mlops_workbench.ledger import append_entry
from mlops_workbench.store import transaction, write_rows

START = as_utc("2026-03-02T08:00:00Z")
DAY = timedelta(days=1)
UNITS = [f"h-{i}" for i in range(400)]
METRIC = MetricPlan("acceptance", "primary", "proportion", "plan_decided", "accepted")


def at(days):
    return START + days * DAY


def decide(store, action, version, days, **evidence):
    subject = {"policy": "meals", "version": version, "model_version": version, "digest": f"{version:064x}"}
    with transaction(store) as connection:
        return append_entry(connection, action, "ana", subject, evidence, at(days))


@pytest.fixture
def world(store):
    "Version 1 serves from day 0, 2 from day 20; an experiment compares 1 with 3 from day 5 to 17."
    with transaction(store) as connection:
        connection.execute("INSERT INTO exp.policies (policy, task) VALUES ('meals', 'mlops_workbench.planner')")
        rows = [
            {
                "policy": "meals",
                "version": v,
                "model_name": "meals",
                "model_version": str(v),
                "model_digest": f"{v:064x}",
            }
            for v in (1, 2, 3)
        ]
        write_rows(
            connection, "exp.policy_versions", [r | {"settings": {"dishes": 5}, "status": "retired"} for r in rows]
        )
        subject = {"model": "meals", "version": 1, "digest": f"{1:064x}"}
        append_entry(connection, "model.candidate", "gate", subject, {"outcome": "pass", "reasons": ["good"]}, at(-1))
    decide(store, "policy.promote", 1, 0, outcome="pass", replaced=None, settings={"dishes": 5})
    variants = (Variant("control", 0.5, 1, control=True), Variant("new", 0.5, 3, {"tone": "short"}))
    design = Design("list", "it helps", "meals", "household", variants, (METRIC,), 0.05, 900, at(90))
    plant(store, Experiment(**vars(design)), [(at(5), 2_000), (at(9), 6_000), (at(13), 10_000)])  # paused from 15 to 16
    with transaction(store) as connection:
        for step, day, coverage in (("start", 5, 2_000), ("ramp", 9, 6_000), ("ramp", 13, 10_000)):
            told = {"status": "active", "coverage": coverage}
            append_entry(connection, f"experiment.{step}", "ben", {"experiment": "list"}, told, at(day))
    decide(store, "policy.promote", 2, 20, outcome="pass", replaced=1, settings={"dishes": 7})
    return store


def ask(store, unit, days, **more):
    return explain_unit(store, None, Question("meals", more.pop("kind", "household"), unit, at(days)), **more)


def bucket_between(store, low, high):
    placed = ((u, ask(store, u, 6).placements[0].bucket) for u in UNITS)
    return next(u for u, bucket in placed if low <= bucket < high)


def test_what_served_follows_the_ledger(world):
    assert [ask(world, "h-1", d).policy_version for d in (-1, 4, 18, 21)] == [None, 1, 1, 2]
    before, served = ask(world, "h-1", -1), ask(world, "h-1", 4)
    assert (before.source, before.model, before.decided) == ("rule", None, None)
    assert (served.source, served.variant, served.settings) == ("production", None, {"dishes": 5})
    assert served.model == {"name": "meals", "version": 1, "digest": f"{1:064x}"}
    assert (served.judged.actor, served.judged.evidence["reasons"]) == ("gate", ["good"])
    assert served.decided.actor == "ana" and served.decided.evidence["outcome"] == "pass"


def test_the_variant_follows_the_phase(world):
    unit = bucket_between(world, 5_000 + 1_000, 5_000 + 3_000)  # in the second phase, not in the first
    told = {d: ask(world, unit, d) for d in (6, 10, 14, 15.5, 16.5, 18)}
    assert [e.variant for e in told.values()] == [None, "new", "new", None, "new", None]
    assert [e.policy_version for e in told.values()] == [1, 3, 3, 1, 3, 1]
    assert [p.reason for e in told.values() for p in e.placements] == [
        "not_covered", "assigned", "assigned", "not_active", "assigned",
    ]  # fmt: skip
    assert (told[10].source, told[10].decided.action, told[10].decided.actor) == ("list", "experiment.ramp", "ben")
    assert told[10].placements[0].parameters == {"tone": "short"}


def test_a_version_that_was_rolled_back_serves_nobody_whatever_is_stored(world):
    unit = bucket_between(world, 5_000, 5_100)
    row = {"experiment": "list", "phase": 1, "unit_type": "household", "unit_id": unit, "variant": "new"}
    with transaction(world) as connection:
        write_rows(connection, "exp.assignments", [row | {"bucket": 5_050, "assigned_at": at(5.1)}])
    decide(world, "policy.rollback", 3, 7, reason="slow", to=1)
    before, after = ask(world, unit, 6.5), ask(world, unit, 7.5)
    assert (before.variant, before.policy_version, before.placements[0].stored) == ("new", 3, "new")
    assert (after.variant, after.policy_version, after.placements[0].reason) == (None, 1, "rolled_back")
    assert before.remarks == after.remarks == ()
    assert allocation_at(world, "list", at(7.5)).barred == {3}


def test_records_that_disagree_are_told(world):
    unit = bucket_between(world, 5_000, 5_900)
    row = {"experiment": "list", "phase": 1, "unit_type": "household", "unit_id": unit, "variant": "control"}
    with transaction(world) as connection:
        write_rows(connection, "exp.assignments", [row | {"bucket": 17, "assigned_at": at(5.1)}])
    assert ask(world, unit, 5.05).remarks == ()  # it was not stored yet
    (told,) = ask(world, unit, 6).remarks
    assert told == "the stored assignment of 'list' says 'control', worked out is 'new'"
    event = Event("exposure", "household", unit, at(9.5), experiments={"list": "control"}, received_at=at(9.5))
    write_events(world, [event])
    assert "the last exposure of 'list' says 'control'" in ask(world, unit, 10).remarks[0]
    assert ask(world, unit, 14).remarks == ()  # another phase


def test_what_arrived_later_was_not_known(world):
    for n, (happened, known) in enumerate(((1, 1), (2, 9), (3, 3))):
        told = Event(
            "plan_decided", "household", "h-1", at(happened), {"n": n}, stable_id("late", n), received_at=at(known)
        )
        write_events(world, [told, Event("plan_decided", "user", "h-1", at(happened), received_at=at(happened))])
    assert [e["id"] for e in ask(world, "h-1", 4).events] == [stable_id("late", 2), stable_id("late", 0)]
    assert len(ask(world, "h-1", 10).events) == 3 and len(ask(world, "h-1", 10, n_events=1).events) == 1
    assert ask(world, "h-1", 0.5).answer is None and ask(world, "h-1", 4).answer["id"] == stable_id("late", 2)


def test_features_are_those_of_the_time_and_a_broken_one_is_a_remark(world):
    sql = """SELECT spine.row_id, count(e.id) AS n FROM spine LEFT JOIN exp.events e ON e.unit_id = spine.unit_id
        AND e.event_at <= spine.as_of AND e.received_at <= spine.as_of AND e.type LIKE 'plan%' GROUP BY 1"""
    good = FeatureSet("plans", sql, ("n",))
    bad = FeatureSet("gone", sql.replace("exp.events", "exp.nowhere"), ("n",))
    for n in range(3):
        write_events(world, [Event("plan_decided", "household", "h-1", at(n), received_at=at(n))])
    module = types.SimpleNamespace(GOOD=good, OTHER=1, BAD=bad)
    found = [ask(world, "h-1", d, module=module) for d in (-1, 0.5, 5)]
    assert [e.features for e in found] == [{"n": 0}, {"n": 1}, {"n": 3}]
    assert "features 'gone' cannot be computed" in found[2].remarks[0] and "exp.nowhere" in found[2].remarks[0]
    task = types.SimpleNamespace(features=[good], answered_by="plan_decided")
    assert ask(world, "h-1", 5, task=task, module=module).remarks == ()


def test_targeting_needs_the_context_of_the_request(world):
    variants = (Variant("control", 0.5, 1, control=True), Variant("new", 0.5, 3))
    asked = ("meals", "household", variants, (METRIC,), 0.05, 900, at(90))
    design = Design("targeted", "it helps", *asked, condition={"country": "SE"})
    plant(world, Experiment(**vars(design)), [(at(30), 5_000), (at(35), 10_000)])

    def told(days):
        return ask(world, "h-1", days)

    assert (told(31).variant, told(31).placements[0].reason) == (None, "targeting")
    row = {"experiment": "targeted", "phase": 1, "unit_type": "household", "unit_id": "h-1", "variant": "new"}
    with transaction(world) as connection:
        write_rows(connection, "exp.assignments", [row | {"bucket": 17, "assigned_at": at(30.5)}])
    assert (told(31).variant, told(31).placements[0].reason) == ("new", "stored")
    about = {"context": {"country": "SE"}, "experiments": {"targeted": "new"}, "received_at": at(36)}
    write_events(world, [Event("exposure", "household", "h-1", at(36), **about)])
    assert told(36.5).placements[0].reason == "assigned"


def test_another_kind_of_unit_takes_no_part(world):
    found = ask(world, "h-1", 14, kind="user")
    assert (found.variant, found.placements[0].reason) == (None, "unit_type")


def test_a_backdated_decision_is_part_of_what_held(world):
    decide(world, "policy.promote", 3, 3, reason="noted afterwards", replaced=1)
    assert [ask(world, "h-1", d).policy_version for d in (2, 4, 21)] == [1, 3, 2]


def test_a_policy_that_is_not_there(world):
    with pytest.raises(WorkbenchError, match="there is no policy 'mael'"):
        explain_unit(world, None, Question("mael", "household", "h-1", at(1)))
    with pytest.raises(WorkbenchError, match="did you mean 'meals'"):
        policy_history(world, "meal")
    with pytest.raises(ValueError, match="no time zone"):
        explain_unit(world, None, Question("meals", "household", "h-1", at(1).replace(tzinfo=None)))
    assert read_policy_task(world)[1].name == "planner"
    with transaction(world) as connection:
        connection.execute("INSERT INTO exp.policies (policy, task) VALUES ('ads', 'x')")
    with pytest.raises(ValueError, match="there are 2 policies, so say which: choose from meals, ads"):
        read_policy_task(world)


def test_the_history_tells_who_changed_what(world):
    decide(world, "policy.rollback", 2, 22, reason="slow", to=1)
    decide(world, "policy.promote", 1, 22, reason="slow", replaced=2, settings={"dishes": 5})
    told = policy_history(world, "meals")
    assert list(told["changed"]) == [
        "meals v1: candidate",
        "the rule → meals@1 serves; dishes: None → 5",
        "list is active at 20 %",
        "list is active at 60 %",
        "list is active at 100 %",
        "meals@1 → meals@2 serves; dishes: 5 → 7",
        "meals@2 serves nobody any more",
        "meals@2 → meals@1 serves; dishes: 7 → 5",
    ]
    assert list(told["reason"])[-2:] == ["slow", "slow"] and told["reason"].iloc[0] == "pass: good"
    assert policy_history(world, "meals", known_at=at(0)).empty


def test_entries_are_found(world):
    def seqs(*search, **more):
        return [e.seq for e in find_entries(world, Search(*search), **more)]

    assert seqs() == [1, 2, 3, 4, 5, 6] and seqs(limit=2) == [5, 6]
    assert seqs("meals") == [1, 2, 6] and seqs("meals@2") == [6] and seqs("list") == [3, 4, 5]
    assert seqs("", "experiment.ramp") == [4, 5] and seqs("meals", "", at(1)) == [1, 2]
    assert seqs("", "", None, at(1)) == []
    with pytest.raises(ValueError, match="such as planner@3"):
        seqs("planner@three")


def test_an_explanation_reads_like_one(world):
    found = ask(world, bucket_between(world, 5_000, 5_900), 6)
    assert (
        "meals@3 (variant 'new' of experiment 'list')" in found.to_text()
        and "experiment.start by ben" in found.to_text()
    )
    assert "| served by | meals@3" in found._repr_markdown_()
    assert found.to_dict()["placements"][0]["variant"] == "new"
    assert "served by    the rule" in ask(world, "h-1", -1).to_text()
