"""Pipelines: everything is checked before a kernel starts, and every end is recorded."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mlops_workbench.core import WorkbenchError
from mlops_workbench.pipeline import check_pipeline, notebook_parameters, read_pipeline, run_pipeline
from mlops_workbench.runs import RunStopped, read_runs
from mlops_workbench.settings import Settings
from mlops_workbench.tracking import open_tracking, read_artifact

START = """
from mlops_workbench.engine import record_outputs
from mlops_workbench.settings import read_settings
from mlops_workbench.store import open_store
from mlops_workbench.tracking import open_run, open_tracking
settings = read_settings()
store = open_store(settings)
run = open_run(open_tracking(store, settings), settings, "t", "t")
"""


def write_notebook(root: Path, name: str, parameters: str | None, code: str) -> None:
    def cell(source: str, *tags: str) -> dict:
        metadata = {"tags": list(tags)}
        return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": [], "execution_count": None}

    cells = [cell(START), cell(code)]
    if parameters is not None:
        cells.insert(0, cell(parameters, "parameters"))
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    path = root / "nbs" / "pipelines" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def project(tmp_path, store, monkeypatch):
    (tmp_path / "settings.ini").write_text("[local]\n")
    (tmp_path / "params" / "smoke").mkdir(parents=True)
    (tmp_path / "params" / "sums.yaml").write_text(
        "task: mlops_workbench.planner\n"
        "stages:\n"
        "  add:\n    parameters: {a: 2}\n"
        "  show:\n    needs: {total: add.total}\n    when: add.positive\n"
    )
    write_notebook(
        tmp_path,
        "add",
        "a: int = 1  # first\nb: int = 1  # second",
        "record_outputs(run, total=a + b, positive=a + b > 0)",
    )
    write_notebook(tmp_path, "show", "total: int = 0  # shown", "record_outputs(run, text=str(10 // (total - 5)))")
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)
    return tmp_path


def settings_of(project: Path, store) -> Settings:
    return Settings("local", project, project / ".workbench", store.url)


CASES = [
    ("stage 'add' of 'sums' has no parameter 'c'", ["add.c=1"]),
    ("a is 'two' (str), expected int", ["add.a=two"]),
    ("a is 1.5 (float), expected int", ["add.a=1.5"]),
    ("has no stage 'ad': did you mean 'add'", ["ad.a=1"]),
    ("write it as stage.parameter=value", ["add.a"]),
]


@pytest.mark.parametrize(("words", "overrides"), CASES)
def test_bad_parameters_are_refused_before_anything_starts(project, words, overrides):
    with pytest.raises(ValueError) as caught:
        check_pipeline(read_pipeline(project, "sums", overrides=overrides))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


FILES = [
    ("task: x\nstages:\n  add:\n    parametres: {a: 1}\n", "unknown key 'parametres': did you mean 'parameters'"),
    ("task: x\nstage:\n  add:\n", "unknown key 'stage': did you mean 'stages'"),
    ("stages: {add: {}}\n", "lacks task"),
    ("task: [x\n", "is not YAML"),
    ("- a\n", "expected a mapping"),
    ("task: x\nstages:\n  show:\n    needs: {total: add.total}\n", "write 'stage.output' of an earlier stage"),
    ("task: x\nstages:\n  add: {}\n  show:\n    needs: {totl: add.total}\n", "did you mean 'total'"),
]


@pytest.mark.parametrize(("text", "words"), FILES)
def test_bad_pipeline_files_are_refused(project, text, words):
    (project / "params" / "bad.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        check_pipeline(read_pipeline(project, "bad"))
    assert words in str(caught.value)


def test_a_notebook_without_parameters_cell_is_refused(project):
    write_notebook(project, "add", None, "1")
    with pytest.raises(WorkbenchError, match="has 0 cells tagged `parameters`"):
        check_pipeline(read_pipeline(project, "sums"))
    with pytest.raises(WorkbenchError, match="is not there"):
        notebook_parameters(project / "nbs" / "none.ipynb")


def test_values_flow_and_everything_is_recorded(project, store, tmp_path):
    settings = settings_of(project, store)
    done = run_pipeline(read_pipeline(project, "sums", overrides=["add.b=4"]), settings, say=lambda line: None)
    assert done["status"] == "finished"
    assert [s["outputs"] for s in done["stages"]] == [{"total": 6, "positive": True}, {"text": "10"}]
    client = open_tracking(store, settings).client
    for stage in done["stages"]:
        run = client.get_run(stage["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == done["mlflow_run_id"]
        assert {"notebook.digest", "notebook.path", "environment.digest", "environment.python"} <= set(run.data.tags)
        assert (settings.home / stage["notebook"]).is_file()
        name = f"notebook/{Path(stage['notebook']).name}"
        assert read_artifact(open_tracking(store, settings), stage["mlflow_run_id"], name, tmp_path / "got").is_file()
    again = run_pipeline(read_pipeline(project, "sums"), settings, start="show", say=lambda line: None)
    assert [s["name"] for s in again["stages"]] == ["show"]


def test_artefacts_go_to_any_place_that_fsspec_knows(project, store, tmp_path):
    settings = replace(settings_of(project, store), artifacts_url=f"local://{tmp_path}/far")
    done = run_pipeline(read_pipeline(project, "sums", overrides=["add.b=4"]), settings, say=lambda line: None)
    tracking = open_tracking(store, settings)
    copy = read_artifact(tracking, done["stages"][0]["mlflow_run_id"], "notebook/0-add.ipynb", tmp_path / "near")
    assert json.loads(copy.read_text())["cells"]
    assert list((tmp_path / "far").rglob("0-add.ipynb"))


def test_a_place_that_nobody_knows_is_refused_before_the_run(project, store):
    settings = replace(settings_of(project, store), artifacts_url="carrier-pigeon://coop")
    with pytest.raises(WorkbenchError, match="its kind is 'carrier-pigeon'"):
        run_pipeline(read_pipeline(project, "sums"), settings, say=lambda line: None)
    assert read_runs(store) == []


def test_a_failing_cell_is_named_and_its_notebook_kept(project, store):
    settings = settings_of(project, store)
    with pytest.raises(RunStopped, match="stage 'show' failed in cell 3: ZeroDivisionError"):
        run_pipeline(read_pipeline(project, "sums", overrides=["add.b=3"]), settings, say=lambda line: None)
    (failed,) = read_runs(store)
    assert (failed["status"], [s["status"] for s in failed["stages"]]) == ("failed", ["finished", "failed"])
    client = open_tracking(store, settings).client
    run_id = failed["stages"][1]["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "FAILED"
    assert [f.path for f in client.list_artifacts(run_id, "notebook")] == ["notebook/1-show.ipynb"]


def test_a_condition_that_does_not_hold_refuses_the_run(project, store):
    pipeline = read_pipeline(project, "sums", overrides=["add.b=-2"])
    done = run_pipeline(pipeline, settings_of(project, store), say=lambda line: None)
    assert (done["status"], [s["status"] for s in done["stages"]]) == ("refused", ["finished", "skipped"])


def test_from_needs_results_of_the_stages_before(project, store):
    with pytest.raises(WorkbenchError, match="has not finished yet: run without --from"):
        run_pipeline(read_pipeline(project, "sums"), settings_of(project, store), start="show", say=lambda line: None)
    assert read_runs(store) == []


def start_driver(project: Path) -> subprocess.Popen:
    write_notebook(
        project, "add", "a: int = 1\nb: int = 1", "import time; open('sleeping', 'w').close(); time.sleep(60)"
    )
    code = "from mlops_workbench.cli import main; import sys; sys.argv = ['workbench', 'run', 'sums']; main()"
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=project, env=os.environ, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(project.glob(".workbench/runs/*/sleeping")):
        assert time.monotonic() < deadline and driver.poll() is None, driver.stderr.read()
        time.sleep(0.05)
    return driver


def kernels_of(project: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if "ipykernel_launcher" in " ".join(process.cmdline()) and str(project) in process.cwd():
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_recorded_and_leaves_no_kernel(project, store, number):
    driver = start_driver(project)
    assert kernels_of(project)
    driver.send_signal(number)
    _, told = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert told.strip().splitlines()[-1] == "workbench: stage 'add' was interrupted"
    assert not kernels_of(project)
    (run,) = read_runs(store)
    assert (run["status"], run["stages"][0]["status"]) == ("cancelled", "cancelled")


def test_a_killed_driver_is_found_out_and_the_next_run_works(project, store):
    driver = start_driver(project)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while kernels_of(project):
        assert time.monotonic() < deadline, "the kernel outlived its driver"
        time.sleep(0.1)
    (run,) = read_runs(store)
    assert (run["status"], run["stages"][0]["status"]) == ("killed", "killed")
    write_notebook(project, "add", "a: int = 1\nb: int = 1", "record_outputs(run, total=6, positive=True)")
    settings = settings_of(project, store)
    assert run_pipeline(read_pipeline(project, "sums"), settings, say=lambda line: None)["status"] == "finished"
    client = open_tracking(store, settings).client
    for lost in (run["mlflow_run_id"], run["stages"][0]["mlflow_run_id"]):
        assert client.get_run(lost).info.status == "KILLED", "MLflow must not say that it is still running"
