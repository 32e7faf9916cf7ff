"""Is the cache ever wrong? Hundreds of generated edits of a small project, each judged by executing its notebook.

    python -m benchmarks.cache_truth             # 400 edits, about a minute of CPU time
    python -m benchmarks.cache_truth --edits 60 --seed 7

Before the first edit and after each one the notebook's code cells are executed in a plain Python process of their own, with the
parameters, the modules and the files as they are then; what they compute is the truth. Then `decide` is asked, with a real
database. It is wrong in one of two ways:

- a **stale hit**: it would have taken over a result (or an output) that is not what execution gives now. None is allowed.
- a **needless run**: it would have run although a finished run had the very result. At most 2 % are allowed.

When it says run, the result is kept as a finished run, as the pipeline would keep it: the project changes on and on, things are
put back as they were, and any earlier run may be hit. No kernel is started: what is measured is the decision, not the engine.
The exit status is 1 when a bound is broken.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from mlops_workbench.cache import Call, decide, make_key, seal
from mlops_workbench.code import open_memory, place_digest
from mlops_workbench.core import canonical_bytes
from mlops_workbench.events import Event, write_events
from mlops_workbench.plan import Stage
from mlops_workbench.runs import hold_run, note_stage
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, temporary_store, transaction

MAX_NEEDLESS = 0.02

# What a kernel would do: parameters are injected, cells run in their order, the project's modules are on the path.
EXECUTE = """
import json, re, runpy, sys
root, site, parameters = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path[:0] = [root, site]
from mlops_workbench.closure import imported_files
from mlops_workbench.core import read_parameters
from pathlib import Path
space = {"__name__": "__main__", "ROOT": root}
space["get_ipython_run"] = lambda name: space.update(runpy.run_path(f"{root}/{name}"))
for cell in json.load(open(f"{root}/work.ipynb"))["cells"]:
    if cell["cell_type"] != "code":
        continue
    text = "".join(cell["source"])
    exec(re.sub(r"^%run (\\S+)$", r"get_ipython_run('\\1')", text, flags=re.M), space)
    if "parameters" in cell["metadata"].get("tags", []):
        space["ranges"] = [str(p.range) for p in read_parameters(text)]
        space.update(parameters)
result = [space["result"], space["ranges"]]
print(json.dumps({"result": result, "modules": imported_files(Path(root), "shop_task")}))
"""

CELLS = [
    ("markdown", "# Work\n\nSome words.", []),
    ("code", "rank: int = 8  # of the matrices; in [1, 64]\nplugin: str = 'alpha'  # whom to ask", ["parameters"]),
    ("code", "import importlib.metadata\nimport json\n\nimport pkg.helper\nfrom pkg import *", []),
    ("code", "data = [1, 2, 3]", []),
    ("code", "value = sum(data) * rank", []),
    ("code", "value = value * 2 + 1", []),
    ("code", "value = value + 7", []),
    ("code", "def late():\n    from pkg.lazy import shift\n\n    return shift(value)", []),
    ("code", "%run extra.py\nanswer = [late(), pkg.helper.total(value), extra, star]", []),
    ("code", "asked = importlib.import_module('plugins.' + plugin).ask()", []),
    ("code", "import ratelib\nfrom shop_task.task import price\n\nanswer += [asked, ratelib.RATE, price()]", []),
    (
        "code",
        "found = importlib.metadata.distributions(path=[ratelib.SITE])\nlock = sorted(d.version for d in found)",
        [],
    ),
    ("code", "rows = [open(f'{ROOT}/data/{n}').read() for n in sorted(__import__('os').listdir(f'{ROOT}/data'))]", []),
    ("code", "weights = open(f'{ROOT}/weights.bin', 'rb').read()", []),
    ("code", "result = [value, answer, lock, rows, sum(weights), pkg.helper.about()]", []),
]

FILES = {
    "pkg/__init__.py": "",
    "pkg/helper.py": """
from pathlib import Path

from . import deep


def total(x):
    "Add what is deep."
    return deep.scaled(x) + len((Path(__file__).parent / "table.csv").read_text().split("7"))


def about():
    return [total.__doc__, deep.scaled.__doc__]
""",
    "pkg/deep.py": """
from pkg.inner.deeper import FACTOR


def scaled(x):
    "Scale a number."
    return x * FACTOR
""",
    "pkg/inner/__init__.py": "",
    "pkg/inner/deeper.py": "FACTOR = 3\n",
    "pkg/lazy.py": "def shift(x):\n    return x + 11\n",
    "pkg/star.py": "",
    "pkg/unused.py": "NOBODY = 1\n",
    "pkg/table.csv": "a,1\nb,7\nc,7\n",
    "plugins/__init__.py": "",
    "plugins/alpha.py": "def ask():\n    return 100\n",
    "plugins/beta.py": "def ask():\n    return 200\n",
    "unrelated.py": "NOBODY = 1\n",
    "extra.py": "extra = 5\n",
    "data/one.csv": "x\n1\n",
    "notes.md": "Words.\n",
    "site-packages/ratelib.py": "SITE = __import__('os').path.dirname(__file__)\nRATE = 19\n",
    "site-packages/ratelib-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: ratelib\nVersion: 1.0\n",
    "site-packages/other-3.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: other\nVersion: 3.1\n",
    "site-packages/shop_task/__init__.py": "",
    "site-packages/shop_task/task.py": """
from pathlib import Path

from shop_task import money


def price():
    return money.EUR * len((Path(__file__).parent / "prices.txt").read_text())
""",
    "site-packages/shop_task/money.py": "EUR = 4\n",
    "site-packages/shop_task/prices.txt": "1 2 3\n",
}
FILES["pkg/__init__.py"] = "__all__ = ['star']\nfrom .star import star\n"
FILES["pkg/star.py"] = "star = 1\n"


class Project:
    "A small project on disk, and the stage that is made of it."

    def __init__(self, folder: Path, store: Store, rng: random.Random):
        self.root, self.store, self.rng, self.n = folder / "project", store, rng, 0
        self.site = self.root / "site-packages"
        self.settings = Settings("local", self.root, folder / "home")
        self.parameters = {"rank": 8, "plugin": "alpha", "source": "app", "weights": "weights.bin"}
        self.cells = [list(cell) for cell in CELLS]
        self.files = dict(FILES)
        self.weights = bytes(1_200_000)
        self.events = 0
        self.write()

    def number(self) -> int:
        "A number that was not there before."
        self.n += 1
        return 1000 + self.n

    def write(self) -> None:
        "Bring the disk to what is wanted, touching only what differs."
        wanted = dict(self.files) | {"work.ipynb": self.notebook()}
        there = {p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file()}
        for name in there - wanted.keys() - {"weights.bin", "output.txt"}:
            if "__pycache__" not in name:
                (self.root / name).unlink()
        for name, text in wanted.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
        for folder in self.site.glob("*.dist-info"):
            if not any(folder.iterdir()):
                folder.rmdir()
        path = self.root / "weights.bin"
        if not path.exists() or path.read_bytes() != self.weights:
            before = path.stat() if path.exists() else None
            path.write_bytes(self.weights)
            if before:  # the same size, and the same time of change as far as anybody can set it
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def notebook(self) -> str:
        "The notebook as JSON, with counts and outputs that mean nothing."
        made = [
            {"cell_type": kind, "id": f"c{i}", "metadata": {"tags": tags} if tags else {}, "source": text}
            | ({"outputs": [], "execution_count": self.parameters.get("count")} if kind == "code" else {})
            for i, (kind, text, tags) in enumerate(self.cells)
        ]
        return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})

    def call(self) -> Call:
        "The stage as the pipeline would give it."
        stage = Stage("work", self.root / "work.ipynb", reads=("events",), inputs=("data/*.csv",))
        given = {name: value for name, value in self.parameters.items() if name != "count"}
        return Call(self.settings, "shop_task.task", stage, given, open_memory(self.settings))

    def execute(self) -> tuple[str, list[str]]:
        "The truth: what the notebook computes now, and which files of the project it imported."
        given = json.dumps({name: self.parameters[name] for name in ("rank", "plugin")})
        command = [sys.executable, "-B", "-c", EXECUTE, str(self.root), str(self.site), given]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.root)
        if done.returncode:
            sys.exit(f"the notebook failed:\n{done.stderr}")
        said = json.loads(done.stdout)
        return canonical_bytes([said["result"], self.events]).decode(), said["modules"]

    def edit(self, name: str, old: str, new: str) -> None:
        "Replace a piece of a file."
        assert old in self.files[name], (name, old)
        self.files[name] = self.files[name].replace(old, new, 1)

    def cell(self, i: int, text: str) -> None:
        "Replace a cell's text."
        self.cells[i][1] = text


def set_number(name: str) -> Callable[[Project], None]:
    "Make an edit that changes the last number of a module's code."

    def edit(project: Project) -> None:
        tree = ast.parse(project.files[name])
        last = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, int)][-1]
        lines = project.files[name].split("\n")
        line = lines[last.lineno - 1]
        lines[last.lineno - 1] = f"{line[: last.col_offset]}{project.number()}{line[last.end_col_offset :]}"
        project.files[name] = "\n".join(lines)

    return edit


def add_comment(project: Project, names: list[str]) -> None:
    "Put a comment, and perhaps blank lines, somewhere in a Python file."
    name = project.rng.choice(names)
    lines = project.files[name].split("\n")
    at = project.rng.choice([i for i, line in enumerate(lines) if not line.startswith(" ")] or [0])
    project.files[name] = "\n".join([*lines[:at], f"# words {project.number()}", *lines[at:]])


def reformat(project: Project, names: list[str]) -> None:
    "Write a Python file in another layout: the same program."
    name = project.rng.choice(names)
    text = ast.unparse(ast.parse(project.files[name])) + "\n"
    project.files[name] = text.replace("\n", "\n" * project.rng.randint(1, 3)) if '"""' not in text else text + "\n\n"


def deep_helper(project: Project) -> None:
    line = next(line for line in project.files["pkg/deep.py"].split("\n") if line.startswith("from pkg.inner."))
    set_number(f"pkg/inner/{line.split('.')[2].split(' ')[0]}.py")(project)


def plugin(project: Project) -> None:
    set_number(f"plugins/{project.parameters['plugin']}.py")(project)


PYTHON = [n for n in FILES if n.endswith(".py") and n != "site-packages/ratelib.py"]


def data_cell(project: Project) -> None:
    project.cell(3, f"data = [1, 2, {project.number()}]")


def order_of_cells(project: Project) -> None:
    texts = [project.cells[5][1], project.cells[6][1]]
    project.cell(5, texts[1])
    project.cell(6, texts[0])


def parameter(project: Project) -> None:
    project.parameters["rank"] = project.rng.choice([project.number(), float(project.number()), -project.number()])


def parameter_of_plugin(project: Project) -> None:
    project.parameters["plugin"] = "beta" if project.parameters["plugin"] == "alpha" else "alpha"


def parameter_range(project: Project) -> None:
    text = project.cells[1][1].split("in [")[0] + f"in [1, {project.number()}]\nplugin: str = 'alpha'  # whom to ask"
    project.cell(1, text)


def parameter_help(project: Project) -> None:
    project.cell(1, project.cells[1][1].split("# whom")[0] + f"# whom to ask {project.number()}")


def lock(project: Project) -> None:
    project_name = project.rng.choice(["ratelib", "other"])
    (old,) = [n for n in project.files if n.startswith(f"site-packages/{project_name}-")]
    version = f"{project.number()}.0"
    del project.files[old]
    new = f"site-packages/{project_name}-{version}.dist-info/METADATA"
    project.files[new] = f"Metadata-Version: 2.1\nName: {project_name}\nVersion: {version}\n"


def package_data(project: Project) -> None:
    name = project.rng.choice(["pkg/table.csv", "site-packages/shop_task/prices.txt"])
    project.files[name] += project.rng.choice(["d,7\n", "e,77\n"])


def input_file(project: Project) -> None:
    project.files["data/one.csv"] += f"{project.number()}\n"


def new_input_file(project: Project) -> None:
    project.files[f"data/f{project.number()}.csv"] = "x\n2\n"


def big_file(project: Project) -> None:
    at = project.rng.randrange(len(project.weights))
    changed = bytes([(project.weights[at] + 1) % 256])
    project.weights = project.weights[:at] + changed + project.weights[at + 1 :]


def docstring(project: Project) -> None:
    text = project.files["pkg/deep.py"]
    start = text.index('"') + 1
    project.files["pkg/deep.py"] = text[:start] + f"Scale {project.number()}." + text[text.index('"', start) :]


def shadow(project: Project) -> None:
    if "ratelib.py" in project.files:
        del project.files["ratelib.py"]
    else:
        project.files["ratelib.py"] = f"SITE = {str(project.site)!r}\nRATE = {project.number()}\n"


def other_import(project: Project) -> None:
    name = f"other{project.number()}"
    project.files[f"pkg/inner/{name}.py"] = f"FACTOR = {project.n}\n"
    text = project.files["pkg/deep.py"]
    line = next(line for line in text.split("\n") if line.startswith("from pkg.inner."))
    project.edit("pkg/deep.py", line, f"from pkg.inner.{name} import FACTOR")


def outside_event(project: Project) -> None:
    write_events(project.store, [Event("sold", "dish", f"d-{project.number()}", now(), context={"source": "app"})])
    project.events += 1


def unrelated_event(project: Project) -> None:
    write_events(project.store, [Event("sold", "dish", f"x-{project.number()}", now(), context={"source": "other"})])


def cell_comment(project: Project) -> None:
    i = project.rng.choice([3, 4, 5, 6, 7, 9, 10, 12, 13, 14])
    project.cell(i, f"# words {project.number()}\n{project.cells[i][1]}  # more")


def cell_whitespace(project: Project) -> None:
    i = project.rng.choice([3, 4, 5, 6, 9, 12, 13, 14])
    text = project.cells[i][1]
    project.cell(
        i, project.rng.choice([text.replace(" = ", "  =   "), "\n" + text + "\n\n", ast.unparse(ast.parse(text))])
    )


def markdown(project: Project) -> None:
    project.cell(0, f"# Work\n\nOther words {project.number()}.")


def empty_cell(project: Project) -> None:
    kind = project.rng.choice(["markdown", "code"])
    project.cells.append([kind, f"# nothing {project.number()}", []])


def outputs(project: Project) -> None:
    project.parameters["count"] = project.number()


def unrelated(project: Project) -> None:
    name = project.rng.choice(["unrelated.py", "pkg/unused.py", "notes.md"])
    project.files[name] += f"# {project.number()}\n" if name == "notes.md" else f"NOBODY = {project.number()}\n"


def rewritten(project: Project) -> None:
    "Save files that did not change: times change, content does not."
    for name in project.rng.sample(sorted(project.files), 5):
        (project.root / name).write_text(project.files[name])


def damaged_memory(project: Project) -> None:
    path = project.settings.home / "cache" / "code.json"
    if path.exists():
        text = path.read_text()
        path.write_text(project.rng.choice([text[: len(text) // 2], text.replace("a", "b"), "", "{}"]))


def output_changed(project: Project) -> None:
    "Somebody edits or deletes what the last runs wrote."
    for path in (project.settings.home / "outputs").glob("*"):
        path.write_text("edited") if project.rng.random() < 0.5 else path.unlink()


def now() -> datetime:
    return datetime.now(UTC)


EDITS: dict[str, Callable[[Project], None]] = {
    "helper two imports deep": deep_helper,
    "helper imported in a function": set_number("pkg/lazy.py"),
    "module imported with a star": set_number("pkg/star.py"),
    "file of %run": set_number("extra.py"),
    "plugin named at run time": plugin,
    "task package": set_number("site-packages/shop_task/money.py"),
    "another module imported": other_import,
    "file that shadows a package": shadow,
    "docstring that is read": docstring,
    "data cell": data_cell,
    "cell order": order_of_cells,
    "parameter": parameter,
    "parameter that names a plugin": parameter_of_plugin,
    "range of a parameter": parameter_range,
    "lock": lock,
    "package data": package_data,
    "input file": input_file,
    "new input file": new_input_file,
    "big file, same size and time": big_file,
    "outside event": outside_event,
    "output edited or deleted": output_changed,
    "comment in a module": lambda p: add_comment(p, [n for n in PYTHON if n in p.files]),
    "layout of a module": lambda p: reformat(p, [n for n in PYTHON if n in p.files]),
    "comment in a cell": cell_comment,
    "whitespace in a cell": cell_whitespace,
    "markdown": markdown,
    "cell without code": empty_cell,
    "outputs and counts": outputs,
    "help of a parameter": parameter_help,
    "unrelated module": unrelated,
    "unrelated event": unrelated_event,
    "saved without a change": rewritten,
    "damaged memory": damaged_memory,
}


class Judge:
    "Ask for a decision after each edit and compare it with the truth."

    def __init__(self, project: Project):
        self.project, self.results, self.seconds = project, set(), 0.0
        self.asked, self.stale, self.needless, self.runs = Counter(), Counter(), Counter(), Counter()

    def judge(self, kind: str) -> None:
        "Decide, execute, compare; keep the result when it says run."
        project = self.project
        time.sleep(0.03)  # what was saved a moment ago would count as saved while the stage ran
        truth, modules = project.execute()
        begun, call = time.process_time(), project.call()
        with transaction(project.store) as connection:
            key = make_key(connection, call)
            decision = decide(connection, call, key, ("truth", "full"))
        self.seconds += time.process_time() - begun
        self.asked[kind] += 1
        if not decision.run:
            outputs = decision.hit["outputs"]
            whole = place_digest(outputs["file"]) == decision.hit["files"][0]["digest"]
            self.stale[kind] += outputs["result"] != truth or not whole
            return
        self.runs[kind] += 1
        self.needless[kind] += self.kept(truth)
        self.finish(call, key, truth, modules)

    def kept(self, truth: str) -> bool:
        "Say whether a finished run has this result, with its output in place."
        return truth in self.results and Path(self.output(truth)).is_file() and self.whole(truth)

    def whole(self, truth: str) -> bool:
        return Path(self.output(truth)).read_text() == truth

    def output(self, truth: str) -> str:
        return str(self.project.settings.home / "outputs" / f"{abs(hash(truth))}.json")

    def finish(self, call: Call, key, truth: str, modules: list[str]) -> None:
        "Keep a finished run, as the pipeline does."
        place = Path(self.output(truth))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(truth)
        recorded = {"files": [{"place": str(place), "digest": place_digest(place)}], "modules": modules}
        columns = {"pipeline": "truth", "profile": "full", "task": call.task}
        with hold_run(self.project.store, columns) as record:
            with transaction(self.project.store) as connection:
                sealed = seal(connection, call, key, recorded)
            sealed |= {"status": "finished", "started_at": now(), "outputs": {"result": truth, "file": str(place)}}
            note_stage(self.project.store, record.run_id, "work", 0, sealed)
        self.results.add(truth)


def walk(judge: Judge, n_edits: int) -> None:
    "Edit the project again and again; every fourth edit is put back, and the decision asked once more."
    project = judge.project
    judge.judge("first run")
    for i in range(n_edits):
        kind = list(EDITS)[i % len(EDITS)]
        keep = (dict(project.files), [list(c) for c in project.cells], dict(project.parameters), project.weights)
        EDITS[kind](project)
        project.write()
        judge.judge(kind)
        if i % 4 == 3:
            project.files, project.cells, project.parameters, project.weights = keep
            project.write()
            judge.judge("put back")


def report(judge: Judge) -> bool:  # whether the bounds hold
    "Print the counts by kind."
    print(f"{'edit':<32}{'asked':>7}{'run':>7}{'stale':>7}{'needless':>10}")
    for kind, n in judge.asked.items():
        print(f"{kind:<32}{n:>7}{judge.runs[kind]:>7}{judge.stale[kind]:>7}{judge.needless[kind]:>10}")
    n, stale, needless = judge.asked.total(), judge.stale.total(), judge.needless.total()
    print(f"\n{n} decisions, {judge.seconds / n * 1000:.1f} ms CPU each: {stale} stale hits, bound 0; ", end="")
    print(f"{needless} needless runs ({needless / n:.1%}), bound {MAX_NEEDLESS:.0%}")
    return stale == 0 and needless <= MAX_NEEDLESS * n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--edits", type=int, default=400, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the edits' values")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="cache-truth-")).resolve()
        stack.callback(shutil.rmtree, folder, True)
        store = stack.enter_context(temporary_store())
        project = Project(folder, store, random.Random(given.seed))
        sys.path[:0] = [str(project.root), str(project.site)]  # a kernel's path
        judge = Judge(project)
        walk(judge, given.edits)
        good = report(judge)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
