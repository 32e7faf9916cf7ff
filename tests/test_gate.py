"The gate: pairing, the table of verdicts, and monotonicity."

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.core import digest
from mlops_workbench.gate import Evidence, Verdict, judge, judge_criterion, plot_evidence, weigh
from mlops_workbench.metrics import Metric
from mlops_workbench.stats import Interval
from mlops_workbench.task import Criterion

up = Metric("share", "Higher is better.", True, 0, 1)
down = Metric("cost", "Lower is better.", False, 0, 100, "ct")


def interval(low, high, n=100):
    return Interval((low + high) / 2, low, high, n, n)


@pytest.mark.parametrize(
    ("metric", "rule", "bound", "low", "high", "outcome"),
    [
        (up, "at_least", 0.5, 0.5, 0.6, "pass"),
        (up, "at_least", 0.5, 0.49, 0.6, "not enough evidence"),
        (up, "at_least", 0.5, 0.3, 0.5, "not enough evidence"),
        (up, "at_least", 0.5, 0.3, 0.49, "fail"),
        (down, "at_most", 20, 10, 20, "pass"),
        (down, "at_most", 20, 10, 21, "not enough evidence"),
        (down, "at_most", 20, 21, 30, "fail"),
        (up, "no_worse", 0.0, 0.0, 0.0, "pass"),
        (up, "no_worse", 0.0, 0.01, 0.2, "pass"),
        (up, "no_worse", 0.0, -0.01, 0.2, "not enough evidence"),
        (up, "no_worse", 0.02, -0.01, 0.2, "pass"),
        (up, "no_worse", 0.02, -0.2, -0.03, "fail"),
        (down, "no_worse", 0.0, -5, 0.0, "pass"),
        (down, "no_worse", 0.0, -5, 0.1, "not enough evidence"),
        (down, "no_worse", 1.0, -5, 1.0, "pass"),
        (down, "no_worse", 1.0, 1.5, 3, "fail"),
        (up, "ratio_at_least", 0.95, 0.95, 1.2, "pass"),
        (up, "ratio_at_least", 0.95, 0.9, 1.2, "not enough evidence"),
        (up, "ratio_at_least", 0.95, 0.5, 0.94, "fail"),
        (up, "ratio_at_least", 0.95, -math.inf, math.inf, "not enough evidence"),
    ],
)
def test_table_of_rules(metric, rule, bound, low, high, outcome):
    part = {"no_worse": "difference", "ratio_at_least": "ratio"}.get(rule)
    found = interval(low, high)
    evidence = Evidence(metric, interval(0.1, 0.2), **{part: found}) if part else Evidence(metric, found)
    judged = judge_criterion(Criterion(metric.name, rule, bound, "somebody asked"), evidence)
    assert judged.outcome == outcome
    assert str(found) in judged.reason and f"{abs(bound):g}" in judged.reason or bound == 0
    assert ("somebody asked" in judged.reason) == (outcome != "pass")


@pytest.mark.parametrize(
    ("metric", "worst", "n", "bound", "outcome"),
    [
        (up, 1.0, 100, 1.0, "pass"),
        (up, 0.99, 100, 1.0, "fail"),
        (up, 0.0, 3, 1.0, "fail"),
        (up, 1.0, 3, 1.0, "not enough evidence"),
        (up, None, 100, 1.0, "not enough evidence"),
        (down, 0.0, 100, 0.0, "pass"),
        (down, 0.1, 100, 0.0, "fail"),
    ],
)
def test_table_of_all(metric, worst, n, bound, outcome):
    evidence = Evidence(metric, interval(0, 1, n), worst=worst)
    assert judge_criterion(Criterion(metric.name, "all", bound), evidence).outcome == outcome


def test_missing_evidence_is_a_reason_and_an_unknown_rule_an_error():
    absent = judge([Criterion("share", "at_least", 0.5)], [])
    assert (absent.outcome, absent.reasons) == ("not enough evidence", ("share was not measured",))
    alone = judge([Criterion("share", "no_worse", 0.0)], [Evidence(up, interval(0.5, 0.6))])
    assert alone.reasons == ("share has no baseline to compare with",)
    few = judge([Criterion("share", "at_least", 0.1)], [Evidence(up, interval(0.5, 0.6, 12))], min_rows=30)
    assert few.reasons == ("share rests on 12 rows; asked: 30 or more",)
    with pytest.raises(ValueError, match="choose all, at_least"):
        judge([Criterion("share", "above", 0.5)], [Evidence(up, interval(0.5, 0.6))])
    with pytest.raises(ValueError, match="would pass everything"):
        judge([], [])


ORDER = ("fail", "not enough evidence", "pass")


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 0.5))
def test_the_gate_is_monotone(low, width, bound, more):
    criterion = Criterion("share", "at_least", bound)

    def rank(low, bound=bound):
        evidence = [Evidence(up, interval(low, low + width))]
        return ORDER.index(judge([Criterion("share", "at_least", bound)], evidence).outcome)

    assert rank(low + more) >= rank(low), "better evidence is never judged worse"
    assert rank(low, bound + more) <= rank(low), "a stricter bound is never easier"
    evidence = [Evidence(up, interval(low, low + width))]
    both = judge([criterion, Criterion("share", "at_least", bound + more)], evidence)
    assert ORDER.index(both.outcome) <= rank(low), "asking more is never easier"


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [("pp", "pass"), ("pn", "not enough evidence"), ("nf", "fail"), ("pf", "fail"), ("pnf", "fail")],
)
def test_one_bad_criterion_decides(outcomes, expected):
    ends = {"p": (0.6, 0.7), "n": (0.4, 0.6), "f": (0.1, 0.2)}
    metrics = [Metric(f"m{i}", "x", True, 0, 1) for i in range(len(outcomes))]
    evidence = [Evidence(m, interval(*ends[o])) for m, o in zip(metrics, outcomes, strict=True)]
    verdict = judge([Criterion(m.name, "at_least", 0.5) for m in metrics], evidence)
    assert verdict.outcome == expected and verdict.passed == (expected == "pass")
    assert len(verdict.reasons) == len(outcomes) and [c.metric for c in verdict.criteria] == [m.name for m in metrics]
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict
    digest(verdict.to_dict())  # the ledger's canonical JSON takes it
    assert expected in verdict._repr_markdown_()


def tables(seed=0, n=60):
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame({"example_id": [f"e{i:03d}" for i in range(n)], "unit_id": [f"u{i // 4}" for i in range(n)]})
    baseline = rows.assign(share=rng.uniform(0, 1, n), cost=rng.uniform(0, 50, n))
    return baseline.assign(share=np.clip(baseline["share"] + 0.1, 0, 1)), baseline


def test_rows_are_paired_by_example_not_by_place():
    candidate, baseline = tables()
    shuffled = baseline.sample(frac=1, random_state=4)
    assert weigh(candidate, shuffled, [up]) == weigh(candidate, baseline, [up])
    found = weigh(candidate, baseline, [up])[0]
    assert found.candidate.n == 60 and found.candidate.n_clusters == 15
    assert found.worst == candidate["share"].min()
    assert found.difference.estimate == pytest.approx(found.candidate.estimate - found.baseline.estimate)
    assert found.ratio.estimate == pytest.approx(found.candidate.estimate / found.baseline.estimate)
    json.dumps(found.to_dict())


def test_a_policy_compared_with_itself_passes_no_worse_with_bound_zero():
    _, baseline = tables()
    criteria = [Criterion("share", "no_worse", 0.0), Criterion("cost", "no_worse", 0.0)]
    assert judge(criteria, weigh(baseline, baseline, [up, down])).passed


def test_a_ratio_metric_is_weighted_on_each_side():
    candidate, baseline = tables()
    ratio = Metric("rate", "Clicks per weight.", True, 0, 1, value="clicks", weight="weight")
    candidate = candidate.assign(weight=2.0, clicks=1.0)
    baseline = baseline.assign(weight=1.0, clicks=0.25)
    found = weigh(candidate, baseline, [ratio])[0]
    assert (found.candidate.estimate, found.baseline.estimate, found.ratio.estimate, found.worst) == (
        0.5,
        0.25,
        2.0,
        0.5,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c, b: (c, b[:-1]), "was scored for one policy only"),
        (lambda c, b: (pd.concat([c, c[:1]]), b), "candidate scores hold example 'e000' twice"),
        (lambda c, b: (c, b.assign(unit_id="u")), "different units"),
        (lambda c, b: (c.assign(share=2.0), b), "share of example 'e000' is 2"),
        (lambda c, b: (c, b.assign(share=-1.0)), "share of example 'e000' is -1"),
        (lambda c, b: (c.drop(columns="share"), b), "no column 'share'"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        weigh(*change(*tables()), [up])


def test_a_metric_that_the_baseline_lacks_is_not_compared():
    candidate, baseline = tables()
    found = weigh(candidate, baseline.drop(columns="cost"), [up, down])
    assert found[0].baseline is not None and found[1].baseline is None and found[1].difference is None
    assert weigh(candidate, None, [up])[0].ratio is None


def test_the_picture_has_one_row_per_metric():
    evidence = weigh(*tables(), [up, down])
    assert len(plot_evidence(evidence).axes) == 2
