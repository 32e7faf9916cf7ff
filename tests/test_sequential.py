"Confidence sequences: against gbstats, against each other, and against simulated paths."

import json
import math

import numpy as np
import pytest
from test_effect import cases, effect_of

from mlops_workbench.effect import compare_means, compare_proportions
from mlops_workbench.sequential import (
    always_valid_p,
    confidence_bounds,
    confidence_sequence,
    crossing_probability,
    guard,
    plot_sequence,
    watch,
    widening,
)
from mlops_workbench.sums import Sums


@cases("sequential")
def test_a_sequence_agrees_with_gbstats(case):
    seen = watch(effect_of(case["data"], case["kind"]), tuning=case["tuning"])
    interval = seen.difference if case["scale"] == "absolute" else seen.relative
    assert (interval.estimate, interval.low, interval.high) == pytest.approx(
        (case["estimate"], case["low"], case["high"]), rel=1e-6
    )
    if case["scale"] == "absolute":
        assert seen.p_value == pytest.approx(case["p_value"], rel=1e-6)


@cases("sequential lower", "sequential upper")
def test_one_sided_bounds_agree_with_gbstats(case):
    found = effect_of(case["data"], case["kind"])
    interval, se = found.difference, found.se
    if case["scale"] == "relative":
        interval, se = found.relative, found.relative_se
    ours = confidence_bounds(interval.estimate, se, found.n, tuning=case["tuning"])
    side = "low" if case["rule"].endswith("lower") else "high"
    assert getattr(ours, side) == pytest.approx(case[side], rel=1e-6)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [50, 5_000, 80_000])
def test_p_is_one_minus_level_exactly_at_the_edge(n, level):
    edge = widening(n, level, 5_000) * 0.02
    assert always_valid_p(edge, 0.02, n, level, 5_000) == pytest.approx(1 - level)
    assert always_valid_p(-edge, 0.02, n, level, 5_000) == pytest.approx(1 - level)
    assert confidence_sequence(edge, 0.02, n, level, 5_000).low == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("one_sided", [False, True])
def test_it_is_tightest_where_it_was_tuned(one_sided):
    grid = np.geomspace(500, 50_000, 400)
    # the width of an interval is widening / √n in units of one standard deviation: what is tuned is the boundary's excess
    best = grid[np.argmin([widening(n, 0.95, 5_000, one_sided) for n in grid])]
    assert 3_500 < best < 15_000
    assert widening(5_000, 0.95, 5_000, one_sided) < 1.05 * widening(best, 0.95, 5_000, one_sided)
    assert widening(5_000, 0.95, 5_000, True) < widening(5_000, 0.95, 5_000, False)


@pytest.mark.parametrize(("se", "n"), [(0.0, 10), (math.inf, 10), (math.nan, 10), (0.1, 0)])
def test_nothing_known_is_an_open_interval_and_p_one(se, n):
    found = confidence_sequence(0.3, se, n)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert confidence_bounds(0.3, se, n).low == -math.inf
    assert always_valid_p(0.3, se, n) == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"level": 1.0}, "level is 1.0"),
        ({"level": 0.4, "one_sided": True}, "between 0.5 and 1"),
        ({"tuning": 0}, "tuning is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        widening(100, **arguments)
    with pytest.raises(ValueError, match="looks is 0"):
        crossing_probability(0.0, looks=0)


# The chance to decide: computed and simulated


def simulated(drift, looks, one_sided, n=20_000):
    "Walk Brownian paths and count those that leave the boundary."
    rng = np.random.default_rng(12)
    steps = rng.normal(drift / looks, math.sqrt(1 / looks), (n, looks))
    times = np.arange(1, looks + 1) / looks
    far = np.array([widening(t, 0.95, 1.0, one_sided) for t in times]) * np.sqrt(times)
    paths = steps.cumsum(axis=1)
    return ((paths if one_sided else np.abs(paths)) > far).any(axis=1).mean()


@pytest.mark.parametrize(
    ("drift", "looks", "one_sided"), [(0, 28, False), (2.8, 28, False), (3.7, 7, False), (3.2, 28, True)]
)
def test_the_computed_chance_is_the_simulated_one(drift, looks, one_sided):
    share = simulated(drift, looks, one_sided)
    # four standard errors of 20,000 paths
    assert crossing_probability(float(drift), 0.95, looks, one_sided) == pytest.approx(
        share, abs=4 * 0.5 / math.sqrt(20_000)
    )


@pytest.mark.parametrize("looks", [1, 5, 28, 120])
def test_false_alarms_stay_below_the_promise_at_any_number_of_looks(looks):
    chances = [crossing_probability(0.0, 0.95, looks, one_sided) for one_sided in (False, True)]
    assert all(0 < c < 0.05 for c in chances)


def test_one_look_is_the_normal_tail():
    from scipy.stats import norm

    far = widening(1.0, 0.95, 1.0)
    expected = norm.sf(far - 2.5) + norm.sf(far + 2.5)
    assert crossing_probability(2.5, 0.95, 1) == pytest.approx(expected, abs=1e-9)


# Guardrails


def share(accepted, n=3000):
    return compare_proportions(Sums.from_totals(n, n // 2), Sums.from_totals(n, accepted))


@pytest.mark.parametrize(
    ("accepted", "margin", "outcome"),
    [(1200, 0.05, "broken"), (1200, 0.3, "kept"), (1300, 0.15, "worse"), (1500, 0.2, "kept"), (1480, 0.02, "unsure")],
)
def test_a_guardrail_on_what_should_be_high(accepted, margin, outcome):
    found = guard(share(accepted), margin, tuning=6000)
    assert found.outcome == outcome, found.words
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_guardrail_on_what_should_be_low_is_turned_around():
    up, down = guard(share(1200), 0.05, tuning=6000), guard(share(1200), 0.05, higher_is_better=False, tuning=6000)
    assert (up.outcome, down.outcome) == ("broken", "kept")
    assert up.gain.low == pytest.approx(-down.gain.high)


def test_a_guardrail_without_units_is_unsure_and_says_why():
    found = guard(compare_means(Sums.of([]), Sums.of([1.0, 2.0])), 0.05)
    assert found.outcome == "unsure" and "0 units" in found.words
    with pytest.raises(ValueError, match="margin is -0.1"):
        guard(share(1500), -0.1)


def test_a_negative_baseline_loses_when_it_falls():
    rng = np.random.default_rng(0)
    fallen = compare_means(Sums.of(rng.normal(-10, 1, 2000)), Sums.of(rng.normal(-12, 1, 2000)))
    assert guard(fallen, 0.05, tuning=4000).outcome == "broken"
    assert guard(fallen, 0.05, higher_is_better=False, tuning=4000).outcome == "kept"


def test_a_picture_is_drawn_where_nothing_is_bounded_yet():
    figure = plot_sequence([share(0, 0), share(20, 50), share(1500)], tuning=6000)
    lines = [line.get_ydata() for line in figure.axes[0].lines[:4]]
    assert all(np.isnan(y[0]) and np.isfinite(y[2]) for y in lines)
