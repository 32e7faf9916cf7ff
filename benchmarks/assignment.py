"""What an assignment costs beside GrowthBook's Python SDK, one unit and many at a time, and whether anybody ever moves.

    python -m benchmarks.assignment                     # medians of 5
    python -m benchmarks.assignment --units 200000 --repeat 3

scalar   `assign` and the SDK's `run` with the same experiment, in turn; CPU time of this process, so that a busy machine disturbs
         neither. `run` is timed alone, for one unit whose attributes are set already: setting them is said in a line of its own.
vector   `assign_many` over a column and over a list, wall time: units per second of this machine
equal    `assign_many` against `assign` unit by unit, with a namespace, a hold-out, a condition, forced units and a barred version
flips    every unit looked up one by one in two other processes whose hash seeds differ, and by the SDK
ramp     1 → 100 % coverage in 100 steps with two, three and unequal arms: units that change their arm
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from growthbook import Experiment, GrowthBook

from mlops_workbench.assignment import Allocation, Arm, Phase, assign, assign_many, split_buckets

ARMS = (Arm("control", 0, 0, 5000, 3), Arm("treatment", 1, 5000, 10_000, 4))
MENU = Allocation("menu-4", "menu-4", "household", "active", Phase(1, 5000, ARMS))
GUARDED = replace(
    MENU,
    namespace=("kitchen", 0.1, 0.9),
    holdout=500,
    condition={"country": {"$in": ["NL", "BE"]}},
    forced={"household-7": "treatment", "household-8": "control"},
)


def medians(variants: Mapping[str, Callable[[], object]], repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    "Time each variant in turn, again and again, and take the middle of each; the first turn warms."
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeat + 1):
        for name, work in variants.items():
            start = clock()
            work()
            if turn:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def held(what: str, kept: bool) -> bool:
    "Say whether a bound was kept."
    print(f"  {what}: {'kept' if kept else 'MISSED'}", flush=True)
    return kept


def part_scalar(options: argparse.Namespace) -> bool:
    "Time one unit after the other."
    experiment = Experiment(key="menu-4", seed="menu-4", variations=[0, 1], hashVersion=2, coverage=0.5)
    good = True
    for kind, units in (
        ("household-123456", [f"household-{100_000 + i}" for i in range(options.calls)]),
        ("UUIDs", [f"6f1c2f0e-3c0b-5d4a-9a52-{i:012x}" for i in range(options.calls)]),
    ):
        sdk = GrowthBook(attributes={"id": units[0]})

        def run(sdk=sdk, units=units):
            for _ in units:
                sdk.run(experiment)

        def set_and_run(sdk=sdk, units=units):
            for unit in units:
                sdk.set_attributes({"id": unit})
                sdk.run(experiment)

        def ours(units=units):
            for unit in units:
                assign(MENU, unit)

        variants = {"assign": ours, "GrowthBook run": run, "GrowthBook set_attributes and run": set_and_run}
        found = medians(variants, options.repeat, time.process_time)
        for name, seconds in found.items():
            print(f"  {kind}: {name} {seconds / len(units) * 1e6:.2f} µs of CPU")
        ratio = found["GrowthBook run"] / found["assign"]
        good &= held(f"{kind}: {ratio:.1f} × as fast as run, at least 5", ratio >= 5)
    return good


def part_vector(options: argparse.Namespace) -> bool:
    "Time many units at once."
    units = [f"household-{i}" for i in range(options.units)]
    column, places = pd.Series(units), pd.DataFrame({"country": np.resize(["NL", "BE", "DE"], len(units))})
    variants = {
        "a column": lambda: assign_many(MENU, column),
        "a list": lambda: assign_many(MENU, units),
        "a column with namespace, hold-out, condition and forced units": lambda: assign_many(GUARDED, column, places),
    }
    speeds = {n: len(units) / s / 1e6 for n, s in medians(variants, options.repeat, time.perf_counter).items()}
    for name, speed in speeds.items():
        print(f"  {name}: {speed:.1f} M units/s")
    return held(f"a column: {speeds['a column']:.1f} M units/s, at least 5", speeds["a column"] >= 5)


def part_equal(options: argparse.Namespace) -> bool:
    "Compare many units at once with one after the other."
    units = [f"{kind}-{i}" for i in range(options.units // 4) for kind in ("household", "müller", "🥕", "u" * (i % 40))]
    places = pd.DataFrame({"country": np.resize(["NL", "BE", "DE", None], len(units))})
    contexts = [{"country": c} if isinstance(c, str) else {} for c in places["country"]]
    different = 0
    for allocation in (MENU, GUARDED, replace(GUARDED, barred=frozenset({4}))):
        many = assign_many(allocation, units, places)
        rows = zip(units, contexts, many["variant"], many["bucket"], many["reason"], strict=True)
        for unit, context, variant, bucket, reason in rows:
            one = assign(allocation, unit, context)
            different += (one.variant, one.bucket, one.reason) != (variant, bucket, reason)
    return held(f"{different} of 3 × {len(units):,} units differ", different == 0)


def look_up(n: int) -> str:
    "Digest what n look-ups say, one by one."
    found = hashlib.sha256()
    for i in range(n):
        found.update((assign(MENU, f"household-{i}").variant or "-").encode())
    return found.hexdigest()


def part_flips(options: argparse.Namespace) -> bool:
    "Look every unit up in processes of their own, and by the SDK."
    code = f"from benchmarks.assignment import look_up; print(look_up({options.units}))"
    said = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        said.add(run.stdout.strip())
    experiment = Experiment(key="menu-4", seed="menu-4", variations=[0, 1], hashVersion=2, coverage=0.5)
    sdk, found = GrowthBook(), hashlib.sha256()
    for i in range(options.units):
        sdk.set_attributes({"id": f"household-{i}"})
        result = sdk.run(experiment)
        found.update((ARMS[result.variationId].name if result.inExperiment else "-").encode())
    said |= {look_up(options.units), found.hexdigest()}
    return held(
        f"{options.units:,} look-ups in 3 processes and by the SDK: {len(said)} different answers", len(said) == 1
    )


def part_ramp(options: argparse.Namespace) -> bool:
    "Raise the coverage percent by percent."
    units, good = pd.Series([f"household-{i}" for i in range(options.units // 10)]), True
    for weights in ((0.5, 0.5), (1 / 3, 1 / 3, 1 / 3), (0.9, 0.1)):
        arms = tuple(Arm(f"arm-{i}", i, *ends) for i, ends in enumerate(split_buckets(weights)))
        steps = [replace(MENU, phase=Phase(i, 100 * i, arms)) for i in range(1, 101)]
        variants = [assign_many(step, units)["variant"].fillna("") for step in steps]
        moves = sum(int(((a != "") & (a != b)).sum()) for a, b in zip(variants, variants[1:], strict=False))
        shares = "/".join(f"{w:.0%}" for w in weights)
        good &= held(f"{shares}: {moves} of {len(units):,} units moved in {len(steps)} steps", moves == 0)
    return good


PARTS = {"scalar": part_scalar, "vector": part_vector, "equal": part_equal, "flips": part_flips, "ramp": part_ramp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--repeat", type=int, default=5, help="turns that count")
    parser.add_argument(
        "--units", type=int, default=1_000_000, help="units of vector, equal and flips; a tenth of them ramps"
    )
    parser.add_argument("--calls", type=int, default=20_000, help="calls of a turn of scalar")
    options = parser.parse_args()
    for name in options.only.split(","):
        if name not in PARTS:
            parser.error(f"there is no part {name!r}: choose from {', '.join(PARTS)}")
    good = True
    for name in options.only.split(","):
        print(name, flush=True)
        good &= PARTS[name](options)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
