"""Half an hour's worth of mixed load on a real service, with everything in it that is changed or goes wrong in a week.

    python -m benchmarks.mixed [--requests 20000] [--minutes 3] [--workers 2] [--seed 0]

A home of its own gets the planner's policy from `workbench run planner` (smoke profile) and two more models of other runs.
`workbench serve` runs on it with several workers; clients ask for assignments and plans and send events, alone and in
batches, each request when it is due. Meanwhile, at shares of the requests:

    10 %  an experiment is ramped from half of its units to all
    15 %  a worker is killed with SIGKILL, and another one at 45 %
    20 %  the second model is promoted
    35 %  it is rolled back, and nobody may meet it any more
    55 %  PostgreSQL is stopped for seconds, and a worker is killed meanwhile
    70 %  a model with damaged files is promoted; at 75 % a worker is killed; at 85 % the model is rolled back

Every answer is compared with what `assignment.assign` says of the phase in force; within 2 s of a change the state before it
is right too. Every event that was acknowledged (stored, a duplicate, or safe on disk), and every decision that was told with
an id, is looked for in `exp.events` at the end. A request whose connection breaks when a worker is killed is sent again with
the same ids, as a client of an idempotent call does, and counted apart. Refusals (4xx, 5xx) are allowed from a kill or a stop
until 5 s after the kill, or after PostgreSQL is back, and at no other time.
"""

import argparse
import asyncio
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from benchmarks.bench import BIN, ROOT, Place
from benchmarks.service import held
from mlops_workbench.alerts import AlertRecord, read_alerts
from mlops_workbench.assignment import Allocation, assign
from mlops_workbench.core import stable_id, utc_now
from mlops_workbench.exclusion import exposure_problems
from mlops_workbench.experiment import (
    Experiment,
    MetricPlan,
    Variant,
    create_experiment,
    ramp_experiment,
    read_experiments,
    start_experiment,
)
from mlops_workbench.gate import Verdict
from mlops_workbench.keys import create_key
from mlops_workbench.policy import promote, propose_policy, read_policies, rollback
from mlops_workbench.registry import ModelVersion, model_place, read_versions, settle
from mlops_workbench.server import start_server, stop_server
from mlops_workbench.settings import Settings
from mlops_workbench.spool import Spool, count_spooled
from mlops_workbench.store import Store, open_store, read_rows, transaction
from mlops_workbench.task import load_task
from mlops_workbench.tracking import Tracking, open_tracking

POLICY, TONE, VERSIONS = "planner", "planner_tone", "planner_versions"
ALERT, DAMAGED = "model-does-not-load", "a damaged model is promoted"
SEEN_S = 2.0  # a change is seen after so long at most
AWAY_S = 6.0  # PostgreSQL is stopped for so long
CALM_S = 5.0  # after a kill or an outage nothing is refused any more
GROWTH = 1.1  # of a worker's memory, from the first third of the requests to the end
ALONE = {"connection": "close"}  # a new worker gets its share of the connections
TRIES, BATCH, UNITS, HOUSEHOLDS = 8, 20, 3_000, 200
MIX = {"assignments": 0.5, "event": 0.2, "batch": 0.1, "plan": 0.2}
PASSED = Verdict(outcome="pass", reasons=("a drill: the gate is not what is measured here",))
TRAINED = ({}, {"train.seed": 1}, {"train.max_steps": 20})  # what is changed in each of the runs


# A home with three models


@dataclass
class World:
    "What the drill works with."

    settings: Settings
    store: Store
    tracking: Tracking
    models: list[ModelVersion]  # the first serves at the beginning
    households: list[str]  # with pantries of this week
    key: str = ""
    url: str = ""
    supervisor: int = 0


def train(place: Place) -> None:
    "Run the pipeline once for each model; the first run promotes its own."
    for changed in TRAINED:
        parameters = [part for name, value in changed.items() for part in ("-p", f"{name}={value}")]
        until = ["--until", "train"] if changed else []
        place.run([BIN / "workbench", "run", POLICY, "--profile", "smoke", *until, *parameters], ROOT)


def declare(world: World, key: str, variants: tuple[Variant, ...], space: tuple[float, float]) -> None:
    "Start an experiment in its part of the units, with half of its coverage."
    plan = (MetricPlan("acceptance", "primary", "proportion", "plan_decided", "accepted"),)
    about = {"policy": POLICY, "unit_type": "household", "metrics": plan, "mde": 0.05, "planned_n": 3_900}
    about |= {"hypothesis": "Households accept more plans.", "ends_at": utc_now() + timedelta(days=30)}
    create_experiment(
        world.store, Experiment(key=key, variants=variants, namespace=("planner", *space), **about), "ana"
    )
    start_experiment(world.store, key, "ana", tracking=world.tracking)
    ramp_experiment(world.store, key, 5_000, "ana")


def build(home: Path) -> World:
    "Name what is there and begin two experiments: one about a tone, one about two versions of the policy."
    settings = Settings("local", home, home, None)
    store = Store(start_server(home))
    with open_store(settings):
        pass  # migrations
    tracking = open_tracking(store, settings)
    models = sorted(read_versions(tracking, POLICY), key=lambda v: v.version)[: len(TRAINED)]
    households = [
        unit for unit, _ in load_task("mlops_workbench.planner").write_visitors(store, HOUSEHOLDS, 0, utc_now())
    ]
    world = World(settings, store, tracking, models, households)
    for i in (1, 2):
        models[i] = settle(tracking, store, models[i], PASSED, "ana")
    second = propose_policy(tracking, store, models[1], {"batch_size": 32}, "ana")
    first = next(p for p in read_policies(store, POLICY) if p.status == "production")
    now = {"policy_version": first.version}
    tones = (Variant("control", 0.5, control=True, **now), Variant("warm", 0.5, parameters={"tone": "warm"}, **now))
    declare(world, TONE, tones, (0.0, 0.5))
    arms = (
        Variant("first", 0.5, control=True, policy_version=first.version),
        Variant("second", 0.5, policy_version=second.version),
    )
    declare(world, VERSIONS, arms, (0.5, 0.9))
    world.key, _ = create_key(store, f"mixed-{os.getpid()}", "client", "ana")
    return world


# The service


def free_port() -> int:
    "Find a port that nobody uses."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def workers(world: World) -> list[psutil.Process]:
    "List the worker processes, oldest first."
    found = []
    for process in psutil.Process(world.supervisor).children():
        with suppress(psutil.Error):  # a zombie has no command line
            found += [process] * ("spawn_main" in " ".join(process.cmdline()))
    return sorted(found, key=lambda p: p.create_time())


@contextmanager
def serving(place: Place, world: World, n_workers: int) -> Iterator[None]:
    "Run `workbench serve` until every worker is ready."
    port = free_port()
    command = [BIN / "workbench", "serve", "--port", str(port), "--workers", str(n_workers)]
    with open(place.folder / "serve.txt", "w") as log:
        process = subprocess.Popen(command, cwd=place.project, env=place.variables, stdout=log, stderr=log)
        world.url, world.supervisor = f"http://127.0.0.1:{port}", process.pid
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise SystemExit(f"the service ended:\n{(place.folder / 'serve.txt').read_text()[-2000:]}")
                if all(is_ready(world.url) for _ in range(8)) and len(workers(world)) == n_workers:
                    break
                time.sleep(0.2)
            time.sleep(5)
            yield
            process.terminate()
            process.wait(60)
        finally:
            if process.poll() is None:
                for one in (*psutil.Process(process.pid).children(recursive=True), process):
                    one.kill()


def is_ready(url: str) -> bool:
    "Ask one worker, on a connection of its own."
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


# What is right


@dataclass
class State:
    "Who gets what, as the records say it."

    name: str
    since: float  # when the step that led to it began
    production: int  # version that answers outside of experiments
    allocations: list[Allocation]
    until: float = float("inf")  # when the step that ended it was over

    def may_answer(self, sent: float, done: float) -> bool:
        "Say whether an answer may come from it."
        return done >= self.since and sent <= self.until + SEEN_S

    def assignments(self, unit_id: str) -> dict[str, tuple]:
        "Say what a unit gets in every experiment."
        found = {}
        for allocation in self.allocations:
            a = assign(allocation, unit_id)
            arm = next((arm for arm in allocation.phase.arms if arm.name == a.variant), None)
            found[a.experiment] = (a.variant, a.reason, *((arm.policy_version, a.phase, a.bucket) if arm else ()))
        return found

    def plan(self, unit_id: str) -> tuple:
        "Say which experiment decides about a unit's plan, and which version makes it."
        for allocation in self.allocations:
            if (variant := assign(allocation, unit_id).variant) is not None:
                arm = next(arm for arm in allocation.phase.arms if arm.name == variant)
                return allocation.key, variant, self.production if arm.policy_version is None else arm.policy_version
        return None, None, self.production


def read_state(world: World, name: str, since: float, production: int | None = None) -> State:
    "Read what is in force; a production that cannot be loaded does not serve."
    known = read_policies(world.store, POLICY)
    barred = {p.version for p in known if p.status == "rolled_back"}
    recorded = next(p.version for p in known if p.status == "production")
    running = [e.allocation(barred) for e in read_experiments(world.store, "active")]
    return State(name, since, production or recorded, running)


# The clients


@dataclass
class Tally:
    "What came of the requests."

    world: World
    states: list[State]
    n: int = 0  # requests that came to an end
    statuses: Counter = field(default_factory=Counter)  # (kind, status, undisturbed) → answers
    fallbacks: Counter = field(default_factory=Counter)  # reason → plans
    acknowledged: dict[str, str] = field(default_factory=dict)  # id → how
    given: list[tuple] = field(default_factory=list)  # kind, unit, what it got, sent, done
    unanswered: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    cut: Counter = field(default_factory=Counter)  # kind → requests whose connection broke with a worker
    kills: list[tuple[float, float]] = field(
        default_factory=list
    )  # when, and when the process was gone: it closes its connections last
    troubles: list[tuple[float, float]] = field(default_factory=list)  # from, until
    waits: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in MIX})
    alerts: list[AlertRecord] = field(default_factory=list)  # about the damaged model, while it was in production
    kept_serving: int = 0  # plans while the damaged model was in production

    def is_calm(self, sent: float, done: float) -> bool:
        "Say whether nothing was killed or stopped meanwhile."
        return not any(begin <= done and sent <= end for begin, end in self.troubles)


def write_request(world: World, i: int, seed: int) -> tuple[str, str, dict[str, Any]]:
    "Make a request: kind, path and body; equal seeds make equal ones."
    rng = random.Random(f"{seed}/mixed/{i}")
    kind = rng.choices(list(MIX), MIX.values())[0]
    unit = rng.choice(world.households) if rng.random() < 0.2 else f"household-{rng.randrange(UNITS)}"
    if kind == "assignments":
        return kind, "/api/v1/assignments", {"unit_id": unit}
    if kind == "plan":
        return kind, "/api/v1/plans", {"unit_id": rng.choice(world.households), "request_id": f"{seed}-{i}"}
    if kind == "event":
        return kind, "/api/v1/events", write_event(unit, f"{seed}/{i}")
    events = [write_event(unit, f"{seed}/{i}/{j}") for j in range(BATCH)]
    if rng.random() < 0.1:
        events[rng.randrange(BATCH)]["metrics"] = {"accepted": "yes"}
    return kind, "/api/v1/events/batch", {"events": events}


def write_event(unit: str, name: str) -> dict[str, Any]:
    "Make an event as an application sends it."
    event = {"type": "plan_decided", "unit_type": "household", "unit_id": unit, "id": stable_id("mixed", name)}
    event |= {"event_at": utc_now().isoformat(), "metrics": {"accepted": 1.0}, "context": {"source": "shop"}}
    return event | {"payload": {"plan": name, "edits": [1, 4]}}


async def ask(client: httpx.AsyncClient, tally: Tally, i: int, seed: int) -> None:
    "Send one request, again when a worker was killed under it, and judge its answer."
    kind, path, body = write_request(tally.world, i, seed)
    begun = time.monotonic()
    for _ in range(TRIES):
        sent = time.monotonic()
        try:
            answer = await client.post(path, json=body, headers=ALONE if i % 4 == 0 else {})
        except httpx.HTTPError as error:
            failed = time.monotonic()
            if any(sent <= gone + 0.1 and killed <= failed + 0.1 for killed, gone in tally.kills):
                tally.cut[kind] += 1
                await asyncio.sleep(0.05)
                continue
            tally.unanswered.append(f"{kind} {i}: {type(error).__name__} {error} after {failed - sent:.2f} s")
            return
        done = time.monotonic()
        tally.waits[kind].append(done - begun)
        tally.statuses[kind, answer.status_code, tally.is_calm(sent, done)] += 1
        judge(tally, (kind, body, answer), sent, done)
        return
    tally.unanswered.append(f"{kind} {i}: its connection broke {TRIES} times")


def judge(tally: Tally, exchange: tuple[str, dict[str, Any], httpx.Response], sent: float, done: float) -> None:
    "Say what is wrong with an answer, and remember what it promises."
    kind, body, answer = exchange
    told = answer.json()
    if answer.status_code >= 500 and answer.status_code != 503 or answer.status_code >= 400 and not is_clear(told):
        tally.unclear.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
    if kind == "batch" and "events" in told:
        tally.acknowledged |= {e["id"]: e["status"] for e in told["events"] if e["status"] != "refused"}
    if answer.status_code >= 300:
        return
    if kind == "event":
        tally.acknowledged[told["id"]] = told["status"]
    elif kind == "plan":
        tally.acknowledged[told["event_id"]] = "plan"
        tally.fallbacks[told["fallback"]] += 1
        tally.kept_serving += tally.states[-1].name == DAMAGED and not told["fallback"]
        got = (told["experiment"], told["variant"], told["policy_version"])
        tally.given.append((kind, body["unit_id"], got, sent, done))
    elif kind == "assignments":
        got = {s["experiment"]: (None, s["reason"]) for s in told["skipped"]}
        given = ("variant", "reason", "policy_version", "phase", "bucket")
        got |= {a["experiment"]: tuple(a[name] for name in given) for a in told["assignments"]}
        tally.given.append((kind, body["unit_id"], got, sent, done))


def is_clear(told: Any) -> bool:
    "Say whether a refusal says what is wrong."
    error = told.get("error") if isinstance(told, dict) else None
    return "events" in told or bool(error and error.get("code") and error.get("message"))


def find_wrong(tally: Tally) -> list[str]:
    "List the answers that no state in force gives; all states are known by now."
    wrong = []
    for kind, unit_id, got, sent, done in tally.given:
        states = [s for s in tally.states if s.may_answer(sent, done)]
        right = [s.plan(unit_id) if kind == "plan" else s.assignments(unit_id) for s in states]
        if got not in right:
            names = ", then ".join(s.name for s in states)
            wrong.append(f"{kind} of {unit_id} at request {sent:.1f} s: {got}; right is {right} ({names})")
    return wrong


# What happens meanwhile


async def change(tally: Tally, name: str, step: Callable[[], object], production: int | None = None) -> None:
    "Take a step and read what is in force from then on."
    begun = time.monotonic()
    await asyncio.to_thread(step)
    tally.states[-1].until = time.monotonic()
    tally.states.append(await asyncio.to_thread(read_state, tally.world, name, begun, production))
    print(f"  {tally.n:>6} requests: {name}, {tally.states[-2].until - begun:.2f} s", flush=True)


async def kill_worker(tally: Tally, name: str) -> None:
    "Kill the youngest worker; the other ones live on."
    victim = workers(tally.world)[-1]
    tally.troubles.append((time.monotonic(), time.monotonic() + CALM_S))
    tally.kills.append((begun := time.monotonic(), float("inf")))
    victim.kill()
    with suppress(psutil.Error):
        while victim.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.005)
    tally.kills[-1] = (begun, time.monotonic())
    print(f"  {tally.n:>6} requests: {name}", flush=True)


def damage(world: World, version: ModelVersion) -> None:
    "Change a model's files where they are kept, and where they were fetched to."
    kept = Path(urlsplit(model_place(world.tracking, version)).path)
    for folder in (kept, world.settings.home / "models" / version.digest[:16]):
        largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size, default=None)
        if largest is not None:
            largest.write_bytes(largest.read_bytes()[:-64] + bytes(64))


async def stop_database(tally: Tally) -> None:
    "Stop PostgreSQL as an operator does, kill a worker meanwhile, and start it again."
    home, begun = tally.world.settings.home, time.monotonic()
    tally.troubles.append((begun, begun + 60))
    await asyncio.to_thread(stop_server, home)
    print(f"  {tally.n:>6} requests: PostgreSQL is away", flush=True)
    await asyncio.sleep(AWAY_S / 2)
    await kill_worker(tally, "a worker is killed while PostgreSQL is away")
    await asyncio.sleep(AWAY_S / 2)
    await asyncio.to_thread(start_server, home)
    tally.troubles[-2:] = [(begun, time.monotonic() + CALM_S)]
    print(f"  {tally.n:>6} requests: PostgreSQL is back after {time.monotonic() - begun:.1f} s", flush=True)


async def direct(tally: Tally, n: int, memory: dict[int, list[float]]) -> None:
    "Do everything when its share of the requests is over."
    w = tally.world

    async def until(share: float) -> None:
        while tally.n < share * n:
            await asyncio.sleep(0.02)

    await until(0.1)
    await change(tally, "the experiment is ramped", lambda: ramp_experiment(w.store, TONE, 10_000, "ana"))
    await until(0.15)
    await kill_worker(tally, "a worker is killed")
    await until(0.2)
    await change(
        tally, "the second model is promoted", lambda: promote(w.tracking, w.store, w.models[1], PASSED, "ana")
    )
    await until(1 / 3)
    weigh(w, memory)
    await until(0.35)
    await change(tally, "it is rolled back", lambda: rollback(w.tracking, w.store, POLICY, "ben", "a drill"))
    await until(0.45)
    await kill_worker(tally, "another worker is killed")
    await until(0.55)
    await stop_database(tally)
    await until(0.7)
    serves = tally.states[-1].production
    await asyncio.to_thread(damage, w, w.models[2])
    await change(tally, DAMAGED, lambda: promote(w.tracking, w.store, w.models[2], PASSED, "ana"), serves)
    await until(0.75)
    await kill_worker(tally, "a worker is killed while the damaged model is in production")
    await until(0.85)
    tally.alerts = [a for a in await asyncio.to_thread(read_alerts, w.store) if a.name == ALERT]
    print(f"  {tally.n:>6} requests: alerts {[a.words for a in tally.alerts] or 'none'}", flush=True)
    await change(
        tally,
        "the damaged model is rolled back",
        lambda: rollback(w.tracking, w.store, POLICY, "ben", "it does not load"),
    )
    await until(1.0)
    weigh(w, memory)


def weigh(world: World, memory: dict[int, list[float]]) -> None:
    "Note the resident memory of every worker, in MB."
    for worker in workers(world):
        memory.setdefault(worker.pid, []).append(worker.memory_info().rss / 1e6)


async def load(tally: Tally, options: argparse.Namespace, memory: dict[int, list[float]]) -> int:
    "Send the requests, each when it is due, and let happen what happens: how many were sent."
    limits = httpx.Limits(max_connections=96, max_keepalive_connections=32, keepalive_expiry=2.0)
    about = {"base_url": tally.world.url, "headers": {"Authorization": f"Bearer {tally.world.key}"}, "timeout": 60}
    rate, begun, room = options.requests / (60 * options.minutes), time.monotonic(), asyncio.Semaphore(64)
    last = begun + 60 * 2 * options.minutes + 60

    async def one(client: httpx.AsyncClient, i: int) -> None:
        async with room:
            await ask(client, tally, i, options.seed)
        tally.n += 1

    async with httpx.AsyncClient(**about, limits=limits, trust_env=False) as client, asyncio.TaskGroup() as group:
        directing = group.create_task(direct(tally, options.requests, memory))
        for i in range(options.requests):
            await asyncio.sleep(max(0.0, begun + i / rate - time.monotonic()))
            while room.locked():
                await asyncio.sleep(0.005)
            if time.monotonic() > last or directing.done():
                directing.cancel()
                return i
            group.create_task(one(client, i))
    return options.requests


# The account


def missing(world: World, acknowledged: dict[str, str]) -> list[str]:
    "List the acknowledged events that are not in the log."
    spool = Spool(world.settings.home / "spool")
    for _ in range(300):
        if not count_spooled(spool):
            break
        time.sleep(0.1)
    ids, found = list(acknowledged), set()
    with transaction(world.store) as connection:
        for at in range(0, len(ids), 5_000):
            sql = "SELECT id::text FROM exp.events WHERE id = ANY(%s::uuid[])"
            found |= {row["id"] for row in read_rows(connection, sql, (ids[at : at + 5_000],))}
    return [name for name in ids if name not in found]


def tell(tally: Tally) -> None:
    "Print what came of the requests."
    for kind, waits in tally.waits.items():
        ordered = sorted(waits) or [0.0]
        p50, p99 = (1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99))
        calm, trouble = (
            {status: n for (k, status, c), n in sorted(tally.statuses.items()) if k == kind and c == is_calm}
            for is_calm in (True, False)
        )
        print(
            f"  {kind:<12} p50 {p50:.1f} ms, p99 {p99:.0f} ms; statuses {calm}, around kills and the outage {trouble}"
        )
    shown = {reason or "the model answered": n for reason, n in tally.fallbacks.items()}
    print(f"  plans: {shown}; acknowledged: {dict(Counter(tally.acknowledged.values()))}")
    print(
        f"  connections that broke with a killed worker, sent again: {dict(tally.cut) or 'none'} ({len(tally.kills)} kills)"
    )


def account(tally: Tally, sent: int, options: argparse.Namespace, memory: dict[int, list[float]]) -> bool:
    "Hold what happened against what was asked for."
    tell(tally)
    lost = missing(tally.world, tally.acknowledged)
    wrong = find_wrong(tally)
    faults = {"wrong": wrong, "unanswered": tally.unanswered, "unclear": tally.unclear}
    for name, told in faults.items():
        print("".join(f"    {name}: {line[:400]}\n" for line in told[:8]), end="")
    kept = [held(f"requests that were sent: {sent:,} of {options.requests:,}", sent == options.requests)]
    kept.append(held(f"wrong variants: {len(wrong)} of {len(tally.given):,} answers (bound 0)", not wrong))
    kept.append(held(f"lost acknowledged events: {len(lost)} of {len(tally.acknowledged):,} (bound 0)", not lost))
    kept.append(held(f"requests without an answer: {len(tally.unanswered)} (bound 0)", not tally.unanswered))
    kept.append(held(f"answers that are not clear: {len(tally.unclear)} (bound 0)", not tally.unclear))
    refused = sum(n for (_, status, calm), n in tally.statuses.items() if calm and status >= 400)
    kept.append(held(f"refusals while nothing was killed or stopped: {refused} (bound 0)", not refused))
    told = f"the damaged model: {len(tally.alerts)} alert, {tally.kept_serving} plans by the old one"
    kept.append(held(told, len(tally.alerts) == 1 and tally.kept_serving > 0))
    still = [a for a in read_alerts(tally.world.store) if a.name == ALERT]
    kept.append(held(f"alerts about it that are open after its rollback: {len(still)} (bound 0)", not still))
    for key in (TONE, VERSIONS):
        problems = exposure_problems(tally.world.store, key)
        kept.append(held(f"exposures of {key}: {problems}", problems.ok))
    lived = {pid: w for pid, w in memory.items() if len(w) == 2}
    for pid, (third, end) in lived.items():
        says = f"memory of worker {pid}: {third:.0f} MB at a third, {end:.0f} MB at the end, {end / third:.3f} × (bound {GROWTH})"
        kept.append(held(says, end <= GROWTH * third))
    return all([*kept, held(f"workers that lived throughout: {len(lived)} of {options.workers}", bool(lived))])


def drill(place: Place, options: argparse.Namespace) -> bool:
    "Serve, load, disturb, and give an account."
    world, memory = build(place.home), {}
    with serving(place, world, options.workers):
        tally = Tally(world, [read_state(world, "the beginning", 0.0)])
        begun = time.monotonic()
        sent = asyncio.run(load(tally, options, memory))
        print(
            f"  {sent:,} requests in {time.monotonic() - begun:.0f} s to {options.workers} workers, seed {options.seed}"
        )
        kept = account(tally, sent, options, memory)
    waits = count_spooled(Spool(world.settings.home / "spool"))
    kept = held(f"events on disk when the service has ended: {waits} (bound 0)", not waits) and kept
    world.store.close()
    return kept


def main() -> int:
    "Measure, and exit 1 when a bound was missed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=3.0, help="in which they are due")
    parser.add_argument("--workers", type=int, default=2, help="2 or more: one of them is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    options = parser.parse_args()
    if options.workers < 2 or options.requests < 200 or options.minutes <= 0:
        parser.error("pass at least 2 workers, 200 requests and some minutes")
    with Place() as place:
        place.workbench("db", "up")
        train(place)
        kept = drill(place, options)
    print("all bounds kept" if kept else "a bound was MISSED")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
