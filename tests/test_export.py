"What is written for other schedulers is checked by those schedulers: Airflow's own import, Kubernetes' own schema."

import ast
import json
import os
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlops_workbench.export import (
    ExportOptions,
    PodOptions,
    check_schedule,
    export_airflow,
    export_k8s,
    stage_edges,
)
from mlops_workbench.plan import Limits, Pipeline, Resources, Stage, read_pipeline
from mlops_workbench.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
AIRFLOW = "apache-airflow==3.3.2"  # checked against; the files need Airflow 3

production = Settings("production", ROOT, ROOT / ".workbench")
weekly = ExportOptions("0 3 * * mon", "Europe/Vienna", retries=2)
pod = PodOptions("registry.example.org/planner:1.4", namespace="ml")


@pytest.fixture(params=["planner", "recommender"])
def pipeline(request):
    return read_pipeline(ROOT, request.param)


# The names and values that a template, a shell or YAML could misread.
AWKWARD = Pipeline(
    "Late Shift_2",
    "smoke",
    "shop.menu",
    (
        Stage("prep-1", ROOT / "a.ipynb"),
        Stage("prep_1", ROOT / "b.ipynb", needs={"x": "prep-1.y"}, limits=Limits(stage_s=90.5)),
        Stage("class", ROOT / "c.ipynb", needs={"x": "prep_1.y"}, when="prep-1.fine", reads=("menu",)),
        Stage("2nd try", ROOT / "d.ipynb", writes=("menu",), resources=Resources(0.25, 0.5, 300)),
        Stage("dag", ROOT / "e.ipynb"),
    ),
)
awkward = ExportOptions(
    overrides=("prep-1.text={{ ds }} it's; rm -rf /", "dag.script=clean.sh", "class.x=no: #1"),
    variables={"GREETING": 'it\'s "{{ ds }}"\n#1', "BROKER": "secret://BROKER_URL", "ON": "yes", "N": "007"},
    project="/srv/late shift",
)


# When


@pytest.mark.parametrize(
    "schedule",
    [
        "0 3 * * 1",
        "*/15 * * * *",
        "0 8-18/2 1,15 jan-mar MON-FRI",
        "59 23 31 12 6",
        "@daily",
        "@hourly",
        "0  3  *  *  *",
    ],
)
def test_a_schedule_that_cron_knows(schedule):
    check_schedule(schedule)


@pytest.mark.parametrize(
    "schedule, words",
    [
        ("", "write five fields"),
        ("every monday", "write five fields"),
        ("@never", "write five fields"),
        ("0 3 * *", "write five fields"),
        ("0 3 * * 1 2026", "write five fields"),
        ("60 * * * *", "minute '60', which goes from 0 to 59"),
        ("0 24 * * *", "hour '24', which goes from 0 to 23"),
        ("0 0 0 * *", "day of the month '0', which goes from 1 to 31"),
        ("0 0 * 13 *", "month '13'"),
        ("0 0 * * 7", "day of the week '7', which goes from 0 to 6"),
        ("0 0 * * monday", "day of the week 'monday'"),
        ("*/0 * * * *", "step '0' of the minute"),
        ("*/x * * * *", "step 'x' of the minute"),
        ("30-10 * * * *", "a range from low to high"),
        ("1-2-3 * * * *", "a range from low to high"),
        (", * * * *", "minute ''"),
        ("-1 * * * *", "minute '-1'"),
        ("² * * * *", "minute '²'"),
    ],
)
def test_a_schedule_that_cron_does_not_know(schedule, words):
    with pytest.raises(ValueError, match="schedule") as told:
        check_schedule(schedule)
    assert words in str(told.value) and "\n" not in str(told.value)


def test_a_time_zone_that_is_none():
    for zone in ("Europe/Wien", "", "../etc/passwd"):
        with pytest.raises(ValueError, match="time_zone is"):
            check_schedule("@daily", zone)


@pytest.mark.parametrize(
    "options, words",
    [
        (ExportOptions("daily"), "schedule is 'daily'"),
        (ExportOptions(retries=-1), "retries is -1"),
        (ExportOptions(overrides=("trian.rank=8",)), "did you mean 'train'"),
        (ExportOptions(overrides=("train.rank",)), "write it as stage.parameter=value"),
        (ExportOptions(variables={"A B": "1"}), "variable 'A B'"),
        (ExportOptions(variables={"URL": "postgresql://me:hunter2@db/x"}), "variable URL has a password"),
    ],
)
def test_options_that_cannot_work(options, words):
    planner = read_pipeline(ROOT, "planner")
    for export in (export_airflow, lambda p, s, o: export_k8s(p, s, pod, o)):
        with pytest.raises(ValueError) as told:
            export(planner, production, options)
        assert words in str(told.value) and "hunter2" not in str(told.value)


# Airflow


def test_edges_are_those_of_the_file():
    edges = stage_edges(read_pipeline(ROOT, "planner"))
    assert set(edges["promote"]) >= {"train", "evaluate"} and edges["prep"] == ()
    assert stage_edges(AWKWARD) == {
        "prep-1": (),
        "prep_1": ("prep-1",),
        "class": ("prep-1", "prep_1"),
        "2nd try": ("class",),
        "dag": (),
    }


def test_a_dag_imports_nothing_of_ours(pipeline):
    tree = ast.parse(export_airflow(pipeline, production, weekly))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"datetime", "zoneinfo", "airflow.sdk", "airflow.providers.standard.operators.bash"}


def test_a_dag_names_the_secrets_and_holds_none(monkeypatch):
    monkeypatch.setenv("PRODUCTION_DATABASE_URL", "postgresql://me:hunter2@db/workbench")
    text = export_airflow(read_pipeline(ROOT, "planner"), production, weekly)
    assert "needs PRODUCTION_DATABASE_URL" in text and "hunter2" not in text


BAG = """
import json, sys
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(sys.argv[1])
told = {"errors": {k: str(v) for k, v in bag.import_errors.items()}}
for name, dag in bag.dags.items():
    told[name] = {"edges": {t.task_id: sorted(t.upstream_task_ids) for t in dag.tasks}}
    told[name]["commands"] = {t.task_id: t.render_template(t.bash_command, {"ds": "WRONG"}) for t in dag.tasks}
    told[name]["environment"] = {t.task_id: t.env for t in dag.tasks}
    told[name]["schedule"] = [dag.schedule, str(dag.timezone), dag.catchup, dag.max_active_runs]
    told[name]["tries"] = {t.task_id: [t.retries, t.cwd, str(t.execution_timeout)] for t in dag.tasks}
print("\\n" + json.dumps(told))
"""


@pytest.fixture(scope="module")
def airflow(tmp_path_factory):
    "A throwaway environment with Airflow, which has too many pins to live beside anything else."
    folder = tmp_path_factory.mktemp("airflow")
    python = os.environ.get("WORKBENCH_TEST_AIRFLOW")  # of an environment that has it already
    if not python:
        venv.create(folder / "env", with_pip=True, symlinks=True)
        python = folder / "env" / "bin" / "python"
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", AIRFLOW]
        done = subprocess.run(install, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"{AIRFLOW} cannot be installed here: {done.stderr[-300:]}")
    (folder / "bag.py").write_text(BAG)

    def read(dags):
        variables = {
            "AIRFLOW_HOME": str(folder / "home"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "PATH": "/usr/bin:/bin",
        }
        command = [python, folder / "bag.py", dags]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=200, env=variables)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return json.loads(ran.stdout.splitlines()[-1])

    return read


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Airflow's packages may lag behind Python")
def test_airflow_imports_the_dags(airflow, tmp_path):
    planner = read_pipeline(ROOT, "planner")
    (tmp_path / "planner.py").write_text(export_airflow(planner, production, weekly))
    (tmp_path / "awkward.py").write_text(export_airflow(AWKWARD, production, awkward))
    found = airflow(tmp_path)
    assert found["errors"] == {}
    assert found["planner"]["edges"] == {s: sorted(e) for s, e in stage_edges(planner).items()}
    assert found["planner"]["commands"]["train"] == "workbench run planner --only train"
    assert found["planner"]["environment"]["train"] == {"WORKBENCH_ENVIRONMENT": "production"}
    assert found["planner"]["schedule"] == ["0 3 * * mon", "Europe/Vienna", False, 1]
    assert found["planner"]["tries"]["prep"] == [2, str(ROOT), "None"]
    late = found["Late_Shift_2-smoke"]
    assert late["edges"] == {
        "prep-1": [],
        "prep_1": ["prep-1"],
        "class": ["prep-1", "prep_1"],
        "2nd_try": ["class"],
        "dag": [],
    }
    run = "workbench run 'Late Shift_2' --profile smoke --only "
    assert late["commands"]["prep-1"] == run + "prep-1 -p 'prep-1.text={{ ds }} it'\"'\"'s; rm -rf /'"
    assert late["commands"]["dag"].strip() == run + "dag -p dag.script=clean.sh"
    assert late["commands"]["2nd_try"] == run + "'2nd try'"
    assert late["tries"]["prep_1"] == [1, "/srv/late shift", "0:01:30.500000"]
    assert late["environment"]["dag"]["N"] == "007" and "BROKER" not in late["environment"]["dag"]


# Kubernetes


def documents(text):
    "Check a file with Kubernetes' own schema, strictly, and read it."
    import kubernetes_validate

    found = list(yaml.safe_load_all(text))
    for each in found:
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
    return found


def test_kubernetes_takes_the_file(pipeline):
    volume, job = documents(export_k8s(pipeline, production, pod, weekly))
    assert (volume["kind"], job["kind"], job["apiVersion"]) == ("PersistentVolumeClaim", "CronJob", "batch/v1")
    spec = job["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == ("0 3 * * mon", "Europe/Vienna", "Forbid")
    template = spec["jobTemplate"]["spec"]
    assert template["backoffLimit"] == 2 and template["template"]["spec"]["restartPolicy"] == "Never"
    (container,) = template["template"]["spec"]["containers"]
    assert container["command"] == ["workbench", "run", pipeline.name]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in template["template"]["spec"]["volumes"][:1]]
    assert claims == [volume["metadata"]["name"]]
    secret = {"secretKeyRef": {"name": "workbench", "key": "PRODUCTION_DATABASE_URL"}}
    assert {"name": "PRODUCTION_DATABASE_URL", "valueFrom": secret} in container["env"]


def test_nothing_runs_as_root():
    spec = documents(export_k8s(AWKWARD, production, pod, awkward))[1]["spec"]["jobTemplate"]["spec"]["template"][
        "spec"
    ]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    assert spec["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False


def test_awkward_values_survive_yaml():
    _, job = documents(export_k8s(AWKWARD, production, pod, awkward))
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:5] == ["workbench", "run", "Late Shift_2", "--profile", "smoke"]
    assert container["command"][5:] == [w for o in awkward.overrides for w in ("-p", o)]
    given = {e["name"]: e.get("value") for e in container["env"]}
    assert given["GREETING"] == awkward.variables["GREETING"] and (given["ON"], given["N"]) == ("yes", "007")
    (broker,) = [e for e in container["env"] if e["name"] == "BROKER"]
    assert broker["valueFrom"] == {"secretKeyRef": {"name": "workbench", "key": "BROKER_URL"}}
    assert job["metadata"]["name"] == "workbench-late-shift-2-smoke"


def test_a_pod_gets_what_its_most_demanding_stage_needs():
    _, job = documents(export_k8s(AWKWARD, production, pod, awkward))
    resources = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["resources"]
    hard = {"memory": "300Mi", "nvidia.com/gpu": "1"}
    assert resources == {"requests": {"cpu": "1000m"} | hard, "limits": hard}


def test_a_job_without_a_schedule_waits_for_a_person():
    _, job = documents(export_k8s(AWKWARD, production, pod, awkward))
    assert job["spec"]["suspend"] is True
    _, job = documents(export_k8s(AWKWARD, production, pod, replace(awkward, schedule="@daily")))
    assert "suspend" not in job["spec"]


def test_a_job_has_a_deadline_when_every_stage_has_one():
    limited = replace(AWKWARD, stages=tuple(replace(s, limits=Limits(stage_s=60)) for s in AWKWARD.stages))
    deadlines = [
        documents(export_k8s(p, production, pod, awkward))[1]["spec"]["jobTemplate"]["spec"].get(
            "activeDeadlineSeconds"
        )
        for p in (AWKWARD, limited)
    ]
    assert deadlines == [None, 5 * 60 * 2 + 600]


def test_a_long_name_is_cut_to_what_kubernetes_takes():
    _, job = documents(export_k8s(replace(AWKWARD, name="x" * 80), production, pod, awkward))
    assert len(job["metadata"]["name"]) <= 52


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"image": ""}, "image is ''"),
        ({"image": "planner latest"}, "image is 'planner latest'"),
        ({"image": "-planner"}, "image is '-planner'"),
        ({"user": 0}, "user 0 would be root"),
        ({"home_gb": 0}, "both must be above 0"),
        ({"secret": "My_Secret"}, "secret is 'My_Secret'"),
        ({"namespace": "ml team"}, "namespace is 'ml team'"),
    ],
)
def test_a_pod_that_kubernetes_would_refuse(wrong, words):
    with pytest.raises(ValueError) as told:
        export_k8s(AWKWARD, production, replace(pod, **wrong), awkward)
    assert words in str(told.value)


def test_the_schema_would_notice():
    import kubernetes_validate

    job = documents(export_k8s(AWKWARD, production, pod, awkward))[1]
    job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
