"""What the benchmarks share: a place of their own, small notebooks, and an account of CPU seconds that forgets nobody.

A command's cost is what the system charged to it and to every process it waited for (`wait4`), plus what was charged
meanwhile to the daemons of the place: warm parents, with the kernels that they forked and reaped, and the embedded server.
Kernels forked from a warm parent are no children of the command, so a parent's own account (`cutime`) is where they appear.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Cost:
    "What a command took."

    cpu_s: float
    wall_s: float
    own_s: float  # CPU seconds of the command and what it waited for, without the daemons


class Place:
    "A throwaway project with a local state, sockets and daemons of its own."

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="wb-"))  # short: sockets have short paths
        self.folder.chmod(0o755)  # the embedded server's user passes through
        self.project, self.home, self.runtime = (self.folder / name for name in ("project", "home", "run"))
        for folder in (self.project / "params", self.home, self.runtime):
            folder.mkdir(parents=True)
        (self.project / "settings.ini").write_text("[local]\n")
        self.variables = {**os.environ, "WORKBENCH_HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.runtime)}
        self.variables |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
        self.variables.pop("WORKBENCH_ROOT", None)

    def __enter__(self) -> "Place":
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit cleans up too
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(
            [BIN / "workbench", "db", "down"], cwd=self.project, env=self.variables, capture_output=True, check=False
        )
        for process in self.daemons():
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def daemons(self) -> list[psutil.Process]:
        "Find the processes that work for this place and are no children of ours, with their living children."
        found = {}
        ours = {os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))}
        for process in psutil.process_iter():
            try:
                if process.pid not in ours and str(self.folder) in " ".join(process.cmdline()):
                    found |= {p.pid: p for p in (process, *process.children(recursive=True))}
            except psutil.Error:
                pass
        return list(found.values())

    def charged(self) -> float:
        "Sum the CPU seconds of the daemons and of what they have reaped."
        total = 0.0
        for process in self.daemons():
            with suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])
        return total

    def run(self, command: Sequence[str | Path], cwd: Path | None = None, **variables: str) -> Cost:
        "Run one command to its end and account for it."
        before, begun = self.charged(), time.perf_counter()
        log = self.folder / "output.txt"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd or self.project,
                env=self.variables | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begun
        if process.returncode:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{tail}")
        own = usage.ru_utime + usage.ru_stime
        return Cost(own + self.charged() - before, wall, own)

    def output(self) -> str:
        "Return what the last command printed."
        return (self.folder / "output.txt").read_text()

    def workbench(self, *arguments: str, **variables: str) -> Cost:
        "Run a `workbench` command."
        return self.run([BIN / "workbench", *arguments], **variables)

    def pipeline(
        self, name: str, stages: Mapping[str, Sequence[str]], values: Mapping[str, object] | None = None
    ) -> None:
        "Write a pipeline, its notebooks' cells given as text; the first cell holds the parameters."
        lines = ["task: mlops_workbench.planner", "stages:"]
        for stage, cells in stages.items():
            path = self.project / "nbs" / name / f"{stage}.ipynb"
            write_notebook(path, cells)
            lines += [f"  {stage}:", f"    notebook: {path.relative_to(self.project)}"]
            lines += [f"    parameters: {json.dumps(values)}"] if values else []
        (self.project / "params" / f"{name}.yaml").write_text("\n".join(lines) + "\n")

    def notebooks(self, name: str) -> list[Path]:
        "List a pipeline's notebooks in the order of its stages."
        text = (self.project / "params" / f"{name}.yaml").read_text()
        return [self.project / line.split(": ")[1] for line in text.splitlines() if "notebook: " in line]


def write_notebook(path: Path, cells: Sequence[str]) -> None:
    "Write a notebook; its first cell holds the parameters."

    def cell(number: int, source: str) -> dict:
        tags = ["parameters"] if number == 0 else []
        shape = {"cell_type": "code", "id": f"c{number}", "outputs": [], "execution_count": None}
        return shape | {"metadata": {"tags": tags}, "source": source}

    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    content = {"cells": [cell(i, source) for i, source in enumerate(cells)], "metadata": {"kernelspec": kernel}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"nbformat": 4, "nbformat_minor": 5}))


def median(costs: Sequence[Cost], what: str = "cpu_s") -> float:
    "Take the middle of several costs."
    return statistics.median(getattr(cost, what) for cost in costs)


def interleave(variants: Mapping[str, object], repeat: int) -> dict[str, list[Cost]]:
    "Run each variant in turn, again and again: what disturbs the machine disturbs them all."
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    for turn in range(repeat + 1):
        for name, work in variants.items():
            cost = work(turn)
            if turn:  # the first turn warms: parents, page cache, compiled files
                costs[name].append(cost)
    return costs


def verdict(value: float, bound: float, unit: str = "") -> str:
    "Hold a value against its bound, which it may not pass."
    return f"{value:.2f} of at most {bound:g}{unit}: {'kept' if value <= bound else 'MISSED'}"
