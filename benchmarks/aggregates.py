"""What aggregation costs beside a full recount, what its marks cost who writes events, and how fast a million units are read.

    python -m benchmarks.aggregates                                   # 200,000 events of 20,000 units, a million units to read
    python -m benchmarks.aggregates --events 50000 --units 5000 --read 100000 --repeat 3

Everything runs on a throwaway server, durable as the real one, with variants in turn and medians of the same run.

new       what arrived in the last hour (1 % of the events), aggregated, beside recounting the experiment
late      as many events, spread over all days
few       100 late events of one day
exposed   1 % of the units become known late, with their events already there
nothing   a turn when nothing has changed
write     `write_events` in batches of 1,000 with the trigger that marks, beside the same without it
read      `read_unit_totals` and `read_sums` of `--read` exposed units
In the end the aggregates must equal the recount, to the last digit.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.bench import verdict
from mlops_workbench.aggregate import aggregate, read_aggregates, read_sums, read_unit_totals, recount
from mlops_workbench.core import new_id
from mlops_workbench.design import MetricPlan, Variant
from mlops_workbench.events import Event, write_events
from mlops_workbench.experiment import Experiment, create_experiment, start_experiment
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, open_store, transaction

START, DAYS = datetime(2026, 3, 2, tzinfo=UTC), 14
METRICS = (
    MetricPlan("acceptance", "primary", "ratio", "plan_accepted", denominator="plan_requested"),
    MetricPlan("edits", "secondary", "mean", "plan_accepted", "edits", covariate=True),
    MetricPlan("wait", "secondary", "quantile", "plan_requested", "wait_ms", higher_is_better=False),
)
ASSIGN = """
INSERT INTO exp.assignments SELECT %(key)s, 1, 'household', 'h-' || i, CASE WHEN i %% 2 = 0 THEN 'control' ELSE 'warm' END,
       i %% 10000, %(at)s FROM generate_series(%(first)s::int, %(last)s::int) AS i
"""
FILL = """
INSERT INTO exp.unit_totals SELECT %(key)s, 'edits', 'h-' || i, 1, CASE WHEN i %% 2 = 0 THEN 'control' ELSE 'warm' END,
       3, (i %% 17) / 3.0, 0, (i %% 13) / 7.0 FROM generate_series(1, %(last)s::int) AS i
"""


def begin(store: Store, key: str) -> None:
    "Start an experiment two weeks ago."
    variants = (Variant("control", 0.5, control=True), Variant("warm", 0.5, parameters={"tone": "warm"}))
    known = ("a warmer tone is edited less", "planner", "household", variants, METRICS, 0.05, 100)
    declared = Experiment(key, *known, ends_at=datetime(2099, 1, 1, tzinfo=UTC), namespace=(key, 0.0, 1.0))
    create_experiment(store, declared, "ana")
    start_experiment(store, key, "ana", at=START)


def assign(store: Store, key: str, first: int, last: int) -> None:
    "Expose a range of units from the start on."
    with transaction(store) as connection:
        connection.execute(ASSIGN, {"key": key, "at": START, "first": first, "last": last})


def some_events(n: int, units: int, r: random.Random, hours: tuple[float, float]) -> list[Event]:
    "Make events within a span of hours after the start."
    made = []
    for _ in range(n):
        at = START + timedelta(hours=r.uniform(*hours))
        accepted = r.random() < 0.5
        metrics = {"edits": r.randrange(5)} if accepted else {"wait_ms": r.lognormvariate(6, 1)}
        type = "plan_accepted" if accepted else "plan_requested"
        unit = f"h-{r.randint(1, units)}"
        context = {"source": "app"}
        made.append(Event(type, "household", unit, at, {"days": 7}, new_id(), {}, context, metrics))
    return made


def timed(work: Callable[[], object]) -> float:  # wall seconds
    "Run something and time it."
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def write(store: Store, events: list[Event]) -> list[float]:  # seconds of each batch
    "Write events in batches of a thousand."
    return [timed(lambda i=i: write_events(store, events[i : i + 1000])) for i in range(0, len(events), 1000)]


def truth(store: Store, name: str) -> bool:
    "Compare the aggregates with their recount."
    same = read_aggregates(store, "warm") == recount(store, "warm")
    if not same:
        print(f"{name}: the aggregates differ from their recount: MISSED")
    return same


def turns(store: Store, chosen: argparse.Namespace, r: random.Random) -> list[bool]:
    "Aggregate after each kind of change, beside recounts of the same run."
    n, units, span = chosen.events // 100, chosen.units, DAYS * 24

    def expose(turn: int) -> None:
        assign(store, "warm", units + turn * units // 100 + 1, units + (turn + 1) * units // 100)

    changes = {
        "new": (lambda turn: write(store, some_events(n, units, r, (span, span + 1))), 0.25),
        "late": (lambda turn: write(store, some_events(n, units, r, (0, span))), 1.0),
        "few": (lambda turn: write(store, some_events(100, units, r, (48, 72))), 0.25),
        "exposed": (expose, 0.25),
        "nothing": (lambda turn: None, 0.05),
    }
    taken, whole = {name: [] for name in changes}, []
    for turn in range(chosen.repeat):
        for name, (change, _) in changes.items():
            change(turn)
            taken[name].append(timed(lambda: aggregate(store)))
        whole.append(timed(lambda: recount(store, "warm")))
    full, kept = statistics.median(whole), [truth(store, "turns")]
    print(f"recount of {chosen.events:,} events and {units:,} units: {full:.2f} s")
    for name, (_, bound) in changes.items():
        seconds = statistics.median(taken[name])
        kept.append(seconds / full <= bound)
        print(f"{name:8} {seconds:.3f} s, {verdict(seconds / full, bound)} of the recount")
    return kept


def writing(store: Store, chosen: argparse.Namespace, r: random.Random) -> list[bool]:
    "Write batches with and without the trigger, in turn."
    seconds: dict[str, list[float]] = {"ENABLE": [], "DISABLE": []}
    for turn in range(4 * chosen.repeat):
        for state in ("ENABLE", "DISABLE") if turn % 2 else ("DISABLE", "ENABLE"):
            with transaction(store) as connection:
                connection.execute(f"ALTER TABLE exp.events {state} TRIGGER events_are_marked")
            spent = write(store, some_events(2000, chosen.units, r, (0, DAYS * 24)))
            seconds[state] += spent if turn else []
    with transaction(store) as connection:
        connection.execute("ALTER TABLE exp.events ENABLE TRIGGER events_are_marked")
    marked, bare = (statistics.median(seconds[state]) for state in ("ENABLE", "DISABLE"))
    print(
        f"write    {1000 * marked:.1f} ms a batch of 1,000 over two weeks, {verdict(marked / bare, 1.15)} of the same without marks"
    )
    return [marked / bare <= 1.15]


def reading(store: Store, chosen: argparse.Namespace) -> None:
    "Read many exposed units."
    begin(store, "large")
    assign(store, "large", 1, chosen.read)
    with transaction(store) as connection:
        connection.execute(FILL, {"key": "large", "last": chosen.read})
        connection.execute("ANALYZE exp.assignments, exp.unit_totals")
    for read in (read_unit_totals, read_sums):
        spent = [timed(lambda read=read: read(store, "large", "edits")) for _ in range(3)]
        print(f"read     {read.__name__} of {chosen.read:,} units: {statistics.median(spent):.2f} s")


def main() -> int:
    "Run everything and say what was kept."
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--events", type=int, default=200_000, help="events of the experiment")
    parser.add_argument("--units", type=int, default=20_000, help="exposed units")
    parser.add_argument("--read", type=int, default=1_000_000, help="exposed units of the experiment that is read")
    parser.add_argument("--repeat", type=int, default=5, help="turns whose median counts")
    parser.add_argument("--seed", type=int, default=1, help="of the events")
    chosen = parser.parse_args()
    r = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory(prefix="wb-") as folder:
        Path(folder).chmod(0o755)  # the embedded server's user passes through
        with open_store(Settings("local", Path(folder), Path(folder))) as store:
            begin(store, "warm")
            assign(store, "warm", 1, chosen.units)
            write(store, some_events(chosen.events, chosen.units, r, (-28 * 24, DAYS * 24)))
            with transaction(store) as connection:  # as the server does by itself after a minute
                connection.execute("ANALYZE exp.events, exp.assignments")
            first = timed(lambda: aggregate(store))
            with transaction(store) as connection:
                connection.execute("ANALYZE exp.unit_totals, exp.metric_aggregates")
            print(f"first    {first:.2f} s to aggregate all of it")
            kept = turns(store, chosen, r) + writing(store, chosen, r)
            with transaction(store) as connection:  # what was written without marks is found by marking every unit
                connection.execute("INSERT INTO exp.unit_marks SELECT experiment, unit_id FROM exp.assignments")
            aggregate(store)
            kept.append(truth(store, "write"))
            reading(store, chosen)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
