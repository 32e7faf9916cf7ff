"The commands about experiments, on a database of their own."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlops_workbench.store import transaction, write_rows

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("create", "start", "ramp", "pause", "resume", "show", "list", "stop")

# one process: importing the workbench for every command would be most of the time
DRIVER = """
import contextlib, io, json, sys
from mlops_workbench import cli
told = []
for arguments in json.load(sys.stdin):
    sys.argv, out, err = ["workbench", *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


@pytest.fixture
def project(tmp_path, store):
    "A project with a file that declares an experiment, and a policy that serves."
    (tmp_path / "pyproject.toml").write_text("")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    content = yaml.safe_load((ROOT / "params" / "experiments" / "planner_tone.yaml").read_text())
    content["ends_at"] = "2099-01-01T00:00:00Z"
    (tmp_path / "tone.yaml").write_text(yaml.safe_dump(content))
    with transaction(store) as connection:
        write_rows(connection, "exp.policies", [{"policy": "planner", "task": "planner"}])
        write_rows(connection, "exp.policy_versions", [{"policy": "planner", "version": 1, "status": "production"}])

    def run(*commands):
        variables = {
            "WORKBENCH_DATABASE_URL": store.url,
            "WORKBENCH_HOME": str(tmp_path / "home"),
            "WORKBENCH_ACTOR": "ada",
        }
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=json.dumps([["experiment", *c] for c in commands]),
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "WORKBENCH_DRIVER": "this", **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_from_create_to_stop_with_json(project):
    told = project(
        ["create", "tone.yaml", "--json"],
        ["start", "planner_tone", "--json"],
        ["ramp", "planner_tone", "0.5", "--json"],
        ["pause", "planner_tone", "--reason", "a fault", "--json"],
        ["resume", "planner_tone", "--actor", "bo", "--json"],
        ["show", "planner_tone", "--json"],
        ["list", "--status", "active", "--json"],
        ["stop", "planner_tone", "--reason", "enough", "--json"],
        ["list", "--status", "active", "--json"],
    )
    assert [(code, err) for code, _, err in told] == [(0, "")] * 9
    found = [json.loads(out) for _, out, _ in told]
    statuses = [f["status"] for f in found[:6]] + [found[7]["status"]]
    assert statuses == ["draft", "active", "active", "paused", "active", "active", "completed"]
    assert [p["coverage"] for p in found[5]["phases"]] == [2_000, 5_000]
    assert found[5]["exposures"] == {"n_units": 0, "n_two_variants": 0, "n_unassigned": 0, "n_unknown": 0}
    assert [e["key"] for e in found[6]] == ["planner_tone"] and found[8] == []
    assert {"key", "hypothesis", "digest", "author", "variants", "metrics", "ends_at"} <= found[0].keys()
    assert [(v["low"], v["high"], v["control"]) for v in found[0]["variants"]] == [
        (0, 5_000, True),
        (5_000, 10_000, False),
    ]


def test_people_read_lines_and_mistakes_are_one_line_with_an_exit_code(project):
    told = project(
        ["create", "tone.yaml"],
        ["start", "planner_tone", "--coverage", "0.5"],
        ["start", "planner_tone"],
        ["start", "planner_ton"],
        ["ramp", "planner_tone", "0.1"],
        ["show", "planner_tone"],
        ["stop", "planner_tone"],
        ["create", "nowhere.yaml"],
        ["list"],
    )
    codes = [code for code, _, _ in told]
    assert codes == [0, 2, 0, 1, 2, 0, 0, 2, 0]
    assert told[0][1] == "planner_tone is draft\n"
    assert "at first it is in [1, 2000]" in told[1][2]
    assert told[2][1] == "planner_tone is active, phase 1: 20.00% of every arm\n"
    assert "there is no experiment 'planner_ton': did you mean 'planner_tone'" in told[3][2]
    assert (
        "it is only raised" in told[4][2]
        and "0 units exposed" in told[5][1]
        and "planner_tone is completed" in told[6][1]
    )
    assert "cannot be read" in told[7][2] and "planner_tone  completed" in told[8][1]
    assert all(told[i][2].count("\n") == 1 for i in (1, 3, 4, 7))
