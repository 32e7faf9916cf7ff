"""How much does the service add to a model, and what does it gain by asking a model in batches?

    python -m benchmarks.prediction                    # all of it, about four minutes
    python -m benchmarks.prediction --only overhead    # everything except the model, p50
    python -m benchmarks.prediction --only tabular     # beside `mlflow models serve` and beside a bare handler
    python -m benchmarks.prediction --only language    # in batches beside one at a time
    python -m benchmarks.prediction --seconds 2 --rounds 3

The world is real: PostgreSQL, MLflow's registry, models that went through settle and promote, features looked up in the store,
exposures and events committed. The models are the reference tasks' own, with weights that were drawn: what they say does not
matter here, what they cost does. Servers run in processes of their own on 127.0.0.1; rounds are interleaved, so that what
disturbs the machine disturbs them all, and a figure is the median over rounds.

- `overhead` asks the planner's path in this process: assign, features, contract, model, validator, exposure and event. Everything
  except the time from the model's queue to its answer counts.
- `tabular` asks the recommender over HTTP, 8 callers: `mlflow models serve` with the same model folder, a bare handler that reads
  JSON and calls the model, and the service's `/invocations` for production and, with a unit, for the whole path with its event.
- `language` asks the planner's model with 16 callers and with 1, once as the service does and once with batches of one.

Exit code 1 when a target is missed.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mlops_workbench import cookbook, planner, recommender
from mlops_workbench.adapter import load_beside
from mlops_workbench.artifact import describe_model, save_model
from mlops_workbench.decision import Asked
from mlops_workbench.gate import Verdict
from mlops_workbench.model import Predictor
from mlops_workbench.outcome import ask_slot
from mlops_workbench.policy import promote, propose_policy
from mlops_workbench.prediction import Predictions
from mlops_workbench.registry import ModelVersion, fetch_model, register_model, settle
from mlops_workbench.settings import Settings, read_settings
from mlops_workbench.slots import Room, open_slot
from mlops_workbench.store import Store, temporary_store
from mlops_workbench.tracking import end_run, open_tracking, start_run

PASSED = Verdict(outcome="pass", reasons=("invented for a test",))
ROOT = Path(__file__).resolve().parent.parent


class World:
    "Models that went through the gate, on a store of the caller."

    def __init__(self, store: Store, folder: Path):
        self.store, self.folder = store, Path(folder)
        # bases are where the project has them: a throwaway home has none
        self.settings = Settings("local", read_settings().root, self.folder / "home", store.url)
        self.settings.home.mkdir(parents=True, exist_ok=True)
        self.tracking = open_tracking(store, self.settings)

    def register(self, task, module: str, files: Path) -> ModelVersion:
        "Make a model folder a version that was trained."
        run = start_run(self.tracking, task.name, "train", {})
        version = register_model(run, task, module, files, "d" * 64)
        end_run(run)
        return version

    def ranking(self, seed: int = 0) -> ModelVersion:
        "Register a ranking model with invented weights."
        rng, places = np.random.default_rng(seed), self.folder / f"ranking-{seed}"
        vocabulary = tuple(tuple(f"u{i}-{k}" for k in range(4)) for i in range(4))
        shapes = {
            "user": (3 + 16, 8),
            "item": (recommender.N_ITEMS, 8),
            "bias": (recommender.N_ITEMS,),
            "affinity": (1,),
        }
        weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
        task = recommender.task
        save_model(places, recommender.RankingModel(vocabulary, weights), describe_model(task, "task"), task=task)
        return self.register(task, "mlops_workbench.recommender", places)

    def planning(self, seed: int = 0) -> ModelVersion:
        "Register an adapter with invented weights on the planner's base."
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from mlops_workbench.base import resolve_base

        torch.manual_seed(seed)
        base = resolve_base("planner-base", self.settings)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config)
        for name, tensor in trained.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(tensor, std=0.05)
        files = self.folder / f"planning-{seed}"
        save_model(files, trained, describe_model(planner.task, "lora", base), base)
        return self.register(planner.task, "mlops_workbench.planner", files)

    def settled(self, version: ModelVersion) -> ModelVersion:
        "Let a version pass the gate."
        return settle(self.tracking, self.store, version, PASSED, "ana")

    def promoted(self, version: ModelVersion, settings: dict | None = None):
        "Put a version into production."
        return promote(self.tracking, self.store, self.settled(version), PASSED, "ana", settings or {})

    def proposed(self, version: ModelVersion, settings: dict | None = None):
        "Give a version a place among the policy's versions."
        return propose_policy(self.tracking, self.store, self.settled(version), settings or {}, "ana")


# --- asking ------------------------------------------------------------------------------------------------------------


def context(rng: random.Random) -> dict:
    "Draw a visitor and a place."
    user = [f"u{i}-{rng.randrange(4)}" for i in range(4)]
    affinity = {str(rng.randrange(recommender.N_ITEMS)): 1.0 for _ in range(3)}
    return {"position": rng.randint(1, 3), "user": user, "affinity": affinity}


def kept(name: str, value: float, bound: float, at_least: bool, unit: str = "") -> bool:
    "Print a figure beside its target."
    good = value >= bound if at_least else value <= bound
    print(
        f"{name}: {value:.2f}{unit}, {'at least' if at_least else 'at most'} {bound:g}{unit}: {'kept' if good else 'MISSED'}"
    )
    return good


async def hammer(ask: Callable[[int], Awaitable], callers: int, seconds: float) -> tuple[float, float]:
    "Let callers ask one request after the other; requests/s and the median time in ms."
    took, until = [], time.perf_counter() + seconds

    async def caller(n: int) -> None:
        i = n
        while (begun := time.perf_counter()) < until:
            await ask(i)
            took.append(time.perf_counter() - begun)
            i += callers

    begun = time.perf_counter()
    await asyncio.gather(*(caller(n) for n in range(callers)))
    return len(took) / (time.perf_counter() - begun), statistics.median(took) * 1e3


async def ready(predictions: Predictions, policy: str, version: int | None) -> None:
    "Wait until a version serves."
    limit = time.monotonic() + 120
    while True:
        keeper = predictions._keepers.get(policy)
        if keeper and keeper.lineup and keeper.lineup.production == version:
            return
        if time.monotonic() > limit:
            raise SystemExit(f"{policy} does not serve version {version}: {predictions.problems()}")
        await asyncio.sleep(0.05)


# --- everything except the model ---------------------------------------------------------------------------------------


async def overhead(world: World, seconds: float, rounds: int) -> bool:
    "Measure what the planner's path costs beside its model."
    from mlops_workbench.intake import Intake
    from mlops_workbench.spool import Spool

    task = planner.task
    task.write_history(world.store, None, "simulation-s0-n440", 440, 0)
    world.promoted(world.planning(1))
    units = [f"simulation-s0-n440/household-{i:04d}" for i in range(20)]
    at = task.read_examples(world.store, "simulation-s0-n440", None)["decided_at"].max().to_pydatetime()
    intake = Intake(Store(world.store.url), Spool(world.settings.home / "spool"), None)
    predictions = Predictions(world.store, world.tracking, world.settings, None, intake.write)
    try:
        await ready(predictions, "planner", 1)
        beside, whole, fallbacks = [], [], 0

        async def ask(i: int) -> None:
            nonlocal fallbacks
            begun = time.perf_counter()
            answered = await predictions.answer("planner", Asked(units[i % len(units)], {}, at))
            whole.append(time.perf_counter() - begun)
            beside.append(whole[-1] - answered.model_ms / 1e3)
            fallbacks += bool(answered.fallback)

        await hammer(ask, 1, 1.0)
        beside.clear(), whole.clear()
        for _ in range(rounds):
            await hammer(ask, 1, seconds)
        p50, p99 = (float(np.quantile(beside, q)) * 1e3 for q in (0.5, 0.99))
        told = (
            f"{len(beside)} plans, {fallbacks} by the fallback; all of it takes {statistics.median(whole) * 1e3:.1f} ms"
        )
        print(f"overhead, one caller: p50 {p50:.2f} ms, p99 {p99:.2f} ms; {told}")
        return kept("overhead p50", p50, 5.0, False, " ms")
    finally:
        await asyncio.to_thread(predictions.close)
        intake.close()


# --- a tabular policy, over HTTP ---------------------------------------------------------------------------------------

BARE = """
import json, sys
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from mlops_workbench import recommender
from mlops_workbench.model import load_predictor

predictor, app = load_predictor(sys.argv[1], recommender.task), FastAPI()


@app.post("/invocations")
async def answer(request: Request):
    rows = json.loads(await request.body())["dataframe_records"]
    contexts = [json.loads(row["context"]) for row in rows]
    found = [json.dumps(a.value) for a in predictor.answer(contexts)]
    return Response(json.dumps({"predictions": found}), media_type="application/json")


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
"""
MLFLOW = """
import sys
import mlflow.pyfunc
import uvicorn
from mlflow.pyfunc.scoring_server import init

app = init(mlflow.pyfunc.load_model(sys.argv[1]))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
"""


def free_port() -> int:
    "Find a port that nobody listens on."
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def server(command: list[str], port: int, path: str = "/ping", key: str = ""):
    "Run a server until the block ends."
    import httpx

    variables = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(process.stderr.read().decode()[-2000:])
            try:
                if httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers(key)).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def headers(key: str) -> dict[str, str]:
    "Say who asks."
    return {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})


class Line:
    "One HTTP connection that is kept open; a client library would cost more than what is measured."

    def __init__(self, port: int, key: str):
        self.port, self.streams = port, None
        self.head = "".join(f"{name}: {value}\r\n" for name, value in headers(key).items())

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\n{self.head}content-length: {len(body)}\r\n\r\n".encode() + body
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split(b" ")[1]), await reader.readexactly(length)


async def ask_server(port: int, key: str, bodies: list[bytes], callers: int, seconds: float) -> float:
    "Ask a server and count; any other answer than 200 ends the benchmark."
    lines = [Line(port, key) for _ in range(callers)]

    async def ask(i: int) -> None:
        status, said = await lines[i % callers].post("/invocations", bodies[i % len(bodies)])
        if status != 200:
            raise SystemExit(f"status {status}: {said[:300]!r}")

    rate, _ = await hammer(ask, callers, seconds)
    for line in lines:
        line.streams[1].close()
    return rate


def tabular(world: World, seconds: float, rounds: int) -> bool:
    "Measure a ranking model behind several servers."
    from mlops_workbench.keys import create_key

    version = world.ranking(7)
    world.promoted(version, {"latency_budget_ms": 5_000})
    folder = fetch_model(world.tracking, world.settings, version)
    logged = world.folder / "logged"
    import mlflow.artifacts

    mlflow.artifacts.download_artifacts(version.source, dst_path=str(logged))
    secret, _ = create_key(world.store, "benchmark", "client", "ana")
    rng, ports = random.Random(1), [free_port() for _ in range(3)]
    contexts = [context(rng) for _ in range(500)]
    rows = [{"context": json.dumps(c)} for c in contexts]
    which = {"params": {"policy": "recommender"}}  # the service serves several, MLflow's server one
    plain = [json.dumps({"dataframe_records": [row]}).encode() for row in rows]
    named = [json.dumps({"dataframe_records": [row]} | which).encode() for row in rows]
    units = [
        json.dumps({"dataframe_records": [row | {"unit_id": f"p-{i}"}]} | which).encode() for i, row in enumerate(rows)
    ]
    serve = [sys.executable, "-m", "benchmarks.prediction", "--serve", str(ports[2]), "--home", str(world.folder)]
    serve += ["--url", world.store.url]
    with (
        server([sys.executable, "-c", BARE, str(folder), str(ports[0])], ports[0], "/docs"),
        server([sys.executable, "-c", MLFLOW, str(logged), str(ports[1])], ports[1]),
        server(serve, ports[2], "/ping", secret),
    ):
        asked = {
            "bare handler": (ports[0], "", plain),
            "mlflow models serve": (ports[1], "", plain),
            "service": (ports[2], secret, named),
            "service, whole path with its event": (ports[2], secret, units),
        }
        rates = {name: [] for name in asked}
        for turn in range(rounds + 1):
            for name, (port, key, bodies) in asked.items():
                rate = asyncio.run(ask_server(port, key, bodies, 8, seconds if turn else 1.0))
                if turn:  # the first turn warms
                    rates[name].append(rate)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        print(f"{name}: {middle[name]:,.0f} requests/s ({', '.join(f'{r:,.0f}' for r in found)})")

    def ratio(name: str, beside: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], rates[beside], strict=True))

    whole = "service, whole path with its event"
    print(f"whole path: {ratio(whole, 'mlflow models serve'):.2f} × mlflow, {ratio(whole, 'bare handler'):.2f} × bare")
    good = kept("service / mlflow models serve", ratio("service", "mlflow models serve"), 3.0, True, " ×")
    return kept("service / bare handler", ratio("service", "bare handler"), 0.5, True, " ×") and good


def serve(url: str, home: Path, port: int) -> None:
    "Run the service for `tabular`."
    import uvicorn

    from mlops_workbench.service import ServiceOptions
    from mlops_workbench.serving import build_app

    settings = Settings("local", read_settings().root, home / "home", url)
    app = build_app(ServiceOptions(settings, calls_per_s=1_000_000))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


# --- a language model --------------------------------------------------------------------------------------------------


async def language(world: World, seconds: float, rounds: int) -> bool:
    "Measure a language model's queue, with batches and without."
    rng, task = random.Random(2), planner.task
    contexts = [cookbook.draw_context(rng) for _ in range(200)]
    files = fetch_model(world.tracking, world.settings, world.planning(3))
    room = Room(task, world.store, world.tracking, world.settings)
    predictor: Predictor = load_beside(files, task, world.settings, room.bases)
    sizes = {"batches": 16, "one at a time": 1}
    slots = {name: open_slot(room, predictor, 1, settings={"batch_size": size}) for name, size in sizes.items()}
    rates = {(name, callers): [] for name in slots for callers in (16, 1)}
    for turn in range(rounds + 1):
        for name, callers in rates:

            async def ask(i: int, slot=slots[name]) -> None:
                outcome = await ask_slot(slot, contexts[i % len(contexts)], time.monotonic() + 60)
                if outcome.reason in ("slow", "broken"):
                    raise SystemExit(outcome.words)

            rate, _ = await hammer(ask, callers, seconds if turn else 0.5)
            if turn:
                rates[name, callers].append(rate)
    for slot in slots.values():
        slot.close()
    for (name, callers), found in rates.items():
        print(
            f"{name}, {callers} callers: {statistics.median(found):,.0f} plans/s ({', '.join(f'{r:,.0f}' for r in found)})"
        )

    def ratio(callers: int) -> float:
        pairs = zip(rates["batches", callers], rates["one at a time", callers], strict=True)
        return statistics.median(a / b for a, b in pairs)

    good = kept("batches / one at a time, 16 callers", ratio(16), 2.5, True, " ×")
    return kept("batches / one at a time, 1 caller", ratio(1), 0.95, True, " ×") and good


def main() -> None:
    "Measure, and say what was kept."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="overhead,language,tabular")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.url, given.home, given.serve)
    good = []
    with tempfile.TemporaryDirectory(prefix="wb-") as folder, temporary_store() as store:
        world = World(store, Path(folder))
        for name in given.only.split(","):
            work = {"overhead": overhead, "language": language, "tabular": tabular}[name]
            print(f"--- {name}")
            done = work(world, given.seconds, given.rounds)
            good.append(asyncio.run(done) if asyncio.iscoroutine(done) else done)
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
