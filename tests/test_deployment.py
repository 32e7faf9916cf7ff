"What is deployed says the same as the settings and the code, and is what Kubernetes, compose and Terraform understand."

import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import hcl2
import jsonschema
import kubernetes_validate
import pytest
import yaml

from mlops_workbench.composition import composition
from mlops_workbench.core import WorkbenchError
from mlops_workbench.deployment import lint_deployment, plan_deployment, read_differences, write_deployment
from mlops_workbench.inspection import compose_faults, manifest_faults, read_objects, read_recipe, recipe_faults
from mlops_workbench.manifest import manifests
from mlops_workbench.settings import Settings
from mlops_workbench.target import ALERTED, COMMANDS, Target, dockerfile, read_target
from mlops_workbench.wiring import Wiring, service_settings

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = ["1.31", "1.34"]
TARGET = Target("production", "[production]\n", 8080, 2, "DB_URL", ("DB_URL", "LEDGER_KEY"), "models")


def schema(name):
    "Read a schema that check-jsonschema brings along."
    return json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / f"{name}.json").read_text())


@pytest.fixture
def project(tmp_path):
    "A copy of what a deployment is made of."
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("params", "nbs/pipelines", "mlops_workbench", "deploy/prometheus", "deploy/grafana"):
        (tmp_path / name).mkdir(parents=True)
    write_deployment(plan_deployment(tmp_path, "production"), tmp_path)
    return tmp_path


def test_the_files_are_what_the_settings_say():
    assert read_differences(plan_deployment(ROOT, "production"), ROOT) == {}
    assert lint_deployment(ROOT) == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize(
    "item", read_objects(DEPLOY / "kubernetes"), ids=lambda i: f"{i['kind']}/{i['metadata']['name']}"
)
def test_kubernetes_takes_every_object(item, version):
    kubernetes_validate.validate(item, version, strict=True)


def test_the_schema_finds_a_misspelt_key():
    broken = manifests(TARGET)["service"][0]
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES[0], strict=True)


def test_compose_takes_its_file():
    jsonschema.validate(yaml.safe_load((DEPLOY / "compose.yaml").read_text()), schema("compose-spec"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"a": {"imag": "x"}}}, schema("compose-spec"))


def test_everything_that_was_promised_runs_on_one_machine():
    asked = {"service", "controller", "postgres", "mlflow", "prometheus", "grafana", "minio"}
    assert asked <= set(yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"])


@pytest.mark.parametrize(
    ("tool", "command", "name"),
    [
        ("promtool", ["check", "config", "--syntax-only"], "prometheus.yml"),
        ("amtool", ["check-config"], "alertmanager.yml"),
    ],
)
def test_who_watches_takes_its_file(tool, command, name):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    assert subprocess.run([tool, *command, DEPLOY / name], capture_output=True).returncode == 0


def test_who_watches_shows_a_key():
    said = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service, name in (("prometheus", "metrics_key"), ("alertmanager", "alerts_key")):
        assert said["services"][service]["secrets"] == [name]
        assert f"credentials_file: /run/secrets/{name}" in (DEPLOY / f"{service}.yml").read_text()
        assert said["secrets"][name] == {"environment": name.upper()}
        assert f"\n{name.upper()}=\n" in (DEPLOY / ".env.example").read_text()


def test_terraform_can_be_parsed_and_asks_for_every_secret():
    found = hcl2.loads((DEPLOY / "terraform" / "main.tf").read_text())
    text = json.dumps(found)
    assert {name.strip('"') for v in found["variable"] for name in v} == {"namespace", "image", "secrets", "storage"}
    for name in read_target(ROOT, "production").secrets:
        assert name in text
    assert text.count('"sensitive": true') == 2


def test_terraform_reads_the_manifests_the_way_yaml_does():
    "The module splits files at '---' by itself: every part must be one object."
    for path in (DEPLOY / "kubernetes").glob("*.yaml"):
        parts = [yaml.safe_load(part) for part in path.read_text().split("\n---\n")]
        assert parts == list(yaml.safe_load_all(path.read_text()))
        assert all(part["kind"] for part in parts)


def test_variables_ports_and_commands_are_those_of_the_code(tmp_path):
    known = {f"WORKBENCH_{f.name.upper()}" for f in (*fields(Settings), *fields(Wiring))}
    assert set(TARGET.variables) <= known
    (tmp_path / "settings.ini").write_text("[production]\n")
    found = service_settings(Settings("production", tmp_path, tmp_path), TARGET.variables)
    assert (found.service_host, found.service_port, found.service_workers) == ("0.0.0.0", 8080, 2)
    from mlops_workbench import cli

    names = {c.name or c.callback.__name__ for c in _commands(cli.app)}
    words = [command[1] if command[0] == "workbench" else command[-1].split()[1] for command in COMMANDS.values()]
    assert set(words) <= names


def _commands(app):
    nested = [c for group in app.registered_groups if not group.name for c in _commands(group.typer_instance)]
    return [*app.registered_commands, *nested]


def test_the_probes_are_routes_of_the_service():
    source = (ROOT / "mlops_workbench" / "serving.py").read_text()
    container = manifests(TARGET)["service"][0]["spec"]["template"]["spec"]["containers"][0]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert f'"{container[probe]["httpGet"]["path"]}"' in source
    administration = (ROOT / "mlops_workbench" / "administration.py").read_text()
    assert (
        'prefix="/api/v1"' in administration and f'@router.post("{ALERTED.removeprefix("/api/v1")}"' in administration
    )


def test_the_recipe_installs_extras_that_exist():
    asked = re.findall(r"'\.\[([\w,]+)\]'", dockerfile(TARGET))[0].split(",")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(asked) <= set(extras)


@pytest.mark.parametrize(
    "change, told",
    [
        (("FROM python:3.11.13-slim-trixie AS build", "FROM python AS build"), "has no version"),
        (("USER 10001:10001", "USER root"), "its last user is 'root'"),
        (("USER 10001:10001", ""), "its last user is 'root'"),
        (("COPY params /app/params", "COPY parms /app/params"), "it copies parms"),
        (("ENV PATH", "ENV DB_PASSWORD=hunter22 PATH"), "DB_PASSWORD is written out"),
        (('CMD ["workbench", "serve"]', "CMD workbench serve"), "goes through a shell"),
        (("COPY params", "ADD params"), "write COPY"),
    ],
)
def test_the_lint_finds_what_is_wrong_with_a_recipe(project, change, told):
    text = dockerfile(TARGET)
    assert recipe_faults(text, project) == []
    assert change[0] in text
    found = recipe_faults(text.replace(*change), project)
    assert len(found) == 1 and told in found[0]


def test_a_continued_line_is_one_instruction():
    assert read_recipe("# x\nRUN a \\\n    && b\nUSER 1") == [("RUN", "a  && b"), ("USER", "1")]


def _broken(items, change):
    items = json.loads(json.dumps(items))
    change(items)
    return items


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s["service"].update(volumes=["nowhere:/x"]), "volume nowhere"),
        (lambda s: s["service"].update(volumes=["./nowhere:/x"]), "./nowhere, which is not there"),
        (lambda s: s["service"].update(depends_on=["redis"]), "waits for redis"),
        (lambda s: s["postgres"].update(image="postgres:latest"), "has no version"),
        (lambda s: s["postgres"]["environment"].update(POSTGRES_PASSWORD="x1y2"), "POSTGRES_PASSWORD is written out"),
    ],
)
def test_the_lint_finds_what_is_wrong_with_compose(project, change, told):
    whole = composition(TARGET)
    assert compose_faults(whole, project / "deploy") == []
    broken = _broken(whole, lambda w: change(w["services"]))
    found = compose_faults(broken, project / "deploy")
    assert len(found) == 1 and told in found[0]


def _pod(items, index=1):
    return items[index]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda i: _pod(i)["securityContext"].update(runAsNonRoot=False), "may run as root"),
        (lambda i: _pod(i)["containers"][0]["livenessProbe"]["httpGet"].update(port="web"), "probes port web"),
        (lambda i: _pod(i)["containers"][0].update(image="workbench:latest"), "has no version"),
        (lambda i: _pod(i)["containers"][0]["env"].append({"name": "API_KEY", "value": "x"}), "API_KEY is written out"),
        (lambda i: _pod(i)["volumes"][0]["configMap"].update(name="other"), "which no file makes"),
        (lambda i: _pod(i)["volumes"].pop(), "mounts tmp"),
        (lambda i: i[2]["spec"]["selector"].update(x="y"), "Service mlops-workbench-service selects no pod"),
        (lambda i: i[3]["spec"]["scaleTargetRef"].update(name="other"), "scales Deployment other"),
        (lambda i: i.append({"kind": "Secret", "metadata": {"name": "s"}}), "a secret is made where it is used"),
    ],
)
def test_the_lint_finds_what_is_wrong_with_manifests(change, told):
    items = [item for part in manifests(TARGET).values() for item in part]
    assert [i["kind"] for i in items[:4]] == ["ConfigMap", "Deployment", "Service", "HorizontalPodAutoscaler"]
    assert manifest_faults(items) == []
    found = manifest_faults(_broken(items, change))
    assert len(found) == 1 and told in found[0]


def test_what_differs_is_said(project):
    plan = plan_deployment(project, "production")
    assert read_differences(plan, project) == {}
    compose = project / "deploy" / "compose.yaml"
    compose.write_text(compose.read_text().replace("8080", "8081"))
    (project / "deploy" / "Dockerfile").unlink()
    (project / "deploy" / "kubernetes" / "old.yaml").write_text("kind: Pod\n")
    found = read_differences(plan, project)
    assert found.pop("deploy/Dockerfile") == "is missing"
    assert found.pop("deploy/kubernetes/old.yaml").startswith("is no part")
    assert "8081" in found.pop("deploy/compose.yaml") and found == {}
    write_deployment(plan, project)
    assert set(read_differences(plan, project)) == {"deploy/kubernetes/old.yaml"}


def test_a_port_in_the_settings_reaches_every_file(project):
    with open(project / "settings.ini", "a") as file:
        file.write("\n[production.service]\nservice_port = 9123\nsmtp_url = secret://SMTP_URL\n")
    plan = plan_deployment(project, "production")
    assert not any(re.search(r"\b8080\b", text) for text in plan.values())
    for name in ("Dockerfile", "compose.yaml", "prometheus.yml", "terraform/main.tf", "kubernetes/service.yaml"):
        assert "9123" in plan[f"deploy/{name}"]
    for name in (".env.example", "compose.yaml", "terraform/main.tf", "kubernetes/controller.yaml"):
        assert "SMTP_URL" in plan[f"deploy/{name}"]


@pytest.mark.parametrize(
    "settings, told",
    [
        ("[production]\n", "needs database_url = secret://NAME"),
        ("[production]\ndatabase_url = secret://DB\n", "needs artifacts_url"),
        ("[prod]\n", "did you mean 'prod'"),
    ],
)
def test_what_cannot_be_deployed_is_refused_in_one_line(tmp_path, settings, told):
    (tmp_path / "settings.ini").write_text(settings)
    with pytest.raises(ValueError, match=re.escape(told)):
        plan_deployment(tmp_path, "production")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "deploy").write_text("a file")
    with pytest.raises(WorkbenchError, match="cannot be written"):
        write_deployment({"deploy/Dockerfile": ""}, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_github_takes_the_workflows(path):
    text = path.read_text()
    jsonschema.validate(
        {k if k is not True else "on": v for k, v in yaml.safe_load(text).items()}, schema("github-workflows")
    )
    assert all("@" in use for use in re.findall(r"uses: (\S+)", text))
