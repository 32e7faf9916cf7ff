"The commands about decisions, by the command that people use."

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlops_workbench.core import as_utc
from mlops_workbench.ledger import append_entry
from mlops_workbench.store import connect, transaction, write_rows

WORKBENCH = str(Path(sys.executable).parent / "workbench")
START = as_utc("2026-03-02T08:00:00Z")


@pytest.fixture
def project(tmp_path, store, monkeypatch):
    "Two versions of the rule, of which the second serves."
    (tmp_path / "settings.ini").write_text("[local]\n")
    with transaction(store) as connection:
        connection.execute("INSERT INTO exp.policies (policy, task) VALUES ('planner', 'mlops_workbench.planner')")
        for version in (1, 2):
            subject = {"policy": "planner", "version": version}
            evidence = {
                "outcome": "pass",
                "reasons": ["good"],
                "replaced": version - 1 or None,
                "settings": {"n": version},
            }
            at = START.replace(day=version * 7)
            entry = append_entry(connection, "policy.promote", "ana", subject, evidence, at)
            status = "production" if version == 2 else "retired"
            row = subject | {"settings": {"n": version}, "status": status, "entry": entry.seq, "author": "ana"}
            write_rows(connection, "exp.policy_versions", [row])
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)
    monkeypatch.setenv("WORKBENCH_ACTOR", "ben")
    monkeypatch.delenv("WORKBENCH_HOME", raising=False)
    return tmp_path


def workbench(project, *arguments, code=0):
    done = subprocess.run([WORKBENCH, *arguments], cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, (
        f"{arguments} ended with {done.returncode}\n{done.stdout[-900:]}\n{done.stderr[-900:]}"
    )
    if done.stderr:
        assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    return done.stdout or done.stderr


def test_the_ledger_is_anchored_checked_shown_and_exported(project, store):
    assert "no anchor vouches for the entries 1 to 2" in workbench(project, "ledger", "verify")
    assert "entry 2 with digest" in workbench(project, "ledger", "anchor")
    assert "2 entries and 2 anchors fit together" in workbench(project, "ledger", "verify", "--strict")
    said = json.loads(workbench(project, "ledger", "show", "planner@2", "--json"))
    assert [(e["seq"], e["actor"], e["subject"]["version"]) for e in said] == [(2, "ana", 2)]
    assert "planner@1  pass: good" in workbench(project, "ledger", "show", "--until", "2026-03-10T00:00:00Z")
    workbench(project, "ledger", "export", "ledger.jsonl")
    assert "2 entries fit together" in workbench(project, "ledger", "verify", "--file", "ledger.jsonl")
    with connect(store) as connection:  # what an administrator can do with psql
        connection.execute("GRANT ALL ON exp.ledger TO CURRENT_USER")
        connection.execute("ALTER TABLE exp.ledger DISABLE TRIGGER ALL")
        connection.execute("""UPDATE exp.ledger SET evidence = evidence || '{"outcome": "fail"}' WHERE seq = 1""")
        connection.commit()
    told = json.loads(workbench(project, "ledger", "verify", "--json", code=1))
    assert (told["ok"], told["first_bad_seq"]) == (False, 1)
    assert "entry 1 was changed after it was written" in workbench(project, "ledger", "verify", code=1)
    assert "nothing was exported" in workbench(project, "ledger", "export", "other.jsonl", code=1)
    lines = (project / "ledger.jsonl").read_text().splitlines(keepends=True)
    (project / "ledger.jsonl").write_text(lines[0].replace("ana", "bob") + lines[1])
    assert "DO NOT FIT" in workbench(project, "ledger", "verify", "--file", "ledger.jsonl", code=1)


def test_going_back_is_told_explained_and_anchored(project, store):
    assert "reason is empty" in workbench(project, "rollback", "planner", "--reason", " ", code=2)
    assert "in production: planner policy 1" in workbench(project, "rollback", "planner", "--reason", "fewer accepted")
    assert "fit together" in workbench(project, "ledger", "verify", "--strict")
    rows = json.loads(workbench(project, "history", "planner", "--json"))
    assert [r["action"] for r in rows][-2:] == ["policy.rollback", "policy.promote"]
    assert {r["actor"] for r in rows[-2:]} == {"ben"} and rows[-1]["reason"] == "fewer accepted"
    assert "planner@1 → planner@2 serves; n: 1 → 2" in workbench(project, "history", "planner")
    asked = ("explain", "--unit", "h-1", "--at", "2026-03-15T08:00:00Z")
    found = json.loads(workbench(project, *asked, "--json"))
    assert (found["policy_version"], found["source"], found["decided"]["actor"]) == (2, "production", "ana")
    assert found["unit_type"] == "household"
    assert "served by    planner@2 (production)" in workbench(project, *asked)
    assert json.loads(workbench(project, "explain", "--unit", "h-1", "--json"))["policy_version"] == 1


def test_wrong_requests_are_told_in_a_line(project):
    assert "there is no policy 'planer'" in workbench(project, "history", "planer", code=1)
    assert "write a time with its zone" in workbench(project, "explain", "--unit", "h-1", "--at", "15 March", code=2)
    assert "such as planner@3" in workbench(project, "approve", "planner", "--reason", "fine", code=2)
    assert "has no version 9" in workbench(project, "approve", "planner@9", "--reason", "fine", code=1)
    assert "cannot be read" in workbench(project, "ledger", "verify", "--file", "nowhere.jsonl", code=1)
