"The contract holds in training and in serving alike, says no more than it must, and costs a request little."

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.contract import Contract, check_frame, context_frame, infer_contract
from mlops_workbench.planner import generic_examples


def contexts(n=300, seed=3):
    return [context for context, _ in generic_examples(n, seed)]


PLANNER = infer_contract(context_frame(contexts()), "planner")


def field(name, contract=PLANNER):
    return next(f for f in contract.fields if f.name == name)


def test_what_was_learnt_from_fits():
    assert [PLANNER.check_row(c) for c in contexts()] == [[]] * 300
    assert check_frame(PLANNER, context_frame(contexts())) == []


def test_other_households_of_the_same_kind_fit_too():
    assert sum(bool(PLANNER.check_row(c)) for c in contexts(2_000, seed=99)) == 0


@pytest.mark.parametrize(
    "key, value, code",
    [
        ("size", 400, "range"),
        ("size", -1, "range"),
        ("size", 2.5, "kind"),
        ("size", True, "kind"),
        ("size", "2", "kind"),
        ("size", None, "null"),
        ("size", math.inf, "kind"),
        ("diet", "carnivore", "value"),
        ("diet", 3, "kind"),
        ("diet", ["vegan"], "kind"),
        ("allergies", "nuts", "kind"),
        ("allergies", ["kryptonite"], "value"),
        ("allergies", [3], "kind"),
        ("pantry", {"feta": 1}, "kind"),
    ],
)
def test_a_request_and_a_table_are_judged_alike(key, value, code):
    broken = contexts()[0] | {key: value}
    told = PLANNER.check_row(broken)
    assert len(told) == 1 and told[0].startswith(f"{key} ")
    frame = context_frame([*contexts()[1:10], broken])
    assert [(f.column, f.code, f.n_rows) for f in check_frame(PLANNER, frame)] == [(key, code, 1)]


def test_a_missing_and_an_unknown_key_are_told_together():
    broken = {k: v for k, v in contexts()[0].items() if k != "diet"} | {"dieet": "vegan"}
    assert [told.split(" ")[:2] for told in PLANNER.check_row(broken)] == [["diet", "is"], ["'dieet'", "is"]]
    assert "did you mean 'diet'" in PLANNER.check_row(broken)[1]
    found = check_frame(PLANNER, context_frame([broken] * 4))
    assert [(f.column, f.code, f.n_rows, f.share) for f in found] == [
        ("diet", "missing", 4, 1.0),
        ("dieet", "unknown", 4, 1.0),
    ] or [(f.column, f.code) for f in found] == [("dieet", "unknown"), ("diet", "missing")]


def test_no_message_repeats_a_persons_words():
    secret = "Ann lives in 12 Elm Street"
    broken = contexts()[0] | {"diet": secret, "size": secret, "allergies": [secret]}
    assert len(PLANNER.check_row(broken)) == 3
    told = PLANNER.check_row(broken) + [str(f) for f in check_frame(PLANNER, context_frame([broken]))]
    assert not any("Elm" in line for line in told)


def test_a_value_that_few_had_is_not_kept():
    rows = [{"town": "Bern", "age": 30 + i % 40} for i in range(100)] + [{"town": "Elm Street 12", "age": 97}]
    kept = json.dumps(infer_contract(context_frame(rows), "people").to_dict())
    assert "Elm" not in kept and "Bern" not in kept and "97" not in kept


def test_typed_columns_are_understood():
    frame = pd.DataFrame(
        {
            "n": np.arange(20),
            "price": np.linspace(1, 2, 20),
            "name": ["a", "b"] * 10,
            "new": [True, False] * 10,
            "at": pd.date_range("2026-01-01", periods=20, tz="UTC"),
            "gap": [1.5, None] * 10,
        }
    )
    contract = infer_contract(frame, "items")
    assert {f.name: f.kind for f in contract.fields} == {
        "n": "integer", "price": "number", "name": "text", "new": "boolean", "at": "time", "gap": "number",
    }  # fmt: skip
    assert not field("gap", contract).required
    assert check_frame(contract, frame) == []
    assert [f.column for f in check_frame(contract, frame.assign(price=frame["price"] * 100))] == ["price"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abcde"), VALUES), min_size=1, max_size=8), st.data())
def test_any_contexts_fit_their_own_contract_and_no_other_crashes_it(rows, data):
    if not any(rows):
        return
    contract = infer_contract(context_frame(rows), "any")
    finite = [r for r in rows if not any(isinstance(v, float) and math.isinf(v) for v in _leaves(r))]
    assert [contract.check_row(r) for r in finite] == [[]] * len(finite)
    assert Contract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract
    other = data.draw(st.dictionaries(st.text(max_size=2), VALUES))
    assert all(isinstance(line, str) and "\n" not in line for line in contract.check_row(other))


def _leaves(value):
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, list) else [value]
