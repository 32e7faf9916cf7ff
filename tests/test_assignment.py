"Assignment: GrowthBook's vectors, no unit that moves, one unit as many, what wins, bad input."

import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.assignment import (
    Allocation,
    Arm,
    Phase,
    assign,
    assign_many,
    bucket_ranges,
    choose_variant,
    split_buckets,
)

CASES = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "growthbook" / "cases.json"


def published(section):
    if not CASES.exists():
        pytest.skip("GrowthBook's published cases are not beside the project: ../shared/data/growthbook/cases.json")
    return json.loads(CASES.read_text())[section]


def make_arms(*weights, first_version=3):
    names = ["control", "treatment", "other", "fourth"]
    ranges = split_buckets(weights)
    return tuple(Arm(names[i], i, low, high, first_version + i) for i, (low, high) in enumerate(ranges))


HALVES = make_arms(0.5, 0.5)
MENU = Allocation("menu-4", "menu-4", "household", "active", Phase(1, 10_000, HALVES))


def test_published_ranges():
    cases = published("getBucketRange")
    found = [[[round(x, 4) for x in r] for r in bucket_ranges(*arguments)] for _, arguments, _ in cases]
    assert found == [ranges for *_, ranges in cases]


def test_published_choices():
    cases = published("chooseVariation")
    assert [choose_variant(n, ranges) for _, n, ranges, _ in cases] == [position for *_, position in cases]


# Nobody moves

# What a million look-ups come to, by GrowthBook's SDK too (4.0.0). A version that changes it would move units.
MILLION = "6c6a50f7169c5e3694cd934bbc1cbb218c98ea9001fde97e4e54f2fc21d1f3ee"
LOOK_UP = """
import hashlib, sys
from mlops_workbench.assignment import Allocation, Arm, Phase, assign_many
arms = (Arm("control", 0, 0, 3000), Arm("a", 1, 3000, 6500), Arm("b", 2, 6500, 10_000))
allocation = Allocation("menu-4", "menu-4", "household", "active", Phase(1, 6000, arms))
many = assign_many(allocation, [f"household-{i}" for i in range(1_000_000)])
said = ",".join(v or "" for v in many["variant"]) + ";" + ",".join(map(str, many["bucket"]))
print(hashlib.sha256(said.encode()).hexdigest())
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_million_look_ups_are_the_same_after_a_restart_and_in_every_version(hash_seed):
    run = subprocess.run(
        [sys.executable, "-c", LOOK_UP],
        env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert run.stdout.strip() == MILLION


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.34, 0.33, 0.33), (0.9, 0.1)])
def test_a_ramp_of_a_hundred_steps_moves_nobody(weights):
    units = pd.Series([f"household-{i}" for i in range(20_000)])
    arms = make_arms(*weights)
    before = np.full(len(units), None, dtype=object)
    for step in range(1, 101):
        now = assign_many(replace(MENU, phase=Phase(step, 100 * step, arms)), units)["variant"].to_numpy()
        served = np.array([v is not None for v in before])
        assert (now[served] == before[served]).all()
        before = now
    assert None not in before


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.lists(st.integers(0, 10_000), min_size=2, max_size=30))
def test_every_bucket_keeps_its_arm_at_any_higher_coverage(parts, coverages):
    arms = make_arms(*(part / sum(parts) for part in parts))
    before = None
    for coverage in sorted(coverages):
        table = np.frombuffer(replace(MENU, phase=Phase(1, coverage, arms)).table, np.uint8)
        outcomes = MENU.outcomes[:7]
        served = table >= len(outcomes)
        for arm in arms:
            n = int((table == len(outcomes) + arm.ordinal).sum())
            assert 0 <= coverage * (arm.high - arm.low) / 10_000 - n < 1  # rounded down to a bucket
        if before is not None:
            assert (table[before >= len(outcomes)] == before[before >= len(outcomes)]).all()
        before = table
        assert coverage < 10_000 or served.all()


def test_coverage_never_serves_less_bucket_by_bucket():
    for arm in (*make_arms(1 / 3, 1 / 3, 1 / 3), Arm("narrow", 0, 17, 18), Arm("odd", 0, 1, 9999)):
        ends = [arm.served_end(coverage) for coverage in range(10_001)]
        assert ends == sorted(ends)
        assert (ends[0], ends[-1]) == (arm.low, arm.high)


# One as many


@st.composite
def allocations(draw):
    arms = make_arms(*draw(st.sampled_from([(0.5, 0.5), (0.2, 0.3, 0.5), (0.9, 0.1)])))
    low = draw(st.sampled_from([0, 0.2, 0.5]))
    return Allocation(
        "menu-4",
        draw(st.text(min_size=1, max_size=5)),
        "household",
        draw(st.sampled_from(["active", "active", "active", "paused"])),
        Phase(3, draw(st.integers(0, 10_000)), arms),
        namespace=draw(st.sampled_from([None, ("kitchen", low, 0.9)])),
        holdout=draw(st.sampled_from([0, 500, 5000])),
        condition=draw(st.sampled_from([{}, {"country": "NL"}, {"size": {"$gte": 3}}])),
        forced=draw(st.sampled_from([{}, {"u-1": "control", "u-2": "treatment"}])),
        barred=draw(st.sampled_from([frozenset(), frozenset({4})])),
    )


@settings(max_examples=150, deadline=None)
@given(
    allocations(),
    st.lists(st.one_of(st.text(min_size=1), st.from_regex(r"u-\d{1,2}", fullmatch=True)), max_size=20),
    st.data(),
)
def test_many_units_get_what_each_gets(allocation, units, data):
    country = data.draw(st.lists(st.sampled_from(["NL", "DE"]), min_size=len(units), max_size=len(units)))
    kind = data.draw(st.lists(st.sampled_from(["household", "user"]), min_size=len(units), max_size=len(units)))
    contexts = pd.DataFrame({"country": country, "size": range(len(units)), "unit_type": kind})
    for given_contexts in (None, contexts, contexts.drop(columns="unit_type")):
        rows = [{}] * len(units) if given_contexts is None else given_contexts.to_dict("records")
        one_by_one = [assign(allocation, unit, row) for unit, row in zip(units, rows, strict=True)]
        many = assign_many(allocation, units, given_contexts)
        assert many["unit_id"].tolist() == units
        for column in ("variant", "bucket", "reason"):
            assert many[column].tolist() == [getattr(a, column) for a in one_by_one]


def test_many_keep_the_index_that_they_came_with():
    units = pd.Series(["household-1", "household-2"], index=["x", "y"])
    guarded = replace(MENU, condition={"country": "NL"}, forced={"household-2": "control"})
    many = assign_many(guarded, units, pd.DataFrame({"country": ["NL", "DE"]}))
    assert many.index.tolist() == ["x", "y"]
    assert many["reason"].tolist() == ["assigned", "forced"]


def test_nobody_is_assigned_without_units():
    assert assign_many(MENU, []).columns.tolist() == ["unit_id", "variant", "bucket", "reason"]
    assert len(assign_many(replace(MENU, condition={"a": 1}), [], pd.DataFrame({"a": []}))) == 0


# What wins


class HasAllocation:
    def allocation(self):
        return MENU


def test_what_has_an_allocation_can_be_assigned():
    assert assign(HasAllocation(), "household-1") == assign(MENU, "household-1")
    assert assign_many(HasAllocation(), ["household-1"]).equals(assign_many(MENU, ["household-1"]))


EVERYTHING = replace(
    MENU,
    phase=Phase(2, 0, HALVES),
    namespace=("kitchen", 0, 1e-9),
    holdout=10_000,
    condition={"country": "NL"},
    forced={"tester": "treatment"},
)


@pytest.mark.parametrize(
    ("changes", "unit", "context", "reason"),
    [
        ({"status": "draft"}, "tester", {}, "not_active"),
        ({"status": "paused"}, "tester", {"unit_type": "user"}, "not_active"),
        ({"status": "completed"}, "tester", {}, "not_active"),
        ({"phase": None}, "tester", {}, "not_active"),
        ({}, "tester", {"unit_type": "user"}, "unit_type"),
        ({}, "tester", {"unit_type": "household"}, "forced"),
        ({"barred": frozenset({4})}, "tester", {}, "rolled_back"),
        ({"barred": frozenset({3})}, "tester", {}, "forced"),
        ({}, "household-1", {}, "namespace"),
        ({"namespace": None}, "household-1", {}, "holdout"),
        ({"namespace": None, "holdout": 0}, "household-1", {}, "targeting"),
        ({"namespace": None, "holdout": 0}, "household-1", {"country": "NL"}, "not_covered"),
        ({"namespace": None, "holdout": 0, "phase": MENU.phase}, "household-1", {"country": "NL"}, "assigned"),
        (
            {"namespace": None, "holdout": 0, "phase": MENU.phase, "barred": frozenset({3, 4})},
            "household-1",
            {"country": "NL"},
            "rolled_back",
        ),
    ],
)
def test_what_wins(changes, unit, context, reason):
    allocation = replace(EVERYTHING, **changes)
    assigned = assign(allocation, unit, context)
    assert assigned.reason == reason
    assert (assigned.variant is None) == (reason not in ("assigned", "forced"))
    assert assigned.bucket == assign(MENU, unit).bucket
    assert assigned.phase == (allocation.phase.number if allocation.phase else 0)
    assert assign_many(allocation, [unit], pd.DataFrame([context], index=[0]))["reason"].tolist() == [reason]


def test_experiments_of_one_namespace_share_no_unit():
    units = [f"household-{i}" for i in range(5000)]
    pieces = [("kitchen", 0, 0.3), ("kitchen", 0.3, 0.7), ("kitchen", 0.7, 1)]
    inside = [assign_many(replace(MENU, namespace=p, seed=str(p)), units)["variant"].notna() for p in pieces]
    assert (sum(i.astype(int) for i in inside) == 1).all()


def test_who_is_held_out_takes_part_in_no_experiment():
    units = [f"household-{i}" for i in range(5000)]
    kept = [assign_many(replace(MENU, seed=seed, holdout=1000), units)["reason"] == "holdout" for seed in "ab"]
    assert (kept[0] == kept[1]).all()
    assert abs(kept[0].mean() - 0.1) < 0.02  # 0.004 is one standard deviation of 5,000 draws


def test_arms_get_their_shares():
    arms = make_arms(0.2, 0.3, 0.5)
    many = assign_many(replace(MENU, phase=Phase(1, 5000, arms)), [f"household-{i}" for i in range(100_000)])
    shares = many["variant"].value_counts(normalize=True)
    assert all(
        abs(shares[name] - share) < 0.01
        for name, share in zip(("control", "treatment", "other"), (0.2, 0.3, 0.5), strict=True)
    )


# Bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: split_buckets([0.1, 0.1]), "sum to 0.2: make them 1 together"),
        (lambda: split_buckets([1.2, -0.2]), "weight -0.2 is less than one bucket"),
        (lambda: split_buckets([1.0, 0.0]), "less than one bucket"),
        (lambda: Arm("", 0, 0, 10), "an arm has no name"),
        (lambda: Arm("control", 0, 10, 10), r"owns buckets \[10, 10\)"),
        (lambda: Arm("control", 0, 0.0, 0.5), "pass 0 ≤ low < high ≤ 10,000"),
        (lambda: Phase(1, 10_001, HALVES), "coverage is 10001"),
        (lambda: Phase(1, 0.1, HALVES), "coverage is 0.1: pass whole buckets"),
        (lambda: Phase(1, True, HALVES), "coverage is True"),
        (lambda: Phase(1, 100, HALVES[:1]), "has 1 arms: an experiment compares 2"),
        (lambda: Phase(1, 100, HALVES[::-1]), r"ordinals \[1, 0\]: number them"),
        (lambda: Phase(1, 100, (HALVES[0], replace(HALVES[1], name="control"))), "a name of its own"),
        (lambda: Phase(1, 100, (HALVES[0], replace(HALVES[1], low=4999))), "both own bucket 4999"),
        (lambda: Phase(1, 100, HALVES, datetime(2026, 3, 1)), "has no time zone"),
        (lambda: replace(MENU, key=""), "key of experiment '' is empty"),
        (lambda: replace(MENU, seed=""), "seed of experiment 'menu-4' is empty"),
        (lambda: replace(MENU, unit_type=""), "unit_type of experiment"),
        (lambda: replace(MENU, status="running"), "status is 'running': choose from draft, active"),
        (lambda: replace(MENU, holdout=0.1), "holdout is 0.1: pass whole buckets"),
        (lambda: replace(MENU, namespace=("kitchen", 0.5, 0.5)), "0 ≤ low < high ≤ 1"),
        (lambda: replace(MENU, condition={"a": {"$is": 1}}), "is no operator"),
        (lambda: replace(MENU, forced={"tester": "c"}), "forced into 'c': the arms are control, treatment"),
        (lambda: assign(MENU, ""), "unit_id is ''"),
        (lambda: assign(MENU, 7), "unit_id is 7: pass the unit's stable id as text"),
        (lambda: assign(MENU, None), "unit_id is None"),
        (lambda: assign_many(MENU, [7]), "turn numbers into text first"),
        (lambda: assign_many(MENU, ["a"], pd.DataFrame({"country": ["NL", "DE"]})), "1 units have 2 contexts"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
