"""Settings: every wrong line is told, and no password stays in a file or a repr."""

import pytest

from mlops_workbench import settings as module
from mlops_workbench.settings import Settings, read_settings, redact


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(module, "_traces", ())


@pytest.fixture
def project(tmp_path):
    (tmp_path / "settings.ini").write_text("[local]\n[production]\ndatabase_url = secret://PRODUCTION\n")
    return tmp_path


def test_a_password_is_not_in_the_repr():
    assert "hunter2" not in repr(Settings("local", None, None, "postgresql://me:hunter2@db/x"))


def test_the_database_s_password_is_hidden_wherever_it_came_from(project):
    read_settings("production", project, {"PRODUCTION": "postgresql://me:hunter%232@db/x"})
    assert redact("login hunter#2 or hunter%232") == "login secret://PRODUCTION or secret://PRODUCTION"
    read_settings("local", project, {"WORKBENCH_DATABASE_URL": "postgresql://me:other-one@db/x"})
    assert redact("login other-one") == "login secret://WORKBENCH_DATABASE_URL"


def test_a_database_without_password_is_no_secret(project):
    read_settings("local", project, {"WORKBENCH_DATABASE_URL": "postgresql://postgres@/workbench?host=%2Frun"})
    assert module.known_secrets() == {}


def test_a_password_that_is_a_public_name_is_hidden_only_beside_its_user(project):
    read_settings("local", project, {"WORKBENCH_DATABASE_URL": "postgresql://workbench:workbench@db/workbench"})
    assert redact("import mlops_workbench") == "import mlops_workbench"
    assert "workbench:workbench@" not in redact("psql postgresql://workbench:workbench@db/other")


def test_a_password_for_artefacts_is_refused_because_mlflow_keeps_the_url(project):
    with pytest.raises(ValueError, match="artifacts_url has a password"):
        read_settings("local", project, {"WORKBENCH_ARTIFACTS_URL": "webdav://me:hunter2@host/models"})
