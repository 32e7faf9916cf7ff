"The state of a kernel: what comes back in another one, what is refused, and what a snapshot does not hold."

import ast
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from jupyter_client import KernelManager

from mlops_workbench.snapshot import read_snapshot

SNAPSHOT = "__import__('mlops_workbench.snapshot', fromlist=['x'])"


class Kernel:
    "A real kernel, asked the way the engine asks it."

    def __init__(self, folder, **variables):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | variables)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.ask(f"{SNAPSHOT}.start_snapshots()")

    def run(self, code):
        "Run a cell and return what it said."
        said = []

        def heard(message):
            content = message["content"]
            said.append(content.get("text") or content.get("data", {}).get("text/plain") or content.get("evalue") or "")

        reply = self.client.execute_interactive(code, timeout=120, output_hook=heard)
        assert reply["content"]["status"] == "ok", said
        return "".join(said)

    def ask(self, expression):
        "Evaluate an expression without a trace."
        asked = self.client.execute("", silent=True, store_history=False, user_expressions={"x": expression})
        while (reply := self.client.get_shell_msg(timeout=120))["parent_header"].get("msg_id") != asked:
            pass
        found = reply["content"]["user_expressions"]["x"]
        return ast.literal_eval(found["data"]["text/plain"]) if found["status"] == "ok" else found["evalue"]

    def save(self, path, cell=3, **options):
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        return json.loads(self.ask(f"{SNAPSHOT}.save_snapshot({str(path)!r}, {cell}{given})"))

    def restore(self, path):
        return self.ask(f"{SNAPSHOT}.restore_snapshot({str(path)!r})")

    def kill(self):
        os.kill(self.manager.provisioner.pid, signal.SIGKILL)
        self.close()

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@contextmanager
def kernel(folder, **variables):
    made = Kernel(folder, **variables)
    try:
        yield made
    finally:
        made.close()


def continued(folder, cells, last, **variables):
    "Run cells, then the last one: in the same kernel, and after two kills in a third. Return what both said."
    path = folder / "state.snapshot"
    first = Kernel(folder, **variables)
    for cell in cells:
        first.run(cell)
    told = first.save(path)
    assert told["ok"], told["why"]
    expected = first.run(last)
    first.kill()
    second = Kernel(folder, **variables)
    assert (restored := second.restore(path)).startswith("{"), restored
    assert (told := second.save(path))["ok"], told["why"]
    second.kill()
    with kernel(folder, **variables) as third:
        assert (restored := third.restore(path)).startswith("{"), restored
        return expected, third.run(last)


CELLS = [
    """
import random, os, sys, collections, enum, functools, itertools
from dataclasses import dataclass, field
import numpy as np, pandas as pd, torch
import matplotlib.pyplot as plt
random.seed(1); np.random.seed(2); torch.manual_seed(3)
size: int = 5  # of things
""",
    """
@dataclass
class Point:
    x: int
    tags: list = field(default_factory=list)
    def scaled(self): return self.x * size

class Colour(enum.Enum):
    RED = 1

class Twice(Point):
    def scaled(self): return 2 * super().scaled()

@functools.lru_cache
def squared(n): return n * n

def counter():
    n = 0
    def count():
        nonlocal n
        n += 1
        return n
    return count

def grow(): return size + 1
def change():
    global size
    size += 100
def isodd(n): return n != 0 and iseven(n - 1)
def iseven(n): return n == 0 or isodd(n - 1)
half = lambda n: n / size
count = counter(); count(); count()
again = count
""",
    """
shared = [1, 2]
first, second = {"list": shared}, {"list": shared}
loop = []; loop.append(loop)
point = Twice(3, shared)
colour = Colour.RED
everything = np.arange(12.0).reshape(3, 4)
column, backwards, alias = everything[:, 1], everything[::-1], everything
dates = np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[D]"); later = dates[1:]
fortran = np.asfortranarray(np.arange(6).reshape(2, 3)); corner = fortran[1:, 1:]
frame = pd.DataFrame({"a": [1, 2, 3], "b": ["x", "y", None], "t": pd.date_range("2026-01-01", periods=3, tz="UTC")})
same, part, series = frame, frame[["a"]], frame["a"]
tensor = torch.arange(6.0); window = tensor[2:4]
layer = torch.nn.Linear(2, 1); optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
layer(torch.ones(3, 2)).sum().backward()
generator, stream, own = np.random.default_rng(7), random.Random(8), torch.Generator().manual_seed(9)
steps = iter([10, 20, 30]); next(steps)
table = collections.defaultdict(list, {"k": shared})
drawn = random.random(), np.random.rand(), float(torch.rand(1))
figure, axes = plt.subplots(); axes.plot([1, 2, 3]); plt.close(figure)
os.makedirs("inside", exist_ok=True); os.chdir("inside")
os.environ["COLOUR"] = "blue"; os.environ.pop("TO_REMOVE")
sys.path.append("/nowhere/at/all")
pd.set_option("display.max_rows", 7); plt.rcParams["lines.linewidth"] = 9.0; np.set_printoptions(precision=3)
torch.set_num_threads(1)
""",
]
LAST = """
print(random.random(), np.random.rand(), float(torch.rand(1)), drawn)
print(generator.random(), stream.random(), torch.rand(1, generator=own))
shared.append(3)
print(first, second, point, table, loop[0] is loop, first["list"] is second["list"] is point.tags)
size = 50
print(grow(), half(100), point.scaled()); change(); print(size, grow(), isodd(7))
print(count(), again(), squared(4), colour is Colour.RED, isinstance(point, Point), next(steps))
everything[0, 1] = 99; dates[1] = np.datetime64("2030-01-01"); fortran[1, 1] = 77
print(column, backwards[-1], alias is everything, later, corner, np.array([1 / 3]))
frame.loc[0, "a"] = 55
print(same is frame, part["a"].tolist(), series.tolist(), frame.to_string(), frame["t"].dt.day.tolist())
tensor[2] = -1; print(window, layer.weight.grad)
optimiser.step(); print(layer.weight.data, optimiser.param_groups[0]["params"][0] is layer.weight)
print(os.path.basename(os.getcwd()), os.environ["COLOUR"], "TO_REMOVE" in os.environ, sys.path[-1])
print(pd.get_option("display.max_rows"), plt.rcParams["lines.linewidth"], torch.get_num_threads(), len(axes.lines))
print(Point(1), get_ipython().execution_count, sorted(__annotations__), squared.cache_info().currsize > 0)
import inspect; print(inspect.getsource(counter)[:20])
"""


@pytest.mark.slow
def test_a_killed_notebook_goes_on_as_if_nothing_had_happened(tmp_path):
    expected, found = continued(tmp_path, CELLS, LAST, TO_REMOVE="x", STAYS="y")
    assert found.splitlines() == expected.splitlines()


REFUSED = [
    ("kept = open('note.txt', 'w')", "TextIOWrapper, which lives in this process only"),
    ("kept = {'deep': [open('note.txt', 'rb')]}", "BufferedReader, which lives in this process only"),
    ("import threading; kept = threading.Lock()", "cannot pickle '_thread.lock' object"),
    ("kept = (n for n in range(3))", "cannot pickle 'generator' object"),
    ("import sqlite3; kept = sqlite3.connect(':memory:')", "cannot pickle 'sqlite3.Connection' object"),
    ("import socket; kept = socket.socket()", "cannot pickle 'socket' object"),
    ("import tempfile; kept = tempfile.TemporaryDirectory()", "class finalize, which lives in this process only"),
    ("import tempfile; kept = tempfile.NamedTemporaryFile()", "which lives in this process only"),
    ("import subprocess; kept = subprocess.Popen(['true'])", "cannot pickle '_thread.lock' object"),
    ("kept = memoryview(bytearray(3))", "memoryview, which lives in this process only"),
    ("import weakref\nclass A: pass\na = A(); kept = weakref.ref(a)", "cannot pickle 'weakref"),
    ("kept = b'x' * 3_000_000", "the variables take more than 2 MB, beginning with 'kept'"),
    ("import pandas as pd; kept = pd.DataFrame({'a': range(300_000)})", "the variables take more than 2 MB"),
]


def test_what_cannot_come_back_is_named_and_the_earlier_snapshot_stays(tmp_path):
    path = tmp_path / "state.snapshot"
    with kernel(tmp_path) as notebook:
        notebook.run("number = 1")
        told = notebook.save(path, 0, prefix="abc")
        assert told["ok"] and told["bytes"] == path.stat().st_size and told["seconds"] < 60, told
        before = path.read_bytes()
        for code, words in REFUSED:
            notebook.run(code)
            told = notebook.save(path, 1, max_bytes=2_000_000)
            assert not told["ok"] and words in told["why"] and "'kept'" in told["why"], (code, told)
            assert len(told["why"].splitlines()) == 1
            notebook.run("del kept")
        notebook.run("everything = globals()")
        assert "globals()" in notebook.save(path, 1)["why"]
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.glob("*snapshot*")] == [path.name], "nothing half-written lies about"
        assert read_snapshot(path) == {"cell": 0, "prefix": "abc"}
        notebook.run("del everything")
        assert notebook.save(path, 2)["ok"] and read_snapshot(path)["cell"] == 2
        assert path.stat().st_mode & 0o777 == 0o600
        assert not notebook.save(tmp_path / "no" / "such", 2)["ok"]
        assert notebook.run("print(sorted(n for n in globals() if 'snapshot' in n))").strip() == "[]"


SECRET = """
from mlops_workbench.settings import known_secrets, read_settings, redact, resolve_secret
from mlops_workbench.store import Store
settings = read_settings()
store = Store(settings.database_url)
import os
os.environ["PGPASSWORD"] = settings.database_url.split(":")[2].split("@")[0]
"""


def test_no_secret_is_in_a_snapshot(tmp_path):
    path = tmp_path / "state.snapshot"
    (tmp_path / "settings.ini").write_text("[local]\ndatabase_url = secret://DATABASE\n")
    url = "postgresql://me:hunter2-pass@127.0.0.1:1/workbench"
    given = {"DATABASE": url, "API_KEY": "tremendous-key"}
    check = "print(settings.database_url, store.url, redact('hunter2-pass'), os.environ['PGPASSWORD'])"
    with kernel(tmp_path, **given) as notebook:
        notebook.run(SECRET)
        told = notebook.save(path, 0)
        assert told["ok"], told["why"]
        assert b"hunter2" not in path.read_bytes()
        expected = notebook.run(check)
        notebook.run("key = resolve_secret('secret://API_KEY'); headers = {'Authorization': f'Bearer {key}'}")
        told = notebook.save(path, 1)
        assert not told["ok"] and "'key'" in told["why"] and "tremendous" not in told["why"]
        notebook.run("del key, headers; resolve_secret('secret://API_KEY')")
    with kernel(tmp_path, **given) as notebook:
        assert notebook.restore(path).startswith("{")
        assert notebook.run(check) == expected
    with kernel(tmp_path) as notebook:
        assert "secret 'DATABASE' is not set here" in notebook.restore(path)
    with kernel(tmp_path, **given | {"DATABASE": url.replace("hunter2", "rotated")}) as notebook:
        notebook.restore(path)
        assert "rotated-pass@" in notebook.run("print(settings.database_url, store.url)")


def test_a_snapshot_of_something_else_is_refused(tmp_path):
    path = tmp_path / "state.snapshot"
    with kernel(tmp_path) as notebook:
        notebook.run("number = 1")
        notebook.save(path)
        whole = path.read_bytes()
        header, rest = whole.split(b"\n", 1)
        for damaged in (b"", b"{}\n" + rest, header.replace(sys.version[:4].encode(), b"2.7.") + b"\n" + rest):
            path.write_bytes(damaged)
            assert read_snapshot(path) is None
            assert "is no snapshot of this Python and these packages" in notebook.restore(path)
        path.write_bytes(whole[:-20])
        assert "the state cannot be rebuilt" in notebook.restore(path)
        path.write_bytes(whole)
        path.chmod(0o666)
        assert "could have been written by somebody else" in notebook.restore(path)


OURS = [
    """
from mlops_workbench.settings import read_settings
from mlops_workbench.store import open_store, read_rows, transaction
from mlops_workbench.tracking import log_metrics, open_run, open_tracking
from mlops_workbench.planner import generic_examples, task
settings = read_settings()
store = open_store(settings)
tracking = open_tracking(store, settings)
run = open_run(tracking, settings, "planner", "train")
with transaction(store) as connection:
    connection.execute("CREATE TABLE exp.notes (note text)")
del connection
""",
    """
import sys; sys.path.insert(0, TESTS)
from test_training import quick_plan, FRAMES
from mlops_workbench.training import train, plot_loss
from mlops_workbench.model import load_predictor
from mlops_workbench.stage import stage_folder
plan = quick_plan()
result = train(plan, stage_folder(settings) / "model")
predictor = load_predictor(result.folder, task)
figure = plot_loss(result.history)
contexts = [context for context, _ in generic_examples(4, seed=5)]
from mlops_workbench import state
state._noted["events"] = "3 rows"
""",
]
OURS_LAST = """
import mlflow
with transaction(store) as connection:
    connection.execute("INSERT INTO exp.notes VALUES ('after')")
    print(read_rows(connection, "SELECT note FROM exp.notes ORDER BY 1")[-1])
log_metrics(run, {"loss": 0.5})
print(run.client.get_run(run.run_id).data.metrics, mlflow.get_tracking_uri() == tracking.uri)
print([answer.value for answer in predictor.answer(contexts)])
print(result.digest, train(plan, result.folder).digest == result.digest, len(figure.axes))
print(state.noted_reads(), "mlops_workbench.planner" in sys.modules, "test_training" in sys.modules)
print(sorted(vars(plan.options)), task.name, (settings.home / "postgres" / "users.lock").is_file())
"""


@pytest.mark.slow
def test_what_our_notebooks_hold_comes_back(tmp_path):
    root, home = Path(__file__).parent.parent, tmp_path / "home"
    cells = [OURS[0], OURS[1].replace("TESTS", repr(str(Path(__file__).parent)))]
    given = {
        "WORKBENCH_HOME": str(home),
        "WORKBENCH_ROOT": str(root),
        "WORKBENCH_STAGE_FOLDER": str(tmp_path / "stage"),
    }
    expected, found = continued(tmp_path, cells, OURS_LAST, **given)
    assert found.splitlines() == expected.splitlines()
