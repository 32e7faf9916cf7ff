"""Kill promotions, rollbacks and their kin at many points: `python -m benchmarks.crash [--points 12] [--only promote]`.

A step is taken by a forked process whose every exchange with PostgreSQL is counted from outside: psycopg's
`Connection.wait` is wrapped, so MLflow's own statements count as well. Before the k-th exchange the process kills itself
with SIGKILL. Then three things are looked at: what is in the database without any repair, what `reconcile` makes of it,
and what repeating the step gives. Each kill starts from a fresh copy of the same database.

Other steps are killed the same way: a `Scenario` says how the world is prepared, what the step is and what must hold.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit, urlunsplit

import psycopg

from mlops_workbench.gate import Verdict
from mlops_workbench.ledger import read_ledger, verify_ledger
from mlops_workbench.policy import (
    approve,
    promote,
    propose_policy,
    read_policies,
    read_policy_version,
    read_production,
    rollback,
    withdraw,
)
from mlops_workbench.production import follow_production
from mlops_workbench.registry import read_stages, read_version, read_versions, reconcile, register_model, settle
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, open_store, read_rows, temporary_store, transaction
from mlops_workbench.tracking import Tracking, end_run, open_tracking, start_run

POLICY = "planner"
PASSED = Verdict(outcome="pass", reasons=("plan_alignment is above the baseline",))
ALWAYS = 10_000_000  # a point that no step reaches


@dataclass(frozen=True)
class World:
    "A database and the MLflow in it."

    store: Store
    tracking: Tracking
    settings: Settings

    def trained(self, text: str):
        "Register a model whose only file holds a text."
        files = Path(tempfile.mkdtemp(dir=self.settings.root))
        (files / "model.json").write_text(json.dumps(text))
        run = start_run(self.tracking, POLICY, "train", {})
        version = register_model(run, SimpleNamespace(name=POLICY), "mlops_workbench.planner", files, "d" * 64)
        end_run(run)
        return version

    def promoted(self, text: str):
        "Register a model and bring it into production."
        version = settle(self.tracking, self.store, self.trained(text), PASSED, "ana")
        return promote(self.tracking, self.store, version, PASSED, "ana", {"batch_size": 32})


@dataclass(frozen=True)
class Scenario:
    "A step that may be killed anywhere."

    name: str
    prepare: Callable[[World], None]  # what was before
    step: Callable[[World], object]  # repeatable
    serves: tuple[int, int]  # policy version before and after the step
    check: Callable[[World], None] = lambda world: None  # what else must hold once the step was repeated
    finished: Callable[[World], bool] = lambda world: False  # says that a repetition would be another step
    approval: bool = False  # whether the environment asks for it


def connect_world(url: str, folder: Path, required: bool = False) -> World:
    "Open a database that exists."
    settings = Settings("local", folder, folder / "home", url, approval="required" if required else "")
    store = Store(url)
    return World(store, open_tracking(store, settings), settings)


# What must hold


def records(world: World) -> dict:
    "Read what the records say, apart from times and digests."
    with transaction(world.store) as connection:
        entries = read_ledger(connection)
        stages = {n: stage for n, (stage, _) in read_stages(connection, POLICY).items()}
        checked = verify_ledger(connection)
    policies = {p.version: (p.model_version, dict(p.settings), p.status) for p in read_policies(world.store, POLICY)}
    return {
        "ledger": [(e.action, e.subject.get("version"), e.subject.get("policy")) for e in entries],
        "verified": checked.ok,
        "stages": stages,
        "policies": policies,
    }


def disagreements(world: World, mlflow: bool = True) -> list[str]:
    "List what contradicts what: policy table, ledger, stages and, once they were reconciled, MLflow's tags and aliases."
    told, found = [], records(world)
    serving = [n for n, (_, _, status) in found["policies"].items() if status == "production"]
    told += [f"{len(serving)} production versions"] * (len(serving) != 1)
    told += ["the ledger's chain is broken"] * (not found["verified"])
    promoted = [version for action, version, _ in found["ledger"] if action == "policy.promote"]
    told += ["the ledger names another production version"] * (promoted[-1:] != serving)
    barred = {version for action, version, _ in found["ledger"] if action == "policy.rollback"} - set(serving)
    now = {n for n, (_, _, status) in found["policies"].items() if status == "rolled_back"}
    told += [f"rolled back in the ledger: {sorted(barred)}, in the table: {sorted(now)}"] * (barred != now)
    last = {version: action for action, version, policy in found["ledger"] if policy is None}
    stages = {n: f"model.{stage}" for n, stage in found["stages"].items()}
    told += [f"stages {stages}, ledger {last}"] * (stages != last)
    behind = [found["policies"][n][0] for n in serving]
    wanted = [n for n, stage in found["stages"].items() if stage == "production"]
    told += [f"models {wanted} are in production, {behind} serve"] * ([n for n in behind if n] != wanted)
    if mlflow:
        tags = {v.version: v.stage for v in read_versions(world.tracking, POLICY)}
        different = {n: tags.get(n) for n, stage in found["stages"].items() if tags.get(n) != stage}
        told += [f"tags {different}"] * bool(different)
        aliases = world.tracking.client.get_registered_model(POLICY).aliases
        told += [f"alias production of {aliases.get('production')}"] * (
            [int(aliases[a]) for a in ("production",) if a in aliases] != wanted
        )
    return told


# Killing


def _armed(point: int) -> Callable[[], int]:
    "Count exchanges with the server; kill this process before the one that is named."
    passed, original = 0, psycopg.Connection.wait

    def wait(self, *arguments, **options):
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **options)

    psycopg.Connection.wait = wait
    return lambda: passed


def attempt(scenario: Scenario, url: str, folder: Path, point: int) -> int | None:
    "Take a step in a process of its own; None when it was killed, else how many exchanges it took."
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            world = connect_world(url, folder, scenario.approval)
            world.tracking.client.search_registered_models(max_results=1)  # MLflow has opened its tables
            count = _armed(point)
            scenario.step(world)
            os.write(writing, str(count()).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if not said:
        raise RuntimeError(f"{scenario.name} failed before exchange {point}")
    return int(said)


class Copies:
    "Fresh copies of a prepared database."

    def __init__(self, url: str, folder: Path):
        self.url, self.n = url, 0
        self.migrated = migrate(self, folder)

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement)

    def named(self, name: str) -> str:
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def make(self, template: str | None = None) -> str:
        "Create a database, empty or as a copy of one that nobody is connected to."
        self.n += 1
        name = f"crash_{os.getpid()}_{self.n}"
        source = urlsplit(template).path[1:] if template else "template0"
        if template:
            self._disconnect(source)
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{source}" STRATEGY file_copy')
        return self.named(name)

    def _disconnect(self, name: str) -> None:
        self._execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    def drop(self, url: str) -> None:
        self._execute(f'DROP DATABASE IF EXISTS "{urlsplit(url).path[1:]}" WITH (FORCE)')


def prepare_world(scenario: Scenario, copies: Copies, folder: Path) -> str:
    "Make the database that every kill of a scenario starts from."
    url = copies.make(copies.migrated)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:  # so that this process keeps no connection to it
        try:
            scenario.prepare(connect_world(url, folder))
            os.write(writing, b"done")
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        if pipe.read() != "done":
            raise RuntimeError(f"{scenario.name} cannot be prepared")
    return url


def judge_kill(scenario: Scenario, world: World, whole: dict) -> list[str]:
    "List what is wrong after a kill: at once, and once MLflow was reconciled."
    serving = read_production(world.store, POLICY)
    told = [f"at once: {t}" for t in disagreements(world, mlflow=False)]
    told += [f"at once: {serving} serves"] * (serving is None or serving.version not in scenario.serves)
    reconcile(world.tracking, world.store, POLICY)
    told += [f"reconciled: {t}" for t in disagreements(world)]
    told += ["reconciling again mended something"] * bool(reconcile(world.tracking, world.store, POLICY))
    return told


def judge_repeat(scenario: Scenario, world: World, whole: dict) -> list[str]:
    "List what is wrong after a step that was killed has been repeated, with nothing between."
    if not scenario.finished(world):
        scenario.step(world)
    told = [f"repeated: {t}" for t in disagreements(world)]
    found = records(world)
    told += [
        f"repeated: {key} is {found[key]}, without a crash {whole[key]}" for key in whole if found[key] != whole[key]
    ]
    scenario.check(world)
    return told


def spread(n: int, most: int) -> list[int]:
    "Choose points from the first to the last, evenly; 0 takes all."
    if not most or most >= n:
        return list(range(1, n + 1))
    return sorted({1 + round(i * (n - 1) / (most - 1)) for i in range(most)})


def sweep(
    scenario: Scenario, copies: Copies, folder: Path, most: int = 0, judges: tuple = (judge_kill, judge_repeat)
) -> tuple[int, int, list[str]]:
    "Kill a step at its points: how many there are, how many were tried, and what went wrong."
    prepared = prepare_world(scenario, copies, folder)
    url = copies.make(prepared)
    n = attempt(scenario, url, folder, ALWAYS)
    world = connect_world(url, folder, scenario.approval)
    whole, wrong = records(world), [f"without a crash: {t}" for t in disagreements(world)]
    copies.drop(url)
    points = spread(n, most)
    for point in points:
        for judge in judges:
            url = copies.make(prepared)
            if attempt(scenario, url, folder, point) is not None:
                wrong.append(f"point {point}: the step ended")
            wrong += [
                f"point {point}: {t}" for t in judge(scenario, connect_world(url, folder, scenario.approval), whole)
            ]
            copies.drop(url)
    copies.drop(prepared)
    return n, len(points), wrong


# The steps of this room; the rollout brings its own


def _candidate(world: World, text: str = "second"):
    world.promoted("first")
    return settle(world.tracking, world.store, world.trained(text), PASSED, "ana")


def _two(world: World) -> None:
    world.promoted("first")
    world.promoted("second")


def _proposed(world: World) -> None:
    propose_policy(world.tracking, world.store, _candidate(world), {"batch_size": 8}, "ana")


def _approve(world: World):
    return approve(world.tracking, world.store, read_policy_version(world.store, POLICY, 2), "ben", "read the report")


def _approved(world: World) -> None:
    _proposed(world)
    _approve(world)


def _promote(world: World):
    version = read_version(world.tracking, POLICY, 2)
    return promote(world.tracking, world.store, version, PASSED, "ana", {"batch_size": 8})


def _settle(world: World):
    return settle(world.tracking, world.store, read_version(world.tracking, POLICY, 2), PASSED, "ana")


def _rollback(world: World):
    return rollback(world.tracking, world.store, POLICY, "ben", "every third dish is replaced")


def _went_back(world: World) -> bool:
    "Say whether a rollback came to its end: what it did is known to MLflow."
    with transaction(world.store) as connection:
        sql = "SELECT projected = revision AS told FROM exp.policies WHERE policy = %s"
        told = read_rows(connection, sql, (POLICY,))[0]["told"]
    return told and any(p.status == "rolled_back" for p in read_policies(world.store, POLICY))


def _rollback_to(world: World):
    return rollback(world.tracking, world.store, POLICY, "ben", "back to the first", to=1)


def _withdraw(world: World):
    policy = read_policy_version(world.store, POLICY, 2)
    return withdraw(world.tracking, world.store, policy, "ben", "its arm does harm")


def _trained(world: World) -> None:
    world.promoted("first")
    world.trained("second")


def _three(world: World) -> None:
    _two(world)
    world.promoted("third")


SCENARIOS = (
    Scenario("settle", _trained, _settle, (1, 1)),
    Scenario("promote", lambda world: _candidate(world) and None, _promote, (1, 2)),
    Scenario("approve", _proposed, _approve, (1, 1)),
    Scenario("promote what was approved", _approved, _promote, (1, 2), approval=True),
    Scenario("rollback", _three, _rollback, (3, 2), finished=_went_back),
    Scenario("rollback --to", _three, _rollback_to, (3, 1)),
    Scenario(
        "rollback to the rule", lambda world: world.promoted("first") and None, _rollback, (1, 2), finished=_went_back
    ),
    Scenario("withdraw", _proposed, _withdraw, (1, 1)),
)


def migrate(copies: Copies, folder: Path) -> str:
    "Make a database with all tables, MLflow's too."
    url = copies.make()
    if (child := os.fork()) == 0:
        try:
            with open_store(Settings("test", folder, folder / "home", url)) as store:
                open_tracking(store, Settings("local", folder, folder / "home", url))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return url


# How fast a change is seen


def reaction(copies: Copies, folder: Path, n: int) -> list[float]:
    "Measure, in seconds, how long after a rollback was asked for another process serves the other version."
    url = copies.make(copies.migrated)
    world = connect_world(url, folder)
    _two(world)
    seen, told = os.pipe()
    if (child := os.fork()) == 0:
        with follow_production(Store(url), POLICY) as followed:
            serving = None
            while True:
                if followed.production.version != serving:
                    serving = followed.production.version
                    os.write(told, f"{serving} {time.monotonic()}\n".encode())
                time.sleep(0.001)
    os.close(told)
    waits, to = [], 1
    with os.fdopen(seen) as pipe:
        pipe.readline()
        for i in range(n):
            asked = time.monotonic()
            step = threading.Thread(
                target=rollback, args=(world.tracking, world.store, POLICY, "ben", f"drill {i}", to), daemon=True
            )
            step.start()
            serving, at = pipe.readline().split()
            assert int(serving) == to
            waits.append(float(at) - asked)
            step.join()
            to = 3 - to
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    copies.drop(url)
    return waits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=12, help="of each step, evenly spread; 0 tries all")
    parser.add_argument("--only", default="", help="part of a scenario's name")
    parser.add_argument("--drills", type=int, default=20, help="rollbacks that another process watches")
    given = parser.parse_args()
    total, missed = 0, 0
    with temporary_store() as store, tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        copies = Copies(store.url, folder)
        for scenario in (s for s in SCENARIOS if given.only in s.name):
            started = time.monotonic()
            n, tried, wrong = sweep(scenario, copies, folder, given.points)
            total, missed = total + tried, missed + bool(wrong)
            seconds = time.monotonic() - started
            said = "kept" if not wrong else "MISSED"
            print(f"{said:<7} {scenario.name:<28} {tried} of {n} points, twice each, {seconds:.0f} s", flush=True)
            print("".join(f"          {line}\n" for line in wrong[:20]), end="")
        print(f"{'kept' if total >= 40 or given.only else 'MISSED':<7} {total} points were killed; asked: at least 40")
        missed += total < 40 and not given.only
        waits = sorted(reaction(copies, folder, given.drills))
        worst, half = waits[-1], waits[len(waits) // 2]
        print(
            f"{'kept' if worst <= 2 else 'MISSED':<7} a rollback is seen by another process within {worst:.2f} s ",
            end="",
        )
        print(f"(median {half:.2f} s, n = {len(waits)}); asked: at most 2 s")
        missed += worst > 2
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
