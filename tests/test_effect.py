"Effects between arms: against scipy, statsmodels and gbstats, on every edge, and additive to the last digit."

import json
import math
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, ttest_ind
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from mlops_workbench.effect import (
    Effect,
    Estimate,
    believe,
    compare,
    compare_counts,
    compare_means,
    compare_proportions,
    compare_quantiles,
    compare_ratios,
    effect_between,
    estimate_mean,
    estimate_quantile,
    heterogeneity,
    stratify,
)
from mlops_workbench.sums import Sums, adjust, linearise, winsorise

GBSTATS = json.loads((Path(__file__).parent / "cases" / "gbstats.json").read_text())
BOTH = ("gain", "loss")

values = st.lists(st.floats(-1e6, 1e6, allow_nan=False, width=32), min_size=0, max_size=25)


def arm(data, side, *columns):
    given_columns = GBSTATS["data"][data][side]
    return Sums.of(**{column: given_columns[column] for column in columns})


def effect_of(data, kind):
    "Compare two arms of the stored data in the way of a stored case."
    columns = {"mean": ("y",), "ratio": ("y", "x"), "cuped mean": ("y", "before"), "cuped ratio": None}[kind]
    columns = columns or ("y", "x", "before", "before_x")
    arms = [arm(data, side, *columns) for side in ("control", "treatment")]
    if kind.startswith("cuped"):
        return compare_means(*adjust(arms, GBSTATS["theta"])[0])
    return compare(kind, *arms)


def cases(*rules):
    found = [c for c in GBSTATS["cases"] if c["rule"] in rules]
    return pytest.mark.parametrize("case", found, ids=lambda c: f"{c['data']} {c['kind']} {c['scale']} {c['rule']}")


# Sums


@settings(max_examples=80, deadline=None)
@given(values, values)
def test_sums_of_parts_are_the_sums_of_the_whole(a, b):
    parts, whole = Sums.of(a, a[::-1]) + Sums.of(b, b[::-1]), Sums.of(a + b, a[::-1] + b[::-1])
    assert parts.n == whole.n
    scale = max(map(abs, a + b), default=0.0) or 1.0
    np.testing.assert_allclose(parts.means, whole.means, rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_allclose(parts.scatter, whole.scatter, rtol=1e-9, atol=1e-9 * scale**2)


def test_a_large_offset_costs_no_digits():
    rng = np.random.default_rng(0)
    small = rng.normal(0, 1, 1000)
    far = Sums.of(small[:400] + 1e8) + Sums.of(small[400:] + 1e8)
    assert far.scatter[0][0] == pytest.approx(Sums.of(small).scatter[0][0], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_with_its_place(bad):
    with pytest.raises(ValueError, match="y of unit 1 is .*must be a finite number"):
        Sums.of([1.0, bad])
    with pytest.raises(ValueError, match="before of unit 0"):
        Sums.of([1.0], before=[bad])
    with pytest.raises(ValueError, match="expected 0 or more units and finite sums"):
        Sums.from_totals(3, bad)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="pass one value a unit in each"):
        Sums.of([1.0, 2.0], [1.0])


# Agreement


@cases("welch")
def test_welch_agrees_with_gbstats(case):
    found = effect_of(case["data"], case["kind"])
    interval = found.difference if case["scale"] == "absolute" else found.relative
    ours = (interval.estimate, interval.low, interval.high)
    assert ours == pytest.approx((case["estimate"], case["low"], case["high"]), rel=1e-6)
    if case["scale"] == "absolute":
        # gbstats tests the relative difference, whose standard error is another one
        assert found.p_value == pytest.approx(case["p_value"], rel=1e-6)


@pytest.mark.parametrize("data", BOTH)
@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_welch_agrees_with_scipy_and_statsmodels(data, level):
    y = [np.array(GBSTATS["data"][data][side]["y"]) for side in ("control", "treatment")]
    found = compare_means(Sums.of(y[0]), Sums.of(y[1]), level)
    expected = ttest_ind(y[1], y[0], equal_var=False)
    ends = expected.confidence_interval(level)
    ours = (found.difference.low, found.difference.high, found.p_value)
    assert ours == pytest.approx((ends.low, ends.high, expected.pvalue), rel=1e-9)
    table = CompareMeans(DescrStatsW(y[1]), DescrStatsW(y[0]))
    assert ours[:2] == pytest.approx(table.tconfint_diff(1 - level, usevar="unequal"), rel=1e-9)


@pytest.mark.parametrize("counts", [(240, 400, 250, 410), (3, 1000, 9, 1200), (0, 50, 4, 60), (50, 50, 48, 50)])
def test_proportions_agree_with_the_chi_square_test(counts):
    a, n, b, m = counts
    found = compare_proportions(Sums.from_totals(n, a), Sums.from_totals(m, b))
    assert found.p_value == pytest.approx(chi2_contingency([[a, n - a], [b, m - b]], correction=False).pvalue, rel=1e-9)
    assert found.difference.low < b / m - a / n < found.difference.high
    assert found == compare_proportions(Sums.of([1] * a + [0] * (n - a)), Sums.of([1] * b + [0] * (m - b)))


def test_newcombes_interval_is_the_published_one():
    # Newcombe (1998), table II, method 10: 56/70 against 48/80, and 10/10 against 0/20
    first = compare_proportions(Sums.from_totals(80, 48), Sums.from_totals(70, 56)).difference
    second = compare_proportions(Sums.from_totals(20, 0), Sums.from_totals(10, 10)).difference
    assert (first.low, first.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert (second.low, second.high) == pytest.approx((0.6791, 1.0), abs=5e-5)


@pytest.mark.parametrize("data", BOTH)
def test_cuped_is_the_regression_on_arm_and_covariate(data):
    arms = [GBSTATS["data"][data][side] for side in ("control", "treatment")]
    sums = [Sums.of(a["y"], before=a["before"]) for a in arms]
    adjusted, theta = adjust(sums)
    y, before = (np.concatenate([a[c] for a in arms]) for c in ("y", "before"))
    treated = np.repeat([0, 1], [len(a["y"]) for a in arms])
    fit = sm.OLS(y, np.column_stack([np.ones(len(y)), treated, before])).fit()
    found = compare_means(*adjusted)
    assert (found.difference.estimate, theta) == pytest.approx((fit.params[1], fit.params[2]), rel=1e-9)
    assert found.se < compare_means(*(Sums.of(a["y"]) for a in arms)).se


def test_counts_agree_with_a_poisson_regression_with_the_sandwich():
    rng = np.random.default_rng(4)
    y = [rng.negative_binomial(0.5, 0.4, 300), rng.negative_binomial(0.5, 0.3, 350)]
    found = compare_counts(Sums.of(y[0]), Sums.of(y[1]))
    x = sm.add_constant(np.repeat([0, 1], [300, 350]))
    fit = sm.GLM(np.concatenate(y), x, family=sm.families.Poisson()).fit(cov_type="HC0")
    assert found.relative.estimate == pytest.approx(math.exp(fit.params[1]) - 1, rel=1e-6)
    # HC0 divides by n where we divide by n − 1
    half = np.log1p(found.relative.high) - np.log1p(found.relative.estimate)
    c, t = (estimate_mean(Sums.of(v)) for v in y)
    ours = [(e.se / e.value) ** 2 * (e.n - 1) / e.n for e in (c, t)]
    assert fit.bse[1] == pytest.approx(math.sqrt(sum(ours)), rel=1e-6)
    assert half == pytest.approx(1.959964 * fit.bse[1], rel=0.005)


def test_ratios_are_the_delta_method_by_hand():
    rng = np.random.default_rng(8)
    x = rng.integers(1, 20, 500)
    y = rng.binomial(x, 0.3)
    r = y.sum() / x.sum()
    by_hand = math.sqrt(np.var(y - r * x, ddof=1) / 500) / x.mean()
    assert estimate_mean(linearise(Sums.of(y, x))).se == pytest.approx(by_hand, rel=1e-9)


def test_heterogeneity_agrees_with_cochran_in_statsmodels():
    rng = np.random.default_rng(9)
    slices = [compare_means(Sums.of(rng.normal(0, 1, 80)), Sums.of(rng.normal(i / 4, 2, 90))) for i in range(5)]
    q = combine_effects(
        np.array([e.difference.estimate for e in slices]), np.array([e.se**2 for e in slices])
    ).test_homogeneity()
    assert heterogeneity(slices) == pytest.approx(q.pvalue, rel=1e-6)
    assert heterogeneity(slices[:1]) == 1.0


@cases("belief")
def test_belief_agrees_with_gbstats(case):
    belief = believe(effect_of(case["data"], case["kind"]))
    # gbstats takes degrees of freedom for known: both are normal on the same estimate and standard error
    ours = (belief.chance_to_win, belief.loss_if_chosen, belief.loss_if_kept)
    assert ours == pytest.approx((case["chance_to_win"], case["loss_if_chosen"], case["loss_if_kept"]), rel=1e-6)
    assert (belief.relative.low, belief.relative.high) == pytest.approx((case["low"], case["high"]), rel=1e-6)


# Signs


@pytest.mark.parametrize("kind", ["mean", "ratio"])
def test_a_negative_baseline_keeps_the_sign_of_the_relative_effect(kind):
    rng = np.random.default_rng(2)
    x = np.ones(400)
    lost, less = -10 + rng.normal(0, 1, 400), -8 + rng.normal(0, 1, 400)
    found = (
        compare(kind, Sums.of(lost, x), Sums.of(less, x))
        if kind == "ratio"
        else compare_means(Sums.of(lost), Sums.of(less))
    )
    assert found.relative.estimate == pytest.approx(0.2, abs=0.02)
    assert 0 < found.relative.low < found.relative.high
    assert believe(found).chance_to_win > 0.999


def test_lower_is_better_turns_the_belief_around():
    slower = compare_means(Sums.of([10.0, 11, 12, 9]), Sums.of([12.0, 13, 14, 12]))
    up, down = believe(slower), believe(slower, higher_is_better=False)
    assert up.chance_to_win == pytest.approx(1 - down.chance_to_win)
    assert (up.loss_if_chosen, up.loss_if_kept) == pytest.approx((down.loss_if_kept, down.loss_if_chosen))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1, 100), min_size=3, max_size=20), st.lists(st.floats(1, 100), min_size=3, max_size=20))
def test_swapping_the_arms_turns_the_difference(a, b):
    forth, back = compare_means(Sums.of(a), Sums.of(b)), compare_means(Sums.of(b), Sums.of(a))
    assert forth.difference.low == pytest.approx(-back.difference.high, abs=1e-9)
    assert forth.p_value == pytest.approx(back.p_value)


# Edges: an open interval, p = 1 and words, never a false certainty

EMPTY, ONE, FLAT, SOME = Sums.of([]), Sums.of([3.0]), Sums.of([3.0] * 9), Sums.of([1.0, 2.0, 4.0, 3.0])


@pytest.mark.parametrize(
    ("control", "treatment", "words"),
    [
        (EMPTY, SOME, "the control has 0 units"),
        (SOME, EMPTY, "the treatment has 0 units"),
        (EMPTY, EMPTY, "the control has 0 units"),
        (ONE, SOME, "the control has 1 units"),
        (FLAT, FLAT, "how they vary is unknown"),
    ],
)
def test_what_says_nothing_bounds_nothing(control, treatment, words):
    found = compare_means(control, treatment)
    for interval in (found.difference, found.relative):
        assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert found.p_value == 1.0 and words in found.note
    assert believe(found).chance_to_win == 0.5
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("a", "n", "b", "m"), [(0, 0, 5, 10), (5, 10, 0, 0), (0, 0, 0, 0)])
def test_proportions_without_units_bound_nothing(a, n, b, m):
    found = compare_proportions(Sums.from_totals(n, a), Sums.from_totals(m, b))
    assert found.p_value == 1.0 and found.difference.high == math.inf and found.note


@pytest.mark.parametrize("rate", [0, 1])
def test_proportions_without_variation_are_still_uncertain(rate):
    found = compare_proportions(Sums.from_totals(40, 40 * rate), Sums.from_totals(50, 50 * rate))
    assert found.p_value == 1.0
    assert -0.15 < found.difference.low < 0 < found.difference.high < 0.15
    assert 0 < found.se < 0.1


def test_a_control_without_success_bounds_no_relative_difference():
    found = compare_proportions(Sums.from_totals(100, 0), Sums.from_totals(100, 20))
    assert found.p_value < 0.001 and found.difference.low > 0
    assert found.relative.high == math.inf and "not bounded" in found.note
    assert math.isinf(found.relative_se)


def test_a_control_around_zero_bounds_no_relative_difference():
    rng = np.random.default_rng(1)
    found = compare_means(Sums.of(rng.normal(0, 1, 100)), Sums.of(rng.normal(2, 1, 100)))
    assert found.p_value < 1e-6 and math.isinf(found.relative.high) and "may be 0" in found.note


@pytest.mark.parametrize("wrong", [[0, 2, 1], [0.5, 0.5], [-1, 1]])
def test_a_proportion_of_other_values_is_refused(wrong):
    with pytest.raises(ValueError, match="is not 0 or 1 a unit"):
        compare_proportions(Sums.of(wrong), Sums.of([0, 1]))


def test_a_ratio_needs_its_denominator():
    with pytest.raises(ValueError, match="have no denominator"):
        compare_ratios(SOME, SOME)
    with pytest.raises(ValueError, match="Σ x of 2 units is 0"):
        compare_ratios(Sums.of([1.0, 2.0], [0, 0]), Sums.of([1.0, 2.0], [1, 1]))
    empty = compare_ratios(Sums.of([], []), Sums.of([1.0, 2.0], [1, 1]))
    assert empty.p_value == 1.0 and "0 units" in empty.note


def test_negative_counts_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="counts are 0 or more"):
        compare_counts(Sums.of([-3.0, -2.0]), Sums.of([1.0, 2.0]))
    with pytest.raises(ValueError, match="choose proportion, mean, ratio, count"):
        compare("median", SOME, SOME)
    with pytest.raises(ValueError, match="level is 95"):
        compare_means(SOME, Sums.of([1.0, 5.0]), level=95)


def test_counts_of_zero():
    none, few = Sums.of([0] * 50), Sums.of([0] * 47 + [1] * 3)
    gone = compare_counts(few, none)
    assert gone.relative.low == -1.0 and math.isinf(gone.relative.high)
    assert compare_counts(none, few).relative.high == math.inf
    assert compare_counts(none, none).p_value == 1.0


# Quantiles


def test_a_median_of_units_is_the_binomial_interval():
    rng = np.random.default_rng(3)
    sample = np.sort(rng.exponential(1, 2001))
    found = estimate_quantile(sample, None, 0.5)
    assert found.value == sample[1000]
    # the order statistics at n/2 ± 1.96 √n/2
    half = 1.96 * math.sqrt(2001) / 2
    expected = (sample[round(1000 + half)] - sample[round(1000 - half)]) / (2 * 1.96)
    assert found.se == pytest.approx(expected, rel=0.03)


def test_copies_of_an_event_add_no_certainty():
    rng = np.random.default_rng(6)
    sample = rng.exponential(1, 400)
    once = estimate_quantile(sample, None, 0.9)
    copied = estimate_quantile(np.repeat(sample, 20), np.repeat(np.arange(400), 20), 0.9)
    assert copied.n == 400 and copied.se == pytest.approx(once.se, rel=0.1)
    assert estimate_quantile(np.repeat(sample, 20), None, 0.9).se < 0.5 * once.se


def test_too_few_units_bound_no_tail():
    sample = list(range(60))
    assert compare_quantiles((sample, None), (sample, None), 0.99).difference.high == math.inf
    assert compare_quantiles(([], None), (sample, None)).p_value == 1.0
    with pytest.raises(ValueError, match="quantile is 99"):
        estimate_quantile(sample, None, 99)
    with pytest.raises(ValueError, match="pass the unit of each event"):
        estimate_quantile(sample, ["u1"], 0.5)


# Strata and adjustment


def test_strata_keep_simpson_out():
    phases = [((9000, 450), (1000, 50)), ((5000, 350), (5000, 350))]
    arms = [(Sums.from_totals(*c), Sums.from_totals(*t)) for c, t in phases]
    assert compare_proportions(arms[0][0] + arms[1][0], arms[0][1] + arms[1][1]).p_value < 0.05
    assert stratify([compare_proportions(*pair) for pair in arms]).difference.estimate == pytest.approx(0, abs=1e-12)


def test_equal_strata_say_what_one_of_double_size_says():
    half = Effect(*[Estimate(v, 0.2, 500, math.inf) for v in (1.0, 1.3)], None, None, 1.0)
    both, whole = stratify([half, half]), effect_between(*[Estimate(v, 0.2 / math.sqrt(2), 1000) for v in (1.0, 1.3)])
    assert (both.se, both.p_value, both.n) == pytest.approx((whole.se, whole.p_value, 2000))
    assert (both.relative.low, both.relative.high) == pytest.approx((whole.relative.low, whole.relative.high))


def test_a_stratum_with_one_arm_has_no_weight():
    pair = compare_proportions(Sums.from_totals(100, 40), Sums.from_totals(100, 60))
    lonely = compare_proportions(Sums.from_totals(500, 50), Sums.from_totals(0, 0))
    assert stratify([lonely, pair]).difference == pair.difference
    nothing = stratify([lonely])
    assert nothing.p_value == 1.0 and nothing.n == 500 and math.isinf(nothing.se)
    assert stratify([]).p_value == 1.0


def test_a_covariate_that_does_not_vary_changes_nothing():
    control, treatment = Sums.of([1.0, 2, 3], before=[5, 5, 5]), Sums.of([2.0, 3, 5], before=[5, 5, 5])
    (a, b), theta = adjust([control, treatment])
    adjusted, plain = compare_means(a, b), compare_means(Sums.of([1.0, 2, 3]), Sums.of([2.0, 3, 5]))
    assert theta == 0 and (adjusted.se, adjusted.p_value) == pytest.approx((plain.se, plain.p_value))
    assert adjust([Sums.of([], before=[])] * 2)[1] == 0


def test_winsorising_uses_one_bound_for_all_arms():
    (a, b), bound = winsorise([[1, 2, 3, 4, 1000], [1, 2, 3, 4, 5]], 0.1)
    assert bound == a.max() == 1000 and b.max() == 5
    (a, b), bound = winsorise([np.arange(100), np.arange(100, 200)], 0.1)
    assert bound == 180 and b.max() == 180 and a.max() == 99
    (a, b), bound = winsorise([[1.0], []], 0.0)
    assert math.isinf(bound) and len(b) == 0
    with pytest.raises(ValueError, match="share is 0.7"):
        winsorise([[1.0]], 0.7)
