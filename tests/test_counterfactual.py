"Counterfactual estimators: closed forms against independent code, known truths, and the refusal of thin logs."

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.counterfactual import (
    diagnose_weights,
    doubly_robust,
    effective_sample_size,
    estimate_value,
    importance_weight,
)

logs = st.lists(
    st.tuples(st.integers(0, 1), st.floats(0, 1, width=32), st.floats(0.0009765625, 1, width=32)),
    min_size=2,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(logs)
def test_closed_forms_agree_with_exact_fractions(log):
    weights = [importance_weight(pi, p) for _, pi, p in log]
    exact = [Fraction(pi) / Fraction(p) for _, pi, p in log]
    rewards = [r for r, _, _ in log]
    earned = sum(w * r for w, r in zip(exact, rewards, strict=True))
    found = estimate_value(rewards, weights)
    assert found.ips.estimate == pytest.approx(float(earned / len(log)), rel=1e-9, abs=1e-9)
    if sum(exact):
        assert found.snips.estimate == pytest.approx(float(earned / sum(exact)), rel=1e-9, abs=1e-9)
        squares = sum(w * w for w in exact)
        assert effective_sample_size(np.array(weights)) == pytest.approx(float(sum(exact) ** 2 / squares), rel=1e-9)
        assert -1e-9 <= found.snips.estimate <= 1 + 1e-9
    else:
        assert np.isnan(found.snips.estimate)


def world(seed, n=6000, n_actions=5):
    "Simulate a logged policy that prefers some actions, in two contexts."
    rng = np.random.default_rng(seed)
    rate = rng.uniform(0.05, 0.5, (2, n_actions))
    logged = rng.dirichlet(np.ones(n_actions) * 3, 2) * 0.9 + 0.1 / n_actions
    target = rng.dirichlet(np.ones(n_actions), 2)
    x = rng.integers(0, 2, n)
    a = np.array([rng.choice(n_actions, p=logged[i]) for i in x])
    r = (rng.random(n) < rate[x, a]).astype(float)
    weights = [importance_weight(target[i, j], logged[i, j]) for i, j in zip(x, a, strict=True)]
    return x, a, r, np.array(weights), rate, target


@pytest.mark.parametrize("seed", range(4))
def test_the_known_value_is_found(seed):
    x, a, r, weights, rate, target = world(seed)
    truth = (target * rate).sum(axis=1)[x].mean()
    found = estimate_value(r, weights)
    assert found.diagnostics.usable
    for interval in (found.ips, found.snips):
        # four half-widths of a 95 % interval: a miss would be a wrong formula, not chance
        assert abs(interval.estimate - truth) < 4 * (interval.high - interval.low) / 2
    for wrong_by in (0.0, 0.2):
        q = rate + wrong_by
        corrected = doubly_robust(r, weights, q[x, a], (target * q).sum(axis=1)[x])
        assert abs(corrected.estimate - truth) < 4 * (corrected.high - corrected.low) / 2


def test_the_logged_policy_itself_has_weight_one_and_its_own_average():
    r = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    found = estimate_value(r, [importance_weight(p, p) for p in (0.1, 0.2, 0.9, 1.0, 0.5)])
    assert found.ips.estimate == pytest.approx(r.mean()) == found.snips.estimate
    assert found.diagnostics.effective_n == pytest.approx(5) and found.diagnostics.max_weight == 1


@pytest.mark.parametrize(
    ("weights", "unsupported", "words"),
    [
        ([1e4, 1e4] + [1e-3] * 9_998, None, "effective sample size 2.0 of 10,000 rows"),
        ([1.0] * 50, None, "effective sample size 50.0 of 50 rows is below 100"),
        ([0.5] * 1000, None, "mean weight 0.5 is far from 1"),
        ([0.0] * 1000, None, "effective sample size 0.0"),
        ([1.0] * 1000, [0.2] * 1000, "20.0% of the policy's decisions have no support"),
        ([], None, "effective sample size 0.0 of 0 rows"),
    ],
)
def test_a_log_that_cannot_answer_says_why(weights, unsupported, words):
    checked = diagnose_weights(weights, unsupported)
    assert not checked.usable
    assert words in "; ".join(checked.reasons)


@pytest.mark.parametrize(
    ("probability", "propensity"), [(0.5, 0), (0.5, None), (0.5, -0.1), (0.5, 1.5), (1.5, 0.5), (-0.1, 0.5)]
)
def test_impossible_probabilities_are_refused(probability, propensity):
    with pytest.raises(ValueError, match="probability is|propensity is"):
        importance_weight(probability, propensity)


def test_negative_and_missing_weights_are_refused():
    for weights in ([1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="importance_weight"):
            diagnose_weights(weights)
