"""What the statistics of experiments promise, checked on simulated experiments whose truth is known.

    python -m benchmarks.experiments                       # every part, some minutes on one core
    python -m benchmarks.experiments --only srm,pooling    # some of them
    python -m benchmarks.experiments --n 300               # fewer experiments a claim: good rules may miss a bound

Data are drawn with numpy from fixed seeds; what is judged are the library's own functions. A share is printed with its exact
95 % interval (Clopper and Pearson). Lines without a verdict show the naive rule beside ours.

pooling    A/A through a ramp of 10, 25, 50 % while the baseline drifts 5 → 6 → 7 %: pooled arms against strata
events     A/A on clicks per view, visitors randomised: a test per view against the delta method
peeking    A/A watched daily for 28 days, stopped at the first finding: single-look tests against confidence sequences
guardrail  a loss exactly as large as the margin, watched daily: how often it is called kept, or broken
power      an effect of the size planned for, watched daily until the planned size
coverage   how often the interval of one look holds the true effect, metric by metric
cuped      variance with and without the past, against 1 − ρ²
srm        100,000 units an arm, split 50.5 : 49.5 and 50 : 50; with 100,000 in all no test at 0.001 can find more than 45 %
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import reduce
from operator import add

import numpy as np

from mlops_workbench.effect import (
    Effect,
    compare_counts,
    compare_means,
    compare_proportions,
    compare_quantiles,
    compare_ratios,
    stratify,
)
from mlops_workbench.power import SRM_THRESHOLD, Design, sample_size, srm_check
from mlops_workbench.sequential import guard, watch
from mlops_workbench.stats import proportion_interval
from mlops_workbench.sums import Sums, adjust

DAYS = 28
Days = list[tuple[Sums, Sums]]


class Report:
    "Print claims as they are settled, and remember whether all were kept."

    def __init__(self) -> None:
        self.kept = True

    def share(self, words: str, hits: int, n: int, low: float = 0.0, high: float = 1.0, top: float = 1.0) -> None:
        "Hold a share between `low` and `high`, and the upper end of its interval below `top`."
        found = proportion_interval(int(hits), n)
        text = f"  {words:<66}{found.estimate:7.2%} [{found.low:.2%}, {found.high:.2%}]"
        if (low, high) == (0.0, 1.0):
            print(text)
            return
        self._settle(text, low <= found.estimate <= high and found.high <= top, bound_words(low, high, top))

    def value(self, words: str, value: float, low: float, high: float) -> None:
        "Hold a number between two others."
        self._settle(f"  {words:<66}{value:7.4f}", low <= value <= high, f"from {low:.4f} to {high:.4f}")

    def _settle(self, text: str, kept: bool, bound: str) -> None:
        self.kept &= kept
        print(f"{text}  {bound}: {'kept' if kept else 'MISSED'}", flush=True)


def bound_words(low: float, high: float, top: float) -> str:
    "Say what was asked of a share."
    if low and high < 1:
        return f"from {low:.0%} to {high:.0%}"
    asked = f"at least {low:.0%}" if low else f"at most {high:.0%}"
    return asked + (f", upper end at most {top:.0%}" if top < 1 else "")


# Pooling


def pooling(report: Report, n: int, rng: np.random.Generator) -> None:
    treated, rates, size = np.array([0.10, 0.25, 0.50]), np.array([0.05, 0.06, 0.07]), 20_000
    n_t = (size * treated).astype(int)
    accepted = rng.binomial(size - n_t, rates, (n, 3)), rng.binomial(n_t, rates, (n, 3))
    even = rng.binomial(size // 2, rates, (n, 3)), rng.binomial(size // 2, rates, (n, 3))
    found = {"pooled": 0, "by phase": 0, "even": 0}
    for i in range(n):
        phases = [
            (Sums.from_totals(size - m, c), Sums.from_totals(m, t))
            for m, c, t in zip(n_t.tolist(), accepted[0][i], accepted[1][i], strict=True)
        ]
        pooled = compare_proportions(*(reduce(add, side) for side in zip(*phases, strict=True)))
        found["pooled"] += pooled.p_value < 0.05
        found["by phase"] += stratify([compare_proportions(*pair) for pair in phases]).p_value < 0.05
        arms = [Sums.from_totals(3 * size // 2, int(side[i].sum())) for side in even]
        found["even"] += compare_proportions(*arms).p_value < 0.05
    report.share("naive: arms pooled over the ramp, false findings", found["pooled"], n)
    report.share("arms of equal coverage, pooled", found["even"], n)
    report.share("by phase", found["by phase"], n, high=0.07)


# Events


def visits(rng: np.random.Generator, n_units: int, lift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    "Draw clicks and views of visitors who have a taste of their own; `lift` moves the rate of all."
    views, a = rng.integers(1, 41, n_units), 1.7 * (1 + lift)
    return rng.binomial(views, rng.beta(a, 8.5 - a, n_units)), views


def events(report: Report, n: int, rng: np.random.Generator) -> None:
    naive = delta = 0
    for _ in range(n):
        (y, x), (z, w) = visits(rng, 500), visits(rng, 500)
        views = Sums.from_totals(x.sum(), y.sum()), Sums.from_totals(w.sum(), z.sum())
        naive += compare_means(*views).p_value < 0.05
        delta += compare_ratios(Sums.of(y, x), Sums.of(z, w)).p_value < 0.05
    report.share("naive: every view by itself, false findings", naive, n)
    report.share("by visitor, delta method", delta, n, high=0.08)


# Peeking


def accept_days(rng: np.random.Generator, units: int, rates: tuple[float, float] = (0.05, 0.05)) -> Days:
    "Draw units who accept or not, `units` a day and arm."
    counts = rng.binomial(units, rates, (DAYS, 2))
    return [(Sums.from_totals(units, int(c)), Sums.from_totals(units, int(t))) for c, t in counts]


def spend_days(rng: np.random.Generator, units: int, means: tuple[float, float] = (20.0, 20.0)) -> Days:
    "Draw skewed spending: an exponential amount a unit."
    drawn = [rng.exponential(m, (DAYS, units)) for m in means]
    return [(Sums.of(c), Sums.of(t)) for c, t in zip(*drawn, strict=True)]


def adjusted_days(rng: np.random.Generator, units: int) -> Days:
    "Draw spending that depends on the month before."
    past = rng.exponential(20, (2, DAYS, units))
    spent = 0.8 * past + rng.exponential(10, (2, DAYS, units))
    return [tuple(Sums.of(spent[a, d], before=past[a, d]) for a in (0, 1)) for d in range(DAYS)]


def visit_days(rng: np.random.Generator, units: int) -> Days:
    "Draw clicks per view."
    return [(Sums.of(*visits(rng, units)), Sums.of(*visits(rng, units))) for _ in range(DAYS)]


def looks(days: Days, compare: Callable[[Sums, Sums], Effect]) -> Iterator[Effect]:
    "Compare what is there at the end of each day."
    control, treatment = days[0]
    yield compare(control, treatment)
    for c, t in days[1:]:
        control, treatment = control + c, treatment + t
        yield compare(control, treatment)


def phase_looks(days: Days, compare: Callable[[Sums, Sums], Effect]) -> Iterator[Effect]:
    "Compare by weeks as phases, and average what is there at the end of each day."
    done: list[Effect] = []
    for start in range(0, DAYS, 7):
        effects = list(looks(days[start : start + 7], compare))
        yield from (stratify([*done, e]) for e in effects)
        done.append(effects[-1])


def compare_adjusted(control: Sums, treatment: Sums) -> Effect:
    return compare_means(*adjust((control, treatment))[0])


WATCHED = {
    "accepted or not": (accept_days, 400, looks, compare_proportions),
    "accepted or not, few units": (accept_days, 20, looks, compare_proportions),
    "skewed spending": (spend_days, 50, looks, compare_means),
    "spending, adjusted for the past": (adjusted_days, 50, looks, compare_adjusted),
    "clicks per view": (visit_days, 50, looks, compare_ratios),
    "accepted or not, four phases": (accept_days, 400, phase_looks, compare_proportions),
}


def peeking(report: Report, n: int, rng: np.random.Generator) -> None:
    for name, (draw, units, look, compare) in WATCHED.items():
        naive = always = 0
        for _ in range(n):
            effects = list(look(draw(rng, units), compare))
            naive += any(e.p_value < 0.05 for e in effects)
            always += any(watch(e, tuning=2 * units * DAYS).decided for e in effects)
        report.share(f"{name}, naive: p < 0.05 on some day", naive, n)
        report.share(f"{name}, confidence sequence", always, n, high=0.05, top=0.06)


def guardrail(report: Report, n: int, rng: np.random.Generator) -> None:
    kept = broken = 0
    for _ in range(n):
        outcomes = {
            guard(e, 0.05, tuning=2 * 400 * DAYS).outcome
            for e in looks(accept_days(rng, 400, (0.60, 0.57)), compare_proportions)
        }
        kept, broken = kept + ("kept" in outcomes), broken + ("broken" in outcomes)
    report.share("a loss of the margin was called kept on some day", kept, n, high=0.05, top=0.06)
    report.share("a loss of the margin was called broken on some day", broken, n, high=0.05, top=0.06)


# Power


def found_by(days: Days, compare: Callable[[Sums, Sums], Effect], tuning: int) -> bool:
    "Say whether a watched experiment finds a gain, as soon as it is decided."
    for effect in looks(days, compare):
        seen = watch(effect, tuning=tuning)
        if seen.decided:
            return seen.difference.low > 0
    return False


def power(report: Report, n: int, rng: np.random.Generator) -> None:
    # an exponential amount scatters as much as its mean: the design is told the larger of both arms
    settings = {
        "acceptance 10 %, +10 %": (Design(0.10, looks=DAYS), 0.10, accept_days, compare_proportions, (0.10, 0.11)),
        "spending 20, +10 %": (Design(20.0, 22.0, looks=DAYS), 0.10, spend_days, compare_means, (20.0, 22.0)),
    }
    for name, (design, effect, draw, compare, truth) in settings.items():
        planned = sample_size(design, effect)
        single = sample_size(Design(design.baseline, design.sd), effect)
        for size, words in ((planned, "planned for daily looks"), (single, "naive: planned for one look")):
            units = -(-size // (2 * DAYS))
            hits = sum(found_by(draw(rng, units, truth), compare, size) for _ in range(n))
            text = f"{name}, {words} ({size:,} units)"
            report.share(text, hits, n, **({"low": 0.8} if size == planned else {}))


# Coverage


def household_events(rng: np.random.Generator, scale: float) -> tuple[np.ndarray, np.ndarray]:
    "Draw latencies of 400 households with ten events each."
    household = np.repeat(np.arange(400), 10)
    return scale * rng.lognormal(5, 0.3, 400)[household] * rng.lognormal(0, 0.4, 4000), household


def one_look(rng: np.random.Generator) -> dict[str, tuple[Effect, float, float]]:
    "Draw one experiment a kind of metric: its effect, its true difference and true relative difference."
    past = rng.exponential(20, (2, 1500))
    spent = [0.8 * p + rng.exponential(m, 1500) for p, m in zip(past, (10, 12), strict=True)]
    adjusted = adjust([Sums.of(s, before=p) for s, p in zip(spent, past, strict=True)])[0]
    counts = [rng.negative_binomial(0.5, q, 3000) for q in (0.4, 0.36)]
    a, b = (0.5 * (1 - q) / q for q in (0.4, 0.36))
    phases = [
        compare_proportions(
            Sums.from_totals(2000 - m, rng.binomial(2000 - m, p)), Sums.from_totals(m, rng.binomial(m, 1.1 * p))
        )
        for m, p in ((200, 0.2), (500, 0.25), (1000, 0.3))
    ]
    weights = np.array([200 * 1800, 500 * 1500, 1000 * 1000]) / 2000
    mixed = np.average([0.2, 0.25, 0.3], weights=weights)
    slow = [household_events(rng, s) for s in (1.0, 1.1)]
    centre, tail = np.exp(5), np.exp(5 + 0.5 * 1.2815515655446004)
    big, small = ([rng.binomial(m, p) for p in (0.10, 0.12)] for m in (2000, 80))
    return {
        "proportion, 2,000 units": (compare_proportions(*(Sums.from_totals(2000, k) for k in big)), 0.02, 0.2),
        "proportion, 80 units": (compare_proportions(*(Sums.from_totals(80, k) for k in small)), 0.02, 0.2),
        "mean, skewed": (
            compare_means(*(Sums.of(rng.exponential(m, k)) for m, k in ((20, 900), (22, 300)))),
            2.0,
            0.1,
        ),
        "mean, negative baseline": (
            compare_means(*(Sums.of(rng.normal(m, 8, 300)) for m in (-10, -8))),
            2.0,
            0.2,
        ),
        "mean, adjusted for the past": (compare_means(*adjusted), 2.0, 2 / 26),
        "ratio, clicks per view": (
            compare_ratios(Sums.of(*visits(rng, 600)), Sums.of(*visits(rng, 600, 0.1))),
            0.02,
            0.1,
        ),
        "count, overdispersed": (compare_counts(*map(Sums.of, counts)), b - a, b / a - 1),
        "quantile, median of clustered events": (compare_quantiles(*slow, 0.5), 0.1 * centre, 0.1),
        "quantile, p90 of clustered events": (compare_quantiles(*slow, 0.9), 0.1 * tail, 0.1),
        "proportion over three phases": (stratify(phases), 0.1 * mixed, 0.1),
    }


def coverage(report: Report, n: int, rng: np.random.Generator) -> None:
    hits: dict[str, list[int]] = {}
    for _ in range(n):
        for name, (effect, difference, relative) in one_look(rng).items():
            held = hits.setdefault(name, [0, 0])
            held[0] += effect.difference.low <= difference <= effect.difference.high
            held[1] += effect.relative.low <= relative <= effect.relative.high
    for name, held in hits.items():
        report.share(f"{name}: difference", held[0], n, low=0.93, high=0.97)
        report.share(f"{name}: relative", held[1], n, low=0.93, high=0.97)


# CUPED, SRM


def cuped(report: Report, n: int, rng: np.random.Generator) -> None:
    for rho in (0.3, 0.6, 0.9):
        plain, left, ratio = [], [], []
        for _ in range(n):
            past = rng.normal(0, 1, (2, 400))
            now = rho * past + np.sqrt(1 - rho**2) * rng.normal(0, 1, (2, 400))
            arms = [Sums.of(y, before=x) for y, x in zip(now, past, strict=True)]
            effects = compare_means(*arms), compare_adjusted(*arms)
            plain.append(effects[0].difference.estimate)
            left.append(effects[1].difference.estimate)
            ratio.append((effects[1].se / effects[0].se) ** 2)
        theory = 1 - rho**2
        # the variances of n differences each are known to about 2/√n; at n = 2,000 that is 4.5 %
        slack = theory * max(0.1, 4.5 / np.sqrt(n))
        report.value(
            f"ρ = {rho}: variance of the adjusted difference",
            np.var(left) / np.var(plain),
            theory - slack,
            theory + slack,
        )
        report.value(f"ρ = {rho}: variance it claims", float(np.mean(ratio)), theory - 0.02, theory + 0.02)


def srm(report: Report, n: int, rng: np.random.Generator) -> None:
    for per_arm, words in ((100_000, "100,000 units an arm"), (50_000, "100,000 units in all")):
        alarms = {}
        for first in (0.505, 0.5):
            drawn = rng.binomial(2 * per_arm, first, n)
            alarms[first] = sum(not srm_check([a, 2 * per_arm - a], [0.5, 0.5]).ok for a in drawn)
        report.share(f"50.5 : 49.5 found, {words}", alarms[0.505], n, **({"low": 0.8} if per_arm == 100_000 else {}))
        report.share(f"false alarm at {SRM_THRESHOLD}, {words}", alarms[0.5], n, high=0.01)


PARTS = {
    "pooling": (pooling, 2000),
    "events": (events, 2000),
    "peeking": (peeking, 2000),
    "guardrail": (guardrail, 2000),
    "power": (power, 4000),
    "coverage": (coverage, 4000),
    "cuped": (cuped, 2000),
    "srm": (srm, 10_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--n", type=int, help="experiments a claim, instead of each part's own number")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    given = parser.parse_args()
    asked = given.only.split(",")
    unknown = sorted(set(asked) - set(PARTS))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    if given.n is not None and given.n < 1:
        parser.error(f"--n is {given.n}: pass 1 or more")
    report = Report()
    for number, (name, (part, n)) in enumerate(PARTS.items()):
        if name in asked:
            started, n = time.process_time(), given.n or n
            print(f"{name}: {n:,} experiments a claim")
            part(report, n, np.random.default_rng([given.seed, number]))
            print(f"  ({time.process_time() - started:.0f} CPU seconds)", flush=True)
    sys.exit(0 if report.kept else 1)


if __name__ == "__main__":
    main()
