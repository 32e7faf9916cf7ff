"""Is a harmful candidate taken back in time, and does a harmless one arrive?

    python -m benchmarks.rollout                 # both questions, 400 rollouts each, about two minutes
    python -m benchmarks.rollout --n 100 --only harmful,equal
    python -m benchmarks.rollout --accepted 0.6  # another share of accepted plans
    python -m benchmarks.rollout --only rules    # our rule beside two others
    python -m benchmarks.rollout --only stack    # a few rollouts on PostgreSQL and MLflow
    python -m benchmarks.rollout --only watch    # `workbench rollout watch` on a good and on a harmful candidate
    python -m benchmarks.rollout --only kill     # kill -9 at every point of a rollout, then again

Every rollout is simulated hour by hour with the decision function that decides about people (`rollout.decide_step`) and the
default plan: 10, 25, 50 % of the traffic, six guardrails, a look every hour. The world:

- `--daily` requests a day in all, each of another household; the candidate and its control get their shares of them.
- A plan is accepted with the share `--accepted`, or else 1 to 3 dishes are replaced. The answer comes up to 12 hours after
  the request, as in the planner's simulated world: what is being answered when the candidate is taken back is harmed too.
- 2 % of the requests need an intervention, latency is log-normal with a median of 400 ms, cost varies by 30 %.
- The harmful candidate is accepted 10 % less often (relative); the edits follow from that. The equal one is the same model.

`rules` puts three ways to watch acceptance beside each other, a look every 10 answers an arm, 5,000 answers an arm at most: our
likelihood ratio, the one-sided confidence sequence of the same error (`sequential.confidence_bounds`, tuned to 400 an arm), and
the naive rule, a fixed-horizon test of the same level at every look.

`stack` does the same on the real thing: the experiment with its assignments and events, the aggregation, the controller, the
promotion or the withdrawal at the end. The least time on a step is left out there. `kill` runs a controller in a process of its
own, kills it before or after each call that changes the world, repeats the command, and compares policy, registry, experiment,
rollout and ledger.

A harmed request is one that the candidate served before it was taken back. Intervals are Clopper and Pearson's, 95 %; that of
the median is made of order statistics. Exit code 1 when a target is missed.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mlops_workbench import controller
from mlops_workbench.assignment import assign
from mlops_workbench.controller import start_rollout, step_rollout
from mlops_workbench.core import WorkbenchError, utc_now
from mlops_workbench.events import Event, write_events
from mlops_workbench.experiment import read_experiment
from mlops_workbench.exposure import record_assignments
from mlops_workbench.gate import Verdict
from mlops_workbench.gauge import read_rollout
from mlops_workbench.ledger import read_ledger, verify_ledger
from mlops_workbench.policy import promote, propose_policy, read_policy_version, read_production
from mlops_workbench.registry import read_version, read_versions, register_model, settle
from mlops_workbench.rollout import Evidence, RolloutPlan, Sample, decide_step, weigh_loss
from mlops_workbench.sequential import confidence_bounds
from mlops_workbench.settings import Settings
from mlops_workbench.stats import proportion_interval
from mlops_workbench.store import Store, read_rows, temporary_store, transaction
from mlops_workbench.tracking import end_run, open_tracking, start_run

START = datetime(2026, 1, 5, tzinfo=UTC)
HOURS = 12  # the longest wait for an answer
PLAN = RolloutPlan("planner-4", "planner", 4)


@dataclass(frozen=True)
class World:
    "What a candidate changes, relative to the control."

    accepted: float = 1.0
    slower: float = 1.0
    dearer: float = 1.0
    intervened: float = 1.0


WORLDS = {
    "harmful": World(accepted=0.9),
    "equal": World(),
    "better": World(accepted=1.05),
    "at the margin": World(accepted=0.95),
    "disaster": World(accepted=0.5, intervened=5),
    "slow": World(slower=1.5),
    "dear": World(dearer=1.25),
}


class Arm:
    "One arm's requests, and the answers to them that are there."

    def __init__(self, rng, accepted, world):
        self.rng, self.accepted, self.world = rng, accepted, world
        self.served = 0
        self.waiting = np.zeros((3, HOURS + 1))  # answers, accepted, edits by the hours until they come
        self.edits_squared = np.zeros(HOURS + 1)
        self.answers = np.zeros(3)
        self.squares = 0.0
        self.intervened = 0
        self.latency, self.cost = [], []

    def hour(self, mean):
        n = self.rng.poisson(mean)
        self.served += n
        rng, when = self.rng, self.rng.integers(0, HOURS + 1, n)
        accepted = rng.random(n) < self.accepted
        edits = np.where(accepted, 0, rng.integers(1, 4, n))
        for row, values in zip(self.waiting, (np.ones(n), accepted, edits), strict=True):
            row += np.bincount(when, values, HOURS + 1)
        self.edits_squared += np.bincount(when, edits**2, HOURS + 1)
        self.answers += self.waiting[:, 0]
        self.squares += self.edits_squared[0]
        self.waiting = np.roll(self.waiting, -1, axis=1)
        self.edits_squared = np.roll(self.edits_squared, -1)
        self.waiting[:, -1] = self.edits_squared[-1] = 0
        self.intervened += rng.binomial(n, 0.02 * self.world.intervened)
        self.latency.extend(400 * self.world.slower * np.exp(rng.normal(0, 0.5, n)))
        self.cost.extend(0.002 * self.world.dearer * np.exp(rng.normal(0, 0.3, n)))

    def samples(self):
        n, accepted, edits = self.answers
        latency, cost = np.array(self.latency), np.array(self.cost)
        return {
            "acceptance": share(accepted, n),
            "edits": mean(n, edits, self.squares),
            "interventions": share(self.intervened, self.served),
            "latency_p50": median(latency),
            "latency_p99": share((latency > 2_000).sum(), len(latency)),
            "cost": mean(len(cost), cost.sum(), (cost**2).sum()),
        }


def share(k, n):
    if not n:
        return None
    smooth = (k + 1) / (n + 2)  # keeps the error above 0 where all are alike
    return Sample(int(n), k / n, math.sqrt(smooth * (1 - smooth) / n))


def mean(n, total, squares):
    if n < 2:
        return None
    return Sample(int(n), total / n, math.sqrt(max(0, squares / n - (total / n) ** 2) / n))


def median(values):
    n = len(values)
    if n < 30:
        return None
    low, mid, high = (int(n * q + s * math.sqrt(n) / 2) for q, s in ((0.5, -1), (0.5, 0), (0.5, 1)))
    values = np.partition(values, (low, mid, min(high, n - 1)))
    return Sample(n, values[mid], (values[min(high, n - 1)] - values[low]) / 2)


@dataclass
class Outcome:
    action: str  # what ended the rollout
    harmed: int  # requests that the candidate served
    days: float
    step: int
    why: str


def simulate(plan, world, options, seed):
    "Run one rollout to its end."
    rng = np.random.default_rng([options.seed, seed])
    arms = [Arm(rng, options.accepted, World()), Arm(rng, options.accepted * world.accepted, world)]
    step, step_at, before = 0, START, 0
    for hour in range(1, int(plan.max_days * 24) + 2):
        now = START + timedelta(hours=hour)
        for arm in arms:
            arm.hour(options.daily * plan.steps[step].share / 24)
        seen = int(min(a.answers[0] for a in arms))
        samples = dict(zip(arms[0].samples(), zip(*(a.samples().values() for a in arms), strict=True), strict=True))
        decision = decide_step(plan, Evidence(step, START, step_at, seen - before, samples, srm_p=0.5), now)
        if decision.action == "raise":
            step, step_at, before = decision.step, now, seen
        elif decision.action in ("roll back", "finish"):
            return Outcome(decision.action, arms[1].served, hour / 24, step, decision.reasons[0])
    return Outcome("wait", arms[1].served, hour / 24, step, "the simulation ended")


class Stage:
    "A workbench with a policy in production, and simulated people who use it."

    def __init__(self, store, folder):
        self.store, self.folder = store, Path(folder)
        self.settings = Settings("local", self.folder, self.folder / "home", store.url)
        self.tracking = open_tracking(store, self.settings)
        self.passed = Verdict("pass", ("plan_alignment is above the baseline",))
        self.people = 0

    def candidate(self, text, settings=None):
        "Train, judge and propose a model that answers nothing: people are simulated, so is what they get."
        files = self.folder / text
        files.mkdir()
        (files / "model.json").write_text(json.dumps(text))
        run = start_run(self.tracking, "planner", "train", {})
        version = register_model(run, SimpleNamespace(name="planner"), "mlops_workbench.planner", files, "d" * 64)
        end_run(run)
        settle(self.tracking, self.store, version, self.passed, "ada")
        return propose_policy(self.tracking, self.store, version, settings or {}, "ada")

    def production(self, text):
        policy = self.candidate(text)
        version = read_version(self.tracking, "planner", policy.model_version)
        return promote(self.tracking, self.store, version, self.passed, "ada")

    def answer(self, rng, accepted, world):
        "Draw what one request leads to: metrics of the proposal and of the decision."
        ok = bool(rng.random() < accepted * world.accepted)
        proposal = {
            "intervened": float(rng.random() < 0.02 * world.intervened),
            "latency_ms": float(400 * world.slower * np.exp(rng.normal(0, 0.5))),
            "cost_eur": float(0.002 * world.dearer * np.exp(rng.normal(0, 0.3))),
        }
        return proposal, {"accepted": float(ok), "edits": 0.0 if ok else float(rng.integers(1, 4))}

    def traffic(self, key, n, world, accepted=0.7, seed=0):
        "Let `n` new households ask: those in an arm are assigned and leave events. Returns how many the candidate served."
        rng, now, experiment = np.random.default_rng([seed, self.people]), utc_now(), read_experiment(self.store, key)
        allocation, rows, events = experiment.allocation(), [], []
        names = [f"household-{self.people + i:07d}" for i in range(n)]
        self.people += n
        for name in names:
            found = assign(allocation, name)
            if found.variant is None:
                continue
            rows.append(found)
            answers = self.answer(rng, accepted, world if found.variant == "treatment" else World())
            for type_, metrics in zip(("plan_proposed", "plan_decided"), answers, strict=True):
                told = {"experiments": {key: found.variant}, "context": {"source": "simulation"}, "metrics": metrics}
                events.append(Event(type_, "household", name, now, **told))
        record_assignments(self.store, rows, now)
        write_events(self.store, events)
        return sum(found.variant == "treatment" for found in rows)


def stack(plan, world, options, seed):
    "Run one rollout on the real thing."
    quick = replace(plan, candidate=2, steps=tuple(replace(s, min_hours=0) for s in plan.steps))
    with temporary_store() as store, tempfile.TemporaryDirectory() as folder:
        stage = Stage(store, folder)
        stage.production("first")
        stage.candidate("second")
        start_rollout(stage.tracking, store, quick, "ada")
        harmed, look, decision = 0, 0, None
        while decision is None or decision.action not in ("roll back", "finish"):
            harmed += stage.traffic(quick.key, options.batch, world, options.accepted, seed)
            decision = step_rollout(stage.tracking, store, quick.key, "controller")
            look += 1
        serving, candidate = read_production(store, "planner"), read_policy_version(store, "planner", 2)
        ends = {"finish": (2, "production"), "roll back": (1, "rolled_back")}[decision.action]
        if (serving.version, candidate.status) != ends:
            raise SystemExit(f"after {decision.action} {serving.key} serves and the candidate is {candidate.status}")
        return Outcome(decision.action, harmed, look, decision.step, decision.reasons[0])


# Three rules


def looks(rng, accepted, change):
    "Simulate one comparison: answers an arm, difference and its standard error at each look."
    n = np.arange(10, 5_001, 10)
    shares = [(rng.binomial(10, p, len(n)).cumsum() + 1) / (n + 2) for p in (accepted, accepted * (1 + change))]
    se = np.sqrt(sum(p * (1 - p) for p in shares) / n)
    return list(zip(n.tolist(), shares[0].tolist(), shares[1].tolist(), se.tolist(), strict=True))[2:]


RULES = {
    "our likelihood ratio": lambda n, c, t, se: weigh_loss(c - t, se, 0.05 * (c + t) / 2) >= 20,
    "confidence sequence": lambda n, c, t, se: confidence_bounds(t - c, se, 2 * n, 0.95, 800).high < 0,
    "test at every look": lambda n, c, t, se: (t - c) / se < -1.645,
}


def part_rules(options):
    rng, found = np.random.default_rng(options.seed), {name: {0.0: [], -0.1: []} for name in RULES}
    for change in (0.0, -0.1):
        for _ in range(options.n):
            seen = looks(rng, options.accepted, change)
            for name, rule in RULES.items():
                found[name][change].append(next((look[0] for look in seen if rule(*look)), math.inf))
    print(f"rules: {options.n} comparisons, {options.accepted:.0%} accepted, error 5 %")
    for name, ends in found.items():
        wrong = proportion_interval(sum(map(math.isfinite, ends[0.0])), options.n)
        low, high = median_interval(ends[-0.1])
        print(
            f"  {name:<21} equal taken back {100 * wrong.estimate:4.1f} % [{100 * wrong.low:.1f}, {100 * wrong.high:.1f}], "
            f"harmful after {np.median(ends[-0.1]):,.0f} [{low:,.0f}, {high:,.0f}] answers in the median"
        )
    ours = proportion_interval(sum(map(math.isfinite, found["our likelihood ratio"][0.0])), options.n)
    print(f"  ours: {verdict(ours.low <= 0.05, 'an error of at most 5 %')}")
    return ours.low <= 0.05


# kill -9

CALLS = (
    "create_experiment",
    "start_experiment",
    "ramp_experiment",
    "promote",
    "withdraw",
    "stop_experiment",
    "_settle",
    "_note",
)
PATHS = {"finish": 26, "roll back": 14}  # boundaries of calls on the way to each end
CANNED = {
    "finish": {"acceptance": (Sample(9000, 0.7, 0.005), Sample(9000, 0.7, 0.005))},
    "roll back": {"acceptance": (Sample(2000, 0.7, 0.01), Sample(2000, 0.55, 0.011))},
}


class Killed(BaseException):
    "A process that ends here."


def die():
    raise Killed


def live(stage, key, path, kill_at=0, kill=die):
    "Carry a rollout to its end with canned evidence, dying at a boundary of a call that changes the world."
    n = 0

    def dying(call):
        def inside(*given, **named):
            nonlocal n
            for half in (True, False):
                n += 1
                if n == kill_at:
                    kill()
                if half:
                    result = call(*given, **named)
            return result

        return inside

    def evidence(tracking, store, rollout):
        return Evidence(rollout.step, rollout.started_at, rollout.step_at, 10**6, CANNED[path], 0.5)

    real = {name: getattr(controller, name) for name in (*CALLS, "read_evidence")}
    try:
        vars(controller).update({name: dying(real[name]) for name in CALLS} | {"read_evidence": evidence})
        steps = tuple(replace(s, min_hours=0) for s in PLAN.steps)
        chosen = replace(PLAN, key=key, candidate=int(key.split("-")[1]), steps=steps, guardrails=PLAN.guardrails[:1])
        start_rollout(stage.tracking, stage.store, chosen, "ada")
        while not (found := read_rollout(stage.store, key)).ended_at:
            step_rollout(stage.tracking, stage.store, key, "controller")
        return found.status, n
    finally:
        vars(controller).update(real)


def disagreements(stage, key, path, before):
    "List what does not fit after a rollout, whatever happened on its way."
    store, candidate = stage.store, int(key.split("-")[1])
    serving, stages = (
        read_production(store, "planner"),
        {v.version: v.stage for v in read_versions(stage.tracking, "planner")},
    )
    chosen = read_policy_version(store, "planner", candidate)
    wanted = candidate if path == "finish" else before
    with transaction(store) as connection:
        entries, ok = read_ledger(connection), verify_ledger(connection).ok
        rows = read_rows(connection, "SELECT count(*) AS n FROM exp.policy_versions WHERE status = 'production'")
    said = [e.action for e in entries if e.subject.get("rollout") == key]
    ends = {"finish": ["rollout.start", "rollout.raise", "rollout.raise", "rollout.finish"]}
    alias = stage.tracking.client.get_model_version_by_alias("planner", "production")
    checks = {
        "what serves": (serving.version, wanted),
        "one version serves": (rows[0]["n"], 1),
        "the candidate": (chosen.status, {"finish": "production", "roll back": "rolled_back"}[path]),
        "the model": (stages[chosen.model_version], {"finish": "production", "roll back": "rolled_back"}[path]),
        "one model serves": ([v for v, stage in stages.items() if stage == "production"], [serving.model_version]),
        "MLflow's alias": (int(alias.version), serving.model_version),
        "the experiment": (read_experiment(store, key).status, "completed"),
        "the ledger": (said, ends.get(path, ["rollout.start", "rollout.rollback"])),
        "the chain": (ok, True),
    }
    return [f"{what}: {found}, expected {right}" for what, (found, right) in checks.items() if found != right]


def again(act, *given):
    "Repeat a command until the server has noticed that its predecessor is dead."
    for _ in range(100):
        try:
            return act(*given)
        except WorkbenchError as error:
            if "another controller" not in str(error):
                raise
            time.sleep(0.1)
    raise SystemExit("the lock of a dead controller was not released within 10 seconds")


def part_kill(options):
    wrong, n = [], 0
    with temporary_store() as store, tempfile.TemporaryDirectory() as folder:
        stage = Stage(store, folder)
        serving = stage.production("first").version
        for path, points in PATHS.items():
            for point in range(1, points + 1):
                candidate = stage.candidate(f"{path}-{point}").version
                key, n = f"planner-{candidate}", n + 1
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.rollout",
                    "--child",
                    store.url,
                    folder,
                    key,
                    path,
                    str(point),
                ]
                code = subprocess.run(command, capture_output=True).returncode
                wrong += [f"{path} {point}: the child ended with {code}"] * (code != -signal.SIGKILL)
                again(live, stage, key, path)
                wrong += [f"{path} {point}: {found}" for found in disagreements(stage, key, path, serving)]
                serving = read_production(store, "planner").version
    for line in wrong:
        print(f"  {line}")
    print(
        f"kill -9 at {n} points: {n - len({w.split(':')[0] for w in wrong})} ended as if nothing had happened: ", end=""
    )
    print(verdict(not wrong, "all"))
    return not wrong


def child(url, folder, key, path, point):
    "Be the process that is killed."
    stage = Stage(Store(url), folder)
    live(stage, key, path, int(point), lambda: os.kill(os.getpid(), signal.SIGKILL))


def part_watch(options):
    "Show `workbench rollout watch` on a good and on a harmful candidate, while simulated people use the application."
    kept = True
    for name, code in (("equal", 0), ("harmful", 3)):
        with temporary_store() as store, tempfile.TemporaryDirectory() as folder:
            stage = Stage(store, folder)
            stage.production("first")
            stage.candidate("second")
            (Path(folder) / "settings.ini").write_text("[local]\n")
            plan = Path(folder) / "plan.yaml"
            plan.write_text(json.dumps({"steps": [asdict(replace(s, min_hours=0)) for s in PLAN.steps]}))
            variables = {"WORKBENCH_ROOT": folder, "WORKBENCH_DATABASE_URL": store.url, "WORKBENCH_ACTOR": "ada"}
            variables |= {"WORKBENCH_HOME": str(stage.settings.home)}
            command = [str(Path(sys.executable).parent / "workbench"), "rollout"]
            settings = {"env": os.environ | variables, "text": True}
            print(f"$ workbench rollout start planner 2 --plan plan.yaml    # {name}", flush=True)
            subprocess.run([*command, "start", "planner", "2", "--plan", str(plan)], check=True, **settings)
            print("$ workbench rollout watch planner-2 --every 1", flush=True)
            watching = subprocess.Popen([*command, "watch", "planner-2", "--every", "1"], **settings)
            while watching.poll() is None:
                if read_experiment(store, "planner-2").status == "active":
                    stage.traffic("planner-2", options.batch // 3, WORLDS[name], options.accepted, options.seed)
                time.sleep(0.3)
            kept = kept and watching.returncode == code
            print(f"exit code {watching.returncode}, {read_production(store, 'planner').key} serves\n", flush=True)
    return kept


def part_stack(options):
    kept = True
    for name, action in (("harmful", "roll back"), ("equal", "finish")):
        print(
            f"{name}, {options.stacks} rollouts on PostgreSQL and MLflow, {options.batch} requests a look", flush=True
        )
        for i in range(options.stacks):
            found = stack(PLAN, WORLDS[name], options, i)
            print(
                f"  {found.action} at look {found.days}, {found.harmed} requests served by the candidate: {found.why}"
            )
            kept = kept and found.action == action
    print(f"  all ended as they should: {'kept' if kept else 'MISSED'}")
    return kept


def median_interval(values):
    "Bound a median by order statistics."
    from scipy.stats import binom

    values, n = sorted(values), len(values)
    low = int(binom.ppf(0.025, n, 0.5))
    return values[max(0, low - 1)], values[min(n - 1, n - low)]


def verdict(kept, target):
    return f"asked: {target}: {'kept' if kept else 'MISSED'}"


def part(name, options):
    outcomes = [simulate(options.plan, WORLDS[name], options, i) for i in range(options.n)]
    ends = {a: [o for o in outcomes if o.action == a] for a in ("finish", "roll back", "wait")}
    kept = True
    print(
        f"{name}: {options.n} rollouts, {options.accepted:.0%} accepted, {options.daily:,} requests a day", flush=True
    )
    for action, found in ends.items():
        interval = proportion_interval(len(found), len(outcomes))
        days = f", median {np.median([o.days for o in found]):.1f} days" if found else ""
        print(
            f"  {action:<10} {100 * interval.estimate:5.1f} of 100 [{100 * interval.low:.1f}, {100 * interval.high:.1f}]{days}"
        )
    harmed = [o.harmed if o.action == "roll back" else math.inf for o in outcomes]
    low, high = median_interval(harmed)
    middle = float(np.median(harmed))
    if name in ("harmful", "disaster"):
        late = np.quantile(harmed, 0.9, method="higher")
        print(
            f"  harmed before it was taken back: median {middle:,.0f} [{low:,.0f}, {high:,.0f}], 90 % below {late:,.0f}"
        )
    if name == "harmful":
        kept = len(ends["roll back"]) >= 0.95 * options.n
        print(f"  taken back: {verdict(kept, 'at least 95 of 100')}")
        fast = middle < 500
        print(f"  harmed:     {verdict(fast, 'below 500 in the median')}")
        kept = kept and fast
    if name == "equal":
        kept = len(ends["finish"]) >= 0.9 * options.n
        print(f"  arrived:    {verdict(kept, 'at least 90 of 100')}")
    whys = [o.why.split(" ")[0].rstrip(":") for o in ends["roll back"]]
    if whys:
        print(
            "  taken back by: "
            + ", ".join(f"{w} {whys.count(w)}" for w in sorted(set(whys), key=whys.count, reverse=True))
        )
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=400, help="rollouts a part")
    parser.add_argument(
        "--only",
        default="harmful,equal",
        help=f"parts, separated by commas: rules, stack, watch, kill, {', '.join(WORLDS)}",
    )
    parser.add_argument("--accepted", type=float, default=0.7, help="share of plans that the control's users accept")
    parser.add_argument("--daily", type=int, default=1_000, help="requests a day")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stacks", type=int, default=2, help="rollouts a part on the real thing, with --only stack")
    parser.add_argument("--batch", type=int, default=400, help="requests a look on the real thing")
    options = parser.parse_args()
    options.plan = PLAN
    names = options.only.split(",")
    if unknown := [n for n in names if n not in WORLDS and n not in ("rules", "stack", "watch", "kill")]:
        parser.error(f"there is no part {unknown[0]!r}: choose from rules, stack, watch, kill, {', '.join(WORLDS)}")
    parts = {"rules": part_rules, "stack": part_stack, "watch": part_watch, "kill": part_kill}
    kept = [parts[name](options) if name in parts else part(name, options) for name in names]
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
