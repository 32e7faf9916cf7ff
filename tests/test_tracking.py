"""MLflow on our server: opened by several at once, and complete in what it records."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlops_workbench import settings as settings_module
from mlops_workbench.core import WorkbenchError, digest_file
from mlops_workbench.settings import Settings, resolve_secret
from mlops_workbench.tracking import (
    end_run,
    log_dataset,
    log_figure,
    log_file,
    log_history,
    log_model,
    log_parameters,
    log_table,
    log_tags,
    open_run,
    open_tracking,
    provenance,
    read_artifact,
    read_history,
    start_run,
)

OPEN = """
import sys
from pathlib import Path
from mlops_workbench.settings import Settings
from mlops_workbench.store import open_store
from mlops_workbench.tracking import end_run, open_tracking, start_run
settings = Settings("local", Path("."), Path(sys.argv[2]), sys.argv[1])
with open_store(settings) as store:
    end_run(start_run(open_tracking(store, settings), "race", "first", {}))
"""


@pytest.fixture
def tracking(store, tmp_path):
    return open_tracking(store, Settings("local", tmp_path, tmp_path / "home", store.url))


@pytest.mark.slow
def test_four_first_users_at_once_all_succeed(empty_url, tmp_path):
    command = [sys.executable, "-c", OPEN, empty_url, str(tmp_path / "home")]
    users = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    told = [user.communicate(timeout=180)[1] for user in users]
    assert [user.returncode for user in users] == [0] * 4, told


def test_artefacts_go_where_the_settings_say(tracking, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    run = start_run(tracking, "places", "train", {})
    uri = log_model(run, "m", folder, "mlops_workbench.model", ["mlops_workbench"], {"task": "t"})
    end_run(run)
    assert list(elsewhere.iterdir()) == [], "nothing lands in the working folder"
    logged = tracking.client.get_logged_model(uri.removeprefix("models:/"))
    assert str(tmp_path / "home" / "artifacts" / "places") in logged.artifact_location
    assert logged.source_run_id == run.run_id


def test_a_failed_recording_leaves_no_ready_model(tracking, tmp_path):
    run = start_run(tracking, "places", "train", {})
    with pytest.raises(Exception):  # noqa: B017 - MLflow's own type does not matter
        log_model(run, "m", tmp_path / "missing", "mlops_workbench.model", ["mlops_workbench"], {})
    experiment = tracking.client.get_run(run.run_id).info.experiment_id
    assert [m.status.name for m in tracking.client.search_logged_models([experiment])] == ["FAILED"]


def test_provenance_names_notebook_commit_and_environment(tmp_path):
    notebook = tmp_path / "nbs" / "a.ipynb"
    notebook.parent.mkdir()
    notebook.write_text("{}")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    clean = provenance(tmp_path, notebook)
    assert clean["git.dirty"] == "false" and len(clean["git.commit"]) == 40
    assert (clean["notebook.path"], clean["notebook.digest"]) == ("nbs/a.ipynb", digest_file(notebook))
    notebook.write_text("{ }")
    dirty = provenance(tmp_path, notebook)
    assert dirty["git.dirty"] == "true" and dirty["notebook.digest"] != clean["notebook.digest"]
    assert dirty["environment.digest"] == clean["environment.digest"]
    assert "git.commit" not in provenance(Path("/"))


def test_a_notebook_joins_the_driver_s_run(tracking, tmp_path, monkeypatch):
    settings = Settings("local", tmp_path, tmp_path / "home")
    begun = start_run(tracking, "joined", "train", {})
    monkeypatch.setenv("WORKBENCH_MLFLOW_RUN", begun.run_id)
    assert open_run(tracking, settings, "joined", "train").run_id == begun.run_id
    monkeypatch.delenv("WORKBENCH_MLFLOW_RUN")
    alone = open_run(tracking, settings, "joined", "train")
    assert alone.run_id != begun.run_id


def test_curves_and_tables_come_back(tracking, tmp_path):
    import pandas as pd

    run = start_run(tracking, "back", "train", {})
    for step in (1, 2):
        log_history(run, step, {"loss": 3.0 - step})
    log_history(run, 2, {"validation_loss": 1.5})
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    log_table(run, table, "rows")
    curve = read_history(tracking, run.run_id, ["loss", "validation_loss", "none"])
    assert curve["loss"].tolist() == [2.0, 1.0] and list(curve) == ["step", "loss", "validation_loss"]
    assert pd.read_parquet(read_artifact(tracking, run.run_id, "tables/rows.parquet", tmp_path)).equals(table)
    with pytest.raises(WorkbenchError, match="has no artefact"):
        read_artifact(tracking, run.run_id, "tables/none.parquet", tmp_path)


def everything(run, folder):
    "Read back whatever MLflow holds of a run, as one text."
    import mlflow.artifacts
    import pandas as pd

    found = run.client.get_run(run.run_id)
    texts = [str(found.to_dictionary())]
    place = mlflow.artifacts.download_artifacts(run_id=run.run_id, dst_path=str(folder), tracking_uri=run.tracking.uri)
    for path in (p for p in Path(place).rglob("*") if p.is_file()):
        if path.suffix == ".parquet":
            rows = pd.read_parquet(path)
            texts.append(str([*rows.columns, *rows.to_numpy().tolist()]))
        texts.append(path.read_bytes().decode("latin-1"))
    return "\n".join(texts)


def test_no_secret_reaches_mlflow(tracking, tmp_path, monkeypatch):
    import matplotlib
    import pandas as pd

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    monkeypatch.setattr(settings_module, "_traces", ())
    token = resolve_secret("secret://TOKEN", {"TOKEN": "t0k'en-of-mine"})
    run = start_run(tracking, "secrets", f"train with {token}", {"git.url": f"https://{token}@host/x"})
    log_parameters(run, {"token": token, "nested": {"key": [token]}, "rank": 8})
    log_tags(run, {"seen": f"it's {token}"})
    log_dataset(run, f"planner/{token}", "7f3a" * 16, f"s3://{token}/d", "training")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "report.html").write_text(f"<b>{token}</b>")
    log_file(run, tmp_path / "made")
    log_file(run, tmp_path / "made" / "report.html", "alone")
    log_table(run, pd.DataFrame({"a": ["x", token]}), "rows")
    figure = Figure()
    figure.subplots().set_title(f"loss with {token}")
    log_figure(run, figure, "loss.svg")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    log_model(run, "m", tmp_path / "model", "mlops_workbench.model", ["mlops_workbench"], {"source": token})
    text = everything(run, tmp_path / "back")
    assert "t0k" not in text and "en-of-mine" not in text
    assert text.count("secret://TOKEN") >= 10
    (tmp_path / "model" / "model.json").write_text(f'{{"base": "{token}"}}')
    with pytest.raises(WorkbenchError, match="of the model holds the value of a secret"):
        log_model(run, "m", tmp_path / "model", "mlops_workbench.model", ["mlops_workbench"], {})


def test_where_mlflow_is_does_not_show_its_password():
    from mlops_workbench.tracking import Run, Tracking

    assert "hunter2" not in repr(Run("r", Tracking("postgresql+psycopg://me:hunter2@db/x", "s3://models")))


def test_tracking_does_not_import_pandas_or_mlflow_by_itself():
    code = (
        "import sys, types; store = types.ModuleType('mlops_workbench.store');"
        "store.Store = store.advisory_lock = store.transaction = None; sys.modules['mlops_workbench.store'] = store;"
        "import mlops_workbench.tracking; print(sorted({'pandas', 'mlflow', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
