"""What monitoring promises about drift, checked on simulated windows whose truth is known.

    python -m benchmarks.drift              # some minutes on one core
    python -m benchmarks.drift --n 50       # fewer windows a claim: good rules may miss a bound

Windows are drawn with numpy from fixed seeds; what is judged are the library's own functions with their defaults. A share is
printed with its exact 95 % interval (Clopper and Pearson). Lines without a verdict show naive rules on the same windows.

identical  20 features (14 numbers, 4 categories, 2 lists), 500 and 2,000 rows a side, nothing moved: reports with any alarm
units      the same 20 features, half of them fixed per unit, 5 rows a unit, units of their own in the window
shift      one of 20 numbers shifted by 0.2 σ at 2,000 rows a side: windows in which that number is named
mixed      the same in a report with categories and lists; a category that moves 10 % of its rows; one member of a list
text       400 notes a side, half of the window's from another world; and none
lasting    three identical windows one after the other: alarms that persist in two of them
"""

import argparse
import sys
import time

import numpy as np
from scipy import stats

from mlops_workbench.drift import (
    DriftPlan,
    Layout,
    Measured,
    correct,
    measure_column,
    prepare_column,
    psi,
    rate_drift,
)
from mlops_workbench.stats import proportion_interval

PLAN = DriftPlan()
FOODS = [f"food-{k}" for k in range(25)]


class Claims:
    "Print claims as they are settled, and remember whether all were kept."

    def __init__(self) -> None:
        self.kept = True

    def share(self, words: str, hits: int, n: int, low: float | None = None, high: float | None = None) -> None:
        "Print a share, and hold it to a bound where there is one."
        found = proportion_interval(int(hits), n)
        text = f"  {words:<62}{found.estimate:7.1%} [{found.low:.1%}, {found.high:.1%}]"
        if low is None and high is None:
            return print(text, flush=True)
        kept = (low is None or found.estimate >= low) and (high is None or found.estimate <= high)
        self.kept &= kept
        bound = f"at least {low:.0%}" if low is not None else f"at most {high:.0%}"
        print(f"{text}  {bound}: {'kept' if kept else 'MISSED'}", flush=True)


def draw(rng: np.random.Generator, n: int) -> dict[str, tuple[str, list]]:
    "Draw 20 features of different kinds for `n` rows: name → kind and values."
    found: dict[str, tuple[str, list]] = {f"normal_{k}": ("number", rng.normal(0, 1, n)) for k in range(8)}
    found |= {f"skewed_{k}": ("number", rng.lognormal(0, 1, n)) for k in range(3)}
    found |= {f"count_{k}": ("number", rng.poisson(2, n).astype(float)) for k in range(3)}
    for k, size in enumerate((2, 3, 8, 30)):
        chances = rng.dirichlet(np.full(size, 3.0))
        found[f"level_{k}"] = ("category", rng.choice([f"v{i}" for i in range(size)], n, p=chances).tolist())
    for k in range(2):
        sizes = rng.integers(1, 7, n)
        found[f"list_{k}"] = ("set", [tuple(rng.choice(FOODS, size, replace=False)) for size in sizes])
    return found


def measure(features: dict[str, tuple[str, list]], layout: Layout) -> list[Measured]:
    "Test all features of a window together, as a report does."
    columns = [prepare_column(name, kind, values) for name, (kind, values) in features.items()]
    return correct([measure_column(column, layout) for column in columns], PLAN)


def halves(n: int) -> Layout:
    "Lay out a reference and a window of `n` rows each, every row a unit."
    return Layout(np.arange(2 * n) >= n, np.arange(2 * n))


def naive(features: dict[str, tuple[str, list]], n: int) -> tuple[bool, bool]:
    "Say whether any number has p < 0.05 by Kolmogorov and Smirnov, and whether any has an index above 0.2."
    sides = [(np.array(v[:n]), np.array(v[n:])) for kind, v in features.values() if kind == "number"]
    return any(stats.ks_2samp(a, b, method="asymp").pvalue < 0.05 for a, b in sides), any(
        psi(a, b) > 0.2 for a, b in sides
    )


def identical(claims: Claims, windows: int) -> None:
    "Windows in which nothing moved."
    for n in (500, 2_000):
        print(f"identical: 20 features, {n:,} rows a side, {windows} windows")
        ours, ks, index, per = 0, 0, 0, 0
        for i in range(windows):
            features = draw(np.random.default_rng([1, n, i]), 2 * n)
            found = measure(features, halves(n))
            by_ks, by_psi = naive(features, n)
            ours, ks, index = ours + any(m.moved for m in found), ks + by_ks, index + by_psi
            per += any(m.p_value < 0.05 for m in found)
        claims.share("reports with a false alarm", ours, windows, high=0.05)
        claims.share("any of the 14 numbers with Kolmogorov–Smirnov p < 0.05", ks, windows)
        claims.share("any with PSI > 0.2", index, windows)
        claims.share("any p < 0.05 of our own tests, without the correction", per, windows)


def by_unit(claims: Claims, windows: int) -> None:
    "Windows with units of their own, whose rows resemble each other."
    print(f"units: 20 features, 5 rows a unit, 1,000 rows a side, {windows} windows")
    units = np.repeat(np.arange(400), 5)
    layout, alone = Layout(units >= 200, units), halves(1_000)
    ours = rows = 0
    for i in range(windows):
        rng = np.random.default_rng([2, i])
        wide, fixed = draw(rng, 2_000), draw(rng, 400)
        lasting = {k: (kind, [v for v in fixed[k][1] for _ in range(5)]) for k, (kind, _) in list(fixed.items())[::2]}
        features = wide | lasting
        ours += any(m.moved for m in measure(features, layout))
        rows += any(m.moved for m in measure(features, alone))
    claims.share("reports with a false alarm", ours, windows, high=0.05)
    claims.share("the same tests, taking every row for a unit", rows, windows)


def shift(claims: Claims, windows: int) -> None:
    "One number of twenty that moves by a fifth of its standard deviation."
    n = 2_000
    print(f"shift: 0.2 σ in one of 20 numbers, {n:,} rows a side, {windows} windows")
    ours = ks = index = 0
    for i in range(windows):
        values = np.random.default_rng([3, i]).normal(0, 1, (20, 2 * n))
        values[0, n:] += 0.2
        found = measure({f"x{k}": ("number", v) for k, v in enumerate(values)}, halves(n))
        ours += found[0].moved
        p = [stats.ks_2samp(v[:n], v[n:], method="asymp").pvalue for v in values]
        ks += stats.false_discovery_control(p)[0] <= 0.05
        index += psi(values[0, :n], values[0, n:]) > 0.2
    claims.share("windows in which it is named", ours, windows, low=0.9)
    claims.share("Kolmogorov–Smirnov alone with Benjamini–Hochberg", ks, windows)
    claims.share("PSI > 0.2", index, windows)


def mixed(claims: Claims, windows: int) -> None:
    "One feature of each kind that moves, in a report of twenty."
    n = 2_000
    print(f"mixed: one feature of each kind moves, {n:,} rows a side, {windows} windows")
    hits = dict.fromkeys(("normal_0", "level_1", "list_0"), 0)
    others = 0
    for i in range(windows):
        rng = np.random.default_rng([4, i])
        features = draw(rng, 2 * n)
        features["normal_0"][1][n:] += 0.2
        levels = features["level_1"][1]
        features["level_1"] = ("category", levels[:n] + ["v0" if rng.random() < 0.15 else v for v in levels[n:]])
        lists = features["list_0"][1]
        more = [tuple({*v, "food-0"}) if rng.random() < 0.1 else v for v in lists[n:]]
        features["list_0"] = ("set", lists[:n] + more)
        moved = {m.name for m in measure(features, halves(n)) if m.moved}
        hits = {name: k + (name in moved) for name, k in hits.items()}
        others += bool(moved - set(hits))
    claims.share("a number shifted by 0.2 σ is named", hits["normal_0"], windows, low=0.9)
    claims.share("a category with 15 % of the rows set to one level", hits["level_1"], windows, low=0.9)
    claims.share("a list with one member added in 10 % of the rows", hits["list_0"], windows, low=0.9)
    claims.share("something that did not move is named beside them", others, windows)


def text(claims: Claims, windows: int) -> None:
    "Notes of 400 households, with and without another world in half of the window's."
    words = [f"word{k}" for k in range(200)]
    print(f"text: 400 notes a side, {windows} windows")
    quiet = found = 0
    for i in range(windows):
        rng = np.random.default_rng([5, i])
        weights = 1 / np.arange(1, 201)
        draws = rng.choice(words, (800, 8), p=weights / weights.sum())
        notes = [" ".join(row) for row in draws]
        other = [" ".join(rng.choice(words[100:], 8)) if k % 2 else note for k, note in enumerate(notes[400:])]
        quiet += correct([measure_column(prepare_column("note", "text", notes), halves(400))], PLAN)[0].moved
        changed = prepare_column("note", "text", notes[:400] + other)
        found += correct([measure_column(changed, halves(400))], PLAN)[0].moved
    claims.share("identical worlds that are told apart", quiet, windows, high=0.05)
    claims.share("half of the notes from another world", found, windows, low=0.9)


def lasting(claims: Claims, windows: int) -> None:
    "Identical windows in a row, against one reference."
    n = 500
    print(f"lasting: three identical windows of {n} rows in a row, {windows} times")
    alarms = severe = 0
    for i in range(windows):
        rng = np.random.default_rng([6, i])
        reference, past = rng.normal(0, 1, (20, n)), []
        for _ in range(3):
            values = np.concatenate([reference, rng.normal(0, 1, (20, n))], axis=1)
            found = measure({f"x{k}": ("number", v) for k, v in enumerate(values)}, halves(n))
            rated = [rate_drift(m.moved, m.effect, [m.name in names for names in past], PLAN) for m in found]
            past = [{m.name for m in found if m.moved}, *past]
        alarms += any(past)
        severe += any(level in ("medium", "high") for level in rated)
    claims.share("any of the three reports names something", alarms, windows)
    claims.share("the last is medium or high, which triggers act on", severe, windows, high=0.05)


PARTS = {"identical": identical, "units": by_unit, "shift": shift, "mixed": mixed, "text": text, "lasting": lasting}


def main() -> int:  # exit code
    "Check what was asked for."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="windows a claim")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    chosen = parser.parse_args()
    claims, names = Claims(), chosen.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    for name in names:
        began = time.perf_counter()
        PARTS[name](claims, chosen.n if name != "text" else max(1, chosen.n // 2))
        print(f"  ({time.perf_counter() - began:.0f} s)\n", flush=True)
    print("all kept" if claims.kept else "MISSED")
    return 0 if claims.kept else 1


if __name__ == "__main__":
    sys.exit(main())
