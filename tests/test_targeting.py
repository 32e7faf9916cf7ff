"Targeting: GrowthBook's vectors, the hash as properties, many units as one, conditions."

import json
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from growthbook.core import fnv1a32, gbhash
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlops_workbench import targeting
from mlops_workbench.targeting import (
    check_condition,
    condition_names,
    digest_text,
    hash_unit,
    in_namespace,
    in_namespace_many,
    meets_condition,
    meets_condition_many,
    unit_bucket,
    unit_buckets,
)

# Published by GrowthBook and kept beside the project, not in it.
CASES = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "growthbook" / "cases.json"

# In these the vectors follow JavaScript's conversions, and GrowthBook's Python SDK 4.0.0, which decides here, does not.
SDK_DIFFERS = {
    "missing attribute with comparison operators",
    "comparing numbers and strings",
    "comparing numbers and strings - v2",
}

# Every character that Python knows, lone surrogates too: JavaScript has them, and so does JSON.
anything = st.text(st.characters(codec=None, categories=None), max_size=40)
identifiers = st.one_of(anything, st.from_regex(r"[a-z]{0,8}-?\d{0,9}", fullmatch=True)).filter(bool)


def published(section):
    if not CASES.exists():
        pytest.skip("GrowthBook's published cases are not beside the project: ../shared/data/growthbook/cases.json")
    return json.loads(CASES.read_text())[section]


def test_published_hashes():
    cases = published("hash")
    assert [hash_unit(value, seed, version) for seed, value, version, _ in cases] == [n for *_, n in cases]


def test_published_namespaces():
    cases = published("inNamespace")
    assert [in_namespace(unit, namespace) for _, unit, namespace, _ in cases] == [inside for *_, inside in cases]
    assert [in_namespace_many([u], n)[0] for _, u, n, _ in cases] == [inside for *_, inside in cases]


def test_published_conditions():
    cases = published("evalCondition")
    other = {
        name for name, condition, context, met, *groups in cases if meets_condition(condition, context, *groups) != met
    }
    assert other == SDK_DIFFERS


@settings(max_examples=500)
@given(anything)
def test_text_is_digested_as_the_sdk_does(text):
    assert digest_text(text) == fnv1a32(text)


@settings(max_examples=300)
@given(anything, anything)
def test_units_are_hashed_as_the_sdk_does(unit, seed):
    assert hash_unit(unit, seed) == gbhash(seed, unit, 2) == unit_bucket(unit, seed) / 10_000
    assert hash_unit(unit, seed, 1) == gbhash(seed, unit, 1)


@settings(max_examples=300)
@given(st.lists(identifiers, max_size=30), anything, st.integers(1, 7))
def test_many_units_are_each_unit(units, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targeting, "_BLOCK", block)
        assert unit_buckets(units, seed).tolist() == [unit_bucket(u, seed) for u in units]
        for low, high in ((0, 0.3), (0.3, 1)):
            piece = (seed, low, high)
            assert in_namespace_many(units, piece).tolist() == [in_namespace(u, piece) for u in units]


def test_small_digests_have_no_zeros_in_front():
    # the digits of a digest below a million are fewer than the tables take at once
    numbers = np.array([0, 7, 99, 1000, 999_999, 1_000_000, 4_294_967_295], np.uint32)
    assert targeting._fold_digits(numbers).tolist() == [fnv1a32(str(n)) for n in numbers]


UNITS = ["user-1", "müller", "🥕-7", "x" * 300, "ὀδυσσεύς"] * 3


@pytest.mark.parametrize(
    "column",
    [
        UNITS,
        tuple(UNITS),
        np.array(UNITS),
        np.array(UNITS, dtype=object),
        pd.Series(UNITS),
        pd.Series(UNITS, dtype=object),
        pd.Series(UNITS, index=range(50, 65)),
        pd.Series(["left out", *UNITS])[1:],
        pd.Series(UNITS, dtype="category"),
        pd.concat([pd.Series(UNITS[:4]), pd.Series(UNITS[4:])]),
        pa.array(UNITS),
        pa.array(["left out", *UNITS], pa.large_string())[1:],
        pa.chunked_array([UNITS[:4], UNITS[4:]]),
        pd.Index(UNITS),
    ],
    ids=lambda column: type(column).__name__,
)
def test_columns_of_every_kind(column):
    assert unit_buckets(column, "menu-4").tolist() == [unit_bucket(u, "menu-4") for u in UNITS]


@pytest.mark.parametrize(
    ("units", "words"),
    [
        ([1, 2], "turn numbers into text first"),
        (pd.Series([1, 2]), "turn numbers into text first"),
        (["user-1", 2], "turn numbers into text first"),
        (["user-1", None], "the unit at position 1 has no id"),
        (pd.Series(["user-1", None]), "the unit at position 1 has no id"),
        (["user-1", "user-2", ""], "the unit at position 2 has no id"),
    ],
)
def test_what_is_no_id_is_refused(units, words):
    with pytest.raises(ValueError, match=words):
        unit_buckets(units, "menu-4")


def test_no_units_have_no_buckets():
    assert unit_buckets([], "menu-4").tolist() == in_namespace_many([], ("kitchen", 0, 1)).tolist() == []


def test_buckets_are_uniform_and_experiments_independent():
    # one seed in a thousand would give a p below 0.001
    units = [f"household-{i}" for i in range(100_000)]
    one, other = unit_buckets(units, "menu-4") // 1000, unit_buckets(units, "menu-5") // 1000
    assert stats.chisquare(np.bincount(one)).pvalue > 0.001
    assert stats.chi2_contingency(pd.crosstab(one, other)).pvalue > 0.001


# Conditions


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("country = NL", "pass a dict"),
        (MappingProxyType({"country": "NL"}), "pass a dict"),
        ({"size": MappingProxyType({"$gte": 3})}, "pass a dict"),
        ({"size": {"$gte": 3, "$lesser": 5}}, r"\$lesser, which is no operator"),
        ({"$or": {"country": "NL"}}, "pass a list"),
        ({"$and": [{"diet": {"$nin": "vegan"}}]}, "pass a list"),
        ({"name": {"$regex": "("}}, "which is no pattern"),
        ({"name": {"$regex": 5}}, "which is no pattern"),
        ({"tags": {"$elemMatch": {"$equals": 1}}}, "which is no operator"),
        ({"id": {"$inGroup": "testers"}}, "write their values with"),
    ],
)
def test_conditions_that_match_nobody_are_refused(condition, words):
    with pytest.raises(ValueError, match=words):
        check_condition(condition)


def test_published_conditions_can_be_written():
    meant = ("not array", "unknown operator", "invalid", "roup")  # the vectors for what evaluators do with nonsense
    for name, condition, *_ in published("evalCondition"):
        if not any(word in name for word in meant):
            check_condition(condition)


@pytest.mark.parametrize(
    "context",
    [
        {"size": np.int64(3), "beta": np.bool_(True)},
        MappingProxyType({"size": 3, "beta": True}),
        pd.Series({"size": 3, "beta": True}),
    ],
)
def test_rows_of_tables_are_contexts(context):
    assert meets_condition({"size": {"$gte": 3}, "beta": True}, context)
    assert not meets_condition({"size": {"$gte": 4}}, context)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT, np.float64("nan")])
def test_what_is_missing_in_a_table_is_a_missing_attribute(missing):
    assert meets_condition({"size": {"$exists": False}}, {"size": missing})
    assert not meets_condition({"size": {"$ne": None}}, {"size": missing})


def test_names_that_a_condition_reads():
    condition = {
        "a.b": 1,
        "$or": [{"c": 2}, {"$not": {"d": {"$elemMatch": {"e": 1}}}}],
        "$and": [],
        "f": {"$not": {"$eq": 1}},
    }
    assert condition_names(condition) == {"a", "c", "d", "f"}


@pytest.mark.parametrize(
    "condition",
    [
        {},
        {"country": "NL"},
        {"country": {"$in": ["NL", "BE"]}, "size": {"$gt": 1}},
        {"$or": [{"size": 1}, {"beta": True}]},
        {"mixed": True},
        {"mixed": 1},
        {"mixed": None},
        {"tags": {"$elemMatch": {"$eq": "new"}}},
        {"address.city": "Utrecht"},
        {"nowhere": {"$exists": False}},
        {"nowhere": 1},
    ],
)
def test_many_contexts_are_each_context(condition):
    contexts = pd.DataFrame(
        {
            "country": ["NL", "BE", None, "NL", "DE", "NL"],
            "size": [1, 2, 3, np.nan, 5, 1],
            "beta": [True, False, True, False, True, False],
            "mixed": [1, True, None, 1.0, "1", "true"],
            "tags": [["new"], [], None, ["old", "new"], ["old"], ["new"]],
            "address": [{"city": "Utrecht"}, {"city": "Ghent"}, None, {"city": "Utrecht"}, {}, None],
        },
        index=range(10, 16),
    )
    rows = [
        {k: v for k, v in row.items() if isinstance(v, list | dict) or not pd.isna(v)}
        for row in contexts.to_dict("records")
    ]
    assert meets_condition_many(condition, contexts).tolist() == [meets_condition(condition, row) for row in rows]
