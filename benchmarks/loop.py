"""What the loop costs: CPU seconds, wall seconds and peak memory of real `workbench` commands, in a fresh local state.

    python -m benchmarks.loop            # help and the smoke profile, about a minute
    python -m benchmarks.loop --full     # the full profile as well

CPU seconds count the command and every process it waited for. The embedded server is a daemon of its own: its CPU time is
added from its process table entry just before the command ends. Memory is the largest sum of proportional set sizes (PSS)
over the whole process tree and the server, sampled five times a second. Each line ends with the ratio against its bound, and
against `python -c pass` for the start of the command.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

WORKBENCH = str(Path(sys.executable).parent / "workbench")


def processes(root: psutil.Process, home: Path) -> list[psutil.Process]:
    "The command's tree, and the server whose data lie below `home`."
    found = [root, *root.children(recursive=True)]
    for process in psutil.process_iter(["name", "cmdline"]):
        if "postgres" in (process.info["name"] or "") and str(home) in " ".join(process.info["cmdline"] or []):
            found += [process, *process.children(recursive=True)]
    return found


def measure(arguments: list[str], home: Path) -> dict[str, float]:
    "Run one command and account for it."
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    variables = {**os.environ, "WORKBENCH_HOME": str(home)}
    with open(home.parent / "output.txt", "a") as output:
        command = subprocess.Popen(arguments, env=variables, stdout=output, stderr=subprocess.STDOUT)
        peak = server = 0.0
        while command.poll() is None:
            memory = cpu = 0.0
            try:
                for process in processes(psutil.Process(command.pid), home):
                    memory += process.memory_full_info().pss
                    if "postgres" in process.name():
                        cpu += sum(process.cpu_times()[:2])
            except psutil.Error:
                pass
            peak, server = max(peak, memory), max(server, cpu)
            time.sleep(0.2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if command.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{(home.parent / 'output.txt').read_text()[-2000:]}")
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": own + server, "wall_s": time.perf_counter() - start, "peak_gb": peak / 1e9}


def start_cost(arguments: list[str], repeats: int = 7) -> float:
    "Median CPU seconds of a short command."
    costs = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="measure the full profile as well")
    full = parser.parse_args().full
    help_s, bare_s = start_cost([WORKBENCH, "--help"]), start_cost([sys.executable, "-c", "pass"])
    print(
        f"workbench --help      {help_s:6.2f} CPU-s   {help_s / 0.4:5.2f} of 0.4 CPU-s, {help_s / bare_s:.0f} x a bare interpreter"
    )
    with tempfile.TemporaryDirectory(prefix="loop-") as folder:
        os.chmod(folder, 0o755)
        home = Path(folder) / "home"
        for profile in ["smoke", "full"] if full else ["smoke"]:
            cost = measure([WORKBENCH, "run", "planner", "--profile", profile], home)
            line = f"run planner, {profile:5}    {cost['cpu_s']:6.1f} CPU-s {cost['wall_s']:6.1f} s wall"
            line += f" {cost['peak_gb']:5.2f} GB peak"
            bounds = f"{cost['peak_gb'] / 4:5.2f} of 4 GB"
            limit = (
                f"{cost['cpu_s'] / 180:5.2f} of 180 CPU-s"
                if profile == "full"
                else f"{cost['wall_s'] / 60:5.2f} of 60 s wall"
            )
            print(f"{line}   {limit}, {bounds}", flush=True)


if __name__ == "__main__":
    main()
