"The quantile sketch that PostgreSQL keeps of every hour: its error, and that merging changes nothing."

import json
import math
import random

import numpy as np
import pytest

from mlops_workbench.store import read_rows, transaction

KEYS = "SELECT exp.sketch_key(v) AS key, count(*) AS n FROM unnest(%s::float8[]) AS v GROUP BY 1"


def sketch(store, values):
    with transaction(store) as connection:
        return {row["key"]: row["n"] for row in read_rows(connection, KEYS, (list(map(float, values)),))}


def quantile(store, counts, share):
    with transaction(store) as connection:
        given = (json.dumps(counts), share)
        return read_rows(connection, "SELECT exp.sketch_quantile(%s::jsonb, %s) AS value", given)[0]["value"]


def streams():
    rng = np.random.default_rng(6)
    latency_ms = rng.lognormal(6, 1, 3000)
    yield "latency", latency_ms
    yield "below zero", -latency_ms
    yield "both sides", rng.normal(0, 100, 3000)
    yield "whole numbers", rng.poisson(2.0, 3000)
    yield "wide", 10.0 ** rng.uniform(-8, 99, 3000)
    yield "one", np.array([17.0])
    yield "powers of the base", (1.01 / 0.99) ** np.arange(-300, 300)


@pytest.mark.parametrize("values", [pytest.param(v, id=name) for name, v in streams()])
def test_every_quantile_is_within_one_percent(store, values):
    counts = sketch(store, values)
    for share in (0.0, 0.001, 0.25, 0.5, 0.9, 0.99, 1.0):
        exact = float(np.quantile(values, share, method="lower"))
        assert quantile(store, counts, share) == pytest.approx(exact, rel=0.01 + 1e-9, abs=1e-9)


def test_the_error_is_not_smaller_than_it_is_told(store):
    "A bound that nothing comes near would be a sketch that is larger than it has to be."
    values = np.linspace(100, 102.1, 60)
    errors = [abs(quantile(store, sketch(store, [v]), 0.5) / v - 1) for v in values]
    assert 0.009 < max(errors) <= 0.01 + 1e-9


def test_what_is_nearer_to_zero_than_a_billionth_is_zero(store):
    assert sketch(store, [0.0, -0.0, 9e-10, -9e-10, 5e-324]) == {"0": 5}
    assert sketch(store, [2e-9, -2e-9]).keys() == {"+-1001", "--1001"}


def test_parts_add_up_to_the_whole_in_any_order(store):
    values = [random.Random(2).gauss(0, 50) for _ in range(2000)]
    whole, parts = sketch(store, values), [sketch(store, values[i::7]) for i in range(7)]
    for order in (parts, parts[::-1]):
        added = {}
        for part in order:
            added = {key: added.get(key, 0) + part.get(key, 0) for key in added.keys() | part.keys()}
        assert added == whole


def test_sixty_thousand_milliseconds_take_a_few_hundred_buckets(store):
    assert len(sketch(store, np.geomspace(1, 60_000, 20_000))) == 1 + math.ceil(
        math.log(60_000) / math.log(1.01 / 0.99)
    )


def test_nothing_has_no_quantile(store):
    assert quantile(store, {}, 0.5) is None
