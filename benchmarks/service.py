"""What the service costs beside an empty FastAPI handler, raw COPY and PostgreSQL's own group commit, all in the same run.

    python -m benchmarks.service                          # everything, and the parts of benchmarks.prediction
    python -m benchmarks.service --part assignments --workers 2 --seconds 6
    python -m benchmarks.service --part events --seconds 4 --repeat 3

assignments  closed-loop callers on keep-alive connections ask for one unit's variant in one experiment; the empty
             handler is `async def empty(): return {}` in FastAPI under the same uvicorn, worker count, callers and
             load generator, in turn. Every tenth unit is new, and its exposure is written: a unit asks about ten
             times during a phase. Further lines: no unit is new; and, without a bound, every one is.
batches      batches of 100 events from a few callers; CPU of the workers alone (user + system, from /proc), rows a
             second beside `COPY` of the same rows into `exp.events` from one connection, in commits of 1,000.
singles      one event a request; beside pgbench, which writes one such event into `exp.events` a transaction from as
             many clients (a psycopg loop where pgbench is missing); the service also writes the id that makes it once
             only.
partial      1 bad event of 100: 207, and 99 are in the table.
change       an experiment is paused; how long until no worker assigns by it any more, the slowest of several times.

Figures are medians of interleaved rounds on a machine that does all of it at once: service, database, load generator.
So read the ratios.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psycopg
import uvloop

from mlops_workbench.core import new_id, utc_now
from mlops_workbench.experiment import (
    Experiment,
    MetricPlan,
    Variant,
    create_experiment,
    pause_experiment,
    ramp_experiment,
    resume_experiment,
    start_experiment,
)
from mlops_workbench.keys import create_key
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, open_store

ASSIGNMENTS, TAIL = 0.8, 2.0  # of the empty handler's requests a second; times its p99
EVENT_CPU_US, BATCH_P99_MS, COPY_SHARE = 40.0, 500.0, 0.6
COMMIT_SHARE = 0.5
CHANGE_S = 2.0
BAD_OF = 100


def held(what: str, kept: bool) -> bool:
    "Say whether a bound was kept."
    print(f"  {what}: {'kept' if kept else 'MISSED'}", flush=True)
    return kept


# Servers


def free_port() -> int:
    "Find a port that nobody uses."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve_workbench(home: Path, port: int, workers: int) -> None:
    "Run the service."
    from mlops_workbench.service import ServiceOptions
    from mlops_workbench.serving import Listen, run_service

    options = ServiceOptions(Settings("local", home, home, None), models=False, calls_per_s=10_000_000)
    run_service(options, Listen(port=port, workers=workers))


def make_empty():
    "Make the handler that does nothing."
    from fastapi import FastAPI

    app = FastAPI()

    @app.post("/empty")
    async def empty():
        return {}

    @app.get("/healthz")
    async def healthz():
        return {}

    return app


def serve_empty(port: int, workers: int) -> None:
    "Run the empty handler under the same server."
    import uvicorn

    how = {"loop": "uvloop", "http": "httptools", "log_level": "warning", "access_log": False, "backlog": 4096}
    uvicorn.run("benchmarks.service:make_empty", factory=True, port=port, workers=workers, **how)


@contextmanager
def running(*arguments: str, port: int) -> Iterator[subprocess.Popen]:
    "Start a server of this module and wait until it answers."
    command = [sys.executable, "-m", "benchmarks.service", *arguments]
    process = subprocess.Popen(command, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as s:
                    s.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    if s.recv(100).startswith(b"HTTP/1.1 200"):
                        break
            except OSError:
                pass
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{arguments[0]} does not answer on port {port}")
        time.sleep(3)  # the other workers start too
        yield process
    finally:
        process.terminate()
        process.wait(60)


# Load: prebuilt requests over keep-alive connections, as cheap as Python allows


@dataclass
class Load:
    "What a round of requests came to."

    seconds: float
    latencies: list[float] = field(repr=False)  # s
    statuses: dict[int, int]

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def quantile_ms(self, share: float) -> float:
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))] * 1e3


class Caller(asyncio.Protocol):
    "One connection that always has one request under way."

    def __init__(self, requests, until, load, done):
        self.requests, self.until, self.load, self.done = requests, until, load, done
        self.buffer, self.need = b"", 0

    def connection_made(self, transport):
        self.transport = transport
        self.ask()

    def ask(self):
        if time.perf_counter() >= self.until:
            self.transport.close()
            return
        self.began = time.perf_counter()
        self.transport.write(next(self.requests))

    def data_received(self, data):
        buffer = self.buffer + data if self.buffer else data
        end = buffer.find(b"\r\n\r\n")
        at = buffer.find(b"content-length: ")
        if end < 0 or at < 0 or len(buffer) < end + 4 + int(buffer[at + 16 : buffer.find(b"\r", at)]):
            self.buffer = buffer
            return
        self.buffer = b""
        self.load.latencies.append(time.perf_counter() - self.began)
        status = int(buffer[9:12])
        self.load.statuses[status] = self.load.statuses.get(status, 0) + 1
        self.ask()

    def connection_lost(self, error):
        if not self.done.done():
            self.done.set_result(None)


async def _load(port, callers, seconds, make):
    loop, load = asyncio.get_running_loop(), Load(seconds, [], {})
    until, waits = time.perf_counter() + seconds, []
    for i in range(callers):
        done = loop.create_future()
        waits.append(done)
        await loop.create_connection(lambda i=i, done=done: Caller(make(i), until, load, done), "127.0.0.1", port)
    await asyncio.gather(*waits)
    return load


def load(port: int, callers: int, seconds: float, make) -> Load:
    "Ask as fast as answers come."
    return uvloop.run(_load(port, callers, seconds, make))


def request(path: str, key: str, body: bytes) -> bytes:
    "Build a request."
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    )
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def asked_assignments(key: str, share_new: float, mark: str):
    "Build requests for assignments; `share_new` of the units were never met."

    def make(caller: int) -> Iterator[bytes]:
        chance, n = random.Random(f"{mark}{caller}"), 0
        while True:
            n += 1
            new = chance.random() < share_new
            unit = f"household-{mark}-{caller}-{n}" if new else f"household-{chance.randrange(2_000)}"
            body = f'{{"unit_id":"{unit}","experiments":["planner_tone"],"context":{{"country":"NL","size":4}}}}'
            yield request("/api/v1/assignments", key, body.encode())

    return make


def asked_nothing(key: str):
    "Build requests for the empty handler, of the same size."
    body = b'{"unit_id":"household-123456","experiments":["planner_tone"],"context":{"country":"NL","size":4}}'

    def make(caller: int) -> Iterator[bytes]:
        while True:
            yield request("/empty", key, body)

    return make


def event(n: int) -> dict:
    "Make an event as an application sends it."
    about = {"type": "plan_decided", "unit_type": "household", "unit_id": f"household-{n % 20_000}"}
    about |= {"id": new_id(), "event_at": utc_now().isoformat(), "experiments": {"planner_tone": "warm"}}
    about |= {"context": {"source": "shop", "policy_version": 3, "country": "NL"}, "metrics": {"accepted": 1.0}}
    return about | {"payload": {"plan": f"plan-{n}", "edits": [1, 4], "note": "less salt"}}


def asked_events(key: str, size: int):
    "Build requests with `size` events; 1 is sent alone. Only ids and units differ, so that building costs next to nothing."
    text = json.dumps(event(0) | {"id": "ID", "unit_id": "UNIT"}).encode().replace(b'"UNIT"', b'"household-%d"')
    text = text.replace(b'"ID"', b'"%b"')
    path, turned = "/api/v1/events/batch" if size > 1 else "/api/v1/events", text.index(b"%b") < text.index(b"%d")
    template = b'{"events": [' + b", ".join([text] * size) + b"]}" if size > 1 else text

    def make(caller: int) -> Iterator[bytes]:
        n = caller * 1_000
        while True:
            n += size
            pairs = [((n + i) % 20_000, new_id().encode()) for i in range(size)]
            values = [v for unit, name in pairs for v in ((name, unit) if turned else (unit, name))]
            yield request(path, key, template % tuple(values))

    return make


# What the machine spent


def children(pid: int) -> list[int]:
    "List the workers of a supervisor."
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def workers_of(supervisor: int) -> list[int]:
    "List the worker processes; a single worker is the supervisor itself."
    found = [pid for pid in children(supervisor) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found or [supervisor]


def cpu_s(pids: list[int]) -> float:
    "Add up the CPU seconds of processes."
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


# Parts


def part_assignments(world, options) -> bool:
    "Beside an empty handler."
    kept, port = True, free_port()
    with running("empty", "--port", str(port), "--workers", str(options.workers), port=port) as empty:
        pids = {"ours": world.workers(), "empty": workers_of(empty.pid)}
        for share, bound in ((0.1, True), (0.0, True), (1.0, False)):
            rounds, costs = {"ours": [], "empty": []}, {"ours": [], "empty": []}
            for turn in range(options.repeat + 1):
                ours = asked_assignments(world.key, share, f"{share}-{turn}-{os.getpid()}")
                for name, at, make in (("ours", world.port, ours), ("empty", port, asked_nothing(world.key))):
                    before = cpu_s(pids[name])
                    done = load(at, options.callers, options.seconds if turn else 2, make)
                    if turn:  # the first turn warms
                        rounds[name].append(done)
                        costs[name].append((cpu_s(pids[name]) - before) / len(done.latencies) * 1e6)
            kept = tell_assignments(share, rounds, costs, bound) and kept
    return kept


def tell_assignments(share: float, rounds: dict, costs: dict, bound: bool) -> bool:
    "Print what came of one share of new units."
    rate = {k: statistics.median(r.rate for r in v) for k, v in rounds.items()}
    tail = {k: statistics.median(r.quantile_ms(0.99) for r in v) for k, v in rounds.items()}
    cost = {k: statistics.median(v) for k, v in costs.items()}
    ratio, slower = rate["ours"] / rate["empty"], tail["ours"] / tail["empty"]
    told = {s: sum(r.statuses.get(s, 0) for r in rounds["ours"]) for r in rounds["ours"] for s in r.statuses}
    print(f"  {share:.0%} new units: {rate['ours']:,.0f}/s beside {rate['empty']:,.0f}/s of the empty handler")
    print(f"    p99 {tail['ours']:.1f} ms beside {tail['empty']:.1f} ms, statuses {told}")
    print(f"    CPU of the worker a request: {cost['ours']:.0f} µs beside {cost['empty']:.0f} µs")
    if not bound:
        print(f"    {ratio:.2f} × the requests a second, {slower:.2f} × the p99: every request writes an event")
        return set(told) == {200}
    good = [
        held(f"{share:.0%} new units, requests a second: {ratio:.2f} × (bound {ASSIGNMENTS})", ratio >= ASSIGNMENTS)
    ]
    good.append(held(f"{share:.0%} new units, p99: {slower:.2f} × (bound {TAIL})", slower <= TAIL))
    return all(good) and set(told) == {200}


def raw_copy(url: str, seconds: float) -> float:
    "Copy the same rows into the log from one connection, 1,000 a commit: rows a second."
    columns = "id, type, unit_type, unit_id, experiments, context, metrics, payload, event_at, received_at"
    blocks, n = [], 0
    for _ in range(60):
        lines = []
        for _ in range(1_000):
            e, n = event(n), n + 1
            parts = [json.dumps(e[name]) for name in ("experiments", "context", "metrics", "payload")]
            lines.append(
                "\t".join([e["id"], e["type"], e["unit_type"], e["unit_id"], *parts, e["event_at"], e["event_at"]])
            )
        blocks.append("\n".join(lines) + "\n")
    with psycopg.connect(url, autocommit=True) as connection:
        rows, began = 0, time.perf_counter()
        for block in blocks:
            with connection.cursor().copy(f"COPY exp.events ({columns}) FROM STDIN") as copy:
                copy.write(block)
            rows += 1_000
            if time.perf_counter() - began > seconds:
                break
        return rows / (time.perf_counter() - began)


def part_batches(world, options) -> bool:
    "Batches of 100 beside raw COPY."
    rates, copies, costs, tails, servers = [], [], [], [], []
    make = asked_events(world.key, BAD_OF)
    for _turn in range(options.repeat):
        before, postgres = cpu_s(world.workers()), cpu_s(world.postgres())
        done = load(world.port, options.batch_callers, options.seconds, make)
        n = len(done.latencies) * BAD_OF
        costs.append((cpu_s(world.workers()) - before) / n * 1e6)
        servers.append((cpu_s(world.postgres()) - postgres) / n * 1e6)
        rates.append(n / done.seconds)
        tails.append(done.quantile_ms(0.99))
        copies.append(raw_copy(world.url, options.seconds))
        if set(done.statuses) != {200}:
            print(f"  statuses {done.statuses}")
    rate, copy = statistics.median(rates), statistics.median(copies)
    print(
        f"  {rate:,.0f} events/s in batches of {BAD_OF} from {options.batch_callers} callers, raw COPY {copy:,.0f} rows/s"
    )
    print(f"    PostgreSQL itself spent {statistics.median(servers):.0f} µs of CPU an event")
    cost, tail = statistics.median(costs), statistics.median(tails)
    return all(
        [
            held(f"CPU of the service an event: {cost:.1f} µs (bound {EVENT_CPU_US})", cost <= EVENT_CPU_US),
            held(f"p99 of a batch: {tail:.0f} ms (bound {BATCH_P99_MS:.0f})", tail < BATCH_P99_MS),
            held(f"rows a second: {rate / copy:.2f} × raw COPY (bound {COPY_SHARE})", rate >= COPY_SHARE * copy),
        ]
    )


def ceiling(url: str, clients: int, seconds: int) -> tuple[float, str]:
    "Measure what PostgreSQL commits a second when every transaction writes one event into the log."
    e = event(0)
    parts = ", ".join(f"'{json.dumps(e[name])}'" for name in ("experiments", "context", "metrics", "payload"))
    columns = "id, type, unit_type, unit_id, experiments, context, metrics, payload, event_at"
    values = (
        f"gen_random_uuid(), '{e['type']}', '{e['unit_type']}', 'household-' || (random() * 20000)::int, {parts}, now()"
    )
    script = f"INSERT INTO exp.events ({columns}) VALUES ({values});"
    if binary := shutil.which("pgbench"):
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
            file.write(script)
            file.flush()
            how = ["-n", "-M", "prepared", "-c", str(clients), "-j", "2", "-T", str(seconds), "-f", file.name]
            told = subprocess.run([binary, *how, url], capture_output=True, text=True, check=True).stdout
        return float(told.rpartition("tps = ")[2].split()[0]), "pgbench"
    return psycopg_ceiling(url, script, clients, seconds), "psycopg, because pgbench is not here"


def psycopg_ceiling(url: str, script: str, clients: int, seconds: int) -> float:
    "Insert one row a transaction from many connections."

    async def one(until: float) -> int:
        n = 0
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            while time.perf_counter() < until:
                await connection.execute(script, prepare=True)
                n += 1
        return n

    async def all_of_them() -> int:
        until = time.perf_counter() + seconds
        return sum(await asyncio.gather(*(one(until) for _ in range(clients))))

    return asyncio.run(all_of_them()) / seconds


def part_singles(world, options) -> bool:
    "Single events beside PostgreSQL's group commit."
    rates, tops, tails, make = [], [], [], asked_events(world.key, 1)
    for _ in range(options.repeat):
        done = load(world.port, options.callers, options.seconds, make)
        rates.append(done.rate)
        tails.append(done.quantile_ms(0.99))
        top, how = ceiling(world.url, options.callers, int(options.seconds))
        tops.append(top)
    rate, top = statistics.median(rates), statistics.median(tops)
    print(f"  {rate:,.0f} single events/s from {options.callers} callers, {how} {top:,.0f} commits/s from as many")
    print(f"    p99 {statistics.median(tails):.1f} ms")
    return held(f"single events: {rate / top:.2f} × the ceiling (bound {COMMIT_SHARE})", rate >= COMMIT_SHARE * top)


def part_partial(world, options) -> bool:
    "One bad event of a hundred."
    import httpx

    events = [event(n) for n in range(BAD_OF)]
    events[41]["metrics"] = {"accepted": "yes"}
    headers = {"authorization": f"Bearer {world.key}"}
    answer = httpx.post(f"http://127.0.0.1:{world.port}/api/v1/events/batch", json={"events": events}, headers=headers)
    with psycopg.connect(world.url) as connection:
        asked = "SELECT count(*) FROM exp.events WHERE id = ANY(%s::uuid[])"
        n = connection.execute(asked, ([e["id"] for e in events],)).fetchone()[0]
    return held(
        f"1 bad event of {BAD_OF}: {answer.status_code}, {n} stored", (answer.status_code, n) == (207, BAD_OF - 1)
    )


def part_change(world, options) -> bool:
    "Until every worker knows of a decision."
    import httpx

    body, headers = {"unit_id": "household-1", "expose": "no"}, {"authorization": f"Bearer {world.key}"}
    url, slowest = f"http://127.0.0.1:{world.port}/api/v1/assignments", 0.0

    def answers() -> set[bool]:
        "Ask on new connections, so that every worker is met: whether the unit got a variant."
        return {
            bool(httpx.post(url, json=body, headers=headers).json()["assignments"]) for _ in range(8 * options.workers)
        }

    with Store(world.url) as store:
        for _ in range(options.repeat):
            for decide, expected in ((pause_experiment, {False}), (resume_experiment, {True})):
                decide(store, "planner_tone", "bench")
                began = time.perf_counter()
                while answers() != expected:
                    time.sleep(0.01)
                slowest = max(slowest, time.perf_counter() - began)
    return held(f"a decision reaches every worker within {slowest:.2f} s (bound {CHANGE_S:.0f})", slowest <= CHANGE_S)


PARTS = {"assignments": part_assignments, "batches": part_batches, "singles": part_singles, "partial": part_partial}
PARTS |= {"change": part_change}


@dataclass
class World:
    "A service with an experiment, on a database of its own that commits to disk."

    port: int
    key: str
    url: str
    supervisor: int

    def workers(self) -> list[int]:
        "List the worker processes; a single worker is the supervisor itself."
        return workers_of(self.supervisor)

    def postgres(self) -> list[int]:
        "List the processes of the database that serve connections."
        with psycopg.connect(self.url) as connection:
            return [
                r[0]
                for r in connection.execute(
                    "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                )
            ]


@contextmanager
def world_of(options: argparse.Namespace) -> Iterator[World]:
    "Start a database and the service on it."
    with tempfile.TemporaryDirectory(prefix="workbench-bench-") as folder:
        home = Path(folder)
        os.chmod(home, 0o755)
        with open_store(Settings("local", home, home, None)) as store:
            key, _ = create_key(store, "bench", "client", "bench")
            tone = Experiment(
                key="planner_tone",
                hypothesis="A friendly tone makes households accept more plans.",
                policy="planner",
                unit_type="household",
                variants=(Variant("control", 0.5, control=True), Variant("warm", 0.5, parameters={"tone": "warm"})),
                metrics=(MetricPlan("acceptance", "primary", "proportion", "plan_decided", "accepted"),),
                mde=0.05,
                planned_n=3_900,
                ends_at=utc_now() + timedelta(days=30),
            )
            create_experiment(store, tone, "bench")
            start_experiment(store, "planner_tone", "bench")
            ramp_experiment(store, "planner_tone", 10_000, "bench")
            port = free_port()
            arguments = ("serve", "--home", str(home), "--port", str(port), "--workers", str(options.workers))
            with running(*arguments, port=port) as process:
                yield World(port, key, store.url, process.pid)


def read_options() -> argparse.Namespace:
    "Read the command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["measure", "serve", "empty"], default="measure")
    parser.add_argument("--part", choices=[*PARTS, "prediction"], help="only this part")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--callers", type=int, default=32, help="connections with one request under way each")
    parser.add_argument("--batch-callers", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=5, help="of one round")
    parser.add_argument("--repeat", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_prediction() -> bool:
    "Run the other half of the service's measurements, which exits with 1 when a bound was missed."
    print("prediction", flush=True)
    return subprocess.run([sys.executable, "-m", "benchmarks.prediction"]).returncode == 0


def main() -> int:
    "Measure, and exit 1 when a bound was missed."
    options = read_options()
    if options.command == "serve":
        serve_workbench(options.home, options.port, options.workers)
        return 0
    if options.command == "empty":
        serve_empty(options.port, options.workers)
        return 0
    kept = True
    chosen = [p for p in PARTS if options.part in (None, p)]
    if chosen:
        with world_of(options) as world:
            for name in chosen:
                print(name, flush=True)
                kept = PARTS[name](world, options) and kept
    if options.part in (None, "prediction"):
        kept = measure_prediction() and kept
    print("all bounds kept" if kept else "a bound was MISSED")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
