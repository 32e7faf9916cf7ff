"Metrics: the definition, the check of scores, and the row functions as properties."

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.metrics import Metric, check_scores, edit_distance, estimate_metric, jaccard

dishes = st.lists(st.sampled_from("abcdefg"), max_size=7)
share = Metric("share", "A share.", True, 0, 1)
reward = Metric("reward", "Reward per weight.", True, 0, 1, value="weighted_reward", weight="weight")


@settings(max_examples=100)
@given(dishes, dishes)
def test_jaccard_is_a_symmetric_share(a, b):
    assert 0 <= jaccard(a, b) <= 1
    assert jaccard(a, b) == jaccard(b, a)
    assert (jaccard(a, b) == 1) == (set(a) == set(b))


@settings(max_examples=100)
@given(dishes, dishes, dishes)
def test_edit_distance_is_a_metric_on_bags(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a) == edit_distance(sorted(a), b)
    assert (edit_distance(a, b) == 0) == (sorted(a) == sorted(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@pytest.mark.parametrize(
    ("a", "b", "similarity", "distance"),
    [
        ([], [], 1, 0),
        (["x"], [], 0, 1),
        (["x", "y"], ["y", "x"], 1, 0),
        (["x", "y", "z"], ["x", "y", "w"], 0.5, 1),
        (["x", "x"], ["x"], 1, 1),
        (["x", "y"], ["u", "v", "w"], 0, 3),
    ],
)
def test_row_functions(a, b, similarity, distance):
    assert jaccard(a, b) == similarity
    assert edit_distance(a, b) == distance


def scores(**columns):
    n = len(next(iter(columns.values())))
    return pd.DataFrame({"example_id": [f"e{i}" for i in range(n)], **columns})


@pytest.mark.parametrize(
    ("metric", "table", "words"),
    [
        (share, {"share": [0.5, 1.5]}, "share of example 'e1' is 1.5"),
        (share, {"share": [math.nan, 0.5]}, "share of example 'e0' is nan"),
        (share, {"share": [0.5, math.inf]}, "share of example 'e1' is inf"),
        (share, {"other": [0.5]}, "no column 'share'"),
        (reward, {"weighted_reward": [3.0], "weight": [2.0]}, "is 3 with weight 2"),
        (reward, {"weighted_reward": [1.0], "weight": [0.0]}, "is 1 with weight 0"),
        (reward, {"weighted_reward": [0.0], "weight": [-1.0]}, "weight -1"),
        (reward, {"weighted_reward": [0.0]}, "no column 'weight' for 'reward'"),
    ],
)
def test_check_scores_names_what_is_wrong(metric, table, words):
    with pytest.raises(ValueError, match=words):
        check_scores(scores(**table), [metric])


def test_an_unbounded_metric_is_still_finite_and_weighted_rows_may_weigh_nothing():
    latency = Metric("latency_ms", "Time.", False, 0, math.inf, "ms")
    check_scores(scores(latency_ms=[0.0, 1e6]), [latency])
    ratio = Metric("r", "Ratio.", True, 0, math.inf, value="v", weight="w")
    check_scores(scores(v=[0.0, 5.0], w=[0.0, 1.0]), [ratio])


def test_an_estimate_is_the_ratio_of_sums():
    table = scores(weighted_reward=[2.0, 0.0, 0.5], weight=[2.0, 1.0, 1.0])
    assert estimate_metric(table, reward) == pytest.approx(2.5 / 4)
    assert estimate_metric(table.assign(share=[1, 0, 1]), share) == pytest.approx(2 / 3)
    assert np.isnan(estimate_metric(table[:0], reward))
