"Aggregates against their recount and against counting in Python: late, repeated, out of order, at once, and after a crash."

import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from mlops_workbench.aggregate import (
    Aggregated,
    aggregate,
    read_aggregates,
    read_oddities,
    read_series,
    read_sums,
    read_unit_totals,
    read_values,
    recount,
)
from mlops_workbench.core import WorkbenchError, stable_id
from mlops_workbench.events import Event, write_events
from mlops_workbench.store import connect, read_rows, transaction, write_rows
from mlops_workbench.sums import Sums, winsorise

START = datetime(2026, 3, 2, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
PLANS = [
    {"metric": "acceptance", "kind": "ratio", "event": "accepted", "denominator": "requested"},
    {"metric": "edits", "kind": "mean", "event": "accepted", "value": "edits", "covariate": True},
    {"metric": "edits_per_dish", "kind": "ratio", "event": "accepted", "value": "edits", "denominator": "dishes"},
    {"metric": "wait", "kind": "quantile", "event": "requested", "value": "wait_ms"},
    {"metric": "converted", "kind": "proportion", "event": "accepted", "covariate": True},
]
BLANK = {"value": "", "denominator": "", "winsor": 0.0, "quantile": 0.5, "covariate": False}
PLANS = [BLANK | plan for plan in PLANS]


def begin(store, key="warm", plans=PLANS, at=START):
    "Put a running experiment in place, as far as aggregation reads it."
    definition = json.dumps({"metrics": plans})
    with transaction(store) as connection:
        connection.execute(
            "INSERT INTO exp.experiments (key, policy, unit_type, definition, digest, author, status, ends_at) "
            "VALUES (%s, 'planner', 'household', %s, '', 'ana', 'active', '2099-01-01')",
            (key, definition),
        )
        for i, name in enumerate(("control", "warm")):
            connection.execute(
                "INSERT INTO exp.variants (experiment, unit_type, variant, ordinal, control, low, high, policy) "
                "VALUES (%s, 'household', %s, %s, %s, %s, %s, 'planner')",
                (key, name, i, i == 0, 5000 * i, 5000 * (i + 1)),
            )
    ramp(store, 1, at, key)


def ramp(store, phase, at, key="warm"):
    "End the phase before and begin another one."
    with transaction(store) as connection:
        connection.execute(
            "UPDATE exp.experiment_phases SET ended_at = %s WHERE experiment = %s AND ended_at IS NULL", (at, key)
        )
        connection.execute(
            "INSERT INTO exp.experiment_phases VALUES (%s, %s, %s, '[]', %s)", (key, phase, 1000 * phase, at)
        )


def stop(store, at, key="warm"):
    with transaction(store) as connection:
        connection.execute(
            "UPDATE exp.experiment_phases SET ended_at = %s WHERE experiment = %s AND ended_at IS NULL", (at, key)
        )


def variant_of(unit):
    return "warm" if int(unit.split("-")[1]) % 2 else "control"


def assignment(unit, at, phase=1, key="warm"):
    return {
        "experiment": key,
        "phase": phase,
        "unit_type": "household",
        "unit_id": unit,
        "variant": variant_of(unit),
        "bucket": int(unit.split("-")[1]) % 10_000,
        "assigned_at": at,
    }


KEY = ("experiment", "unit_type", "unit_id", "phase")


def expose(store, *rows):
    with transaction(store) as connection:
        return write_rows(connection, "exp.assignments", rows, KEY)


def event(number, unit, at, type="accepted", received=None, experiments=None, **metrics):
    return Event(
        type,
        "household",
        unit,
        at,
        id=stable_id("aggregate", str(number)),
        metrics=metrics,
        experiments=experiments or {},
        received_at=received or max(at, START + 20 * DAY),
    )


def same(store, key="warm"):
    kept, counted = read_aggregates(store, key), recount(store, key)
    assert kept == counted
    return kept


# Counting in Python


def number(value):
    return Fraction(repr(value)) if value is not None else None


def worth(plan, e):
    "Say what an event adds to a metric: (n, y, denominator), or nothing."
    own = e.type == plan["event"]
    if own and plan["value"] and plan["value"] not in e.metrics:
        return None
    if not own and e.type != plan["denominator"]:
        return None
    y = (number(e.metrics[plan["value"]]) if plan["value"] else 1) if own else 0
    d = 1 if e.type == plan["denominator"] else number(e.metrics.get(plan["denominator"])) or 0 if own else 0
    return own, y, d if plan["denominator"] else 0


def buckets_of(values):
    "Sketch values as DDSketch says."
    keys = (
        "0" if abs(v) < 1e-9 else f"{'+' if v > 0 else '-'}{math.ceil(math.log(abs(v)) / math.log(1.01 / 0.99))}"
        for v in values
    )
    return dict(Counter(keys))


def windows_of(phases, assignments):
    "Map units to (phase, variant, from, to)."
    found = defaultdict(list)
    for a in assignments:
        until = phases.get(a["phase"] + 1, datetime.max.replace(tzinfo=UTC))
        found[a["unit_id"]].append((a["phase"], a["variant"], max(a["assigned_at"], phases[a["phase"]]), until))
    return found


def count_in_python(events, phases, assignments):
    "Count the hours (n, y, y², denominator, values) and the units (n, y, denominator, x) of every metric with a loop."
    hours, units = defaultdict(lambda: [0, 0, 0, 0, []]), defaultdict(lambda: [0, 0, 0, 0])
    windows = windows_of(phases, assignments)
    for e, plan in ((e, plan) for e in events for plan in PLANS):
        if (added := worth(plan, e)) is None:
            continue
        n, y, d = added
        first = min((window[2] for window in windows[e.unit_id]), default=None)
        for phase, variant, since, until in windows[e.unit_id]:
            unit = units[plan["metric"], e.unit_id, phase]
            if since <= e.event_at < until:
                hour = hours[plan["metric"], e.event_at.replace(minute=0, second=0, microsecond=0), phase, variant]
                hour[:4] = hour[0] + n, hour[1] + y, hour[2] + y * y, hour[3] + d
                hour[4] += [float(y)] if n and plan["value"] else []
                unit[:3] = unit[0] + n, unit[1] + y, unit[2] + d
            elif plan["covariate"] and first - 28 * DAY <= e.event_at < first:
                unit[3] += y
    return hours, units


def check_against_python(kept, events, phases, assignments):
    hours, units = count_in_python(events, phases, assignments)
    rows = [r for r in kept["metric_aggregates"] if r["bucket"] == "hour"]
    got = {(r["metric"], r["starts_at"], r["phase"], r["variant"]): r for r in rows}
    assert got.keys() == hours.keys()
    for name, (*numbers, values) in hours.items():
        row = got[name]
        assert [Fraction(row[c]) for c in ("count", "sum", "sum_squares", "denominator")] == numbers
        assert row["sketch"] == buckets_of(values)
    totals = {(r["metric"], r["unit_id"], r["phase"]): r for r in kept["unit_totals"]}
    assert totals.keys() == {name for name, row in units.items() if name in totals or any(row)}
    for name, row in totals.items():
        assert [row[c] for c in ("n", "y", "denominator", "x")] == [float(v) for v in units[name]]


# Random streams


class World:
    "A stream of random changes, and what was written so far."

    def __init__(self, store, seed):
        self.store, self.random = store, random.Random(seed)
        self.events, self.assignments, self.phases = [], {}, {1: START}
        self.now = START

    def write(self):
        r, batch = self.random, []
        for _ in range(r.randrange(1, 40)):
            unit = f"h-{r.randrange(25)}"
            late = r.choice([0, 0, 0.2, 3, 20, 45])
            at = self.now + timedelta(hours=r.uniform(-12, 12)) - late * DAY
            metrics = {
                "edits": r.choice([0, 1, 0.1, 2.7, 1e-7, 1e15, -3.25]),
                "wait_ms": r.lognormvariate(6, 1),
                "dishes": 7,
            }
            metrics = {k: v for k, v in metrics.items() if r.random() < 0.9}
            claim = r.choice([{}, {"warm": variant_of(unit)}, {"warm": "control"}])
            type = r.choice(["accepted", "requested", "other"])
            received = max(at, self.now) + timedelta(minutes=r.uniform(0, 300))
            batch.append(event(len(self.events) + len(batch), unit, at, type, received, claim, **metrics))
        write_events(self.store, batch + r.sample(self.events, min(len(self.events), 5)))
        self.events += batch

    def assign(self):
        rows = []
        for _ in range(self.random.randrange(1, 6)):
            phase = self.random.choice(list(self.phases))
            at = self.phases[phase] + timedelta(hours=self.random.uniform(-3, 30))
            row = assignment(f"h-{self.random.randrange(25)}", at, phase)
            if (row["unit_id"], phase) not in self.assignments and row["unit_id"] not in [x["unit_id"] for x in rows]:
                rows.append(row)
        expose(self.store, *rows)
        self.assignments |= {(row["unit_id"], row["phase"]): row for row in rows}

    def ramp(self):
        if len(self.phases) < 4 and self.random.random() < 0.3:
            phase = len(self.phases) + 1
            at = max(self.now - timedelta(hours=self.random.uniform(0, 10)), self.phases[phase - 1] + HOUR)
            ramp(self.store, phase, at)
            self.phases[phase] = at

    def turn(self):
        self.now += timedelta(hours=self.random.uniform(0, 20))
        for step in self.random.choices([self.write, self.assign, self.ramp], weights=[4, 4, 1], k=5):
            step()


@pytest.mark.parametrize("seed", range(6))
def test_any_stream_gives_what_a_recount_and_a_loop_give(store, seed):
    begin(store)
    world = World(store, seed)
    for _ in range(8):
        world.turn()
        aggregate(store)
        kept = same(store)
        check_against_python(kept, world.events, world.phases, world.assignments.values())
    assert len(kept["unit_totals"]) > 20 and len(kept["metric_aggregates"]) > 40 and kept["metric_oddities"]
    assert aggregate(store) == Aggregated(0, 0)


def test_the_loop_in_python_can_disagree(store):
    begin(store)
    expose(store, assignment("h-1", START))
    events = [event(i, "h-1", START + i * HOUR, edits=i) for i in range(4)]
    write_events(store, events)
    aggregate(store)
    with pytest.raises(AssertionError):
        check_against_python(read_aggregates(store, "warm"), events[:-1], {1: START}, [assignment("h-1", START)])


# One case each


def total(store, unit="h-1", metric="edits", column="y"):
    totals = read_unit_totals(store, "warm", metric)
    return totals[totals["unit_id"] == unit][column].tolist()


def test_only_what_happened_from_the_exposure_to_the_end_of_the_phase_counts(store):
    begin(store)
    expose(store, assignment("h-1", START + 5 * HOUR))
    times = [5 * HOUR - timedelta(microseconds=1), 5 * HOUR, 9 * HOUR, 10 * HOUR - timedelta(microseconds=1), 10 * HOUR]
    write_events(store, [event(i, "h-1", START + at, edits=10**i) for i, at in enumerate(times)])
    aggregate(store)
    assert total(store) == [11110.0] and total(store, column="covariate") == [1.0]
    stop(store, START + 10 * HOUR)
    aggregate(store)
    assert total(store) == [1110.0]
    same(store)


def test_an_event_is_counted_in_the_phase_in_which_it_happened(store):
    begin(store)
    expose(store, assignment("h-1", START))
    ramp(store, 2, START + 10 * HOUR)
    expose(store, assignment("h-1", START + 12 * HOUR, phase=2))
    write_events(store, [event(i, "h-1", START + h * HOUR, edits=10**i) for i, h in enumerate((9, 11, 13))])
    aggregate(store)
    assert total(store) == [101.0]  # 11: the second phase had begun, the unit had not met it
    rows = [(r["phase"], r["y"]) for r in read_aggregates(store, "warm")["unit_totals"] if r["metric"] == "edits"]
    assert rows == [(1, 1.0), (2, 100.0)]
    values = read_values(store, "warm", "edits")
    assert list(zip(values["phase"], values["value"], strict=True)) == [(1, 1.0), (1, 100.0)]
    assert total(store, column="covariate") == [0.0]  # the first phase is no history of the second
    same(store)


def test_a_late_event_reaches_a_completed_experiment(store):
    begin(store)
    expose(store, assignment("h-1", START))
    stop(store, START + 10 * HOUR)
    aggregate(store)
    write_events(store, [event(1, "h-1", START + HOUR, received=START + 300 * DAY, edits=3)])
    assert aggregate(store) == Aggregated(n_hours=4, n_units=1)  # the four metrics that read this type
    assert total(store) == [3.0]
    same(store)


def test_events_outside_the_time_of_an_experiment_cost_it_nothing(store):
    begin(store)
    expose(store, assignment("h-1", START))
    stop(store, START + 10 * HOUR)
    aggregate(store)
    write_events(store, [event(i, "h-1", START + d * DAY, edits=3) for i, d in enumerate((-30, 2))])
    assert aggregate(store) == Aggregated(0, 0)
    write_events(store, [event(7, "h-1", START - 20 * DAY, edits=3)])
    assert aggregate(store) == Aggregated(0, 1)  # history explains variance: the unit, no hour
    assert total(store, column="covariate") == [3.0]
    same(store)


def test_an_exposure_that_becomes_known_late_counts_what_was_already_there(store):
    begin(store)
    write_events(store, [event(1, "h-1", START + HOUR, edits=3), event(2, "h-1", START - HOUR, edits=5)])
    assert aggregate(store).n_units == 0
    expose(store, assignment("h-1", START))
    assert aggregate(store).n_units == 1
    assert (total(store), total(store, column="covariate")) == ([3.0], [5.0])
    same(store)


def test_oddities_are_counted(store):
    begin(store)
    expose(store, assignment("h-1", START + HOUR))
    claims = [("h-1", 2, "warm", 1), ("h-1", 2, "control", 1), ("h-1", 0, "warm", 1), ("h-2", 2, "control", 1)]
    claims += [("h-3", 2, None, 1), ("h-1", 3, "warm", None), ("h-1", 3, "warm", 1e200)]
    for i, (unit, hour, claim, edits) in enumerate(claims):
        metrics = {} if edits is None else {"edits": edits}
        write_events(
            store, [event(i, unit, START + hour * HOUR, experiments={"warm": claim} if claim else {}, **metrics)]
        )
    aggregate(store)
    odd = read_oddities(store, "warm").set_index("metric")
    assert odd.loc["edits"].tolist() == [2, 1, 2] and odd.loc["acceptance"].tolist() == [2, 1, 0]
    assert total(store) == [2.0]  # by the exposure, not by the claim
    same(store)


def test_extreme_numbers_do_not_stop_aggregation(store):
    begin(store)
    expose(store, assignment("h-1", START))
    values = [5e-324, -5e-324, 1e100, -1e100, 1.7e308, 0.1, 2**53, 10**400]
    write_events(store, [event(i, "h-1", START + HOUR, edits=v) for i, v in enumerate(values[:-1])])
    aggregate(store)
    assert total(store) == [float(Decimal(2**53) + Decimal("0.1"))]
    assert read_oddities(store, "warm").set_index("metric").loc["edits", "unusable"] == 1
    assert read_series(store, "warm", "edits", "hour")["count"].tolist() == [6]
    same(store)


def test_a_forgotten_unit_leaves_nothing(store):
    begin(store)
    expose(store, assignment("h-1", START), assignment("h-2", START))
    write_events(store, [event(i, f"h-{1 + i % 2}", START + i * HOUR, edits=1) for i in range(6)])
    aggregate(store)
    with transaction(store) as connection:
        connection.execute("DELETE FROM exp.events WHERE unit_id = 'h-1'")
        connection.execute("DELETE FROM exp.assignments WHERE unit_id = 'h-1'")
    aggregate(store)
    kept = same(store)
    assert {r["unit_id"] for r in kept["unit_totals"]} == {"h-2"}
    with transaction(store) as connection:
        connection.execute("DELETE FROM exp.assignments WHERE unit_id = 'h-2'")
    aggregate(store)
    assert same(store) == {"metric_aggregates": [], "metric_oddities": [], "unit_totals": []}


def test_two_experiments_do_not_disturb_each_other(store):
    begin(store)
    begin(store, "cold", PLANS[:2])
    expose(store, assignment("h-1", START), assignment("h-1", START + 2 * HOUR, key="cold"))
    write_events(store, [event(i, "h-1", START + i * HOUR, edits=1) for i in range(4)])
    aggregate(store)
    assert same(store)["unit_totals"] != same(store, "cold")["unit_totals"]
    expose(store, assignment("h-2", START, key="cold"))
    write_events(store, [event(9, "h-2", START, edits=1)])
    aggregate(store)
    same(store), same(store, "cold")


# Order of commits, many at once, and crashes


def test_an_event_that_commits_after_the_turn_is_seen_by_the_next(store):
    "Its transaction began earlier, its times are earlier, and its exposure was counted without it."
    begin(store)
    with transaction(store) as connection:  # a partition must be there: making one locks the table
        connection.execute(
            "CREATE TABLE exp.events_2026_03 PARTITION OF exp.events FOR VALUES FROM ('2026-03-01Z') TO ('2026-04-01Z')"
        )
    slow = connect(store)
    slow.execute(
        "INSERT INTO exp.events (id, type, unit_type, unit_id, metrics, event_at, received_at) "
        "VALUES (gen_random_uuid(), 'accepted', 'household', 'h-1', '{\"edits\": 7}', %s, %s)",
        (START + HOUR, START + HOUR),
    )
    expose(store, assignment("h-1", START))
    write_events(store, [event(1, "h-1", START + HOUR, edits=1)])
    aggregate(store)
    assert total(store) == [1.0]
    slow.commit()
    slow.close()
    aggregate(store)
    assert total(store) == [8.0]
    same(store)


def test_writers_and_aggregators_at_once(store):
    "Three writers and two aggregators: whatever was seen in between, the end is the recount."
    begin(store)
    write_events(store, [event(10_000, "h-0", START, edits=1)])
    errors, running = [], threading.Event()

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    def write(seed):
        r = random.Random(seed)
        for i in range(15):
            units = [f"h-{r.randrange(40)}" for _ in range(10)]
            expose(store, *(assignment(u, START + seed * HOUR) for u in sorted(set(units))))
            write_events(
                store,
                [
                    event(seed * 1000 + i * 20 + j, u, START + r.uniform(0, 48) * HOUR, edits=j)
                    for j, u in enumerate(units)
                ],
            )

    def turn():
        while not running.is_set():
            aggregate(store)

    writers = [threading.Thread(target=guarded, args=(lambda s=s: write(s),)) for s in range(3)]
    turners = [threading.Thread(target=guarded, args=(turn,)) for _ in range(2)]
    for thread in writers + turners:
        thread.start()
    for thread in writers:
        thread.join()
    running.set()
    for thread in turners:
        thread.join()
    assert errors == []
    aggregate(store)
    kept = same(store)
    n = sum(r["n"] for r in kept["unit_totals"] if r["metric"] == "edits")
    assert (
        n == sum(r["count"] for r in kept["metric_aggregates"] if r["metric"] == "edits" and r["bucket"] == "day") > 300
    )


WORK = """
import sys
from mlops_workbench.aggregate import aggregate
from mlops_workbench.store import Store, transaction
store = Store(sys.argv[1])
print("ready", flush=True)
aggregate(store)
"""


def test_a_killed_turn_has_done_nothing_and_the_next_does_all(store):
    "The database holds the turn back right after the old rows are gone; then the process is killed with -9."
    begin(store)
    expose(store, *(assignment(f"h-{i}", START) for i in range(5)))
    write_events(store, [event(i, f"h-{i % 5}", START + i * HOUR, edits=i) for i in range(40)])
    aggregate(store)
    before = same(store)
    write_events(store, [event(100 + i, f"h-{i % 5}", START + i * HOUR, edits=i) for i in range(40)])
    with transaction(store) as connection:
        connection.execute(
            "CREATE FUNCTION exp.hold() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN NULL; END'"
        )
        connection.execute(
            "CREATE TRIGGER hold AFTER DELETE ON exp.unit_totals FOR EACH STATEMENT EXECUTE FUNCTION exp.hold()"
        )
    process = subprocess.Popen([sys.executable, "-c", WORK, store.url], stdout=subprocess.PIPE)
    waits = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    deadline = time.monotonic() + 60
    while True:
        with transaction(store) as connection:
            if held := read_rows(connection, waits):
                break
        assert time.monotonic() < deadline, "the turn never came to its last step"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with transaction(store) as connection:  # a server notices a dead client when it next speaks: make it now
        connection.execute("SELECT pg_terminate_backend(%s)", (held[0]["pid"],))
        connection.execute("DROP TRIGGER hold ON exp.unit_totals")
    assert read_aggregates(store, "warm") == before
    aggregate(store)
    assert same(store) != before


# Reading


def test_every_exposed_unit_has_a_row(store):
    begin(store)
    expose(store, *(assignment(f"h-{i}", START) for i in range(6)))
    write_events(store, [event(1, "h-1", START + HOUR, edits=3), event(2, "h-1", START - HOUR, edits=3)])
    aggregate(store)
    totals = read_unit_totals(store, "warm", "converted")
    assert totals["unit_id"].tolist() == ["h-0", "h-2", "h-4", "h-1", "h-3", "h-5"]
    assert totals["y"].tolist() == totals["covariate"].tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("winsor", [0, 0.1, 0.01])
def test_sums_are_those_of_the_rows(store, winsor):
    plans = [dict(PLANS[1], winsor=winsor), dict(PLANS[2], winsor=winsor), PLANS[4]]
    begin(store, plans=plans)
    r = random.Random(3)
    expose(store, *(assignment(f"h-{i}", START) for i in range(60)))
    ramp(store, 2, START + 20 * HOUR)
    expose(store, *(assignment(f"h-{i}", START + r.uniform(20, 40) * HOUR, phase=2) for i in range(40, 90)))
    events = []
    for i in range(400):
        metrics = {"edits": r.lognormvariate(0, 1) + 1e6, "dishes": r.randrange(9)}
        events.append(event(i, f"h-{r.randrange(90)}", START + r.uniform(-48, 48) * HOUR, **metrics))
    write_events(store, events)
    aggregate(store)
    for plan in plans:
        rows, sums = read_unit_totals(store, "warm", plan["metric"]), read_sums(store, "warm", plan["metric"])
        assert len(rows) == rows["unit_id"].nunique() == 90
        assert rows.groupby("phase").size().to_dict() == {1: 60, 2: 30}
        name, column = ("x", "denominator") if plan["kind"] == "ratio" else ("before", "covariate")
        rows["y"] = winsorise([rows["y"]], plan["winsor"])[0][0]
        for (phase, variant), arm in rows.groupby(["phase", "variant"]):
            got, wanted = sums[phase][variant], Sums.of(arm["y"], **{name: arm[column]})
            assert (got.n, got.columns) == (wanted.n, wanted.columns)
            np.testing.assert_allclose(got.means, wanted.means, rtol=1e-12)
            np.testing.assert_allclose(got.scatter, wanted.scatter, rtol=1e-9, atol=1e-3)


def test_values_and_series_and_slices(store):
    begin(store)
    expose(store, assignment("h-1", START), assignment("h-2", START))
    write_events(
        store, [event(i, f"h-{1 + i % 2}", START + i * 6 * HOUR, "requested", wait_ms=100.0 * i + 1) for i in range(8)]
    )
    first = Event("exposure", "household", "h-1", START, context={"country": "PT"}, experiments={"warm": "warm"})
    second = Event("exposure", "household", "h-1", START + DAY, context={"country": "ES"}, experiments={"warm": "warm"})
    write_events(store, [second, first, event(9, "h-1", START + HOUR), event(10, "h-1", START + 2 * HOUR)])
    aggregate(store)
    values = read_values(store, "warm", "wait")
    assert values.groupby("unit_id")["value"].apply(list).to_dict() == {
        "h-1": [1, 201, 401, 601],
        "h-2": [101, 301, 501, 701],
    }
    series = read_series(store, "warm", "wait")
    assert series["starts_at"].dt.hour.tolist() == [0] * 4 and series["count"].tolist() == [2, 2, 2, 2]
    assert series["value"].tolist() == pytest.approx([101, 1, 501, 401], rel=0.011)
    ratio = read_series(store, "warm", "acceptance")
    assert ratio[ratio["variant"] == "warm"]["value"].tolist() == [1.0, 0.0]
    sliced = read_unit_totals(store, "warm", "edits", slices=("country", "plan"))
    assert sliced[["country", "plan"]].astype(object).where(
        sliced[["country", "plan"]].notna(), None
    ).values.tolist() == [
        [None, None],
        ["PT", None],
    ]
    assert isinstance(sliced, pd.DataFrame)


@pytest.mark.parametrize("read", [read_unit_totals, read_sums, read_values, read_series])
def test_unknown_names_are_told(store, read):
    begin(store)
    with pytest.raises(WorkbenchError, match="there is no experiment 'wram'.*warm"):
        read(store, "wram", "edits")
    with pytest.raises(WorkbenchError, match="has no metric 'edit'.*edits"):
        read(store, "warm", "edit")


def test_other_bad_input_is_told(store):
    begin(store)
    with pytest.raises(ValueError, match="bucket is 'week': choose from hour, day"):
        read_series(store, "warm", "edits", "week")
    for read in (recount, read_oddities):
        with pytest.raises(WorkbenchError, match="there is no experiment 'cold'"):
            read(store, "cold")
