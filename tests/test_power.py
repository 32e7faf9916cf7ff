"Sizes, durations, sample ratio mismatch and corrections: against statsmodels, scipy and gbstats."

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import samplesize_proportions_2indep_onetail

from mlops_workbench.power import (
    Design,
    correct,
    detectable_effect,
    duration_days,
    needed_drift,
    plot_power,
    power_of,
    sample_size,
    srm_check,
)
from mlops_workbench.sequential import crossing_probability

GBSTATS = json.loads((Path(__file__).parent / "cases" / "gbstats.json").read_text())


@pytest.mark.parametrize(("rate", "effect"), [(0.05, 0.05), (0.05, -0.05), (0.6, 0.02), (0.001, 0.5)])
@pytest.mark.parametrize("power", [0.8, 0.95])
def test_sizes_for_shares_agree_with_statsmodels(rate, effect, power):
    expected = samplesize_proportions_2indep_onetail(rate * effect, rate, power)
    assert sample_size(Design(rate, power=power), effect) == 2 * math.ceil(expected - 1e-9)


@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize(("mean", "sd", "effect"), [(42.0, 60.0, 0.05), (-42.0, 60.0, 0.05), (3.0, 0.5, -0.01)])
def test_sizes_for_means_agree_with_statsmodels(mean, sd, effect, share):
    ratio = (1 - share) / share  # of control to treatment
    n = NormalIndPower().solve_power(abs(mean * effect) / sd, power=0.8, alpha=0.05, ratio=ratio)
    # statsmodels adds the chance to err in the wrong direction, which is below one in a million here
    assert sample_size(Design(mean, sd, share=share), effect) == pytest.approx(n * (1 + ratio), rel=1e-6, abs=2)


@pytest.mark.parametrize("looks", [None, 1, 28])
@pytest.mark.parametrize("sd", [None, 0.8])
def test_size_power_and_detectable_effect_are_inverses(looks, sd):
    design = Design(0.3, sd, looks=looks)
    n = sample_size(design, 0.04)
    assert power_of(design, 0.04, n) == pytest.approx(0.8, abs=0.002)
    assert detectable_effect(design, n) == pytest.approx(0.04, rel=0.01)
    assert power_of(design, 0.04, n // 2) < power_of(design, 0.04, n) < power_of(design, 0.04, 2 * n)


def test_a_watched_experiment_needs_more_and_more_the_fewer_looks_there_are_to_catch_it():
    sizes = [sample_size(Design(0.3, looks=looks), 0.04) for looks in (120, 28, 7, 1)]
    assert all(a < b for a, b in pairwise(sizes))
    assert 1.6 < sizes[1] / sample_size(Design(0.3), 0.04) < 1.8
    assert crossing_probability(needed_drift(Design(0.3, looks=28))) == pytest.approx(0.8, abs=1e-6)


def test_what_cannot_be_found_is_infinite():
    assert math.isinf(detectable_effect(Design(0.9), 10))
    assert detectable_effect(Design(1.0, sd=100.0), 10) > 50


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"baseline": 1.2}, "give sd for a mean"),
        ({"baseline": 0.0, "sd": 1.0}, "needs a baseline that is not 0"),
        ({"baseline": math.nan, "sd": 1.0}, "needs a baseline that is not 0"),
        ({"baseline": 1.0, "sd": 0.0}, "above 0"),
        ({"baseline": 1.0, "sd": math.inf}, "above 0"),
        ({"baseline": 0.5, "power": 80}, "power is 80"),
        ({"baseline": 0.5, "share": 0}, "share is 0"),
        ({"baseline": 0.5, "looks": 0}, "looks is 0"),
    ],
)
def test_a_design_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Design(**arguments)


@pytest.mark.parametrize("effect", [0.0, math.nan, math.inf, 1.5, -1.0])
def test_an_effect_that_cannot_be_is_refused(effect):
    with pytest.raises(ValueError, match="pass the smallest relative effect|pass a smaller effect"):
        sample_size(Design(0.5), effect)
    with pytest.raises(ValueError, match="n is 0"):
        power_of(Design(0.5), 0.1, 0)


def test_days():
    assert duration_days(10_000, 1_000) == 10
    assert duration_days(10_001, 1_000) == 11
    assert duration_days(10, 1_000) == 7
    with pytest.raises(ValueError, match="units_per_day is 0"):
        duration_days(10, 0)


@pytest.mark.parametrize("case", GBSTATS["srm"], ids=lambda c: str(c["counts"]))
def test_srm_agrees_with_gbstats(case):
    assert srm_check(case["counts"], case["weights"]).p_value == pytest.approx(case["p_value"], rel=1e-6, abs=1e-12)


def test_srm_says_what_it_saw():
    bad, good = srm_check([50_900, 49_100], [1, 1]), srm_check([50_100, 49_900], [1, 1])
    assert not bad.ok and "50,900 : 49,100 units where 50,000 : 50,000" in bad.words
    assert good.ok and "as promised" in good.words
    assert srm_check([0, 0, 0], [1, 1, 2]).ok
    assert srm_check([50_400, 49_600], [1, 1], threshold=0.05).ok is False
    assert srm_check([9_000, 1_000], [0.9, 0.1]).ok and not srm_check([9_000, 1_000], [0.5, 0.5]).ok


@pytest.mark.parametrize(
    ("counts", "weights"), [([10], [1]), ([10, 10], [1]), ([-1, 10], [1, 1]), ([1, 1], [0, 1]), ([1, 1], [math.nan, 1])]
)
def test_counts_that_cannot_be_are_refused(counts, weights):
    with pytest.raises(ValueError, match="pass a count of 0 or more|must be above 0"):
        srm_check(counts, weights)


@pytest.mark.parametrize(("method", "name"), [("holm", "holm"), ("bh", "fdr_bh")])
def test_corrections_agree_with_statsmodels_and_skip_what_was_not_asked(method, name):
    p = [0.001, 0.04, 0.03, 0.2, 0.011]
    expected = multipletests(p, method=name)[1].tolist()
    assert correct(p, method) == pytest.approx(expected)
    with_gap = correct([*p[:2], math.nan, *p[2:]], method)
    assert math.isnan(with_gap[2]) and with_gap[:2] + with_gap[3:] == pytest.approx(expected)
    assert correct([], method) == [] and correct([0.04], method) == [0.04]


def test_corrections_by_hand():
    assert correct([0.01, 0.02, 0.03], "holm") == pytest.approx([0.03, 0.04, 0.04])
    assert correct([0.01, 0.02, 0.03], "bh") == pytest.approx([0.03, 0.03, 0.03])
    with pytest.raises(ValueError, match="choose holm or bh"):
        correct([0.1], "bonferroni")
    with pytest.raises(ValueError, match="between 0 and 1"):
        correct([1.1])


def test_the_power_curve_passes_through_the_plan():
    design = Design(0.3, looks=28)
    n = sample_size(design, 0.05)
    line = plot_power({"watched": design}, 0.05, 2 * n).axes[0].lines[0]
    x, y = line.get_data()
    assert (y[x < 0.9 * n] < 0.8).all() and (y[x > 1.1 * n] > 0.8).all()
