"Drift: what the tests find, what they leave alone, and what is broken instead."

import numpy as np
import pytest
from scipy import stats

from mlops_workbench.cause import find_cause, find_upstream
from mlops_workbench.columns import find_faults, learn_shapes, read_columns
from mlops_workbench.drift import (
    DriftPlan,
    Layout,
    Measured,
    contrast,
    correct,
    false_alarms,
    find_break,
    measure_column,
    prepare_column,
    psi,
    psi_bound,
    rate_drift,
    split_rows,
)

PLAN = DriftPlan()


def sides(n, m=None):
    "Lay out a reference of n rows and a window of m, every row a unit."
    m = m or n
    return Layout(np.arange(n + m) >= n, np.arange(n + m))


def measure(kind, values, layout):
    return measure_column(prepare_column("x", kind, values), layout)


def draw(kind, rng, n):
    if kind == "number":
        return rng.normal(0, 1, n)
    if kind == "category":
        return rng.choice(list("abcdef"), n, p=[0.4, 0.3, 0.15, 0.1, 0.03, 0.02])
    if kind == "set":
        return [tuple(rng.choice(list("abcdefgh"), rng.integers(0, 5), replace=False)) for _ in range(n)]
    return rng.normal(0, 1, (n, 8)).tolist()


@pytest.mark.parametrize("kind, times", [("number", 400), ("category", 400), ("set", 150), ("vector", 40)])
def test_a_test_is_not_surer_than_it_says(kind, times):
    rng = np.random.default_rng(1)
    p = np.array([measure(kind, draw(kind, rng, 250), sides(150, 100)).p_value for _ in range(times)])
    for level in (0.05, 0.2):  # four standard errors of a share
        assert (p <= level).mean() <= level + 4 * np.sqrt(level * (1 - level) / times)


def test_statistics_are_those_of_scipy_where_no_unit_comes_twice():
    rng = np.random.default_rng(2)
    a, b = rng.poisson(3, 300).astype(float), rng.poisson(4, 200).astype(float)
    found = measure("number", [*a, *b], sides(300, 200))
    by_shape, by_rank = stats.ks_2samp(a, b, method="asymp"), stats.mannwhitneyu(a, b)
    assert found.effect == pytest.approx(by_shape.statistic)
    assert found.p_value <= 2.2 * min(by_shape.pvalue, by_rank.pvalue)
    names = [*rng.choice(list("ab"), 300), *rng.choice(list("ab"), 200, p=[0.6, 0.4])]
    table = [[names[:300].count(v), names[300:].count(v)] for v in "ab"]
    chi2 = stats.chi2_contingency(table, correction=False).pvalue
    assert measure("category", names, sides(300, 200)).p_value == pytest.approx(chi2, rel=1e-4)


def test_rows_of_few_units_do_not_count_as_many():
    rng, ours, naive = np.random.default_rng(3), 0, 0
    units = np.repeat(np.arange(40), 20)
    layout, rows = Layout(units >= 30, units), sides(600, 200)
    for _ in range(200):
        values = np.repeat(rng.normal(0, 1, 40), 20) + rng.normal(0, 0.1, 800)
        ours += measure("number", values, layout).p_value <= 0.05
        naive += measure("number", values, rows).p_value <= 0.05
    assert ours / 200 <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 200)
    assert naive > 150


def test_the_same_units_on_both_sides_are_no_drift():
    units = np.tile(np.arange(50), 8)
    layout = Layout(np.arange(400) >= 200, units)
    size = np.random.default_rng(4).normal(0, 1, 50)[units]
    assert contrast(size, layout).design == pytest.approx(1.0)
    assert measure("number", size, layout).p_value == 1.0


def test_a_moved_mean_of_few_units_is_still_found():
    units = np.repeat(np.arange(60), 10)
    values = np.repeat(np.random.default_rng(5).normal(0, 1, 60), 10) + 2.5 * (units >= 40)
    assert measure("number", values, Layout(units >= 40, units)).p_value < 1e-4


@pytest.mark.parametrize(
    "kind, values",
    [
        ("number", [None] * 200),
        ("number", [1.0] * 200),
        ("number", [None] * 100 + [1.0, 2.0] * 50),
        ("category", ["a"] * 200),
        ("category", [str(i) for i in range(200)]),
        ("set", [()] * 200),
        ("text", [None] * 200),
        ("text", ["a b c d"] * 200),
        ("vector", [[0.0] * 8] * 200),
    ],
)
def test_poor_columns_are_measured_without_an_error(kind, values):
    found = measure(kind, values, sides(100))
    assert 0 <= found.p_value <= 1 and 0 <= found.effect <= 1
    if values[0] is not None or values[-1] is None:
        assert found.p_value > 0.05


def test_missing_values_are_news_of_their_own():
    values = [1.0, 2.0] * 100 + [1.0, 2.0, None, 2.0] * 50
    found = measure("number", values, sides(200))
    assert (found.part, round(found.effect, 2)) == ("missing", 0.25) and found.p_value < 1e-9


def test_the_member_of_a_list_that_moved_is_named():
    rng = np.random.default_rng(6)
    lists = [tuple(rng.choice(list("abcdefgh"), 3, replace=False)) for _ in range(800)]
    more = lists[:400] + [tuple({*v, "d"}) if rng.random() < 0.4 else v for v in lists[400:]]
    assert measure("set", more, sides(400)).part in ("d", "size")
    swapped = lists[:400] + [("z", *v[1:]) if rng.random() < 0.3 else v for v in lists[400:]]
    assert measure("set", swapped, sides(400)).part == "z"


def test_texts_and_embeddings_are_told_apart_by_their_content():
    rng = np.random.default_rng(7)
    words = np.array([f"w{k}" for k in range(60)])
    notes = [" ".join(rng.choice(words[:40], 6)) for _ in range(600)]
    other = notes[:300] + [" ".join(rng.choice(words[20:], 6)) for _ in range(300)]
    assert measure("text", notes, sides(300)).p_value > 0.001
    assert measure("text", other, sides(300)).p_value < 1e-6
    points = rng.normal(0, 1, (600, 16))
    assert measure("vector", points.tolist(), sides(300)).p_value > 0.001
    points[300:] += 0.3
    assert measure("vector", points.tolist(), sides(300)).p_value < 1e-6


def test_many_features_are_corrected_together():
    p = [0.001, 0.004, 0.03, 0.2, 0.9]
    found = correct([Measured(f"x{i}", "number", v, 0.5) for i, v in enumerate(p)], PLAN)
    assert [m.q_value for m in found] == pytest.approx(stats.false_discovery_control(p))
    assert [m.moved for m in found] == [True, True, True, False, False]
    assert correct([], PLAN) == []


def test_a_trifle_is_not_told_however_sure_it_is():
    rng, n = np.random.default_rng(8), 60_000
    values = np.append(rng.normal(0, 1, n), rng.normal(0.05, 1, n))
    found = correct([measure("number", values, sides(n))], PLAN)[0]
    assert found.p_value < 1e-6 and found.effect < PLAN.floor and not found.moved


def test_a_fifth_of_a_standard_deviation_is_found_among_twenty():
    hits = 0
    for seed in range(20):
        values = np.random.default_rng([9, seed]).normal(0, 1, (20, 4_000))
        values[7, 2_000:] += 0.2
        hits += correct([measure("number", v, sides(2_000)) for v in values], PLAN)[7].moved
    assert hits >= 18


def test_the_measured_rate_is_the_same_every_time_and_shows_a_bad_configuration():
    rng = np.random.default_rng(10)
    columns = [prepare_column(f"x{k}", "number", rng.normal(0, 1, 400)) for k in range(8)]
    units = np.repeat(np.arange(100), 4)
    plan = DriftPlan(n_simulations=60)
    first = false_alarms(columns, units, 150, plan)
    assert first == false_alarms(columns, units, 150, plan) and first.low <= 0.05
    careless = DriftPlan(level=0.9, floor=0.0, n_simulations=60)
    assert false_alarms(columns, units, 150, careless).low > 0.2
    with pytest.raises(ValueError, match="too few to be cut in two"):
        false_alarms(columns, np.zeros(400, int), 150, plan)


@pytest.mark.parametrize("whole", [True, False])
def test_a_split_has_the_size_that_is_asked_for(whole):
    units = np.repeat(np.arange(50), 4)
    layout = split_rows(units, 0.3, np.random.default_rng(11), whole)
    assert layout.counts == (140, 60)
    assert (len(np.unique(units[layout.is_current])) == 15) == whole


@pytest.mark.parametrize(
    "moved, effect, before, expected",
    [
        (False, 0.9, [True, True], "none"),
        (True, 0.9, [], "low"),
        (True, 0.9, [False, False], "low"),
        (True, 0.9, [False, True], "high"),
        (True, 0.1, [True], "medium"),
        (True, 0.9, [False, False, True], "low"),
    ],
)
def test_severity_needs_persistence_and_size(moved, effect, before, expected):
    assert rate_drift(moved, effect, before, PLAN) == expected


def test_the_index_of_others_tends_to_the_square_of_the_shift():
    rng = np.random.default_rng(12)
    assert psi(rng.normal(0, 1, 200_000), rng.normal(0.2, 1, 200_000), 50) == pytest.approx(0.04, abs=0.004)
    found = [psi(rng.normal(0, 1, 500), rng.normal(0, 1, 500)) > psi_bound(500, 500) for _ in range(400)]
    assert np.mean(found) == pytest.approx(0.05, abs=0.04)


def test_a_stream_of_errors_breaks_where_its_mean_changes():
    rng = np.random.default_rng(13)
    quiet = (rng.random(2_000) < 0.3).astype(float)
    assert find_break(quiet) is None and find_break([]) is None
    assert abs(find_break([*quiet[:1_000], *(rng.random(500) < 0.6)]) - 1_000) < 60


def test_shapes_are_learned_once_and_do_not_follow_the_window():
    rows = [
        {"n": i / 7, "b": i % 2 == 0, "deep": {"k": i % 5}, "ids": f"u-{i}", "many": list("abc")[: i % 4]}
        for i in range(90)
    ]
    rows = [r | {"note": f"this is note number {i}", "v": [float(i)] * 8} for i, r in enumerate(rows)]
    shapes = learn_shapes(rows, "context")
    assert {s.name.removeprefix("context."): s.kind for s in shapes} == {
        "n": "number", "b": "category", "deep.k": "number", "many": "set", "note": "text", "v": "vector",
    }  # fmt: skip
    odd = [{"n": "7", "b": 1, "deep": None, "many": {"a": 1}, "note": 3, "v": [1.0]}]
    found = {k.removeprefix("context."): v[0] for k, v in read_columns(odd, shapes).items()}
    assert found == {"n": None, "b": "1", "deep.k": None, "many": ("a",), "note": None, "v": None}


def test_whole_numbers_of_an_action_are_names():
    rows = [{"action": {"item": i % 9}} for i in range(50)]
    assert [s.kind for s in learn_shapes(rows, choices=True)] == ["category"]
    assert [s.kind for s in learn_shapes(rows)] == ["number"]


@pytest.mark.parametrize(
    "change, name, kind, breaks",
    [
        (lambda r, i: {k: v for k, v in r.items() if k != "a"}, "a", "gone", True),
        (lambda r, i: r | {"a": None}, "a", "gone", True),
        (lambda r, i: r | {"a": None} if i % 3 == 0 else r, "a", "nulls", True),
        (lambda r, i: r | {"a": str(r["a"])} if i % 20 == 0 else r, "a", "type", True),
        (lambda r, i: r | {"a": 4.0}, "a", "stuck", True),
        (lambda r, i: r | {"c": 1}, "c", "added", False),
    ],
)
def test_broken_data_are_told_from_drift(change, name, kind, breaks):
    rng = np.random.default_rng(14)
    rows = [{"a": float(v), "b": "x"} for v in rng.normal(0, 1, 200)]
    window = [change({"a": float(v), "b": "x"}, i) for i, v in enumerate(rng.normal(0, 1, 100))]
    shapes = learn_shapes(rows)
    faults = find_faults(shapes, (rows, window), (read_columns(rows, shapes), read_columns(window, shapes)))
    assert [(f.name, f.kind, f.breaks) for f in faults] == [(name, kind, breaks)]


def test_the_slice_that_moved_is_named_and_an_even_shift_has_none():
    rng, n = np.random.default_rng(15), 1_500
    layout, country = sides(n), rng.choice(["at", "de", "nl"], 2 * n, p=[0.2, 0.4, 0.4])
    cuts = {"country": ("category", country.tolist()), "hour": ("number", rng.uniform(0, 24, 2 * n).tolist())}
    for where, expected in ((country == "at", "country = 'at'"), (np.full(2 * n, True), "")):
        values = rng.normal(0, 1, 2 * n) + 1.5 * (layout.is_current & where)
        column = prepare_column("x", "number", values)
        cause = find_cause(measure_column(column, layout), column, cuts | {"x": ("number", values.tolist())}, layout)
        assert cause.slice == expected


@pytest.mark.parametrize(
    "kind, before, now, words",
    [
        ("number", [10.0, 11.0, 12.0, 13.0] * 9, [600.0, 660.0, 720.0, 780.0] * 9, "its values are ×60: another unit?"),
        ("number", [1.0, 2.0, 3.0] * 9, [1.0, 2.0, -1.0] * 9, "-1 stands in 33% of the rows, 0% before: a default?"),
        ("category", ["a", "b"] * 9, ["a", "c"] * 9, "new value 'c' in 50% of the rows"),
        ("category", ["a", "b"] * 9, ["a", "a"] * 9, "no 'b' any more, 50% before"),
        ("set", [("a",)] * 9, [("a", "b")] * 9, "new value 'b' in 100% of the rows"),
        ("number", [1.0] * 9, [1.0, None, 1.0] * 3, "it is missing in 33% of the rows, 0% before"),
    ],
)  # fmt: skip
def test_upstream_changes_are_recognised(kind, before, now, words):
    assert words in find_upstream(kind, before, now)
    assert find_upstream(kind, before, before) == ()
