"""What the engine costs beside a plain process, stock papermill, DVC and Snakemake, and whether one notebook reaches another.

    python -m benchmarks.engine                            # every part, medians of 5
    python -m benchmarks.engine --only chain,trivial --repeat 3
    python -m benchmarks.engine --peers ~/.cache/peers     # where DVC and Snakemake are installed the first time

Each part runs its variants in turn (A, B, C, A, B, C, …) and compares medians of the same run; the first turn warms and does
not count. CPU seconds are those of all processes, see `benchmarks.bench`. `workbench run` is the whole command: reading the
pipeline, checking it, the driver, the kernels, the records in PostgreSQL (its server included) and in MLflow.

chain      four scikit-learn notebooks with MLflow on SQLite: workbench, the same cells in one process, four `papermill` commands
trivial    notebooks with nothing to do: what one more of them costs, and what it costs with its share of the command's start
heavy      four notebooks that import torch, transformers, peft and mlflow: workbench, and four `papermill` commands
loop       the planner's smoke profile: CPU of everything but the server, minus the CPU that passed inside cells, which the
           kernels measure themselves (process time between `pre_run_cell` and `post_run_cell`)
cached     `workbench run planner` when nothing changed, and the same for DVC and Snakemake on four equivalent stages
isolation  one notebook plants something, the next one must not see it
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench import BIN, ROOT, Cost, Place, interleave, median, verdict
from benchmarks.isolation import check_isolation
from benchmarks.peers import peer_runs

TELL = """import json, os
said = {"outputs": {"value": %s}, "files": [], "modules": []}
json.dump(said, open(os.environ.get("WORKBENCH_OUTPUTS", os.devnull), "w"))"""

SPLIT = """from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.3, random_state=0)"""

OPEN = """import json
import mlflow
mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")
mlflow.set_experiment("chain")"""


def chain(place: Path) -> dict[str, list[str]]:
    "Write a real chain: train, evaluate, register, promote."
    here = f'place: str = "{place}"  # folder of MLflow'
    fit = """from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
forest = RandomForestClassifier(trees, random_state=0).fit(X_train, y_train)
boosted = GradientBoostingClassifier(n_estimators=20, random_state=0).fit(X_train, y_train)
best = max([forest, boosted], key=lambda model: model.score(X_test, y_test))"""
    log = """with mlflow.start_run(run_name="train") as run:
    mlflow.log_params({"trees": trees, "kind": type(best).__name__})
    mlflow.log_metric("accuracy", best.score(X_test, y_test))
    # types are named so that MLflow writes and reads them with skops, as it wants by default
    mlflow.sklearn.log_model(best, name="model", pip_requirements=["scikit-learn"], serialization_format="cloudpickle")
json.dump(run.info.run_id, open(f"{place}/run.json", "w"))"""
    load = """run_id = json.load(open(f"{place}/run.json"))
model = mlflow.sklearn.load_model(f"runs:/{run_id}/model")"""
    judge = """from sklearn.inspection import permutation_importance
from sklearn.metrics import classification_report, confusion_matrix
report = classification_report(y_test, model.predict(X_test), output_dict=True)
matrix = confusion_matrix(y_test, model.predict(X_test))
weighty = permutation_importance(model, X_test[:100], y_test[:100], n_repeats=1, random_state=0).importances_mean"""
    note = """with mlflow.start_run(run_id=run_id):
    mlflow.log_metric("f1", report["macro avg"]["f1-score"])
    mlflow.log_dict({"matrix": matrix.tolist(), "importance": weighty.tolist()}, "evidence.json")"""
    register = """run_id = json.load(open(f"{place}/run.json"))
version = mlflow.register_model(f"runs:/{run_id}/model", "digits").version"""
    promote = """client = mlflow.MlflowClient()
version = max(client.search_model_versions("name='digits'"), key=lambda v: int(v.version))
client.set_registered_model_alias("digits", "production", version.version)"""
    return {
        "train": [
            f"{here}\ntrees: int = 100  # of the forest",
            OPEN,
            SPLIT,
            fit,
            log,
            TELL % "best.score(X_test, y_test)",
        ],
        "evaluate": [here, OPEN, SPLIT, load, judge, note, TELL % 'report["accuracy"]'],
        "register": [here, OPEN, register, TELL % "int(version)"],
        "promote": [here, OPEN, promote, TELL % "int(version.version)"],
    }


PLAIN = """import json, sys
for path in sys.argv[1:]:
    names = {"__name__": "__main__"}
    for cell in json.load(open(path))["cells"]:
        exec(compile("".join(cell["source"]), path, "exec"), names)
"""


ALONE = """import sys
from pathlib import Path
from mlops_workbench.engine import execute_notebook
from mlops_workbench.execution import Execution, outside_imports
from mlops_workbench.settings import read_settings

settings = read_settings()
for path in map(Path, sys.argv[1:]):
    preload = outside_imports(settings, path, "mlops_workbench.planner")
    execute_notebook(path, {}, Execution(settings.home / path.name, cwd=settings.home, preload=preload))
"""


def alone(place: Place, name: str) -> Callable[[int], Cost]:
    "Execute a pipeline's notebooks in one process by the engine alone: nothing is cached, checked or recorded."
    (place.folder / "alone.py").write_text(ALONE)
    return lambda turn: place.run([sys.executable, place.folder / "alone.py", *place.notebooks(name)])


def papermill(place: Place, name: str) -> Cost:
    "Execute a pipeline's notebooks with one `papermill` command each."
    costs = [
        place.run([BIN / "papermill", "--no-progress-bar", path, place.folder / "out.ipynb"])
        for path in place.notebooks(name)
    ]
    return Cost(*(sum(getattr(c, what) for c in costs) for what in ("cpu_s", "wall_s", "own_s")))


def show(costs: dict[str, list[Cost]]) -> None:
    "Print the medians of each variant."
    for name, found in costs.items():
        spread = f"{min(c.cpu_s for c in found):.2f} to {max(c.cpu_s for c in found):.2f}"
        print(f"  {name:34} {median(found):7.2f} CPU-s ({spread})  {median(found, 'wall_s'):7.2f} s wall", flush=True)


def forced(place: Place, name: str) -> Callable[[int], Cost]:
    "Run a pipeline, whatever is cached."
    return lambda turn: place.workbench("run", name, "--force")


def part_chain(place: Place, options: argparse.Namespace) -> None:
    place.pipeline("chain", chain(place.folder))
    (place.folder / "plain.py").write_text(PLAIN)
    plain = [sys.executable, place.folder / "plain.py", *place.notebooks("chain")]
    variants = {
        "workbench run chain": forced(place, "chain"),
        "the engine alone, one process": alone(place, "chain"),
        "the same cells in one process": lambda turn: place.run(plain),
        "papermill, 4 commands": lambda turn: papermill(place, "chain"),
    }
    costs = interleave(variants, options.repeat)
    show(costs)
    ours, _, one, stock = (median(found) for found in costs.values())
    print(f"  against one process: {verdict(ours / one, 1.3)}")
    print(f"  against papermill:   {verdict(ours / stock, 1 / 3)}")


def part_trivial(place: Place, options: argparse.Namespace) -> None:
    few, many = 2, 12
    for n in (few, many):
        cells = ["n: int = 1  # a number", "twice = 2 * n", TELL % "twice"]
        place.pipeline(f"trivial{n}", {f"step{i}": cells for i in range(n)})
    costs = interleave({f"{n} trivial notebooks": forced(place, f"trivial{n}") for n in (few, many)}, options.repeat)
    show(costs)
    low, high = costs.values()
    slopes = [(b.cpu_s - a.cpu_s) / (many - few) for a, b in zip(low, high, strict=True)]
    print(f"  one more notebook:   {verdict(statistics.median(slopes), 0.15, ' CPU-s')}")
    print(f"  with its share of the command's start, {many} notebooks: {median(high) / many:.3f} CPU-s each")


def part_heavy(place: Place, options: argparse.Namespace) -> None:
    imports = "import torch\nimport mlflow\nfrom peft import LoraConfig\n"
    imports += "from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer"
    work = "total = float((torch.ones(64, 64) @ torch.ones(64, 64)).sum())"
    cells = ["n: int = 1  # a number", imports, work, TELL % "total"]
    place.pipeline("heavy", dict.fromkeys(("prep", "train", "evaluate", "promote"), cells))
    variants = {
        "workbench run heavy, warm": forced(place, "heavy"),
        "the engine alone, one process": alone(place, "heavy"),
        "papermill, 4 commands": lambda turn: papermill(place, "heavy"),
    }
    costs = interleave(variants, options.repeat)
    show(costs)
    ours, engine, stock = costs.values()
    print(f"  the engine alone: {median(stock) / median(engine):.1f} times in CPU, ", end="")
    print(f"{median(stock, 'wall_s') / median(engine, 'wall_s'):.1f} times in wall time")
    print(f"  CPU:  {median(stock) / median(ours):.1f} times faster, at least 15 asked")
    print(f"  wall: {median(stock, 'wall_s') / median(ours, 'wall_s'):.1f} times faster")


HOOKS = """import json, os, resource, time
from IPython import get_ipython

def _spent():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime

_begun = []
get_ipython().events.register("pre_run_cell", lambda info: _begun.append(_spent()))
get_ipython().events.register(
    "post_run_cell", lambda result: open(os.environ["BENCH_CELLS"], "a").write(f"{_spent() - _begun.pop()}\\n")
)
"""


def part_loop(place: Place, options: argparse.Namespace) -> None:
    startup = place.folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "cells.py").write_text(HOOKS)
    cells = place.folder / "cells.txt"
    variables = {"IPYTHONDIR": str(startup.parent.parent), "BENCH_CELLS": str(cells), "WORKBENCH_ROOT": str(ROOT)}
    rows = []
    for turn in range(options.repeat + 1):
        cells.write_text("")
        server = postgres(place)
        cost = place.run([BIN / "workbench", "run", "planner", "--profile", "smoke", "--force"], ROOT, **variables)
        inside = [float(line) for line in cells.read_text().split()]
        if not inside:
            raise SystemExit("the kernels did not measure their cells: IPYTHONDIR did not reach them")
        if turn:
            rows.append((cost.cpu_s - (postgres(place) - server), sum(inside), len(inside), cost.wall_s))
    total, within, n, wall = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"  workbench run planner, smoke: {total:.2f} CPU-s without the server, {within:.2f} in {n:.0f} cells, {wall:.1f} s wall"
    )
    print(f"  the engine's share:  {verdict(statistics.median(t - w for t, w, *_ in rows), 1.5, ' CPU-s')}")


def postgres(place: Place) -> float:
    "Sum the CPU seconds of the embedded server."
    return sum(sum(p.cpu_times()[:4]) for p in place.daemons() if "postgres" in p.name())


def part_cached(place: Place, options: argparse.Namespace) -> None:
    command = [BIN / "workbench", "run", "planner", "--profile", "smoke"]

    def ours(turn: int) -> Cost:
        cost = place.run(command, ROOT, WORKBENCH_ROOT=str(ROOT))
        if turn and place.output().count("cached") < 3:
            raise SystemExit(f"something ran although nothing changed:\n{place.output()}")
        return cost

    ours(0)
    variants = {"workbench run planner, all cached": ours}
    for peer, name in (("dvc", "dvc repro, nothing changed"), ("snakemake", "snakemake -c1, nothing changed")):
        if again := peer_runs(place, options.peers, peer):
            variants[name] = again
    costs = interleave(variants, options.repeat)
    show(costs)
    first, *others = costs.values()
    print(f"  workbench, the server's read included: {verdict(median(first), 0.4, ' CPU-s')}")
    if others:
        print(f"  {median(first) / min(map(median, others)):.2f} of the faster peer's")


def part_isolation(place: Place, options: argparse.Namespace) -> None:
    leaks, n, kinds, seconds = check_isolation(place, options.checks)
    for leak in leaks:
        print(f"  LEAK {leak}")
    print(f"  {n} checks of {kinds} kinds in {seconds:.0f} s: {verdict(len(leaks), 0, ' leaks')}")


PARTS = {
    "chain": part_chain,
    "trivial": part_trivial,
    "heavy": part_heavy,
    "loop": part_loop,
    "cached": part_cached,
    "isolation": part_isolation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--repeat", type=int, default=5, help="turns that count")
    parser.add_argument("--checks", type=int, default=200, help="isolation checks")
    parser.add_argument(
        "--peers", type=Path, default=Path.home() / ".cache" / "workbench-peers", help="where DVC and Snakemake live"
    )
    options = parser.parse_args()
    for name in options.only.split(","):
        if name not in PARTS:
            parser.error(f"there is no part {name!r}: choose from {', '.join(PARTS)}")
    for name in options.only.split(","):
        with Place() as place:
            if name != "isolation":
                place.workbench("db", "up")  # held up for the part, so that its account is complete
            print(name, flush=True)
            PARTS[name](place, options)


if __name__ == "__main__":
    main()
