"""Whether one notebook reaches the next: it plants something, and the next one looks at everything.

Each kind of thing has code that plants it and an expression that sees it. A notebook that follows nothing says what every
expression gives in a fresh kernel; after each planting the next notebook must say the same. Random numbers are the exception:
they must differ from those of the planted seed and from those of every other notebook.
"""

import json
import os
import random
import threading
import time
from collections.abc import Mapping

import psutil

from benchmarks.bench import Place, write_notebook

NAP = f"{600 + os.getpid() % 97}.25"  # seconds, so odd that nobody else's nap is mistaken for ours

# kind → (code that plants it, expression that sees it)
KINDS: Mapping[str, tuple[str, str]] = {
    "variable": ("planted = 1", "'planted' in dir()"),
    "private variable": ("_planted = 1", "'_planted' in dir()"),
    "builtin": ("import builtins; builtins.planted = 1", "hasattr(__import__('builtins'), 'planted')"),
    "replaced builtin": ("import builtins; builtins.sorted = reversed", "sorted([2, 1])"),
    "module": ("import sys, types; sys.modules['planted'] = types.ModuleType('planted')", "'planted' in sys.modules"),
    "removed module": ("import sys; sys.modules['colorsys'] = None", "sys.modules.get('colorsys', 'none') is None"),
    "attribute of a module": ("import math; math.planted = 1", "hasattr(__import__('math'), 'planted')"),
    "patched library": ("import statistics; statistics.mean = max", "__import__('statistics').mean([1, 2])"),
    "patched class": ("import pathlib; pathlib.Path.planted = 1", "hasattr(__import__('pathlib').Path, 'planted')"),
    "module's own state": ("import numpy; numpy.planted = 1", "hasattr(__import__('numpy'), 'planted')"),
    "search path": ("import sys; sys.path.insert(0, '/planted')", "'/planted' in sys.path"),
    "import hook": (
        "import sys; sys.meta_path.insert(0, __import__('types').SimpleNamespace(find_spec=lambda *a: None))",
        "len(sys.meta_path)",
    ),
    "path hook": ("import sys; sys.path_hooks.append(lambda path: None)", "len(sys.path_hooks)"),
    "arguments": ("import sys; sys.argv.append('planted')", "'planted' in sys.argv"),
    "display hook": ("import sys; sys.planted_hook = sys.displayhook = print", "hasattr(sys, 'planted_hook')"),
    "exception hook": ("import sys; sys.excepthook = print", "sys.excepthook is print"),
    "thread hook": ("import threading; threading.excepthook = print", "threading.excepthook is print"),
    "trace": ("import threading; threading.settrace(lambda *a: None)", "threading.gettrace() is None"),
    "recursion limit": ("import sys; sys.setrecursionlimit(4321)", "sys.getrecursionlimit()"),
    "switch interval": ("import sys; sys.setswitchinterval(0.123)", "round(sys.getswitchinterval(), 3)"),
    "integer digits": ("import sys; sys.set_int_max_str_digits(5000)", "sys.get_int_max_str_digits()"),
    "standard output": ("import io, sys; sys.stdout = io.StringIO()", "type(sys.stdout).__name__"),
    "garbage collection": ("import gc; gc.disable(); gc.set_threshold(7)", "(gc.isenabled(), gc.get_threshold())"),
    "environment variable": ("import os; os.environ['PLANTED'] = '1'", "os.environ.get('PLANTED')"),
    "changed variable": ("import os; os.environ['HOME'] = '/planted'", "os.environ['HOME']"),
    "removed variable": ("import os; del os.environ['PATH']", "'PATH' in os.environ"),
    "C environment": ("import os; os.putenv('PLANTED_C', '1')", "getenv('PLANTED_C')"),
    "working folder": ("import os; os.chdir('/')", "os.getcwd()"),
    "file mode mask": ("import os; os.umask(0o001)", "oct((os.umask(0o077), os.umask(MASK))[0])"),
    "priority": ("import os; os.nice(3)", "os.nice(0)"),
    "processors": (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
        "len(os.sched_getaffinity(0))",
    ),
    "limit of open files": (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (200, 200))",
        "resource.getrlimit(resource.RLIMIT_NOFILE)",
    ),
    "open file": ("import os; kept = os.open('/dev/zero', os.O_RDONLY)", "opened('/dev/zero')"),
    "lock on a file": (
        "import fcntl; kept = open(PLACE + '/lock', 'w'); fcntl.flock(kept, fcntl.LOCK_EX)",
        "lockable(PLACE + '/lock')",
    ),
    "socket": ("import socket; kept = socket.socket(); kept.bind(('127.0.0.1', PORT))", "bindable(PORT)"),
    "socket time-out": ("import socket; socket.setdefaulttimeout(5)", "__import__('socket').getdefaulttimeout()"),
    "signal handler": (
        "import signal; signal.signal(signal.SIGUSR1, lambda *a: None)",
        "str(signal.getsignal(signal.SIGUSR1))",
    ),
    "ignored signal": (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "str(signal.getsignal(signal.SIGTERM))",
    ),
    "blocked signal": (
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})",
        "sorted(map(str, signal.pthread_sigmask(signal.SIG_BLOCK, ())))",
    ),
    "alarm": ("import signal; signal.setitimer(signal.ITIMER_REAL, 300)", "signal.getitimer(signal.ITIMER_REAL)"),
    "thread": (
        "import threading; threading.Thread(target=threading.Event().wait, name='planted', daemon=True).start()",
        "[t.name for t in threading.enumerate() if t.name == 'planted']",
    ),
    "process": (
        f"import subprocess; kept = subprocess.Popen(['sleep', '{NAP}'])",
        f"running('sleep', '{NAP}')",
    ),
    "exit function": ("import atexit; atexit.register(lambda: open(PLACE + '/exits', 'a').write('x'))", "exits()"),
    "weekday names": (
        "import locale; locale.setlocale(locale.LC_ALL, 'C')",
        "__import__('locale').setlocale(__import__('locale').LC_ALL)",
    ),
    "time zone": ("import os, time; os.environ['TZ'] = 'Asia/Tokyo'; time.tzset()", "__import__('time').tzname"),
    "decimal context": ("import decimal; decimal.getcontext().prec = 5", "__import__('decimal').getcontext().prec"),
    "warning filter": (
        "import warnings; warnings.simplefilter('error')",
        "[f[0] for f in __import__('warnings').filters][:3]",
    ),
    "log level": (
        "import logging; logging.getLogger().setLevel(5); logging.disable(40)",
        "(logging.getLogger().level, logging.root.manager.disable)",
    ),
    "log handler": (
        "import logging; logging.getLogger().addHandler(logging.NullHandler())",
        "len(logging.getLogger().handlers)",
    ),
    "multiprocessing": (
        "import multiprocessing as m; m.set_start_method('spawn', force=True)",
        "__import__('multiprocessing').get_start_method(allow_none=True)",
    ),
    "context variable": (
        "import contextvars; numpy_like = contextvars.ContextVar('planted'); numpy_like.set(1)",
        "[v.name for v in __import__('contextvars').copy_context() if v.name == 'planted']",
    ),
    "random.seed": ("import random; random.seed(7)", "RANDOM:random.random()"),
    "numpy seed": ("import numpy; numpy.random.seed(7)", "RANDOM:float(__import__('numpy').random.rand())"),
    "torch seed": ("import torch; torch.manual_seed(7)", "float(__import__('torch').rand(1))"),
    "numpy errors": ("import numpy; numpy.seterr(all='raise')", "__import__('numpy').geterr()"),
    "numpy printing": (
        "import numpy; numpy.set_printoptions(precision=2)",
        "__import__('numpy').get_printoptions()['precision']",
    ),
    "pandas options": (
        "import pandas; pandas.set_option('display.max_rows', 7)",
        "__import__('pandas').get_option('display.max_rows')",
    ),
    "matplotlib style": (
        "import matplotlib; matplotlib.rcParams['lines.linewidth'] = 9",
        "__import__('matplotlib').rcParams['lines.linewidth']",
    ),
    "open figure": (
        "import matplotlib.pyplot as plt; plt.figure()",
        "len(__import__('matplotlib.pyplot').pyplot.get_fignums())",
    ),
    "torch threads": ("import torch; torch.set_num_threads(1)", "__import__('torch').get_num_threads()"),
    "torch type": (
        "import torch; torch.set_default_dtype(torch.float64)",
        "str(__import__('torch').get_default_dtype())",
    ),
    "torch gradients": ("import torch; torch.set_grad_enabled(False)", "__import__('torch').is_grad_enabled()"),
    "torch determinism": (
        "import torch; torch.use_deterministic_algorithms(True)",
        "__import__('torch').are_deterministic_algorithms_enabled()",
    ),
    "MLflow run": (
        "import mlflow; mlflow.set_tracking_uri('sqlite:///' + PLACE + '/m.db'); mlflow.start_run()",
        "(str(__import__('mlflow').active_run()), __import__('mlflow').get_tracking_uri())",
    ),
    "MLflow experiment": (
        "import mlflow; mlflow.set_tracking_uri('sqlite:///' + PLACE + '/m.db'); mlflow.set_experiment('planted')",
        "os.environ.get('MLFLOW_EXPERIMENT_ID')",
    ),
    "MLflow autolog": (
        "import mlflow.sklearn; mlflow.sklearn.autolog()",
        "'mlflow.sklearn' in sys.modules and __import__('mlflow').utils.autologging_utils.autologging_is_disabled('sklearn')",
    ),
    "IPython magic": (
        "get_ipython().register_magic_function(print, 'line', 'planted')",
        "'planted' in get_ipython().magics_manager.magics['line']",
    ),
    "IPython hook": (
        "get_ipython().events.register('post_run_cell', lambda r: None)",
        "len(get_ipython().events.callbacks['post_run_cell'])",
    ),
    "IPython alias": (
        "get_ipython().run_line_magic('alias', 'planted echo')",
        "'planted' in [a for a, _ in get_ipython().alias_manager.aliases]",
    ),
    "cell history": ("1 + 1", "len(In)"),
    "event loop": (
        "import asyncio; asyncio.get_event_loop().planted = 1",
        "hasattr(__import__('asyncio').get_event_loop(), 'planted')",
    ),
    "shared counter": ("import itertools; import uuid; uuid._last_timestamp = 1", "__import__('uuid')._last_timestamp"),
}

HELP = """import gc, json, logging, os, random, resource, signal, sys, threading

def getenv(name):
    import ctypes
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    return libc.getenv(name.encode()) is not None

def opened(path):
    numbers = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    return [os.readlink(number) for number in numbers if os.path.islink(number)].count(path)

def lockable(path):
    import fcntl
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False

def bindable(port):
    import socket
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
            return True
        except OSError:
            return False

def running(*command):
    import psutil
    found = [p.info for p in psutil.process_iter(["cmdline", "status"]) if p.info["cmdline"] == list(command)]
    return [info for info in found if info["status"] != "zombie"] != []

def exits():
    import atexit
    return atexit._ncallbacks()

def see(expression):
    try:
        return repr(eval(expression, globals()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


def cells(place: Place, port: int) -> dict[str, list[str]]:
    "Write what the notebooks hold."
    known = f"PLACE, PORT, MASK = {str(place.folder)!r}, {port}, 0o{umask():o}"
    looks = {kind: look.removeprefix("RANDOM:") for kind, (_, look) in KINDS.items()}
    tell = "import json, os\njson.dump({'outputs': %s, 'files': [], 'modules': []}, open(os.environ['WORKBENCH_OUTPUTS'], 'w'))"
    # everything is looked at before anything else is imported, in one cell, from a module's namespace like a notebook's own
    look = f"LOOKS = json.loads({json.dumps(json.dumps(looks))})\nseen = {{kind: see(look) for kind, look in LOOKS.items()}}"
    notebooks = {"look": ["kind: str = ''  # what was planted before", f"{known}\n{HELP}", look, tell % "seen"]}
    for kind, (plant, _) in KINDS.items():
        # the outputs are told first: what is planted may break whatever comes after it
        told = tell % "{'planted': True}"
        notebooks[kind] = ["kind: str = ''  # what is planted", known, told, plant]
    return notebooks


def umask() -> int:
    "Read this process's file mode mask."
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def ours() -> dict[str, object]:
    "Say what must not change in the process that drives the notebooks."
    threads = sorted(t.name for t in threading.enumerate())
    files = sorted(os.listdir("/proc/self/fd"))
    return {"env": dict(os.environ), "cwd": os.getcwd(), "umask": umask(), "threads": threads, "files": len(files)}


def check_isolation(place: Place, n: int) -> tuple[list[str], int, int, float]:
    "Plant and look `n` times; return the leaks, how many checks there were, of how many kinds, and the seconds."
    from mlops_workbench.engine import Execution, execute_notebook

    begun, before = time.monotonic(), dict(os.environ)
    os.environ.update(place.variables)
    port = 20_000 + os.getpid() % 20_000
    for name, sources in cells(place, port).items():
        write_notebook(place.project / "isolation" / f"{name}.ipynb", sources)
    preload = [(name, ()) for name in ("numpy", "pandas", "matplotlib.pyplot", "torch", "mlflow", "psutil")]

    def execute(name: str, kind: str) -> dict[str, str]:
        executed = place.folder / "executed.ipynb"
        execution = Execution(executed=executed, cwd=place.folder, preload=preload)
        found = execute_notebook(place.project / "isolation" / f"{name}.ipynb", {"kind": kind}, execution)
        kernel = json.loads(executed.read_text())["metadata"]["workbench"]
        if kernel["kernel"] != "warm":
            raise SystemExit(f"the kernel was not forked, so there is nothing to check: {kernel.get('why_cold')}")
        return found["outputs"]

    execute("look", "")
    fresh = execute("look", "")
    told = {kind for kind, (_, look) in KINDS.items() if look.startswith("RANDOM:")}
    drawn = {kind: {fresh[kind]} for kind in told}
    planted = {"random.seed": repr(random.Random(7).random()), "numpy seed": repr(_numpy(7))}
    leaks, kinds = [], list(KINDS)
    for i in range(n):
        kind = kinds[i % len(kinds)]
        driver = ours()
        execute(kind, kind)
        seen = execute("look", kind)
        for other, value in seen.items():
            if other in told:
                if value == planted[other] or value in drawn[other]:
                    leaks.append(f"after {kind!r}: {other!r} gives {value}, which was drawn before")
                drawn[other].add(value)
            elif value != fresh[other]:
                leaks.append(f"after {kind!r}: {other!r} is {value}, in a fresh kernel {fresh[other]}")
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] == ["sleep", NAP]:
                process.kill()  # it was told; it must not be told again for whatever is planted next
        leaks += [f"after {kind!r}: the driver's {name} changed" for name, v in ours().items() if v != driver[name]]
    os.environ.clear()
    os.environ.update(before)
    return leaks, n, len(kinds), time.monotonic() - begun


def _numpy(seed: int) -> float:
    "Draw what a planted seed would give."
    import numpy

    return float(numpy.random.RandomState(seed).rand())
