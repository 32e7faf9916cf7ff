"Retention: what is due, exactly once, with sums and experiments left as they are."

from datetime import timedelta

import pytest

from mlops_workbench.aggregate import aggregate
from mlops_workbench.assignment import assign
from mlops_workbench.core import WorkbenchError, as_utc, stable_id
from mlops_workbench.events import Event, read_events, write_events
from mlops_workbench.experiment import (
    Experiment,
    MetricPlan,
    Variant,
    create_experiment,
    start_experiment,
    stop_experiment,
)
from mlops_workbench.exposure import expose
from mlops_workbench.retention import (
    EventClass,
    Retention,
    apply_retention,
    plan_retention,
    read_archive,
    read_retention,
)
from mlops_workbench.settings import Settings
from mlops_workbench.store import read_rows, transaction

NOW = as_utc("2026-09-15T00:00:00Z")
ARCHIVE = Retention((EventClass("*", 60, "archive", 365),))


@pytest.fixture
def settings(tmp_path):
    return Settings("local", tmp_path, tmp_path)


def fill(store, months=(1, 2, 8), units=("h0", "h1", "h2", "h3", "h4")):
    events = [
        Event(
            "plan_decided",
            "household",
            unit,
            as_utc(f"2026-{m:02}-1{i}T08:00:00Z"),
            id=stable_id(m, i),
            metrics={"accepted": 1},
        )
        for m in months
        for i, unit in enumerate(units)
    ]
    return write_events(store, events).n_new


def archives(store):
    with transaction(store) as connection:
        return read_rows(connection, "SELECT * FROM exp.event_archives ORDER BY type, month, part")


def test_a_month_leaves_the_log_when_its_last_moment_is_old_enough(store, settings):
    fill(store)
    done = apply_retention(store, settings, ARCHIVE, "ada", NOW)
    assert [(d.month, d.n, d.action) for d in done] == [("2026-01", 5, "archive"), ("2026-02", 5, "archive")]
    assert len(read_events(store, "plan_decided")) == 5
    assert [len(read_archive(settings, a)) for a in archives(store)] == [5, 5]
    assert apply_retention(store, settings, ARCHIVE, "ada", NOW) == []


def test_an_archived_event_that_is_sent_again_stays_archived(store, settings):
    fill(store, months=(1,))
    apply_retention(store, settings, ARCHIVE, "ada", NOW)
    assert fill(store, months=(1,)) == 0


def test_late_events_of_an_archived_month_become_another_part(store, settings):
    fill(store, months=(1,))
    apply_retention(store, settings, ARCHIVE, "ada", NOW)
    write_events(store, [Event("plan_decided", "household", "late", as_utc("2026-01-20T08:00:00Z"))])
    apply_retention(store, settings, ARCHIVE, "ada", NOW)
    assert [(a["part"], a["n_rows"]) for a in archives(store)] == [(1, 5), (2, 1)]


def test_a_file_left_by_a_crash_before_the_commit_is_written_again(store, settings, monkeypatch):
    fill(store, months=(1,))
    with monkeypatch.context() as patched:
        patched.setattr("mlops_workbench.retention.append_entry", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            apply_retention(store, settings, ARCHIVE, "ada", NOW)
    assert (len(read_events(store, "plan_decided")), archives(store)) == (5, [])
    apply_retention(store, settings, ARCHIVE, "ada", NOW)
    (archive,) = archives(store)
    assert (len(read_events(store, "plan_decided")), len(read_archive(settings, archive))) == (0, 5)


def test_archives_expire_and_keep_their_record(store, settings):
    fill(store, months=(1,))
    apply_retention(store, settings, ARCHIVE, "ada", NOW)
    apply_retention(store, settings, ARCHIVE, "ada", NOW + timedelta(days=500))
    (archive,) = archives(store)
    assert archive["removed_at"] is not None
    with pytest.raises(WorkbenchError, match="is gone"):
        read_archive(settings, archive)


def test_a_month_that_a_running_experiment_reads_stays_and_sums_survive_its_end(store, settings):
    begun = as_utc("2026-01-05T00:00:00Z")
    made = Experiment(
        "tone", "Friendlier is better.", "planner", "household",
        (Variant("control", 0.5, control=True), Variant("friendly", 0.5, parameters={"tone": "warm"})),
        (MetricPlan("acceptance", "primary", "proportion", "plan_decided", "accepted"),),
        mde=0.05, planned_n=100, ends_at=as_utc("2099-01-01T00:00:00Z"),
    )  # fmt: skip
    create_experiment(store, made, "ada")
    running = start_experiment(store, "tone", "ada", at=begun)
    served = [a for i in range(400) if (a := assign(running, f"h{i}")).variant][:5]
    expose(store, served, begun)
    fill(store, (1,), [a.unit_id for a in served])
    (due,) = [d for d in plan_retention(store, ARCHIVE, NOW) if d.name == "plan_decided"]
    assert due.action == "kept: experiment tone is computed from it"
    stop_experiment(store, "tone", "ada", "done", at=as_utc("2026-02-01T00:00:00Z"))
    aggregate(store)
    sums = "SELECT variant, sum(count) AS n FROM exp.metric_aggregates WHERE bucket = 'day' GROUP BY 1 ORDER BY 1"
    with transaction(store) as connection:
        before = read_rows(connection, sums)
    apply_retention(store, settings, ARCHIVE, "ada", NOW)
    aggregate(store)
    with transaction(store) as connection:
        assert (read_rows(connection, sums), bool(before)) == (before, True)
    assert len(read_events(store, "plan_decided")) == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("events: [{type: x, keep_days: 0, then: delete}]", "keep_days is 0"),
        ("events: [{type: x, keep_days: 9, then: burn}]", "write archive or delete"),
        ("events: [{type: x, keep: 9}]", "has 'keep'"),
        ("events: [{type: x}]", "it needs type, keep_days, then"),
        ("tables: [{table: exp.ledger, column: written_at, keep_days: 9}]", "holds what decisions rest on"),
        ("tables: [{table: 'exp.x; drop', column: a, keep_days: 9}]", "write schema and name"),
        ("archive: 3", "write events, tables or runs"),
        ("[1, 2]", "write events, tables or runs"),
    ],
)
def test_a_class_that_makes_no_sense_is_refused(tmp_path, text, told):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "retention.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_retention(tmp_path)


def test_without_a_file_everything_is_kept(store, settings, tmp_path):
    fill(store)
    assert plan_retention(store, read_retention(tmp_path), NOW) == []
