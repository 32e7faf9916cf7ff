"""The same four stages for DVC and Snakemake, installed into an environment of their own below a cache folder."""

import subprocess
import sys
from pathlib import Path

from benchmarks.bench import Cost, Place

PINS = {"dvc": "dvc==3.67.1", "snakemake": "snakemake==9.27.1"}

SCRIPT = """
import json, sys
source, target, rank = sys.argv[1:]
n = json.load(open(source))["n"] if source != "-" else 0
json.dump({"n": n + int(rank)}, open(target, "w"))
"""
STAGES = ("prep", "train", "evaluate", "promote")


def install(cache: Path, peer: str) -> Path | None:
    "Find a peer's command below the cache folder, installing it the first time; None where that is not possible."
    place = cache / peer
    command = place / "bin" / peer
    if not command.exists():
        try:
            subprocess.run([sys.executable, "-m", "venv", place], check=True, capture_output=True, timeout=300)
            subprocess.run(
                [place / "bin" / "pip", "install", "-q", PINS[peer]], check=True, capture_output=True, timeout=900
            )
        except (subprocess.SubprocessError, OSError) as error:
            print(f"{peer} cannot be installed here, its row is left out: {str(error).splitlines()[0][:160]}")
            return None
    return command


def prepare(place: Path, peer: str) -> None:
    "Write the four stages in a peer's own words."
    place.mkdir(parents=True)
    (place / "step.py").write_text(SCRIPT)
    sources = ["-", *(f"{name}.json" for name in STAGES)]
    chain = list(zip(STAGES, sources, strict=False))
    if peer == "dvc":
        lines = ["stages:"]
        for name, source in chain:
            lines += [f"  {name}:", f"    cmd: {sys.executable} step.py {source} {name}.json ${{{name}.rank}}"]
            lines += ["    deps:", "    - step.py", *([f"    - {source}"] if source != "-" else [])]
            lines += ["    params:", f"    - {name}.rank", "    outs:", f"    - {name}.json"]
        (place / "dvc.yaml").write_text("\n".join(lines) + "\n")
        (place / "params.yaml").write_text("".join(f"{name}:\n  rank: 16\n" for name in STAGES))
        return
    lines = ["rule all:", "    input: 'promote.json'"]
    for name, source in chain:
        wanted = "'step.py'" + (f", '{source}'" if source != "-" else "")
        lines += [f"rule {name}:", f"    input: {wanted}", f"    output: '{name}.json'", "    params: rank=16"]
        lines += [f"    shell: '{sys.executable} step.py {source} {{output}} {{params.rank}}'"]
    (place / "Snakefile").write_text("\n".join(lines) + "\n")


def peer_runs(place: Place, cache: Path, peer: str):
    "Make a peer's pipeline, run it once, and return what runs it again; None where the peer is not there."
    command = install(cache, peer)
    if command is None:
        return None
    folder = place.folder / peer
    prepare(folder, peer)
    variables = {"PATH": f"{command.parent}:{place.variables['PATH']}", "DVC_NO_ANALYTICS": "1"}
    variables |= {"XDG_CACHE_HOME": str(place.folder / "cache"), "HOME": str(place.folder)}
    if peer == "dvc":
        place.run([command, "init", "--no-scm", "-q"], folder, **variables)
        again = [command, "repro"]
    else:
        again = [command, "-c1"]
    place.run(again, folder, **variables)

    def run(turn: int) -> Cost:
        cost = place.run(again, folder, **variables)
        said = place.output().lower()
        assert "up to date" in said or "nothing to be done" in said, f"{peer} ran something: {said}"
        return cost

    return run
