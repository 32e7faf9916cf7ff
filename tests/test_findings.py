"Findings: phases, corrections, guardrails, conclusions, words, beliefs and slices."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mlops_workbench.design import MetricPlan, to_design
from mlops_workbench.findings import (
    MIN_UNITS,
    believe,
    compare_arms,
    conclude,
    correct_findings,
    correct_slices,
    find,
    slice_effects,
    sum_up,
    tell,
)
from mlops_workbench.stats import Interval
from mlops_workbench.sums import Sums

METRICS = [
    {"metric": "acceptance", "role": "primary", "kind": "proportion", "event": "accepted"},
    {"metric": "spend", "role": "secondary", "kind": "mean", "event": "bought", "value": "eur"},
    {
        "metric": "edits",
        "role": "guardrail",
        "kind": "mean",
        "event": "edited",
        "margin": 0.1,
        "higher_is_better": False,
    },
]
design = to_design(
    {
        "key": "tone",
        "hypothesis": "Reasons help.",
        "policy": "planner",
        "unit_type": "household",
        "variants": [
            {"name": "plain", "share": 0.4, "control": True},
            {"name": "reasons", "share": 0.3},
            {"name": "jokes", "share": 0.3},
        ],
        "metrics": METRICS,
        "mde": 0.05,
        "planned_n": 1000,
        "ends_at": "2099-01-01T00:00:00Z",
    }
)
acceptance, spend, edits = design.metrics


def arm(variant, values, phase=1, **columns):
    values = np.asarray(values, float)
    names = [f"{phase}-{variant}-{i}" for i in range(len(values))]
    return pd.DataFrame({"phase": phase, "variant": variant, "unit_id": names, "y": values, **columns})


def ones(n, share):
    return np.arange(n) < round(n * share)


def found(plan, *tables, variant="reasons"):
    return find(design, plan, sum_up(plan, pd.concat(tables)), variant)


def test_arms_are_compared_within_phases():
    cells = [(1, 0.5, 9000, 1000), (2, 0.3, 1000, 9000)]
    tables = [
        arm(name, ones(n, rate), phase) for phase, rate, a, b in cells for name, n in (("plain", a), ("reasons", b))
    ]
    within = found(acceptance, *tables)
    pooled = found(acceptance, *[t.assign(phase=1) for t in tables])
    assert within.difference.estimate == pytest.approx(0, abs=1e-9)
    assert within.p_value == 1.0
    assert pooled.p_value < 1e-6, "the trap is there: without phases the same units show an effect"


def test_a_phase_with_one_unit_is_left_out():
    full = found(acceptance, arm("plain", ones(200, 0.4)), arm("reasons", ones(200, 0.5)))
    more = found(
        acceptance,
        arm("plain", ones(200, 0.4)),
        arm("reasons", ones(200, 0.5)),
        arm("plain", [1.0], 2),
        arm("reasons", ones(40, 0.5), 2),
    )
    assert more.difference == full.difference


def test_winsorising_cuts_all_arms_at_one_bound():
    plan = replace(spend, winsor=0.01)
    values = np.r_[np.full(99, 10.0), 1e6]
    strata = sum_up(plan, pd.concat([arm("plain", np.full(900, 10.0)), arm("reasons", values)]))
    assert strata[1]["reasons"].means[0] == 10.0


def test_a_covariate_narrows_the_interval():
    rng = np.random.default_rng(0)
    before = rng.normal(10, 3, 2000)
    y = before + rng.normal(0, 1, 2000)
    tables = [arm("plain", y[:1000], covariate=before[:1000]), arm("reasons", y[1000:] + 0.5, covariate=before[1000:])]
    plain, adjusted = found(spend, *tables), found(replace(spend, covariate=True), *tables)
    expected = np.sqrt(1 - np.corrcoef(before, y)[0, 1] ** 2)
    assert adjusted.effect.se / plain.effect.se == pytest.approx(expected, rel=0.05)
    assert adjusted.relative.low < 0.05 < adjusted.relative.high


def test_a_ratio_without_denominator_in_an_arm_says_so():
    plan = MetricPlan("edit_rate", "primary", "ratio", "edited", denominator="planned")
    tables = [arm("plain", ones(100, 0.5), denominator=1.0), arm("reasons", np.zeros(100), denominator=0.0)]
    assert found(plan, *tables).effect is None


def test_a_quantile_is_compared_by_units():
    plan = MetricPlan("latency", "guardrail", "quantile", "answered", "ms", margin=0.2, higher_is_better=False)
    rng = np.random.default_rng(2)
    slow = arm("reasons", rng.lognormal(5.5, 0.3, 1500))
    assert found(plan, arm("plain", rng.lognormal(5, 0.3, 1500)), slow).outcome == "broken"


@pytest.mark.parametrize(
    ("more", "higher", "outcome"),
    [
        (0.0, False, "kept"),
        (0.3, False, "broken"),
        (-0.3, False, "kept"),
        (-0.3, True, "broken"),
        (0.3, True, "kept"),
        (0.1, False, "open"),
    ],
)
def test_a_guardrail_is_one_sided_and_relative(more, higher, outcome):
    rng = np.random.default_rng(1)
    plan = replace(edits, higher_is_better=higher)
    seen = found(plan, arm("plain", rng.normal(5, 1, 1500)), arm("reasons", rng.normal(5 * (1 + more), 1, 1500)))
    assert seen.outcome == outcome
    assert seen.p_value is None


def test_few_units_conclude_nothing_whatever_they_show():
    n = MIN_UNITS - 1
    seen = correct_findings([found(acceptance, arm("plain", ones(n, 0.05)), arm("reasons", ones(n, 0.95)))])[0]
    assert seen.outcome == "open"
    assert "nothing is concluded" in tell(seen)


def test_units_that_do_not_vary_bound_nothing():
    seen = correct_findings([found(spend, arm("plain", np.full(500, 3.0)), arm("reasons", np.full(500, 3.0)))])[0]
    assert seen.outcome == "open"
    assert "same value" in tell(seen)
    json.dumps(seen.to_dict(), allow_nan=False, default=lambda v: None)


def test_nobody_in_an_arm_is_told():
    assert tell(found(acceptance, arm("plain", ones(100, 0.5)))) == (
        "acceptance of reasons: nobody was exposed to reasons yet."
    )


def test_one_look_is_shown_from_the_planned_size_on():
    small = found(acceptance, arm("plain", ones(999, 0.4)), arm("reasons", ones(1000, 0.5)))
    full = found(acceptance, arm("plain", ones(1000, 0.4)), arm("reasons", ones(1000, 0.5)))
    assert small.fixed is None
    wide, once = full.relative, full.fixed
    assert wide.high - wide.low > once.high - once.low, "what holds at every look is wider"


def test_guardrails_do_not_count_as_questions():
    tables = [arm("plain", ones(1000, 0.4)), arm("reasons", ones(1000, 0.49))]
    one = found(acceptance, *tables)
    guardrail = found(edits, arm("plain", ones(1000, 0.4)), arm("reasons", ones(1000, 0.4)))
    alone, beside, twice = (correct_findings(group)[0] for group in ([one], [one, guardrail], [one, one]))
    assert alone.corrected == beside.corrected == one.p_value
    assert twice.corrected == pytest.approx(2 * one.p_value)


def test_what_counts_alone_may_not_count_among_many():
    tables = [arm("plain", ones(1000, 0.4)), arm("reasons", ones(1000, 0.4825))]
    one = found(acceptance, *tables)
    assert 0.005 < one.p_value < 0.05
    many = correct_findings([one] + [replace(one, p_value=0.9)] * 9)
    assert (correct_findings([one])[0].outcome, many[0].outcome) == ("better", "open")
    assert "By itself that would count" in tell(many[0])


def outcomes(**given):
    "Findings of one treatment with chosen outcomes, at the planned size."
    plans = {"acceptance": acceptance, "spend": spend, "edits": edits}
    base = found(acceptance, arm("plain", ones(1000, 0.4)), arm("reasons", ones(1000, 0.4)))
    held = {"acceptance": "open", "spend": "open", "edits": "kept"} | given
    return [replace(base, plan=plans[name], outcome=what) for name, what in held.items()]


two = replace(design, variants=design.variants[:2])


@pytest.mark.parametrize(
    ("given", "action"),
    [
        ({"acceptance": "better"}, "ship"),
        ({"acceptance": "better", "edits": "open"}, "keep going"),
        ({"acceptance": "better", "spend": "worse"}, "keep going"),
        ({"acceptance": "better", "edits": "broken"}, "stop for harm"),
        ({"acceptance": "worse"}, "stop for harm"),
        ({"edits": "broken"}, "stop for harm"),
        ({}, "no effect"),
        ({"spend": "better"}, "no effect"),
    ],
)
def test_table_of_conclusions(given, action):
    assert conclude(two, outcomes(**given)).action == action
    assert conclude(two, outcomes(**given), ["lost units"]).action == "blocked"


def test_before_the_planned_size_it_goes_on():
    early = [replace(f, n=(900, 900)) for f in outcomes()]
    assert conclude(two, early).action == "keep going"


def test_the_best_of_several_arms_ships_and_the_harmful_one_is_named():
    good = outcomes(acceptance="better")
    bad = [replace(f, variant="jokes") for f in outcomes(edits="broken")]
    seen = conclude(design, good + bad)
    assert (seen.action, seen.variant) == ("ship", "reasons")
    assert seen.per_variant == {"reasons": "ship", "jokes": "stop for harm"}
    assert "jokes: stop for harm" in seen.reasons


def test_the_larger_gain_ships():
    def lifted(variant, by):
        relative = Interval(by, by - 0.01, by + 0.01, 10, 10)
        return [replace(f, variant=variant, relative=relative) for f in outcomes(acceptance="better")]

    seen = conclude(design, lifted("reasons", 0.1) + lifted("jokes", 0.2))
    assert (seen.action, seen.variant) == ("ship", "jokes")


def test_words_have_the_numbers_and_no_sign():
    seen = correct_findings([found(acceptance, arm("plain", ones(2000, 0.4)), arm("reasons", ones(2000, 0.3)))])[0]
    told = tell(seen)
    assert "30.0 % with reasons and 40.0 % with plain: 25.0 % less" in told
    assert told.endswith("That is worse, and chance does not explain it.")


def test_a_belief_is_pulled_to_its_prior():
    seen = found(acceptance, arm("plain", ones(400, 0.4)), arm("reasons", ones(400, 0.5)))
    sure, wide = believe(seen, 0.01), believe(seen, 10.0)
    assert sure.high < wide.high and sure.chance_better < wide.chance_better
    assert wide.low == pytest.approx(seen.effect.relative.estimate - 1.96 * seen.effect.relative_se, rel=1e-3)
    worse = believe(replace(seen, plan=replace(acceptance, higher_is_better=False)), 10.0)
    assert worse.chance_better == pytest.approx(1 - wide.chance_better)
    with pytest.raises(ValueError, match="prior_sd is 0"):
        believe(seen, 0.0)


def test_slices_are_corrected_together_and_small_ones_left_out():
    cells = [("plain", "new", 0.3), ("reasons", "new", 0.5), ("plain", "old", 0.5), ("reasons", "old", 0.5)]
    tables = [arm(name, ones(600, share), tenure=tenure) for name, tenure, share in cells]
    tables.append(arm("plain", ones(10, 0.5), tenure="rare"))
    tables.append(arm("reasons", ones(10, 0.5), tenure="rare"))
    totals = pd.concat(tables, ignore_index=True)
    totals["unit_id"] = totals.index.astype(str)
    totals["coin"] = np.where(totals.index % 2, "a", "b")
    views = correct_slices(slice_effects(two, acceptance, totals, ["tenure", "coin"]))
    assert set(views[0].effects) == {"new", "old"}
    assert views[0].corrected == pytest.approx(2 * views[0].p_value)
    assert "the effects differ" in views[0].words and "Exploratory" in views[0].words
    assert "no difference" in views[1].words


def test_equal_arms_are_rarely_told_apart_however_often_they_are_looked_at():
    rng, wrong, once = np.random.default_rng(7), 0, 0
    for _ in range(100):
        a, b = rng.normal(5, 2, (2, 1000))
        looks = [
            find(design, spend, {1: {"plain": Sums.of(a[:n]), "reasons": Sums.of(b[:n])}}, "reasons")
            for n in range(100, 1001, 100)
        ]
        wrong += any(look.p_value < 0.05 for look in looks)
        once += any(look.effect.p_value < 0.05 for look in looks)
    assert wrong <= 11, "5 of 100 are promised, and three standard errors"
    assert once > 11, "the trap is there: tests at each of ten looks find more"


def test_compare_arms_needs_both():
    assert compare_arms(acceptance, {}, ("plain", "reasons")) is None
