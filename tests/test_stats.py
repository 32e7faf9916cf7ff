"Intervals: exact cases against scipy, properties, and coverage by simulation with fixed seeds."

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mlops_workbench.stats import Interval, difference_interval, mean_interval, proportion_interval, ratio_interval

values = st.lists(st.floats(-10, 10, allow_nan=False, width=32), min_size=2, max_size=30)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 1000), (17, 40)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_proportion_is_the_exact_interval(k, n, level):
    expected = binomtest(k, n).proportion_ci(level, method="exact")
    found = proportion_interval(k, n, level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert mean_interval([1] * k + [0] * (n - k), level=level) == found


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(ValueError, match="expected from 0 to the number of trials"):
        proportion_interval(k, n)


@settings(max_examples=40, deadline=None)
@given(values, st.integers(0, 5))
def test_an_interval_holds_its_estimate_and_does_not_depend_on_the_order_of_rows(sample, seed):
    found = mean_interval(sample, seed=seed)
    assert found.low - 1e-9 <= found.estimate <= found.high + 1e-9
    assert found == mean_interval(sample, seed=seed)
    clusters = [i % 5 for i in range(len(sample))]
    order = np.random.default_rng(seed).permutation(len(sample))
    a = mean_interval(sample, clusters, seed=seed)
    b = mean_interval(np.array(sample)[order], np.array(clusters)[order], seed=seed)
    assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(values, st.floats(0.1, 5))
def test_a_difference_is_antisymmetric_and_shifts_with_the_candidate(sample, shift):
    sample = np.array(sample)
    other = sample[::-1]
    forth, back = difference_interval(sample, other), difference_interval(other, sample)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    moved = difference_interval(sample + shift, sample)
    assert (moved.low, moved.high) == pytest.approx((shift, shift), abs=1e-6)


def test_weights_of_one_change_nothing_and_scale_cancels():
    rng = np.random.default_rng(0)
    sample, units, weight = rng.normal(size=60), np.arange(60) // 3, rng.uniform(0.1, 3, 60)
    assert mean_interval(sample, units) == mean_interval(sample, units, np.ones(60))
    a, b = mean_interval(sample * weight, units, weight), mean_interval(7 * sample * weight, units, 7 * weight)
    assert (a.estimate, a.low, a.high) == pytest.approx((b.estimate, b.low, b.high))
    assert a.estimate == pytest.approx(np.average(sample, weights=weight))


def test_the_bootstrap_agrees_with_a_plain_loop():
    rng = np.random.default_rng(5)
    unit = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    sample = rng.normal(0, 1, 60)[unit] + rng.normal(0, 0.3, len(unit))
    found, loop = mean_interval(sample, unit), []
    for _ in range(4000):
        drawn = rng.integers(0, 60, 60)
        loop.append(np.concatenate([sample[unit == u] for u in drawn]).mean())
    width = np.subtract(*np.quantile(loop, [0.975, 0.025]))
    # Student's t with 59 degrees of freedom is 3 % wider than the normal; 5 % is left for the noise of the draws
    assert (found.high - found.low) / width == pytest.approx(1.03, abs=0.05)


@pytest.mark.parametrize("clusters", [None, ["u"] * 4])
def test_nothing_bounds_an_interval_without_data(clusters):
    empty = mean_interval([])
    assert math.isnan(empty.estimate) and (empty.low, empty.high) == (-math.inf, math.inf)
    assert ratio_interval([1, 2, 1, 2], [0, 0, 0, 0], clusters).high == math.inf
    one = difference_interval([1, 2, 1, 2], [1, 1, 1, 1], ["u"] * 4)
    assert (one.low, one.high, one.n_clusters) == (-math.inf, math.inf, 1)
    assert mean_interval([1.0, 2.0], None, [0.0, 0.0]).low == -math.inf


def test_all_rows_alike_are_not_certainty():
    clustered = mean_interval([0] * 100, [i // 10 for i in range(100)])
    assert (clustered.low, clustered.n, clustered.n_clusters) == (0, 100, 10)
    assert clustered.high == pytest.approx(proportion_interval(0, 10).high)
    assert mean_interval([0] * 100).high == pytest.approx(proportion_interval(0, 100).high)


def test_rows_without_weight_are_not_there():
    clicks, judged, unit = [1, 0, 0, 1, 0, 1], [1, 1, 1, 0, 1, 0], list("aabbcc")
    assert mean_interval([c * j for c, j in zip(clicks, judged, strict=True)], None, judged) == mean_interval(
        [1, 0, 0, 0]
    )
    assert mean_interval([0, 0, 0, 0, 0, 0], unit, judged).high == pytest.approx(proportion_interval(0, 3).high)
    a, b = np.array(clicks) * judged, np.zeros(6)
    found = difference_interval(a, b, unit, (judged, judged))
    assert (found.n, found.n_clusters, found.estimate) == (4, 3, 0.25)
    assert mean_interval([0.0, 0.0], ["a", "b"], [0.0, 0.0]).n == 0


def test_an_interval_survives_json():
    for found in (Interval(0.5, 0.1, 0.9, 10, 3), Interval(math.nan, -math.inf, math.inf, 0, 0)):
        again = Interval.from_dict(found.to_dict())
        assert str(again) == str(found) and None not in (again.low, again.high)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_interval([1, math.inf]), "finite"),
        (lambda: mean_interval([1, 2], ["a"]), "pass the unit of each row"),
        (lambda: difference_interval([1, 2], [1]), "pair them first"),
    ],
)
def test_bad_rows_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def study(rng, n_units):
    "Simulate one study: rows of a unit share half of what they are; true mean 0, true ratio 0.5, true difference 0.1."
    unit = np.repeat(np.arange(n_units), rng.integers(1, 8, n_units))
    shared = rng.normal(0, 1, n_units)[unit]
    value = shared + rng.normal(0, 1, len(unit))
    weight = rng.gamma(2, 1, n_units)[unit] + rng.gamma(1, 1, len(unit))
    reward = weight * (0.5 + 0.3 * rng.normal(size=n_units)[unit])
    return unit, value, value + 0.1 + rng.normal(0, 0.2, len(unit)), reward, weight


@pytest.mark.parametrize("n_units", [20, 80])
def test_clustered_intervals_cover_the_truth(n_units):
    rng, hits = np.random.default_rng(20), np.zeros(3)
    n_studies = 600
    for _ in range(n_studies):
        unit, value, better, reward, weight = study(rng, n_units)
        found = (
            mean_interval(value, unit),
            difference_interval(better, value, unit),
            mean_interval(reward, unit, weight),
        )
        hits += [i.low <= truth <= i.high for i, truth in zip(found, (0, 0.1, 0.5), strict=True)]
    for covered in hits:
        known = proportion_interval(int(covered), n_studies, 0.99)
        assert known.high >= 0.94 and known.low >= 0.87, f"covers {known}"


def test_rare_events_are_covered_by_the_exact_interval():
    rng = np.random.default_rng(3)
    clicks = rng.binomial(500, 0.004, 2000)
    covered = [i.low <= 0.004 <= i.high for i in (proportion_interval(int(k), 500) for k in clicks)]
    assert proportion_interval(sum(covered), len(covered), 0.99).low >= 0.95
