"The ledger under concurrency and tampering."

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psycopg
import pytest

from mlops_workbench.core import as_utc
from mlops_workbench.ledger import append_entry, check_chain, entry_digest, read_ledger, verify_ledger
from mlops_workbench.store import connect, transaction

AT = as_utc("2026-03-02T08:00:00Z")


def append(store, i, **evidence):
    with transaction(store) as connection:
        return append_entry(connection, "model.candidate", "gate", {"model": "planner", "version": i}, evidence)


@pytest.fixture
def filled(store):
    for i in range(5):
        append(store, i, estimate=i / 3, reasons=["é", None, True])
    return store


def tamper(store, *statements):
    "Change the ledger as an administrator could."
    with connect(store) as connection:
        connection.execute("ALTER TABLE exp.ledger DISABLE TRIGGER ALL")
        for statement in statements:
            connection.execute(statement)
        connection.execute("ALTER TABLE exp.ledger ENABLE TRIGGER ALL")
        connection.commit()
        return verify_ledger(connection)


def test_what_is_written_is_what_is_read(filled):
    written = append(filled, 9, low=-0.0, high=1e15, text='\\u0000 "quoted"')
    with transaction(filled) as connection:
        entries, check = read_ledger(connection), verify_ledger(connection)
    assert entries[-1] == written
    assert (check.ok, check.n, check.last_digest) == (True, 6, written.digest)


def test_an_empty_ledger_is_whole(store):
    with transaction(store) as connection:
        assert verify_ledger(connection).ok


def test_writers_at_once_make_one_chain(store):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append(store, i), range(40)))
    with transaction(store) as connection:
        check, entries = verify_ledger(connection), read_ledger(connection)
    assert check.ok and check.n == 40
    assert sorted(e.subject["version"] for e in entries) == list(range(40))


def test_a_failed_transaction_leaves_no_gap(filled):
    with pytest.raises(ZeroDivisionError), transaction(filled) as connection:
        append_entry(connection, "model.rejected", "gate", {"model": "planner"}, {})
        raise ZeroDivisionError
    assert append(filled, 6).seq == 6


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE exp.ledger SET actor = 'x'",
        "DELETE FROM exp.ledger",
        "TRUNCATE exp.ledger",
        "DELETE FROM exp.ledger WHERE false",
    ],
)
def test_the_table_refuses_changes(filled, statement):
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"), transaction(filled) as connection:
        connection.execute(statement)
    with transaction(filled) as connection:
        assert verify_ledger(connection).n == 5


@pytest.mark.parametrize(
    "column, value",
    [
        ("actor", "'somebody else'"),
        ("action", "'model.rejected'"),
        ("held_from", "held_from - interval '1 microsecond'"),
        ("written_at", "written_at + interval '1 day'"),
        ("subject", "subject || '{\"version\": 7}'"),
        ("evidence", "evidence || '{\"estimate\": 0.9}'"),
        ("previous", "repeat('0', 64)"),
        ("digest", "repeat('f', 64)"),
    ],
)
def test_an_edited_entry_is_found(filled, column, value):
    check = tamper(filled, f"UPDATE exp.ledger SET {column} = {value} WHERE seq = 3")
    assert not check.ok and check.first_bad_seq == 3


@pytest.mark.parametrize("seq, bad", [(1, 1), (3, 3), (4, 4)])
def test_a_removed_entry_is_found(filled, seq, bad):
    check = tamper(filled, f"DELETE FROM exp.ledger WHERE seq = {seq}")
    assert not check.ok and check.first_bad_seq == bad and "missing" in check.reason


def test_a_removed_entry_is_found_when_the_rest_moves_up(filled):
    check = tamper(filled, "DELETE FROM exp.ledger WHERE seq = 3", "UPDATE exp.ledger SET seq = seq - 1 WHERE seq > 3")
    assert not check.ok and check.first_bad_seq == 3


def test_entries_that_changed_places_are_found(filled):
    swap = [f"UPDATE exp.ledger SET seq = {b} WHERE seq = {a}" for a, b in ((2, 99), (3, 2), (99, 3))]
    check = tamper(filled, *swap)
    assert not check.ok and check.first_bad_seq == 2


def test_an_edit_with_a_new_digest_breaks_the_next_entry(filled):
    with transaction(filled) as connection:
        third = replace(read_ledger(connection)[2], actor="somebody else")
    check = tamper(
        filled, f"UPDATE exp.ledger SET actor = '{third.actor}', digest = '{entry_digest(third)}' WHERE seq = 3"
    )
    assert not check.ok and check.first_bad_seq == 4


def test_a_cut_tail_needs_the_last_digest_kept_elsewhere(filled):
    with transaction(filled) as connection:
        anchor = verify_ledger(connection).last_digest
    check = tamper(filled, "DELETE FROM exp.ledger WHERE seq = 5")
    assert check.ok and check.last_digest != anchor


def test_reading_by_valid_time_and_subject(store):
    with transaction(store) as connection:
        for day, version in ((10, 1), (20, 2)):
            append_entry(
                connection, "model.production", "ana", {"model": "planner", "version": version}, {}, AT.replace(day=day)
            )
        append_entry(connection, "model.production", "ana", {"model": "ranker", "version": 1}, {}, AT)
        read = [
            [e.subject["version"] for e in read_ledger(connection, AT.replace(day=day), {"model": "planner"})]
            for day in (9, 10, 25)
        ]
    assert read == [[], [1], [1, 2]]


def test_bad_input(store):
    for action, actor in (("", "ana"), ("model.candidate", " "), (None, "ana")):
        with pytest.raises(ValueError, match="say in a word who decided what"), transaction(store) as connection:
            append_entry(connection, action, actor, {}, {})
    with pytest.raises(ValueError, match="no time zone"), transaction(store) as connection:
        append_entry(connection, "a", "b", {}, {}, AT.replace(tzinfo=None))
    for evidence in ({"x": float("nan")}, {"x": 2**60}):
        with pytest.raises(ValueError), transaction(store) as connection:
            append_entry(connection, "a", "b", {}, evidence)
    with transaction(store) as connection:
        assert verify_ledger(connection).n == 0


def test_the_digest_is_of_plain_json(filled):
    "Somebody without this code can recompute it: canonical JSON of the columns, SHA-256."
    import hashlib

    with transaction(filled) as connection:
        entry = read_ledger(connection)[0]
    said = {k: v.isoformat() if k.endswith(("_at", "_from")) else v for k, v in vars(entry).items() if k != "digest"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert '"estimate":0.0' in text
    assert hashlib.sha256(text.replace('"estimate":0.0', '"estimate":0').encode()).hexdigest() == entry.digest
    assert check_chain([entry]).ok
