"""Kernels: forked where that is safe, cold where it is not, and nothing of one is seen in another."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mlops_workbench.core import WorkbenchError
from mlops_workbench.fork import (
    ForkedProcess,
    call_warm,
    count_threads,
    parent_socket,
    runtime_folder,
    startup_variables,
    warm_parents,
)
from mlops_workbench.kernel import started_kernel, why_cold


async def tell(kernel: tuple, code: str, value: str = "None") -> str:
    "Run code in a kernel and give the repr of a value."
    _, client = kernel
    reply = await client.execute_interactive(
        code, user_expressions={"x": value}, timeout=60, output_hook=lambda m: None
    )
    assert reply["content"]["status"] == "ok", reply["content"]
    found = reply["content"]["user_expressions"]["x"]
    assert found["status"] == "ok", found
    return found["data"]["text/plain"]


def in_kernels(*cells: tuple[str, str], **variables: str) -> list[str]:
    "Run each (code, value) in a kernel of its own, one after the other."

    async def go() -> list[str]:
        told = []
        for code, value in cells:
            preload = [("numpy", ()), ("torch", ()), ("pandas", ()), ("matplotlib", ("rcParams",))]
            async with started_kernel("python3", {**os.environ, **variables}, Path.cwd(), preload) as kernel:
                assert kernel[0].cold == ""
                told.append(await tell(kernel, code, value))
        return told

    return asyncio.run(go())


LEAKS = [
    ("x = 1", "'x' in globals()", "False"),
    ("import os; os.environ['LEAK'] = '1'", "__import__('os').environ.get('LEAK')", "None"),
    ("import os; os.chdir('/')", f"__import__('os').getcwd() == {os.getcwd()!r}", "True"),
    ("import sys; sys.path.append('/leak')", "'/leak' in __import__('sys').path", "False"),
    (
        "import sys, types; sys.modules['leak'] = types.ModuleType('leak')",
        "'leak' in __import__('sys').modules",
        "False",
    ),
    ("import os; os.umask(0)", "__import__('os').umask(0o22) != 0", "True"),
    ("import torch; torch.set_num_threads(1)", "__import__('torch').get_num_threads()", str(count_threads(os.environ))),
    (
        "import matplotlib as m; m.rcParams['lines.linewidth'] = 99",
        "__import__('matplotlib').rcParams['lines.linewidth']",
        "1.5",
    ),
    (
        "import pandas; pandas.set_option('display.max_rows', 7)",
        "__import__('pandas').get_option('display.max_rows')",
        "60",
    ),
    ("import logging; logging.getLogger().setLevel(1)", "__import__('logging').getLogger().level", "30"),
    ("import decimal; decimal.getcontext().prec = 3", "__import__('decimal').getcontext().prec", "28"),
]


@pytest.mark.parametrize(("plant", "look", "clean"), LEAKS)
def test_nothing_leaks_from_one_kernel_to_the_next(plant, look, clean):
    assert in_kernels((plant, "1"), ("", look))[1] == clean


def test_kernels_draw_different_random_numbers():
    draws = "[__import__('random').random(), float(__import__('numpy').random.random())]"
    told = [json.loads(t) for t in in_kernels(("", draws), ("", draws), ("", draws))]
    assert len({t[0] for t in told}) == len({t[1] for t in told}) == 3


def test_a_forked_kernel_computes_what_a_cold_one_computes():
    code = "import torch; torch.manual_seed(0); a = torch.randn(300, 300); s = (a @ a).double().sum().item()"
    (forked,) = in_kernels((code, "s"))

    async def cold() -> str:
        variables = {**os.environ, "WORKBENCH_WARM": "off", "OMP_NUM_THREADS": str(count_threads(os.environ))}
        async with started_kernel("python3", variables, Path.cwd()) as kernel:
            assert kernel[0].cold == "WORKBENCH_WARM is off"
            return await tell(kernel, code, "s")

    assert forked == asyncio.run(cold())


def test_a_kernel_of_another_environment_starts_cold():
    class Spec:
        argv, display_name = ["/usr/bin/julia", "kernel.jl"], "Julia"

    assert why_cold(Spec, {}) == "kernel 'Julia' is not of this environment"


def test_what_a_process_takes_over_at_its_start_has_a_parent_of_its_own():
    assert startup_variables({"OMP_NUM_THREADS": "1", "WORKBENCH_HOME": "x", "SECRET": "y"}) == {"OMP_NUM_THREADS": "1"}
    assert parent_socket({"PYTHONHASHSEED": "1"}) != parent_socket({"PYTHONHASHSEED": "2"})
    assert parent_socket({"A": "1"}) == parent_socket({"A": "2"})
    assert len(str(parent_socket({}))) < 60


def test_only_its_user_may_enter_the_folder_of_the_sockets():
    assert runtime_folder().stat().st_mode & 0o077 == 0


def test_a_package_that_starts_threads_is_left_to_the_kernels(tmp_path):
    (tmp_path / "noisy.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    )
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}

    async def go() -> str:
        async with started_kernel("python3", variables, tmp_path, [("noisy", ()), ("decimal", ())]) as kernel:
            assert kernel[0].cold == ""
            return await tell(kernel, "import noisy, threading", "threading.active_count() > 1")

    assert asyncio.run(go()) == "True"
    assert "noisy" in [name for parent in warm_parents() for name in parent["left"]]


def test_a_kernel_dies_with_whoever_started_it(tmp_path):
    code = "import os, time; from mlops_workbench.fork import ForkedProcess\n"
    code += "p = ForkedProcess(os.environ, {'kind': 'command', 'module': 'sleeper', 'argv': ['x']})\n"
    code += "print(p.pid, flush=True)\ntime.sleep(60)"
    (tmp_path / "sleeper.py").write_text("import time\ndef main(): time.sleep(60)")
    starter = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    forked = psutil.Process(int(starter.stdout.readline()))
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 10
    while forked.is_running() and forked.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the forked process outlived its starter"
        time.sleep(0.05)


def test_a_forked_process_tells_how_it_ended(tmp_path):
    (tmp_path / "busy.py").write_text("import sys\ndef main():\n    sum(range(10**7))\n    sys.exit(7)")
    forked = ForkedProcess(
        {**os.environ, "PYTHONPATH": str(tmp_path)}, {"kind": "command", "module": "busy", "argv": ["x"]}
    )
    assert forked.wait(30) == 7
    assert forked.cpu_s > 0.05


def test_a_command_runs_warm_with_its_arguments_and_its_code(tmp_path, monkeypatch, capfd):
    (tmp_path / "said.py").write_text(
        "import os, sys\ndef main():\n    print(sys.argv, os.environ['SAID'])\n    sys.exit('no')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SAID", "yes")
    assert call_warm("said", ["said", "--loud"]) == 1
    out, err = capfd.readouterr()
    assert out == "['said', '--loud'] yes\n" and err == "no\n"


def test_where_no_parent_can_be_forked_a_command_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("mlops_workbench.fork.warm.__file__", str(tmp_path / "none.py"))
    monkeypatch.setattr("mlops_workbench.fork.START_S", 1.0)
    monkeypatch.setenv("PYTHONHASHSEED", "77")  # a parent that is not there yet
    with pytest.raises(WorkbenchError, match="the warm parent did not start"):
        call_warm("said", ["said"])


PLAIN = [
    ("1 / 0", "failed", "ZeroDivisionError"),
    ("import os; os.kill(os.getpid(), 9)", "died", "lost its kernel: it was killed"),
    ("import time; time.sleep(60)", "timeout", "took longer than its limit"),
    ("1 + 1", "finished", ""),
]


@pytest.mark.parametrize(("code", "ended", "words"), PLAIN)
def test_plain_papermill_can_use_the_engine(tmp_path, code, ended, words):
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for i, source in enumerate([code, "2"])
    ]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "in.ipynb").write_text(json.dumps(content))
    papermill = str(Path(sys.executable).parent / "papermill")
    done = subprocess.run(
        [papermill, "--engine", "workbench", "--execution-timeout", "3", "in.ipynb", "out.ipynb"],
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode == 0) == (ended == "finished")
    executed = json.loads((tmp_path / "out.ipynb").read_text())
    assert executed["metadata"]["workbench"]["ended"] == ended
    assert words in executed["metadata"]["workbench"]["reason"]
    statuses = [c["metadata"]["papermill"]["status"] for c in executed["cells"] if c["cell_type"] == "code"]
    assert statuses == (["completed", "completed"] if ended == "finished" else ["failed", "pending"])


def test_a_forked_kernel_shows_figures():
    async def go() -> list[str]:
        preload = [("matplotlib.pyplot", ("figure",)), ("matplotlib.figure", ("Figure",))]
        shown = []
        async with started_kernel("python3", dict(os.environ), Path.cwd(), preload) as (_, client):
            code = "import matplotlib.pyplot as plt\nfigure, axes = plt.subplots()\nplt.close(figure)\nfigure"
            await client.execute_interactive(code, timeout=60, output_hook=shown.append)
        return [kind for m in shown for kind in m["content"].get("data", {})]

    assert "image/png" in asyncio.run(go())
