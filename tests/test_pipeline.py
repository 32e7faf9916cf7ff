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
from mlops_workbench.pipeline import resume_run, run_pipeline
from mlops_workbench.plan import check_pipeline, notebook_parameters, read_pipeline
from mlops_workbench.runs import RunStopped, hold_pipeline, read_runs
from mlops_workbench.schedule import RunOptions
from mlops_workbench.settings import Settings
from mlops_workbench.tracking import open_tracking, read_artifact

START = """
from mlops_workbench.settings import read_settings
from mlops_workbench.stage import record_outputs
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
    ("task: x\nstages:\n  add: {}\n  add: {}\n", "'add' stands twice"),
    ("task: x\nstages:\n  show:\n    needs: {total: add.x}\n  add: {}\n", "of a later stage: write 'add' before it"),
    (
        "task: x\nstages:\n  show:\n    needs: {total: add.x}\n  add:\n    needs: {a: show.text}\n",
        "need each other in a circle: show → add → show",
    ),
    ("task: x\nstages:\n  add: {writes: [a.b]}\n  show: {writes: [a.b]}\n", "both write 'a.b': only one may"),
    ("task: x\nstages:\n  add: {limits: {cell_s: -1}}\n", "cell_s is -1, expected a number from 0 up"),
    ("task: x\nstages:\n  add: {limits: {cells: 1}}\n", "unknown key 'cells': did you mean 'cell_s'"),
    ("task: x\nstages:\n  add: {effect: maybe}\n", "effect is 'maybe', expected true or false"),
    ("task: x\nstages:\n  add: {reads: 3}\n", "expected a list of names"),
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


def test_a_notebook_without_kernel_is_refused(project):
    path = project / "nbs" / "pipelines" / "add.ipynb"
    content = json.loads(path.read_text())
    del content["metadata"]["kernelspec"]
    path.write_text(json.dumps(content))
    with pytest.raises(WorkbenchError, match="add.ipynb names no kernel"):
        check_pipeline(read_pipeline(project, "sums"))


def test_a_parameter_that_hides_an_import_is_refused(project):
    write_notebook(project, "add", "json: int = 1  # hides", "import json")
    (project / "params" / "hidden.yaml").write_text("task: mlops_workbench.planner\nstages:\n  add: {}\n")
    with pytest.raises(ValueError, match="parameter 'json' hides"):
        check_pipeline(read_pipeline(project, "hidden"))


def test_values_flow_and_everything_is_recorded(project, store, tmp_path):
    settings = settings_of(project, store)
    done = run_pipeline(read_pipeline(project, "sums", overrides=["add.b=4"]), settings)
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
    again = run_pipeline(read_pipeline(project, "sums"), settings, RunOptions(first="show"))
    assert [s["name"] for s in again["stages"]] == ["show"]


def test_artefacts_go_to_any_place_that_fsspec_knows(project, store, tmp_path):
    settings = replace(settings_of(project, store), artifacts_url=f"local://{tmp_path}/far")
    done = run_pipeline(read_pipeline(project, "sums", overrides=["add.b=4"]), settings)
    tracking = open_tracking(store, settings)
    copy = read_artifact(tracking, done["stages"][0]["mlflow_run_id"], "notebook/0-add.ipynb", tmp_path / "near")
    assert json.loads(copy.read_text())["cells"]
    assert list((tmp_path / "far").rglob("0-add.ipynb"))


def test_a_place_that_nobody_knows_is_refused_before_the_run(project, store):
    settings = replace(settings_of(project, store), artifacts_url="carrier-pigeon://coop")
    with pytest.raises(WorkbenchError, match="its kind is 'carrier-pigeon'"):
        run_pipeline(read_pipeline(project, "sums"), settings)
    assert read_runs(store) == []


def test_a_failing_cell_is_named_and_its_notebook_kept(project, store):
    settings = settings_of(project, store)
    with pytest.raises(RunStopped, match="stage 'show' failed in cell 3: ZeroDivisionError"):
        run_pipeline(read_pipeline(project, "sums", overrides=["add.b=3"]), settings)
    (failed,) = read_runs(store)
    assert (failed["status"], [s["status"] for s in failed["stages"]]) == ("failed", ["finished", "failed"])
    client = open_tracking(store, settings).client
    run_id = failed["stages"][1]["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "FAILED"
    assert {f.path for f in client.list_artifacts(run_id, "notebook")} == {
        "notebook/1-show.html",
        "notebook/1-show.ipynb",
    }


def test_a_condition_that_does_not_hold_refuses_the_run(project, store):
    pipeline = read_pipeline(project, "sums", overrides=["add.b=-2"])
    done = run_pipeline(pipeline, settings_of(project, store))
    assert (done["status"], [s["status"] for s in done["stages"]]) == ("refused", ["finished", "skipped"])


def test_from_needs_results_of_the_stages_before(project, store):
    with pytest.raises(WorkbenchError, match="has not finished yet: run without --from"):
        run_pipeline(read_pipeline(project, "sums"), settings_of(project, store), RunOptions(first="show"))
    assert read_runs(store) == []


def wait_for(happened, seconds: float = 240) -> None:
    "Wait until something has happened; machines may be busy."
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def start_driver(project: Path) -> subprocess.Popen:
    write_notebook(
        project, "add", "a: int = 1\nb: int = 1", "import time; open('sleeping', 'w').close(); time.sleep(60)"
    )
    code = "from mlops_workbench.cli import main; import sys; sys.argv = ['workbench', 'run', 'sums']; main()"
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=project, env=os.environ, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: list(project.glob(".workbench/runs/*/add/sleeping")) or driver.poll() is not None)
    assert driver.poll() is None, driver.stderr.read()
    return driver


def kernels_of(project: Path) -> list[psutil.Process]:
    "Kernels work in their stage's folder; forked ones have the command line of the warm parent."
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(f"{project}/.workbench/runs/"):
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
    wait_for(lambda: not kernels_of(project), 30)
    (run,) = read_runs(store)
    assert (run["status"], run["stages"][0]["status"]) == ("killed", "killed")
    write_notebook(project, "add", "a: int = 1\nb: int = 1", "record_outputs(run, total=6, positive=True)")
    settings = settings_of(project, store)
    assert run_pipeline(read_pipeline(project, "sums"), settings)["status"] == "finished"
    client = open_tracking(store, settings).client
    for lost in (run["mlflow_run_id"], run["stages"][0]["mlflow_run_id"]):
        assert client.get_run(lost).info.status == "KILLED", "MLflow must not say that it is still running"


def test_what_has_not_changed_is_not_run_again(project, store):
    settings, pipeline = settings_of(project, store), read_pipeline(project, "sums", overrides=["add.b=4"])
    first, again = run_pipeline(pipeline, settings), run_pipeline(pipeline, settings)
    assert [s["status"] for s in again["stages"]] == ["cached", "cached"]
    assert {s["cached_from"] for s in again["stages"]} == {first["run_id"]}
    assert [s["outputs"] for s in again["stages"]] == [s["outputs"] for s in first["stages"]]
    forced = run_pipeline(pipeline, settings, RunOptions(force=True))
    assert [s["status"] for s in forced["stages"]] == ["finished", "finished"]
    write_notebook(project, "show", "total: int = 0  # shown", "record_outputs(run, text='changed')")
    changed = run_pipeline(pipeline, settings)
    assert [s["status"] for s in changed["stages"]] == ["cached", "finished"]


def test_only_and_until_run_what_they_name(project, store):
    settings, pipeline = settings_of(project, store), read_pipeline(project, "sums", overrides=["add.b=4"])
    assert [s["name"] for s in run_pipeline(pipeline, settings, RunOptions(last="add"))["stages"]] == ["add"]
    done = run_pipeline(pipeline, settings, RunOptions(only=("show",)))
    assert [(s["name"], s["outputs"]) for s in done["stages"]] == [("show", {"text": "10"})]


def test_a_failed_run_goes_on_where_it_stopped(project, store):
    settings = settings_of(project, store)
    pipeline = read_pipeline(project, "sums", overrides=["add.b=3"])
    with pytest.raises(RunStopped):
        run_pipeline(pipeline, settings)
    (failed,) = read_runs(store)
    write_notebook(project, "show", "total: int = 0  # shown", "record_outputs(run, text=str(total))")
    done = resume_run(settings, failed["run_id"])
    assert (done["run_id"], done["status"]) == (failed["run_id"], "finished")
    assert [s["mlflow_run_id"] for s in done["stages"]][0] == failed["stages"][0]["mlflow_run_id"]
    client = open_tracking(store, settings).client
    assert client.get_run(done["mlflow_run_id"]).info.status == "FINISHED"
    with pytest.raises(WorkbenchError, match="there is nothing to go on with"):
        resume_run(settings, failed["run_id"])


def test_a_second_run_of_the_same_pipeline_waits_or_is_refused(project, store):
    settings, pipeline = settings_of(project, store), read_pipeline(project, "sums", overrides=["add.b=4"])
    with hold_pipeline(store, "sums"), pytest.raises(WorkbenchError, match="pipeline 'sums' is running"):
        run_pipeline(pipeline, settings, RunOptions(wait=False))
    assert read_runs(store) == []


LIMITS = [
    ("cell_s: 2", "import time; time.sleep(60)", "took longer than its limit (cell_s is 2 seconds)"),
    ("stage_s: 4", "import time; time.sleep(60)", "took longer than its limit (stage_s is 4 seconds)"),
    ("memory_mb: 700", "x = bytearray(2**30)\nimport time; time.sleep(60)", "its limit is 700 (memory_mb)"),
]


@pytest.mark.parametrize(("limit", "code", "words"), LIMITS)
def test_what_goes_too_far_is_stopped_with_the_reason(project, store, limit, code, words):
    (project / "params" / "far.yaml").write_text(
        f"task: mlops_workbench.planner\nstages:\n  add:\n    limits: {{{limit}}}\n"
    )
    write_notebook(project, "add", "a: int = 1\nb: int = 1", code)
    with pytest.raises(RunStopped) as caught:
        run_pipeline(read_pipeline(project, "far"), settings_of(project, store))
    assert words in str(caught.value)
    assert not kernels_of(project)
    (run,) = read_runs(store)
    executed = json.loads((project / ".workbench" / run["stages"][0]["notebook"]).read_text())
    assert words in executed["metadata"]["workbench"]["reason"]
    assert [c["metadata"]["papermill"]["status"] for c in executed["cells"]][-1] == "failed"


def test_a_dead_kernel_is_told_truthfully(project, store):
    write_notebook(project, "add", "a: int = 1\nb: int = 1", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunStopped, match="lost its kernel: it was killed"):
        run_pipeline(read_pipeline(project, "sums"), settings_of(project, store))
    (run,) = read_runs(store)
    executed = json.loads((project / ".workbench" / run["stages"][0]["notebook"]).read_text())
    assert executed["metadata"]["workbench"]["ended"] == "died"
    statuses = [c["metadata"]["papermill"]["status"] for c in executed["cells"]]
    assert statuses[-1] == "failed" and "completed" in statuses


def test_whoever_listens_may_stop_a_run(project, store):
    write_notebook(project, "add", "a: int = 1\nb: int = 1", "import time; time.sleep(60)")

    def stop(event):
        if event["event"] == "cell_started" and event["cell"] >= 3:
            raise RunStopped("no use", "pruned")

    with pytest.raises(RunStopped, match="no use"):
        run_pipeline(read_pipeline(project, "sums"), settings_of(project, store), listen=stop)
    (run,) = read_runs(store)
    assert (run["status"], run["stages"][0]["status"]) == ("pruned", "pruned")
    assert not kernels_of(project)


def ran(project: Path) -> Path:
    "Name the file, outside the project: a file of the project that a cell names is part of what the stage depends on."
    return project.parent / f"{project.name}-ran"


def counted(project: Path, *, last: str) -> None:
    "A notebook whose cells say in a file that they ran."
    log = ran(project)
    path = project / "nbs" / "pipelines" / "add.ipynb"
    write_notebook(project, "add", "a: int = 1\nb: int = 1", f"open({str(log)!r}, 'a').write('first ')\nx = a + 40")
    content = json.loads(path.read_text())
    for source in (f"open({str(log)!r}, 'a').write('second ')\ny = [x, x]", last):
        content["cells"].append(dict(content["cells"][-1], source=source))
    path.write_text(json.dumps(content))


def test_a_mended_cell_goes_on_with_the_state_before_it(project, store):
    settings = settings_of(project, store)
    (project / "params" / "one.yaml").write_text(
        "task: mlops_workbench.planner\nstages:\n  add:\n    parameters: {a: 2}\n"
    )
    counted(project, last="y[2]")
    with pytest.raises(RunStopped, match="IndexError"):
        run_pipeline(read_pipeline(project, "one"), settings)
    (failed,) = read_runs(store)
    counted(project, last="record_outputs(run, total=sum(y), positive=True)")
    done = resume_run(settings, "")
    assert done["stages"][0]["outputs"]["total"] == 84
    assert ran(project).read_text() == "first second "
    assert done["stages"][0]["mlflow_run_id"] == failed["stages"][0]["mlflow_run_id"]
    executed = json.loads((settings.home / done["stages"][0]["notebook"]).read_text())
    assert [c["metadata"]["papermill"]["status"] for c in executed["cells"]] == ["completed"] * 6


def test_a_killed_run_repeats_no_finished_cell(project, store):
    counted(project, last="import time; open('sleeping', 'w').close(); time.sleep(60)")
    code = "from mlops_workbench.cli import main; import sys; sys.argv = ['workbench', 'run', 'sums']; main()"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=project)
    wait_for(lambda: list(project.glob(".workbench/runs/*/add/sleeping")) or driver.poll() is not None)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    wait_for(lambda: not kernels_of(project))
    counted(project, last="record_outputs(run, total=sum(y), positive=False)")
    done = resume_run(settings_of(project, store), "")
    assert done["stages"][0]["outputs"] == {"total": 84, "positive": False}
    assert (done["status"], ran(project).read_text()) == ("refused", "first second ")
