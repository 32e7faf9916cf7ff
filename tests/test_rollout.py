"""The decision of a rollout: what raises, what waits, what takes back, and that looking often costs nothing."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from mlops_workbench.rollout import (
    GUARDRAILS,
    MIN_N,
    Decision,
    Evidence,
    Guardrail,
    RolloutPlan,
    Sample,
    Step,
    decide_step,
    make_plan,
    rollout_verdict,
    weigh_guardrail,
    weigh_loss,
    weigh_share,
)

MONDAY = datetime(2026, 3, 2, 8, tzinfo=UTC)
ACCEPTANCE = Guardrail("acceptance", 0.05, "ratio", value="accepted", denominator="plan_decided", alpha=0.05)
COST = Guardrail("cost", 0.10, value="cost_eur", higher_is_better=False)
PLAN = RolloutPlan("planner-4", "planner", 4, guardrails=(ACCEPTANCE, COST))


def proportion(p, n):
    return Sample(n, p, math.sqrt(p * (1 - p) / n))


def evidence(**changes):
    samples = {
        "acceptance": (proportion(0.7, 4000), proportion(0.7, 4000)),
        "cost": (Sample(4000, 0.002, 1e-5), Sample(4000, 0.002, 1e-5)),
    }
    samples |= changes.pop("samples", {})
    return replace(Evidence(0, MONDAY, MONDAY, 4000, samples, 0.5), **changes)


def decide(hours=30, plan=PLAN, **changes):
    return decide_step(plan, evidence(**changes), MONDAY + timedelta(hours=hours))


def test_steps_are_taken_one_after_the_other_and_end_in_a_promotion():
    found = [decide(100, step=step) for step in range(3)]
    assert [(d.action, d.step) for d in found] == [("raise", 1), ("raise", 2), ("finish", 2)]
    assert rollout_verdict(PLAN, found[-1]).passed
    assert not rollout_verdict(PLAN, found[0]).passed


def test_the_same_evidence_gives_the_same_decision():
    assert decide() == decide()


@pytest.mark.parametrize("hours, n, action", [(23.9, 4000, "wait"), (24, 299, "wait"), (24, 300, "raise")])
def test_a_step_lasts_at_least_its_time_and_its_units(hours, n, action):
    assert decide(hours, n=n).action == action


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("hours", [-5, 0, 0.5, 500])
def test_harm_takes_back_on_any_step_at_any_time(step, hours):
    found = decide(hours, step=step, n=0, samples={"acceptance": (proportion(0.7, 2000), proportion(0.6, 2000))})
    assert found.action == "roll back"
    assert found.reasons[0].startswith("acceptance is 0.6 against 0.7")
    assert rollout_verdict(PLAN, found).outcome == "fail"


def test_one_broken_guardrail_is_enough():
    found = decide(samples={"cost": (Sample(900, 0.002, 1e-5), Sample(900, 0.0026, 1e-5))})
    assert (found.action, found.reasons[0].split(" ")[0]) == ("roll back", "cost")


def test_a_clock_that_was_set_back_waits_and_says_so():
    found = decide(hours=-1)
    assert found.action == "wait"
    assert "before this step began" in found.reasons[0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"srm_p": 0.0009}, "not split as planned"),
        ({"problems": ("the model is gone",)}, "the model is gone"),
        ({"samples": {"cost": (None, None)}}, "cost rests on 0 units"),
        ({"samples": {"cost": (Sample(MIN_N - 1, 0.002, 0.0), Sample(4000, 0.002, 1e-5))}}, "cost rests on 29 units"),
        ({"samples": {"cost": (Sample(50, math.nan, math.inf), Sample(50, 0.002, 1e-5))}}, "cost rests on"),
    ],
)
def test_what_cannot_be_trusted_holds(changes, words):
    found = decide(**changes)
    assert found.action == "hold"
    assert words in found.reasons[0]


def test_numbers_that_cannot_be_trusted_take_nothing_back():
    worse = {"acceptance": (proportion(0.7, 2000), proportion(0.5, 2000))}
    assert decide(samples=worse, srm_p=1e-9).action == "hold"


def test_a_missing_guardrail_does_not_hide_the_harm_that_another_one_shows():
    samples = {"cost": (None, None), "acceptance": (proportion(0.7, 2000), proportion(0.5, 2000))}
    assert decide(samples=samples).action == "roll back"


def test_what_is_not_proven_in_time_is_taken_back():
    late = PLAN.max_days * 24 + 1
    assert decide(late).action == "roll back"
    assert decide(late, srm_p=1e-9).action == "roll back"
    assert decide(late).reasons[0] == "not proven within 42 days"


def test_the_last_step_waits_for_proof_and_not_only_for_the_absence_of_harm():
    few = {"acceptance": (proportion(0.7, 700), proportion(0.7, 700))}
    found = decide(100, step=2, samples=few)
    assert found.action == "wait"
    assert found.reasons[0].startswith("acceptance")
    assert decide(100, step=1, samples=few).action == "raise"
    lax = replace(PLAN, guardrails=(replace(ACCEPTANCE, proof=False), COST))
    assert decide(100, plan=lax, step=2, samples=few).action == "finish"


def test_doubt_keeps_the_share():
    doubtful = {"acceptance": (proportion(0.7, 320), proportion(0.62, 320))}
    found = decide(samples=doubtful)
    (weighed, _) = found.guardrails
    assert PLAN.doubt <= weighed.harm < weighed.rollback_at
    assert (found.action, found.step) == ("wait", 0)


def test_evidence_turns_at_the_margin():
    unit, se = 0.035, 0.005  # much evidence: what counts is only the side of the margin
    assert weigh_loss(0.9 * unit, se, unit) < 1 < weigh_loss(1.1 * unit, se, unit)


@pytest.mark.parametrize("higher, control, treatment", [(True, 0.7, 0.6), (False, 2.0, 2.6)])
def test_worse_is_on_the_metrics_own_side(higher, control, treatment):
    guardrail = Guardrail("m", 0.05, higher_is_better=higher)
    pair = (Sample(5000, control, control / 100), Sample(5000, treatment, treatment / 100))
    assert weigh_guardrail(PLAN, guardrail, *pair).state == "harm"
    assert weigh_guardrail(PLAN, guardrail, *pair[::-1]).state == "kept"


def test_nothing_measured_twice_is_no_harm_and_something_out_of_nothing_is():
    rare = Guardrail("interventions", 0.05, higher_is_better=False, proof=False)
    none = Sample(500, 0.0, 0.0)
    assert weigh_guardrail(PLAN, rare, none, none).state == "open"
    assert weigh_guardrail(PLAN, rare, none, proportion(0.2, 500)).state == "harm"


def test_a_limit_looks_at_the_candidate_alone():
    limit = next(g for g in GUARDRAILS if g.limit)
    for share, state in ((0.002, "open"), (0.05, "harm")):
        assert weigh_guardrail(PLAN, limit, None, Sample(2000, share, 0.0)).state == state


@pytest.mark.parametrize(
    "n, alpha, low", [(4_000, 0.05, 0.01), (4_000, 0.01, 0.0)], ids=["five percent", "one percent"]
)
def test_looking_at_every_answer_takes_back_few_candidates_that_are_alike(n, alpha, low):
    # 1,000 rollouts, 400 looks each: the chance of ever reaching 1 / alpha is at most alpha (Ville);
    # the tolerance is three standard errors of 1,000 draws, and a bound that is never reached would be useless
    rng, looks = np.random.default_rng(5), np.arange(10, n + 1, 10)
    accepted = rng.binomial(10, 0.7, (2, 1000, len(looks))).cumsum(axis=2)
    control, treatment = accepted / looks
    harmed = np.zeros(1000, bool)
    for i in range(3, len(looks)):
        for k in np.flatnonzero(~harmed & (control[:, i] - treatment[:, i] > 0.035)):
            c, t = control[k, i], treatment[k, i]
            se = math.sqrt((c * (1 - c) + t * (1 - t)) / looks[i])
            harmed[k] = weigh_loss(c - t, se, 0.05 * (c + t) / 2) >= 1 / alpha
    assert low <= harmed.mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 1000)


def test_counting_slow_requests_is_exact_at_any_look():
    rng = np.random.default_rng(6)
    slow = (rng.random((400, 3000)) < 0.01).cumsum(axis=1)
    reached = [
        max(weigh_share(k, n, 0.01) for n, k in zip(range(50, 3001, 50), row[49::50], strict=True)) for row in slow
    ]
    assert np.mean(np.array(reached) >= 20) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_a_decision_and_a_plan_are_what_json_says_of_them():
    found = decide(samples={"cost": (Sample(40, math.nan, math.inf), None)})
    assert Decision.from_dict(found.to_dict()) == found
    assert make_plan(PLAN.to_dict()) == PLAN


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mode": "blue"}, "choose canary, blue-green or shadow"),
        ({"steps": (Step(5_000, 1, 1), Step(2_000, 1, 1))}, "every step is larger"),
        ({"steps": ()}, "every step is larger"),
        ({"guardrails": ()}, "name at least one"),
        ({"guardrails": (ACCEPTANCE, ACCEPTANCE)}, "each once"),
        ({"guardrails": (ACCEPTANCE, replace(COST, alpha=0.06))}, "share out 0.1 at most"),
        ({"mode": "blue-green"}, "one step and no control"),
        ({"beta": 0.6}, "beta is below 0.5"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(PLAN, **changes)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Step(10_001, 1, 1), "0 to 10,000 buckets"),
        (lambda: Guardrail("m", 5), "0.05 for 5 %"),
        (lambda: Guardrail("m", 0.05, alpha=0.5), "0.1 at most"),
        (lambda: make_plan({"key": "k", "policy": "planner"}), "candidate"),
        (lambda: make_plan({"key": "k", "policy": "planner", "candidate": 4, "step": []}), "did you mean 'steps'"),
    ],
)
def test_bad_input_says_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()
