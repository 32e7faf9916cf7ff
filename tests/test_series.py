"""The commands that go beyond one run, on a small project, by the command that people use."""

import ast
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlops_workbench.debug import lab_command, prepare_debug
from mlops_workbench.kernel import started_kernel
from mlops_workbench.runs import find_run
from mlops_workbench.settings import Settings

WORKBENCH = str(Path(sys.executable).parent / "workbench")
START = """
from mlops_workbench.settings import read_settings
from mlops_workbench.stage import record_outputs
from mlops_workbench.store import open_store
from mlops_workbench.tracking import open_run, open_tracking
settings = read_settings()
store = open_store(settings)
run = open_run(open_tracking(store, settings), settings, "t", "t")
"""


@pytest.fixture
def project(tmp_path, store, monkeypatch):
    (tmp_path / "settings.ini").write_text("[local]\n")
    (tmp_path / "params").mkdir()
    (tmp_path / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    stages = "  make:\n    parameters: {a: 2}\n  use:\n    needs: {total: make.total}\n"
    (tmp_path / "params" / "sums.yaml").write_text(f"task: mlops_workbench.planner\nstages:\n{stages}")
    write(
        tmp_path,
        "make",
        "a: int = 1  # first; in [0, 9]",
        "import helper",
        "record_outputs(run, total=helper.twice(a))",
    )
    write(tmp_path, "use", "total: int = 0  # made", "seen = [total] * 3", "record_outputs(run, text=str(seen))")
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)
    monkeypatch.delenv("WORKBENCH_HOME", raising=False)
    return tmp_path


def write(root, name, *sources):
    def cell(number, source):
        tags = ["parameters"] if number == 0 else []
        shape = {"cell_type": "code", "id": f"c{number}", "outputs": [], "execution_count": None}
        return shape | {"metadata": {"tags": tags}, "source": source}

    cells = [cell(i, source) for i, source in enumerate([sources[0], START, *sources[1:]])]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    path = root / "nbs" / "pipelines" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})
    )


def workbench(project, *arguments, code=0):
    done = subprocess.run([WORKBENCH, *arguments], cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (
        f"{arguments} ended with {done.returncode}\n{done.stdout[-900:]}\n{done.stderr[-900:]}"
    )
    if code in (1, 2):
        assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    return done.stdout if code in (0, 3) else done.stderr


def test_a_touched_helper_is_what_explain_names(project):
    workbench(project, "run", "sums")
    rows = json.loads(workbench(project, "run", "sums", "--explain", "--json"))
    assert {r["action"] for r in rows} == {"cached"}
    (project / "helper.py").write_text("# a remark\ndef twice(x):\n    return 2 * x\n")
    assert {r["action"] for r in json.loads(workbench(project, "run", "sums", "--explain", "--json"))} == {"cached"}
    (project / "helper.py").write_text("def twice(x):\n    return 3 * x\n")
    make, use = json.loads(workbench(project, "run", "sums", "--explain", "--json"))
    assert make["action"] == "run" and "helper.py" in make["reason"]
    assert use["action"] == "run" and "make" in use["reason"]
    said = workbench(project, "run", "sums", "--json")
    events = [json.loads(line) for line in said.splitlines()]
    assert [e["event"] for e in events][0] == "run_started" and events[-1]["status"] == "finished"
    a, b = [r["run_id"] for r in json.loads(workbench(project, "runs", "--json"))]
    told = workbench(project, "diff", b, a, "--html", "diff.html")
    assert "helper.py" in told and "make.total" in told
    page = (project / "diff.html").read_text()
    assert "helper.py" in page and 'src="http' not in page


def test_params_are_shown_with_their_ranges_and_refused_outside(project):
    rows = {r["name"]: r for r in json.loads(workbench(project, "params", "sums", "--json"))}
    assert (rows["a"]["type"], rows["a"]["range"], rows["a"]["value"]) == ("int", "[0, 9]", 2)
    assert (rows["total"]["from"], rows["total"]["value"]) == ("flow", "make.total")
    assert "expected int in [0, 9]" in workbench(project, "run", "sums", "-p", "make.a=12", code=2)


def test_a_pipeline_is_exported_without_its_secrets(project):
    (project / "settings.ini").write_text("[local]\ndatabase_url = secret://SHOP_DB\n")
    assert "dag_id='sums'" in workbench(project, "export", "airflow", "sums", "--schedule", "0 3 * * *")
    job = workbench(project, "export", "k8s", "sums", "--image", "shop:1", "--schedule", "@daily")
    assert "kind: CronJob" in job and "secretKeyRef" in job and "SHOP_DB" in job
    assert "write five fields" in workbench(
        project, "export", "k8s", "sums", "--image", "x", "--schedule", "often", code=2
    )


@pytest.mark.slow
def test_a_sweep_finds_the_best_and_goes_on(project):
    asked = ("sweep", "sums", "-p", "make.a=0..9", "--metric", "make.total", "--maximise")
    workbench(project, *asked, "--trials", "2")
    said = workbench(project, *asked, "--trials", "4")
    assert "4 finished" in said and "is best" in said
    (folder,) = (project / ".workbench" / "sweeps").iterdir()
    assert (folder / "trials.png").stat().st_size > 1000
    assert "9..0" in workbench(project, "sweep", "sums", "-p", "make.a=9..0", code=2)


@pytest.mark.slow
def test_a_stopped_notebook_opens_with_the_state_it_had_reached(project, store):
    write(project, "use", "total: int = 0  # made", "seen = [total] * 3", "seen[5]")
    assert "IndexError" in workbench(project, "run", "sums", code=1)
    settings = Settings("local", project, project / ".workbench", store.url)
    copy, cell = prepare_debug(settings, find_run(store, ""))
    command, variables, address = lab_command(copy, cell)
    assert address.endswith(f"#cell-id={cell}") and "--no-browser" in command

    async def look(name: str) -> str:
        environment = {**os.environ, **variables, "WORKBENCH_WARM": "off"}
        async with started_kernel("workbench-debug", environment, project) as (_, client):
            reply = await client.execute_interactive("", user_expressions={"x": name}, timeout=60)
        return reply["content"]["user_expressions"]["x"]["data"]["text/plain"]

    os.environ["JUPYTER_PATH"] = variables["JUPYTER_PATH"]
    try:
        assert ast.literal_eval(asyncio.run(look("seen"))) == [4, 4, 4]
        next(project.glob(".workbench/runs/*/1-use.state")).unlink()  # no state was kept: the cells are run again
        assert ast.literal_eval(asyncio.run(look("seen"))) == [4, 4, 4]
    finally:
        del os.environ["JUPYTER_PATH"]
