"Exposures: written once whoever sends them, acknowledged when committed, and refused in one line."

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest

from mlops_workbench import exposure
from mlops_workbench import gathering as room
from mlops_workbench.assignment import assign
from mlops_workbench.core import WorkbenchError, as_utc, utc_now
from mlops_workbench.events import Event, read_events, write_events
from mlops_workbench.exclusion import exposure_problems
from mlops_workbench.experiment import (
    Experiment,
    MetricPlan,
    Variant,
    create_experiment,
    pause_experiment,
    ramp_experiment,
    read_experiment,
    start_experiment,
    stop_experiment,
)
from mlops_workbench.exposure import expose, record_assignments
from mlops_workbench.gathering import Exposures
from mlops_workbench.store import Store, read_rows, transaction

MONDAY = as_utc("2026-03-02T08:00:00Z")
TUESDAY = MONDAY + timedelta(days=1)


def started(store, key="tone", **changes):
    design = {
        "key": key,
        "hypothesis": "Warm words are accepted more often.",
        "policy": "planner",
        "unit_type": "household",
        "variants": (Variant("control", 0.5, control=True), Variant("warm", 0.5, parameters={"tone": "warm"})),
        "metrics": (MetricPlan("acceptance", "primary", "proportion", "plan_decided", "accepted"),),
        "mde": 0.05,
        "planned_n": 4_000,
        "ends_at": as_utc("2099-01-01T00:00:00Z"),
    }
    create_experiment(store, Experiment(**design | changes), "ada")
    start_experiment(store, key, "ada", at=MONDAY)
    return ramp_experiment(store, key, 10_000, "ada", at=MONDAY)


def rows(store, sql="SELECT * FROM exp.assignments ORDER BY unit_id, phase"):
    with transaction(store) as connection:
        return read_rows(connection, sql)


# Once, whoever sends it


def test_first_requests_at_once_leave_one_row_and_one_answer_each(store):
    running, units = started(store), [f"h{i}" for i in range(500)]
    gate = threading.Barrier(4)

    def serve(_):
        "A server that meets every unit: it answers when the row is committed."
        with Exposures(Store(store.url), "service") as buffer:
            gate.wait()
            found = [assign(running, unit) for unit in units]
            waiting = [buffer.add(a, TUESDAY) for a in found]
            return [(a.variant, done.exception(timeout=60)) for a, done in zip(found, waiting, strict=True)]

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(serve, range(4)))
    assert [fault for server in told for _, fault in server if fault] == []
    kept = {row["unit_id"]: row["variant"] for row in rows(store)}
    assert len(rows(store)) == len(kept) == 500 and len(read_events(store, "exposure")) == 500
    assert all([variant for variant, _ in server] == [kept[unit] for unit in units] for server in told)
    assert exposure_problems(store, "tone").ok


SERVER = """
import sys
from mlops_workbench.assignment import assign
from mlops_workbench.experiment import read_experiment
from mlops_workbench.exposure import expose
from mlops_workbench.core import utc_now
from mlops_workbench.store import Store
store = Store(sys.argv[1])
running = read_experiment(store, "tone")
units = [f"h{i}" for i in range(500)]
print("ready", flush=True)
sys.stdin.readline()
n = sum(expose(store, [assign(running, u) for u in units[i : i + 25]], utc_now(), "service") for i in range(0, 500, 25))
print(n)
"""


def test_processes_that_write_the_same_units_at_once_do_not_fail(store):
    started(store)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    servers = [subprocess.Popen([sys.executable, "-c", SERVER, store.url], **pipes) for _ in range(2)]
    for server in servers:
        assert server.stdout.readline() == "ready\n"
    for server in servers:
        server.stdin.write("go\n")
        server.stdin.flush()
    told = [server.communicate(timeout=120) for server in servers]
    assert [error for _, error in told] == [""] * 2
    assert sum(int(out) for out, _ in told) == len(rows(store)) == 500


def test_one_by_one_at_once_is_one_row_too(store):
    running = started(store)
    units = [assign(running, f"h{i % 10}") for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda a: record_assignments(store, [a], TUESDAY), units)) == 10


DYING = """
import os, sys, threading
from mlops_workbench.assignment import assign
from mlops_workbench.experiment import read_experiment
from mlops_workbench.gathering import Exposures
from mlops_workbench.store import Store
store = Store(sys.argv[1])
running, buffer, lock = read_experiment(store, "tone"), Exposures(store, max_group=20), threading.Lock()
def tell(unit):
    def acknowledge(done):
        with lock:
            os.write(1, f"{unit}\\n".encode())
    return acknowledge
for i in range(100_000):
    try:
        buffer.add(assign(running, f"h{i}")).add_done_callback(tell(f"h{i}"))
    except Exception:
        buffer.flush()
"""


def test_what_was_acknowledged_survives_a_kill(store):
    started(store)
    server = subprocess.Popen([sys.executable, "-c", DYING, store.url], stdout=subprocess.PIPE, text=True)
    told = [server.stdout.readline().strip() for _ in range(60)]
    os.kill(server.pid, signal.SIGKILL)
    told += [line.strip() for line in server.stdout if line.endswith("\n")]
    server.wait()
    assert set(told) <= {row["unit_id"] for row in rows(store)}


# What is kept


def test_an_exposure_is_a_row_and_an_event(store):
    running = started(store)
    units = [assign(running, f"h{i}") for i in range(50)]
    assert expose(store, units, TUESDAY, "service") == 50 and expose(store, units, TUESDAY + timedelta(hours=1)) == 0
    kept, events = rows(store), read_events(store, "exposure")
    assert {row["assigned_at"] for row in kept} == {TUESDAY} and {row["phase"] for row in kept} == {2}
    assert [(row["unit_id"], row["variant"], row["bucket"]) for row in kept] == sorted(
        (a.unit_id, a.variant, a.bucket) for a in units
    )
    assert sorted((e.unit_id, e.experiments["tone"]) for e in events.itertuples()) == sorted(
        (a.unit_id, a.variant) for a in units
    )
    assert all(c == {"phase": 2, "policy_version": None, "source": "service"} for c in events["context"])


def test_each_phase_has_a_row_of_its_own(store):
    running = started(store)
    first = replace_phase(assign(running, "h1"), 1)
    assert record_assignments(store, [first, assign(running, "h1")], TUESDAY) == 2
    assert record_assignments(store, [first, first], TUESDAY) == 0


def replace_phase(assigned, phase):
    return replace(assigned, phase=phase)


def test_who_is_in_no_experiment_and_who_is_forced_is_not_kept(store):
    running = started(store, forced={"tester": "warm"})
    assert assign(running, "tester").variant == "warm"
    paused = pause_experiment(store, "tone", "ada")
    assert expose(store, [assign(running, "tester"), assign(paused, "h1")], utc_now()) == 0
    with Exposures(store) as buffer:
        assert buffer.add(assign(paused, "h1")).result() is None
    assert rows(store) == [] and len(read_events(store, "exposure")) == 0


def test_an_interrupted_group_is_completed_by_sending_it_again(store, monkeypatch):
    running = started(store)
    units = [assign(running, f"h{i}") for i in range(5)]

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exposure, "write_events", fail)
    with pytest.raises(KeyboardInterrupt):
        expose(store, units, TUESDAY)
    monkeypatch.undo()
    expose(store, units, TUESDAY)
    assert len(rows(store)) == len(read_events(store, "exposure")) == 5


# What is refused


REFUSED = [
    ({"experiment": "tune"}, "experiment 'tune': there is no such experiment"),
    ({"variant": "cold"}, "it has no variant 'cold', did you mean"),
    ({"variant": "long"}, "it has no variant 'long'"),
    ({"unit_type": "session"}, "it assigns units of type 'household'"),
    ({"unit_type": "sesion"}, "it assigns units of type 'household'"),
    ({"phase": 7}, "it has no phase 7, it is active"),
]


def test_an_exposure_that_cannot_be_is_refused(store):
    running = started(store)
    started(store, "size", variants=(Variant("short", 0.5, control=True), Variant("long", 0.5, parameters={"n": 7})))
    for change, words in REFUSED:
        units = [assign(running, "h1"), replace(assign(running, "h2"), **change)]
        for call in (record_assignments, expose):
            with pytest.raises(WorkbenchError, match=words) as error:
                call(store, units, TUESDAY)
            assert "\n" not in str(error.value) and "1 of 2 are refused, none was written" in str(error.value)
        assert rows(store) == []


def test_an_ended_experiment_takes_only_what_happened_before(store):
    running = started(store)
    stop_experiment(store, "tone", "ada", "enough", at=TUESDAY)
    assert record_assignments(store, [assign(running, "h1")], TUESDAY - timedelta(seconds=1)) == 1
    with pytest.raises(WorkbenchError, match="it ended 2026-03-03T08:00:00.00:00, serve the production policy"):
        record_assignments(store, [assign(running, "h2")], TUESDAY)


def test_a_draft_takes_nothing(store):
    running = started(store)
    draft = replace(read_experiment(store, "tone"), key="later", status="draft", phases=())
    create_experiment(store, draft, "ada")
    with pytest.raises(WorkbenchError, match="it has no phase 2, it is draft"):
        record_assignments(store, [replace(assign(running, "h1"), experiment="later")], TUESDAY)


def test_clocks_that_run_wrong(store):
    running = started(store)
    assert record_assignments(store, [assign(running, "h1")], MONDAY - timedelta(hours=3)) == 1
    assert rows(store)[0]["assigned_at"] == MONDAY
    with pytest.raises(WorkbenchError, match="is more than a day ahead, set the clock of the sender"):
        record_assignments(store, [assign(running, "h2")], utc_now() + timedelta(days=2))
    with pytest.raises(ValueError, match="no time zone"):
        record_assignments(store, [assign(running, "h2")], TUESDAY.replace(tzinfo=None))


IMPOSSIBLE = [
    ("('tone', 2, 'household', 'h1', 'long', 1, now())", "foreign key"),
    ("('tone', 2, 'session', 'h1', 'warm', 1, now())", "foreign key"),
    ("('tone', 9, 'household', 'h1', 'warm', 1, now())", "foreign key"),
    ("('tune', 1, 'household', 'h1', 'warm', 1, now())", "foreign key"),
    ("('tone', 2, 'household', 'h1', 'warm', 10000, now())", "check constraint"),
    ("('tone', 2, 'household', '', 'warm', 1, now())", "check constraint"),
]


def test_the_database_refuses_an_assignment_that_cannot_be(store):
    started(store)
    started(store, "size", variants=(Variant("short", 0.5, control=True), Variant("long", 0.5, parameters={"n": 7})))
    for row, words in IMPOSSIBLE:
        with pytest.raises(psycopg.IntegrityError, match=words), transaction(store) as connection:
            connection.execute(f"INSERT INTO exp.assignments VALUES {row}")


DELETED = [
    ("DELETE FROM exp.experiments", "foreign key"),
    ("DELETE FROM exp.variants", "its variants stay as they are"),
    ("UPDATE exp.assignments SET variant = 'control'", "stays as it was written"),
    ("TRUNCATE exp.assignments", "stays as it was written"),
]


def test_assignments_outlive_whoever_deletes(store):
    running = started(store)
    record_assignments(store, [assign(running, f"h{i}") for i in range(9)], TUESDAY)
    for statement, words in DELETED:
        with pytest.raises(psycopg.Error, match=words), transaction(store) as connection:
            connection.execute(statement)
        assert len(rows(store)) == 9


# The buffer


def test_one_that_is_refused_does_not_hold_up_the_others(store):
    running = started(store)
    with Exposures(store, wait_s=0.2) as buffer:
        good = [buffer.add(assign(running, f"h{i}"), TUESDAY) for i in range(20)]
        bad = buffer.add(replace(assign(running, "h99"), variant="cold"), TUESDAY)
        assert [done.result(timeout=30) for done in good] == [None] * 20
        with pytest.raises(WorkbenchError, match="it has no variant 'cold'"):
            bad.result(timeout=30)
    assert len(rows(store)) == 20


def test_what_was_written_is_not_sent_again(store, monkeypatch):
    running, groups, keep = started(store), [], room._keep_group
    monkeypatch.setattr(room, "_keep_group", lambda *a: groups.append(len(a[1])) or keep(*a))
    with Exposures(store) as buffer:
        for _ in range(3):
            buffer.add(assign(running, "h1"), TUESDAY).result(timeout=30)
        buffer.flush()
    assert groups == [1]


def test_a_full_buffer_says_so_and_a_flush_empties_it(store, monkeypatch):
    running, gate, keep = started(store), threading.Event(), room._keep_group
    monkeypatch.setattr(room, "_keep_group", lambda *a: gate.wait(30) and keep(*a))
    with Exposures(store, wait_s=0.0, max_group=1, bound=3) as buffer:
        told, waiting = "", []
        for i in range(10):
            try:
                waiting.append(buffer.add(assign(running, f"h{i}"), TUESDAY))
            except WorkbenchError as error:
                told = str(error)
        assert (
            "3 exposures wait to be written: the database is slow or not reachable" in told and 3 <= len(waiting) <= 5
        )
        gate.set()
        buffer.flush()
        assert all(done.done() for done in waiting)
    assert len(rows(store)) == len(waiting)


def test_a_database_that_is_away_acknowledges_nothing_and_is_tried_again(store, monkeypatch):
    running, keep, down = started(store), room._keep_group, [True]

    def fail(*arguments):
        if down:
            raise WorkbenchError("database db:5432/workbench is not reachable: start it")
        return keep(*arguments)

    monkeypatch.setattr(room, "_keep_group", fail)
    with Exposures(store) as buffer:
        with pytest.raises(WorkbenchError, match="is not reachable"):
            buffer.add(assign(running, "h1"), TUESDAY).result(timeout=30)
        down.clear()
        assert buffer.add(assign(running, "h1"), TUESDAY).result(timeout=30) is None
    assert len(rows(store)) == 1


def test_closing_writes_what_waits_and_takes_no_more(store):
    running = started(store)
    buffer = Exposures(store, wait_s=5.0)
    waiting = [buffer.add(assign(running, f"h{i}"), TUESDAY) for i in range(30)]
    waiting[3].cancel()
    buffer.close()
    buffer.close()
    assert all(done.done() for done in waiting) and len(rows(store)) == 30
    with pytest.raises(WorkbenchError, match="is closed: open another one"):
        buffer.add(assign(running, "h99"))


# What cannot be analysed


def test_problems_are_counted_unit_by_unit(store):
    running = started(store)
    units = [assign(running, f"h{i}") for i in range(20)]
    expose(store, units, TUESDAY)
    assert str(exposure_problems(store, "tone")) == "20 units exposed"
    swapped = {"control": "warm", "warm": "control"}
    earlier = replace(units[0], phase=1, variant=swapped[units[0].variant])
    record_assignments(store, [earlier], TUESDAY)  # two variants, in two phases
    seen = [(units[1].unit_id, swapped[units[1].variant]), ("stranger", "warm"), ("lost", "cold")]
    write_events(store, [Event("exposure", "household", u, TUESDAY, experiments={"tone": v}) for u, v in seen])
    found = exposure_problems(store, "tone")
    assert (found.n_units, found.n_two_variants, found.n_unassigned, found.n_unknown) == (22, 2, 2, 1)
    assert not found.ok and "22 units exposed, of which 2 saw two variants, 2 have no assignment, 1 saw" in str(found)


def test_what_is_known_of_a_unit_is_kept_with_its_exposure_where_a_slice_can_read_it(store):
    running = started(store)
    about = {"country": "NL", "size": 4, "vegan": True, "note": "a" * 500, "allergens": ["nuts"], "nul": "\x00"}
    about |= {"share": float("nan"), "source": "somebody else"}
    with Exposures(store, "service") as buffer:
        buffer.add(assign(running, "h1"), TUESDAY, about).result(timeout=30)
    expose(store, [assign(running, "h2")], TUESDAY, contexts=[about])
    first, second = read_events(store, "exposure").sort_values("unit_id")["context"]
    known = {"country": "NL", "size": 4, "vegan": True}
    assert {k: first[k] for k in known} == {k: second[k] for k in known} == known
    assert first.keys() == second.keys() == known.keys() | {"phase", "policy_version", "source"}
    assert first["source"] == "service"


def test_a_buffer_and_a_call_write_the_same(store):
    running = started(store)
    with Exposures(store, "workbench") as buffer:
        buffer.add(assign(running, "h1"), TUESDAY, {"country": "NL"}).result(timeout=30)
    before = [read_events(store, "exposure").drop(columns="received_at").to_dict("records"), rows(store)]
    assert expose(store, [assign(running, "h1")], TUESDAY, contexts=[{"country": "NL"}]) == 0
    assert [read_events(store, "exposure").drop(columns="received_at").to_dict("records"), rows(store)] == before


def test_a_unit_that_cannot_be_named_does_not_hold_up_the_others(store):
    running = started(store)
    with Exposures(store, wait_s=0.2) as buffer:
        bad = [
            buffer.add(replace(assign(running, "h1"), unit_id=u), TUESDAY)
            for u in ("a\x00", "\ud800", "u" * 501, "a\tb")
        ]
        good = buffer.add(assign(running, "h\\1"), TUESDAY)
        assert good.result(timeout=30) is None
        for done in bad:
            with pytest.raises(WorkbenchError, match="unit_id"):
                done.result(timeout=30)
    assert len(rows(store)) == 1 and list(read_events(store, "exposure")["unit_id"]) == ["h\\1"]


def test_a_buffer_that_may_tries_again_until_the_database_is_back(store):
    running = started(store)
    url, other = store.url, Store("postgresql://nobody@127.0.0.1:1/nowhere")
    with Exposures(other, retry_s=0.05) as buffer:
        done = buffer.add(assign(running, "h1"), TUESDAY)
        with pytest.raises(TimeoutError):
            done.result(timeout=0.5)
        other.url = url
        assert done.result(timeout=30) is None
    assert len(rows(store)) == 1
