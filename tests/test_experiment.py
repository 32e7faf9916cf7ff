"Experiments: what is refused, what cannot change, and what a step leaves behind."

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
import yaml

from mlops_workbench import clearance
from mlops_workbench import experiment as room
from mlops_workbench.assignment import assign
from mlops_workbench.clearance import add_unit_type
from mlops_workbench.core import WorkbenchError, as_utc, utc_now
from mlops_workbench.design import check_design, describe_design, overlap, to_design
from mlops_workbench.experiment import (
    Experiment,
    MetricPlan,
    Variant,
    allocation_at,
    create_experiment,
    first_coverage,
    pause_experiment,
    ramp_experiment,
    read_allocations,
    read_experiment,
    read_experiment_file,
    read_experiments,
    resume_experiment,
    start_experiment,
    stop_experiment,
)
from mlops_workbench.gate import Verdict
from mlops_workbench.ledger import append_entry, read_ledger, verify_ledger
from mlops_workbench.policy import propose_policy, read_policy_version
from mlops_workbench.registry import read_version, register_model, settle
from mlops_workbench.settings import Settings
from mlops_workbench.store import read_rows, transaction, write_rows
from mlops_workbench.tracking import end_run, open_tracking, start_run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "params" / "experiments" / "planner_tone.yaml"
MONDAY = as_utc("2026-03-02T08:00:00Z")
ACCEPTANCE = MetricPlan("acceptance", "primary", "proportion", "plan_decided", "accepted")
EDITS = MetricPlan("edits", "guardrail", "mean", "plan_decided", "edits", margin=0.1, higher_is_better=False)
ARMS = (Variant("control", 0.5, 1, control=True), Variant("short", 0.5, 2))


def declared(key="short", **changes):
    design = {
        "key": key,
        "hypothesis": "Shorter plans are accepted more often.",
        "policy": "planner",
        "unit_type": "household",
        "variants": ARMS,
        "metrics": (ACCEPTANCE, EDITS),
        "mde": 0.05,
        "planned_n": 4_000,
        "ends_at": as_utc("2099-01-01T00:00:00Z"),
    }
    return Experiment(**design | changes)


def propose(store, *statuses):
    "Write policy versions that the rule answers."
    with transaction(store) as connection:
        write_rows(connection, "exp.policies", [{"policy": "planner", "task": "planner"}], ("policy",))
        rows = [{"policy": "planner", "version": i + 1, "status": s} for i, s in enumerate(statuses)]
        write_rows(connection, "exp.policy_versions", rows)


@pytest.fixture
def bench(store):
    propose(store, "production", "candidate", "candidate")
    return store


def started(store, **changes):
    found = create_experiment(store, declared(**changes), "ada")
    return start_experiment(store, found.key, "ada", at=MONDAY)


def actions(store, key="short"):
    with transaction(store) as connection:
        assert verify_ledger(connection).ok
        return [e.action.removeprefix("experiment.") for e in read_ledger(connection, subject={"experiment": key})]


def execute(store, statement):
    with transaction(store) as connection:
        connection.execute(statement)


# Declarations


def test_the_worked_example_is_right_and_survives_writing():
    found = read_experiment_file(EXAMPLE)
    assert check_design(found, as_utc("2026-11-01T00:00:00Z")) == []
    assert to_design(json.loads(json.dumps(describe_design(found)))).digest == found.digest
    assert found.control == "control" and [a.name for a in found.treatments] == ["reasons"]
    assert found.phases == () and found.allocation().phase is None


REFUSED = [
    ({"variants": (Variant("control", 0.5, 1, control=True), Variant("short", 0.4, 2))}, "sum to 0.9, expected 1"),
    ({"variants": (Variant("control", 0.9, 1, control=True), Variant("short", 0.9, 2))}, "sum to 1.8, expected 1"),
    ({"variants": (Variant("control", 0.5, 1), Variant("short", 0.5, 2))}, "0 variants are marked as control"),
    ({"variants": tuple(replace(v, control=True) for v in ARMS)}, "2 variants are marked as control"),
    ({"variants": ARMS[:1]}, "name at least two"),
    ({"variants": (ARMS[0], replace(ARMS[1], name="control"))}, "name at least two, each differently"),
    ({"metrics": (EDITS,)}, "no metric is primary"),
    ({"metrics": (ACCEPTANCE, ACCEPTANCE)}, "plan each once"),
    ({"metrics": (ACCEPTANCE, replace(EDITS, margin=0.0))}, "give the guardrail a margin"),
    ({"metrics": (replace(ACCEPTANCE, margin=0.1),)}, "make it a guardrail"),
    ({"metrics": (replace(ACCEPTANCE, kind="ratio"),)}, "name a denominator"),
    ({"metrics": (replace(ACCEPTANCE, denominator="plan_proposed"),)}, "a proportion has no denominator"),
    ({"metrics": (replace(ACCEPTANCE, kind="quantile", value=""),)}, "a quantile is of a value"),
    ({"metrics": (replace(ACCEPTANCE, winsor=0.01),)}, "is not winsorised"),
    ({"metrics": (replace(ACCEPTANCE, kind="quantile", covariate=True),)}, "takes no covariate"),
    ({"metrics": (replace(ACCEPTANCE, role="main"),)}, "metric 1: role is 'main'"),
    ({"metrics": (replace(EDITS, winsor=0.5), ACCEPTANCE)}, r"winsor is 0.5, expected float in \[0, 0.5\)"),
    ({"unit_type": "houshold"}, "unit type 'houshold' is not known: did you mean 'household'"),
    ({"ends_at": as_utc("2020-01-01T00:00:00Z")}, "ends_at is 2020-01-01, which is over"),
    ({"key": "Short Plans"}, "use lower case letters"),
    ({"hypothesis": " "}, "hypothesis is empty"),
    ({"namespace": ("planner", 0.5, 0.5)}, r"write a name and a range within \[0, 1\]"),
    ({"forced": {"h1": "shrt"}}, "unit 'h1' is forced into 'shrt': did you mean 'short'"),
    ({"condition": {"size": {"$bigger": 2}}}, "which is no operator"),
    ({"mde": 0.0}, r"mde is 0.0, expected float in \(0, inf\]"),
    ({"planned_n": 0}, "planned_n is 0"),
    ({"power": 1.0}, "power is 1.0"),
    ({"holdout": 10_000}, "holdout is 10000"),
]


def test_a_declaration_that_could_not_be_analysed_is_refused(bench):
    for changes, words in REFUSED:
        with pytest.raises(ValueError, match=words) as error:
            create_experiment(bench, declared(**changes), "ada")
        assert "\n" not in str(error.value)
        assert read_experiments(bench) == [] and actions(bench) == []


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.pop("hypothesis"), "has no hypothesis: say it before the start"),
        (lambda c: c.pop("variants"), "has no variants"),
        (lambda c: c.update(varaints=[]), "no parameter 'varaints': did you mean 'variants'"),
        (lambda c: c.update(metrics="acceptance"), "metrics is 'acceptance': write a list"),
        (lambda c: c["variants"].append("third"), "variant 3 is 'third': write it as names with values"),
        (lambda c: c["metrics"][0].update(marign=0.1), "no parameter 'marign': did you mean 'margin'"),
        (lambda c: c.update(ends_at="2027-03-31"), "write a time with its zone"),
        (lambda c: c.update(ends_at="soon"), "ends_at is soon"),
        (lambda c: c.update(planned_n="many"), "planned_n is 'many'"),
        (lambda c: c.update(namespace="planner"), "namespace is 'planner'"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path, change, words):
    content = yaml.safe_load(EXAMPLE.read_text())
    change(content)
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=words):
        read_experiment_file(tmp_path / "e.yaml")


@pytest.mark.parametrize(
    "text, words", [("{", "is not YAML"), ("- 1", "holds no declaration"), (None, "cannot be read")]
)
def test_a_file_that_holds_nothing_is_refused(tmp_path, text, words):
    if text:
        (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_experiment_file(tmp_path / "e.yaml")
    assert "\n" not in str(error.value)


def test_a_new_kind_of_unit_can_be_made_known(bench):
    add_unit_type(bench, "shop")
    assert create_experiment(bench, declared(unit_type="shop"), "ada").unit_type == "shop"
    with pytest.raises(ValueError, match="use lower case letters"):
        add_unit_type(bench, "My Shop")


def test_a_policy_version_that_is_not_there_is_refused(bench):
    missing = declared(variants=(ARMS[0], Variant("short", 0.5, 9)))
    with pytest.raises(
        WorkbenchError, match="variant 'short': policy 'planner' has no version 9: it has versions 1, 2, 3"
    ):
        create_experiment(bench, missing, "ada")
    with pytest.raises(WorkbenchError, match="nothing was ever proposed for it"):
        create_experiment(bench, declared(policy="planer"), "ada")


# Steps


def test_a_life_from_draft_to_completed(bench):
    found = started(bench)
    assert (found.status, found.phases[0].coverage, found.phases[0].started_at) == ("active", 2_000, MONDAY)
    assert ramp_experiment(bench, "short", 10_000, "ada").phases[1].arms == found.phases[0].arms
    assert pause_experiment(bench, "short", "ada", "a fault").status == "paused"
    assert resume_experiment(bench, "short", "ada").status == "active"
    assert stop_experiment(bench, "short", "ada", "enough").status == "completed"
    assert actions(bench) == ["create", "start", "ramp", "pause", "resume", "stop"]
    with transaction(bench) as connection:
        entries = read_ledger(connection, subject={"experiment": "short", "digest": found.digest})
        phases = read_rows(
            connection, "SELECT phase, coverage, ended_at IS NULL AS open FROM exp.experiment_phases ORDER BY 1"
        )
    assert [e.evidence["phase"] for e in entries] == [0, 1, 2, 2, 2, 2] and entries[1].held_from == MONDAY
    assert [tuple(p.values()) for p in phases] == [(1, 2_000, False), (2, 10_000, False)]


def test_every_step_can_be_repeated(bench):
    for _ in range(2):
        create_experiment(bench, declared(), "ada")
    for _ in range(2):
        start_experiment(bench, "short", "ada", at=MONDAY)
    for step in (pause_experiment, resume_experiment):
        assert step(bench, "short", "ada") == step(bench, "short", "bo")
    for _ in range(2):
        ramp_experiment(bench, "short", 5_000, "ada")
    for _ in range(2):
        stop_experiment(bench, "short", "ada", "enough")
    assert actions(bench) == ["create", "start", "pause", "resume", "ramp", "stop"]


def test_a_draft_may_be_declared_anew_and_what_runs_may_not(bench):
    create_experiment(bench, declared(), "ada")
    again = create_experiment(bench, declared(mde=0.1, variants=(*ARMS[:1], Variant("short", 0.5, 3))), "ada")
    assert again.mde == 0.1 and read_experiment(bench, "short").arms[1].policy_version == 3
    start_experiment(bench, "short", "ada")
    with pytest.raises(WorkbenchError, match="is active, what it declared is fixed: stop it and give the changed one"):
        create_experiment(bench, declared(), "ada")
    assert actions(bench) == ["create", "create", "start"]


TOO_EARLY_OR_LATE = [
    ("draft", lambda s: ramp_experiment(s, "short", 5_000, "ada"), "is draft, ramp needs active: start it first"),
    ("draft", lambda s: pause_experiment(s, "short", "ada"), "is draft, pause needs active"),
    ("draft", lambda s: stop_experiment(s, "short", "ada", "no"), "is draft, stop needs active or paused"),
    ("active", lambda s: start_experiment(s, "short", "ada", 1_000), "is active, start needs draft: it runs"),
    (
        "paused",
        lambda s: ramp_experiment(s, "short", 5_000, "ada"),
        "is paused, ramp needs active: resume it first",
    ),
    ("paused", lambda s: start_experiment(s, "short", "ada"), "is paused, start needs draft: resume it first"),
    ("completed", lambda s: start_experiment(s, "short", "ada"), "is completed, start needs draft: it is over"),
    ("completed", lambda s: resume_experiment(s, "short", "ada"), "is completed, resume needs paused: it is over"),
    ("completed", lambda s: ramp_experiment(s, "short", 5_000, "ada"), "is completed, ramp needs active"),
]


def test_a_step_that_comes_too_early_or_too_late_is_told(bench):
    create_experiment(bench, declared(), "ada")
    reach = {
        "active": lambda: start_experiment(bench, "short", "ada"),
        "paused": lambda: pause_experiment(bench, "short", "ada"),
        "completed": lambda: stop_experiment(bench, "short", "ada", "enough"),
    }
    for status, step, words in TOO_EARLY_OR_LATE:  # in the order of a life
        if read_experiment(bench, "short").status != status:
            reach[status]()
        before = actions(bench)
        with pytest.raises(WorkbenchError, match=words):
            step(bench)
        assert actions(bench) == before and read_experiment(bench, "short").status == status


def test_a_new_variant_begins_with_a_tenth_of_the_units(bench):
    three = (Variant("control", 0.34, 1, control=True), Variant("short", 0.33, 2), Variant("long", 0.33, 3))
    for shares in (ARMS, three, (Variant("control", 0.9, 1, control=True), Variant("short", 0.1, 2))):
        one = declared(variants=shares)
        served = [a.served_end(first_coverage(one)) - a.low for a in one.treatments]
        more = [a.served_end(first_coverage(one) + 4) - a.low for a in one.treatments]
        assert max(served) <= 1_000 and (max(more) > 1_000 or first_coverage(one) == 10_000)
    create_experiment(bench, declared(), "ada")
    for coverage in (0, 2_001, 10_000):
        with pytest.raises(ValueError, match=rf"coverage is {coverage}, at first it is in \[1, 2000\]"):
            start_experiment(bench, "short", "ada", coverage)


LESS = [4_999, 0, -1, 10_001]


def test_coverage_is_only_raised(bench):
    started(bench)
    ramp_experiment(bench, "short", 5_000, "ada")
    for coverage in LESS:
        with pytest.raises(
            ValueError, match="expected above 5000 and at most 10000: it is only raised, stopping takes"
        ):
            ramp_experiment(bench, "short", coverage, "ada")
        assert len(read_experiment(bench, "short").phases) == 2


def test_raising_coverage_moves_nobody(bench):
    three = (Variant("control", 0.34, 1, control=True), Variant("short", 0.33, 2), Variant("long", 0.33, 3))
    found, seen = started(bench, variants=three), {}
    for coverage in range(3_500, 10_001, 650):
        for unit in (f"h{i}" for i in range(300)):
            if variant := assign(found, unit).variant:
                assert seen.setdefault(unit, variant) == variant
        found = ramp_experiment(bench, "short", coverage, "ada")
    assert len(seen) > 250


# Others in the way


def test_ranges_of_a_namespace_do_not_overlap(bench):
    started(bench, namespace=("planner", 0, 0.5))
    create_experiment(bench, declared("wide", namespace=("planner", 0.4, 1)), "ada")
    with pytest.raises(
        ValueError, match="0.4 to 1 of namespace 'planner' overlaps with 0 to 0.5 of experiment 'short'"
    ):
        start_experiment(bench, "wide", "ada")
    pause_experiment(bench, "short", "ada")
    with pytest.raises(ValueError, match="overlaps"):  # a paused one goes on where it was
        start_experiment(bench, "wide", "ada")
    stop_experiment(bench, "short", "ada", "enough")
    assert start_experiment(bench, "wide", "ada").status == "active"
    started(bench, key="beside", namespace=("planner", 0, 0.4))


def test_the_database_refuses_an_overlap_too(bench):
    started(bench, namespace=("planner", 0, 0.5))
    create_experiment(bench, declared("wide", namespace=("planner", 0.4, 1)), "ada")
    with pytest.raises(psycopg.errors.ExclusionViolation):
        execute(bench, "UPDATE exp.experiments SET status = 'active' WHERE key = 'wide'")


def test_one_experiment_decides_which_version_of_a_policy_answers(bench):
    started(bench)
    create_experiment(bench, declared("other"), "ada")
    with pytest.raises(ValueError, match="experiment 'short' already decides which version of policy 'planner' serves"):
        start_experiment(bench, "other", "ada")
    words = (Variant("plain", 0.5, 1, control=True), Variant("warm", 0.5, 1, {"tone": "warm"}))
    assert started(bench, key="words", variants=words).status == "active"
    assert overlap(declared(), declared("sessions", unit_type="session")) == ""


def test_two_starts_at_once_leave_one(bench):
    for key in ("short", "other"):
        create_experiment(bench, declared(key), "ada")
    gate = threading.Barrier(2)

    def start(key):
        gate.wait()
        try:
            return start_experiment(bench, key, "ada").status
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(start, ("short", "other")))
    assert sorted(t == "active" for t in told) == [False, True] and any("already decides" in t for t in told)


def test_the_same_command_at_once_is_one_step(bench):
    started(bench)

    def raise_to(coverage):
        try:
            return len(ramp_experiment(bench, "short", coverage, "ada").phases)
        except (ValueError, WorkbenchError) as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(raise_to, [5_000] * 6))
    assert told == [2] * 6 and actions(bench) == ["create", "start", "ramp"]
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda i: stop_experiment(bench, "short", f"a{i}", "enough").status, range(4)))
    assert told == ["completed"] * 4 and actions(bench)[-1:] == ["stop"] and len(actions(bench)) == 4


def test_of_two_different_commands_the_second_is_told(bench):
    started(bench)
    gate = threading.Barrier(2)

    def run(step):
        gate.wait()
        try:
            return step().status
        except WorkbenchError as error:
            return str(error)

    steps = [
        lambda: stop_experiment(bench, "short", "ada", "enough"),
        lambda: ramp_experiment(bench, "short", 9_000, "bo"),
    ]
    with ThreadPoolExecutor(2) as pool:
        stopped, ramped = pool.map(run, steps)
    assert stopped == "completed"
    assert ramped == "active" or "is completed, ramp needs active" in ramped
    assert actions(bench)[-1] == "stop"


# What the database holds by itself


FORBIDDEN = [
    ("UPDATE exp.variants SET high = 9000 WHERE variant = 'short'", "its variants stay as they are"),
    ("UPDATE exp.variants SET parameters = '{\"x\": 1}' WHERE variant = 'short'", "its variants stay as they are"),
    ("DELETE FROM exp.variants WHERE variant = 'short'", "its variants stay as they are"),
    ("UPDATE exp.experiment_phases SET coverage = 9000", "it can only be ended, once"),
    ("UPDATE exp.experiment_phases SET arms = '[]'", "it can only be ended, once"),
    ("DELETE FROM exp.experiment_phases", "it cannot be deleted"),
    ("UPDATE exp.experiments SET definition = '{}'", "stop it and create another one"),
    ("UPDATE exp.experiments SET ends_at = now()", "stop it and create another one"),
    ("UPDATE exp.experiments SET status = 'draft'", "it cannot become draft"),
    ("DELETE FROM exp.experiments", "violates foreign key"),
    ("UPDATE exp.experiment_states SET since = now()", "stays as it was written"),
    ("DELETE FROM exp.experiment_states", "stays as it was written"),
    ("TRUNCATE exp.experiments CASCADE", "stays as it was written"),
    ("INSERT INTO exp.experiment_phases VALUES ('short', 2, 10000, '[]', now())", "a phase follows the one before"),
    (
        "INSERT INTO exp.experiment_phases VALUES ('short', 3, 20000, '[]', now())",
        "a phase follows|check constraint",
    ),
]


def test_a_started_experiment_is_beyond_change(bench):
    before = started(bench)
    for statement, words in FORBIDDEN:
        with pytest.raises(psycopg.Error, match=words):
            execute(bench, statement)
        assert read_experiment(bench, "short") == before


def test_no_phase_begins_on_arms_that_leave_buckets_out(bench):
    create_experiment(bench, declared(), "ada")
    execute(bench, "UPDATE exp.variants SET high = 4000 WHERE variant = 'control'")
    with pytest.raises(psycopg.Error, match="its variants must fill the 10,000 buckets"):
        start_experiment(bench, "short", "ada")
    assert read_experiment(bench, "short").status == "draft" and actions(bench) == ["create"]


def test_a_step_is_written_with_its_entry_or_not_at_all(bench, monkeypatch):
    started(bench)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "append_entry", fail)
    with pytest.raises(KeyboardInterrupt):
        ramp_experiment(bench, "short", 5_000, "ada")
    monkeypatch.undo()
    assert len(read_experiment(bench, "short").phases) == 1
    assert len(ramp_experiment(bench, "short", 5_000, "ada").phases) == 2


# Time


def test_a_clock_that_is_set_back_does_not_turn_steps_around(bench, monkeypatch):
    create_experiment(bench, declared(), "ada")
    start_experiment(bench, "short", "ada")
    since = read_experiment(bench, "short").phases[0].started_at
    monkeypatch.setattr(clearance, "utc_now", lambda: since - timedelta(hours=1))
    assert ramp_experiment(bench, "short", 5_000, "ada").phases[1].started_at == since
    assert stop_experiment(bench, "short", "ada", "enough").status == "completed"
    assert allocation_at(bench, "short", since).status == "completed"


def test_a_time_that_somebody_names_is_in_order(bench):
    started(bench)
    with pytest.raises(WorkbenchError, match="is before the last step of experiment 'short'"):
        ramp_experiment(bench, "short", 5_000, "ada", at=MONDAY - timedelta(hours=1))
    with pytest.raises(ValueError, match="is in the future"):
        ramp_experiment(bench, "short", 5_000, "ada", at=utc_now() + timedelta(days=3))
    with pytest.raises(ValueError, match="no time zone"):
        ramp_experiment(bench, "short", 5_000, "ada", at=MONDAY.replace(tzinfo=None))


def test_what_was_in_force_at_every_time(bench):
    def at(hour):
        return MONDAY + timedelta(hours=hour)

    started(bench)
    ramp_experiment(bench, "short", 4_000, "ada", at=at(1))
    pause_experiment(bench, "short", "ada", at=at(2))
    resume_experiment(bench, "short", "ada", at=at(3))
    ramp_experiment(bench, "short", 10_000, "ada", at=at(4))
    stop_experiment(bench, "short", "ada", "enough", at=at(5))
    found = [allocation_at(bench, "short", at(hour)) for hour in (-1, 0, 0.5, 1, 2, 3, 4, 5, 100)]
    phases = [(a.status, a.phase.number if a.phase else 0) for a in found]
    expected = [("draft", 0), ("active", 1), ("active", 1), ("active", 2), ("paused", 2), ("active", 2), ("active", 3)]
    assert phases == [*expected, ("completed", 3), ("completed", 3)]


def test_an_arm_whose_policy_version_was_rolled_back_serves_nobody(bench):
    found = started(bench)
    unit = next(f"h{i}" for i in range(1_000) if assign(found, f"h{i}").variant == "short")
    execute(bench, "UPDATE exp.policy_versions SET status = 'rolled_back' WHERE version = 2")
    (allocation,) = read_allocations(bench)
    assert assign(allocation, unit).reason == "rolled_back"
    assert assign(found.allocation(barred={2}), unit).variant is None
    create_experiment(bench, declared("later", variants=(ARMS[0], Variant("new", 0.5, 3))), "ada")
    with pytest.raises(WorkbenchError, match="version 2 was rolled back"):
        create_experiment(bench, declared("again"), "ada")


def test_a_rollback_counts_from_its_moment_until_the_version_serves_again(bench):
    def decide(action, version, hour):
        with transaction(bench) as connection:
            subject = {"policy": "planner", "version": version}
            append_entry(connection, action, "ada", subject, {}, MONDAY + timedelta(hours=hour))

    found = started(bench)
    decide("policy.promote", 2, 1)
    decide("policy.rollback", 2, 3)
    decide("policy.promote", 1, 3)
    decide("policy.promote", 2, 5)
    barred = [allocation_at(bench, "short", MONDAY + timedelta(hours=h)).barred for h in (2, 4, 6)]
    assert barred == [frozenset(), {2}, frozenset()] and found.allocation().barred == frozenset()


# Models


class Models:
    def __init__(self, store, folder):
        self.store, self.folder = store, folder
        self.settings = Settings("local", folder, folder / "home", store.url)
        self.tracking = open_tracking(store, self.settings)

    def proposed(self, text):
        files = self.folder / text
        files.mkdir()
        (files / "model.json").write_text(text)
        run = start_run(self.tracking, "planner", "train", {})
        version = register_model(run, SimpleNamespace(name="planner"), "mlops_workbench.planner", files, "d" * 64)
        end_run(run)
        passed = Verdict(outcome="pass", reasons=("better",))
        version = settle(self.tracking, self.store, version, passed, "ada")
        return propose_policy(self.tracking, self.store, version, {}, "ada")

    def stages(self, version):
        policy = read_policy_version(self.store, "planner", version).status
        return policy, read_version(self.tracking, "planner", version).stage


@pytest.fixture
def models(store, tmp_path):
    found = Models(store, tmp_path)
    for text in ("first", "second"):
        found.proposed(text)
    return found


def test_models_meet_people_while_the_experiment_runs(models):
    create_experiment(models.store, declared(), "ada")
    with pytest.raises(ValueError, match="is answered by a model: pass tracking"):
        start_experiment(models.store, "short", "ada")
    for _ in range(2):
        start_experiment(models.store, "short", "ada", tracking=models.tracking)
    assert models.stages(2) == ("experiment", "experiment") and models.stages(1) == ("candidate", "candidate")
    stop_experiment(models.store, "short", "ada", "enough", models.tracking)
    assert models.stages(2) == ("candidate", "candidate")
    assert actions(models.store) == ["create", "start", "stop"]


def test_a_policy_version_whose_model_was_deleted_does_not_start(models):
    create_experiment(models.store, declared(), "ada")
    (stored,) = [p for p in models.settings.home.glob("artifacts/**/model.json") if p.read_text() == "second"]
    stored.unlink()
    with pytest.raises(WorkbenchError, match="variant 'short': planner@2 cannot answer, files of planner v2"):
        start_experiment(models.store, "short", "ada", tracking=models.tracking)
    models.tracking.client.delete_model_version("planner", "2")
    with pytest.raises(WorkbenchError, match="model 'planner' has no version 2.* whose model is there") as error:
        start_experiment(models.store, "short", "ada", tracking=models.tracking)
    assert "\n" not in str(error.value)
    assert read_experiment(models.store, "short").status == "draft" and actions(models.store) == ["create"]
