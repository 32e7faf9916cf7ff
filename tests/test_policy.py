"""Stages and policies survive a crash at any step, and a repeated call changes nothing."""

import json
from types import SimpleNamespace

import psycopg
import pytest

from mlops_workbench import policy as policy_room
from mlops_workbench import registry as registry_room
from mlops_workbench.core import WorkbenchError
from mlops_workbench.gate import Verdict
from mlops_workbench.ledger import read_ledger, verify_ledger
from mlops_workbench.policy import promote, read_policies, read_production
from mlops_workbench.registry import fetch_model, read_version, read_versions, register_model, settle
from mlops_workbench.settings import Settings
from mlops_workbench.store import transaction
from mlops_workbench.tracking import end_run, open_tracking, start_run

PASSED = Verdict(outcome="pass", reasons=("plan_alignment is above the baseline",))
UNSURE = Verdict(outcome="not enough evidence", reasons=("plan_alignment could be either",))


class Bench:
    def __init__(self, store, folder):
        self.store, self.folder = store, folder
        self.settings = Settings("local", folder, folder / "home", store.url)
        self.tracking = open_tracking(store, self.settings)

    def trained(self, text):
        files = self.folder / text
        files.mkdir()
        (files / "model.json").write_text(json.dumps(text))
        run = start_run(self.tracking, "planner", "train", {})
        version = register_model(run, SimpleNamespace(name="planner"), "mlops_workbench.planner", files, "d" * 64)
        end_run(run)
        return version

    def agrees(self):
        "Ledger, registry and policy tell the same story."
        serving = read_production(self.store, "planner")
        stages = {v.version: v.stage for v in read_versions(self.tracking, "planner")}
        assert [n for n, stage in stages.items() if stage == "production"] == [serving.model_version]
        alias = self.tracking.client.get_model_version_by_alias("planner", "production")
        assert int(alias.version) == serving.model_version
        with transaction(self.store) as connection:
            assert verify_ledger(connection).ok
            promoted = [e for e in read_ledger(connection) if e.action == "policy.promote"]
        assert promoted[-1].subject["model_version"] == serving.model_version
        assert len(promoted) == len(read_policies(self.store, "planner"))


@pytest.fixture
def bench(store, tmp_path):
    return Bench(store, tmp_path)


@pytest.mark.parametrize("crash_at", range(1, 5))
def test_promotion_can_be_repeated_after_a_crash_at_each_step(bench, monkeypatch, crash_at):
    for text in ("first", "second"):
        version = settle(bench.tracking, bench.store, bench.trained(text), PASSED, "t")
        if text == "first":
            promote(bench.tracking, bench.store, version, PASSED, "t")
    steps, move = iter(range(1, 5)), registry_room.move_stage

    def crashing(*arguments):
        if next(steps) == crash_at:
            raise KeyboardInterrupt
        result = move(*arguments)
        if next(steps) == crash_at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(policy_room, "move_stage", crashing)
    with pytest.raises(KeyboardInterrupt):
        promote(bench.tracking, bench.store, version, PASSED, "t")
    monkeypatch.undo()
    promote(bench.tracking, bench.store, read_version(bench.tracking, "planner", 2), PASSED, "t")
    bench.agrees()
    assert read_production(bench.store, "planner").model_version == 2


def test_an_unsure_verdict_promotes_nobody(bench):
    version = settle(bench.tracking, bench.store, bench.trained("unsure"), UNSURE, "t")
    assert version.stage == "rejected"
    for verdict in (UNSURE, PASSED):
        with pytest.raises(WorkbenchError):
            promote(bench.tracking, bench.store, version, verdict, "t")
    assert read_production(bench.store, "planner") is None


def test_the_database_allows_one_production_version(bench):
    version = settle(bench.tracking, bench.store, bench.trained("one"), PASSED, "t")
    promote(bench.tracking, bench.store, version, PASSED, "t")
    second = "INSERT INTO exp.policy_versions (policy, version, status) VALUES ('planner', 2, 'production')"
    with pytest.raises(psycopg.errors.UniqueViolation), transaction(bench.store) as connection:
        connection.execute(second)


def test_files_that_changed_are_not_used(bench):
    version = bench.trained("good")
    kept = fetch_model(bench.tracking, bench.settings, version)
    (kept / "model.json").write_text("tampered")
    assert (fetch_model(bench.tracking, bench.settings, version) / "model.json").read_text() == '"good"'
    (stored,) = bench.settings.home.glob("artifacts/**/model.json")
    stored.write_text("tampered")
    (kept / "model.json").write_text("tampered")
    with pytest.raises(WorkbenchError, match="have changed since it was registered"):
        fetch_model(bench.tracking, bench.settings, version)
