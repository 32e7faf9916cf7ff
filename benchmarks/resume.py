"""Whether a run that was killed at any moment goes on where it was, and ends as if nothing had happened.

    python -m benchmarks.resume            # 50 kills, some minutes
    python -m benchmarks.resume --n 5

A pipeline of a few seconds (prepare, train with torch and checkpoints, evaluate, promote) is killed with SIGKILL at a random
moment: its driver, its kernel, or the driver, the kernel and the warm parent together. `workbench resume` continues it. Every
cell writes its name into a side file as the last thing it does; a name that is there twice is a finished cell that was
repeated. Kept is: at most one repeated cell a kill, and the digest that an uninterrupted run ends with.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.bench import BIN, Place

MARK = """
def done(cell):
    with open(f"{place}/cells.txt", "a") as file:
        file.write(f"{nonce} {cell}\\n")

def tell(**outputs):
    said = {"outputs": outputs, "files": [], "modules": []}
    json.dump(said, open(os.environ["WORKBENCH_OUTPUTS"], "w"))
"""

TRAIN = """def fit(model, state, steps=60):
    optimiser, begun = torch.optim.Adam(model.parameters(), lr=0.01), 0
    if os.path.exists(state):
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        begun = kept["step"]
    for step in range(begun + 1, steps + 1):
        loss = torch.nn.functional.mse_loss(model(X), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        time.sleep(0.03)
        if step % 10 == 0:
            kept = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            torch.save(kept, state + ".writing")
            os.replace(state + ".writing", state)

torch.manual_seed(seed)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
fit(model, os.environ["WORKBENCH_STAGE_FOLDER"] + "/checkpoint.pt")
done("train 2")"""

DIGEST = """weights = torch.cat([p.detach().flatten() for p in model.parameters()])
mark = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
torch.save(model.state_dict(), f"{place}/model-{nonce}.pt")
done("train 3")"""


def stages(place: Path) -> dict[str, list[str]]:
    "Write the four notebooks, each cell with the mark that it has finished."
    head = f'place: str = "{place}"  # where the side file lies\nnonce: int = 0  # which kill this is'
    imports = "import hashlib, json, os, time\nimport torch" + MARK
    data = "torch.manual_seed(seed)\nX = torch.randn(64, 8)\ny = X.sum(1, keepdim=True)"
    build = "model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))"
    load = f'{build}\nmodel.load_state_dict(torch.load(f"{{place}}/model-{{nonce}}.pt", weights_only=True))'
    judge = "error = float(torch.nn.functional.mse_loss(model(X), y))"
    effect = 'open(f"{place}/promoted.txt", "a").write(f"{nonce} {digest}\\n")'

    def ends(stage: str, *cells: str) -> list[str]:
        return [f'{cell}\ndone("{stage} {i}")' for i, cell in enumerate(cells, 1)]

    seeded = "seed: int = 0  # of the data"
    told = "digest: str = ''  # of the model"
    return {
        "prep": [
            f"{head}\n{seeded}",
            *ends("prep", imports, data, "time.sleep(0.2)", "tell(n_rows=len(X), seed=seed)"),
        ],
        "train": [
            f"{head}\n{seeded}",
            f'{imports}\n{data}\ndone("train 1")',
            TRAIN,
            DIGEST,
            'tell(digest=mark)\ndone("train 4")',
        ],
        "evaluate": [f"{head}\n{seeded}\n{told}", *ends("evaluate", imports, data, load, judge, "tell(error=error)")],
        "promote": [f"{head}\n{told}", *ends("promote", imports, effect, "tell(promoted=digest)")],
    }


def write_pipeline(place: Place) -> None:
    "Write the pipeline's notebooks and its file."
    place.pipeline("small", stages(place.folder))
    flow = {"train": "seed: prep.seed", "evaluate": "digest: train.digest", "promote": "digest: train.digest"}
    lines = (place.project / "params" / "small.yaml").read_text().splitlines()
    for stage, need in flow.items():
        i = lines.index(f"  {stage}:")
        lines[i + 2 : i + 2] = [f"    needs: {{{need}}}"] + (["    effect: true"] if stage == "promote" else [])
    (place.project / "params" / "small.yaml").write_text("\n".join(lines) + "\n")


def command(nonce: int) -> list[str]:
    "Write the command of one run; its parameters keep it from finding another one's results."
    chosen = [f"-p{stage}.nonce={nonce}" for stage in ("prep", "train", "evaluate", "promote")]
    return [str(BIN / "workbench"), "run", "small", *chosen]


def newest(place: Place) -> dict | None:
    "Read the newest run."
    place.workbench("runs", "--limit", "1", "--json")
    found = json.loads(place.output()[place.output().index("[") :])
    return found[0] if found else None


def digest_of(run: dict) -> str:
    "Read what a run ended with: the digest that was trained, and that promote was told the same."
    outputs = {stage["name"]: stage["outputs"] or {} for stage in run["stages"]}
    trained, promoted = outputs["train"]["digest"], outputs["promote"]["promoted"]
    return trained if trained == promoted else f"{trained}, but promoted {promoted}"


def kernels(place: Place) -> list[psutil.Process]:
    "Find the kernels of a place, and its warm parents."
    return [p for p in place.daemons() if "postgres" not in p.name()]


def kill(place: Place, driver: subprocess.Popen, what: str) -> None:
    "Kill a run with SIGKILL."
    alive = kernels(place)
    parents = {p.ppid() for p in alive if p.is_running()}
    chosen = {"driver": [], "kernel": [p for p in alive if p.pid not in parents], "everything": alive}[what]
    if what != "kernel":
        driver.send_signal(signal.SIGKILL)
    for process in chosen:
        with suppress(psutil.Error):
            process.kill()
    driver.wait(60)


def one(place: Place, nonce: int, after_s: float, what: str) -> tuple[int, str, str]:
    "Kill one run and resume it; return how many finished cells were repeated, its digest, and where it was killed."
    before = newest(place)
    with open(os.devnull, "w") as nowhere:
        driver = subprocess.Popen(
            command(nonce), cwd=place.project, env=place.variables, stdout=nowhere, stderr=nowhere
        )
        time.sleep(after_s)
        kill(place, driver, what)
    run = newest(place)
    if run is None or (before and run["run_id"] == before["run_id"]):
        place.run(command(nonce))  # killed before there was anything to resume
        where = "before it began"
    elif run["status"] == "finished":
        where = "after its end"
    else:
        reached = [s["name"] for s in run["stages"]]
        where = f"in {reached[-1]}" if reached else "before its first stage"
        place.workbench("resume", run["run_id"])
    run = newest(place)
    cells = Counter(
        line for line in (place.folder / "cells.txt").read_text().splitlines() if line.split()[0] == str(nonce)
    )
    repeated = [cell for cell, n in cells.items() if n > 1]
    if run["status"] != "finished":
        return len(repeated), f"the run is {run['status']}: {run['error']}", where
    return sum(n - 1 for n in cells.values()), digest_of(run), f"{where}, repeated {', '.join(repeated) or 'nothing'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw, good = random.Random(options.seed), 0
    with Place() as place:
        place.workbench("db", "up")
        write_pipeline(place)
        place.run(command(-1))  # warms
        whole_s = place.run(command(-2)).wall_s
        wanted = digest_of(newest(place))
        print(f"uninterrupted: {whole_s:.1f} s, digest {wanted[:12]}", flush=True)
        for i in range(options.n):
            after_s, what = (
                draw.uniform(0.1, 0.97 * whole_s),
                draw.choices(["driver", "kernel", "everything"], [3, 1, 1])[0],
            )
            repeated, digest, where = one(place, i, after_s, what)
            fine = repeated <= 1 and digest == wanted
            good += fine
            print(
                f"{'ok  ' if fine else 'FAIL'} {what:10} after {after_s:5.2f} s, {where}; digest {digest[:60]}",
                flush=True,
            )
    print(f"{good} of {options.n}")
    raise SystemExit(good != options.n)


if __name__ == "__main__":
    main()
