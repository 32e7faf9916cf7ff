"The ledger under concurrency and tampering."

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files

import psycopg
import pytest

from mlops_workbench.core import WorkbenchError, as_utc
from mlops_workbench.ledger import (
    BEGINNING,
    Entry,
    append_entry,
    check_chain,
    check_lines,
    entry_digest,
    entry_text,
    export_lines,
    last_entry,
    mark_unit,
    read_ledger,
    verify_ledger,
)
from mlops_workbench.settings import resolve_secret
from mlops_workbench.store import Store, apply_migrations, as_json, connect, read_migrations, transaction

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
        connection.execute("GRANT ALL ON exp.ledger TO CURRENT_USER")
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
    refusals = (psycopg.errors.RaiseException, WorkbenchError)  # a superuser meets the trigger, others lack the right
    with pytest.raises(refusals, match="append-only|permission denied"), transaction(filled) as connection:
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
    assert not check.ok and check.first_bad_seq == 3


def text_of(entry):
    return entry_text(entry).decode().replace("'", "''")


def test_an_edit_with_a_new_text_and_digest_breaks_the_next_entry(filled):
    with transaction(filled) as connection:
        third = replace(read_ledger(connection)[2], actor="somebody else")
    values = f"actor = '{third.actor}', said = '{text_of(third)}', digest = '{entry_digest(third)}'"
    check = tamper(filled, f"UPDATE exp.ledger SET {values} WHERE seq = 3")
    assert not check.ok and check.first_bad_seq == 4


def test_a_text_and_digest_that_do_not_say_what_the_columns_say_are_found(filled):
    "The last entry: nothing follows whose `previous` would give it away."
    with transaction(filled) as connection:
        last = replace(read_ledger(connection)[4], actor="somebody else")
    check = tamper(
        filled, f"UPDATE exp.ledger SET said = '{text_of(last)}', digest = '{entry_digest(last)}' WHERE seq = 5"
    )
    assert not check.ok and check.first_bad_seq == 5


@pytest.mark.parametrize(
    "said",
    [
        "not json",
        "{}",
        "[]",
        '{"seq": {}}',
        '{"subject": "\\u0000"}',
        '{"written_at": "soon"}',
        "",
        '{"seq": 1e999999}',
    ],
)
def test_a_text_that_is_no_entry_is_found_and_not_an_error(filled, said):
    check = tamper(filled, f"UPDATE exp.ledger SET said = '{said}' WHERE seq = 3")
    assert (check.ok, check.n, check.first_bad_seq) == (False, 2, 3)
    digest = hashlib.sha256(said.encode()).hexdigest()
    assert tamper(filled, f"UPDATE exp.ledger SET digest = '{digest}' WHERE seq = 3").first_bad_seq == 3


@pytest.mark.parametrize(
    "at", ["'infinity'", "'-infinity'", "'0044-03-15 12:00:00+00 BC'", "'20000-01-01 00:00:00+00'"]
)
@pytest.mark.parametrize("said", ["said", "NULL"])
def test_a_time_that_never_was_is_found_and_not_an_error(filled, at, said):
    check = tamper(filled, f"UPDATE exp.ledger SET held_from = {at}, said = {said} WHERE seq = 3")
    assert (check.ok, check.first_bad_seq) == (False, 3)


def test_rows_that_hide_beside_others_are_found(filled):
    check = tamper(
        filled,
        "ALTER TABLE exp.ledger DROP CONSTRAINT ledger_pkey",
        "ALTER TABLE exp.ledger DROP CONSTRAINT ledger_digest_key",
        "INSERT INTO exp.ledger SELECT * FROM exp.ledger WHERE seq = 3",
    )
    assert (check.ok, check.n) == (False, 3)
    assert not tamper(filled, "DELETE FROM exp.ledger WHERE seq = 3", "UPDATE exp.ledger SET seq = -1 WHERE seq = 5").ok


def test_entries_from_before_texts_were_kept_go_on_being_checked(filled):
    "A database of the migration before has rows without a text; later ones have one."
    assert tamper(filled, "UPDATE exp.ledger SET said = NULL WHERE seq <= 3").ok
    append(filled, 6)
    check = tamper(filled, "UPDATE exp.ledger SET subject = subject || '{\"version\": 1.5}' WHERE seq = 2")
    assert (check.ok, check.first_bad_seq) == (False, 2)


def test_a_database_of_the_migration_before_goes_on(empty_url):
    old = Store(empty_url)
    migrations = read_migrations(files("mlops_workbench") / "migrations", "workbench")
    apply_migrations(old, [m for m in migrations if m.version <= 5])
    entry = Entry(1, AT, AT, "ana", "model.candidate", {"model": "planner", "version": 1}, {"low": 0.5}, BEGINNING)
    row = {k: as_json(v) for k, v in (vars(entry) | {"digest": entry_digest(entry)}).items()}
    with transaction(old) as connection:
        connection.execute(f"INSERT INTO exp.ledger VALUES ({', '.join(f'%({k})s' for k in row)})", row)
    apply_migrations(old, migrations)
    append(old, 2)
    with transaction(old) as connection:
        check = verify_ledger(connection)
        assert (check.ok, check.n) == (True, 2)
        assert check_lines(export_lines(connection)).last_digest == check.last_digest


def test_a_cut_tail_needs_the_last_digest_kept_elsewhere(filled):
    with transaction(filled) as connection:
        anchor = verify_ledger(connection).last_digest
    check = tamper(filled, "DELETE FROM exp.ledger WHERE seq = 5")
    assert check.ok and check.last_digest != anchor


def test_a_cut_tail_and_a_rewritten_chain_do_not_fit_what_was_remembered(filled):
    with transaction(filled) as connection:
        entries = read_ledger(connection)
        assert verify_ledger(connection, {5: entries[4].digest, 2: entries[1].digest}).ok
        assert verify_ledger(connection, {2: "0" * 64}).first_bad_seq == 2
    check = tamper(filled, "DELETE FROM exp.ledger WHERE seq = 5")
    with transaction(filled) as connection:
        check = verify_ledger(connection, {5: entries[4].digest})
    assert (check.ok, check.first_bad_seq, check.reason) == (
        False,
        5,
        "entries 5 to 5 are missing: the tail was cut off",
    )


def test_an_exported_ledger_is_checked_by_anybody(filled):
    with transaction(filled) as connection:
        lines, check = list(export_lines(connection)), verify_ledger(connection)
    digests = [hashlib.sha256(line.rstrip("\n").encode()).hexdigest() for line in lines]
    assert [json.loads(line)["previous"] for line in lines[1:]] == digests[:-1] and digests[-1] == check.last_digest
    assert check_lines(lines, {5: check.last_digest}).ok
    assert check_lines([*lines[:2], *lines[3:]]).first_bad_seq == 3
    with pytest.raises(ValueError, match="line 2 is no entry"):
        check_lines([lines[0], "[1, 2]\n"])


def test_what_was_known_is_told_apart_from_what_held(store):
    with transaction(store) as connection:
        first = append_entry(connection, "policy.promote", "ana", {"policy": "planner", "version": 1}, {}, AT)
        late = append_entry(
            connection, "policy.promote", "ana", {"policy": "planner", "version": 2}, {}, AT.replace(hour=9)
        )
        append_entry(connection, "policy.promote", "bob", {"policy": "ranker", "version": 9}, {}, AT.replace(hour=9))
        asked = (connection, ("policy", "planner"), ["policy.promote"])
        assert last_entry(*asked) == late and last_entry(*asked, until=AT) == first
        assert last_entry(*asked, known_at=first.written_at) == first
        assert last_entry(*asked, known_at=AT) is None
        assert [e.seq for e in read_ledger(connection, known_at=late.written_at)] == [1, 2]
        with pytest.raises(ValueError, match="choose policy or experiment"):
            last_entry(connection, ("model", "planner"), [])


@pytest.mark.parametrize(
    "said", [{"unit_id": "h-1"}, {"a": [{"user_ids": ["u-1"]}]}, {"Email": "a@b.c"}, {"forced": {"h-1": "control"}}]
)
def test_a_person_is_not_written_into_the_chain(store, said):
    for subject, evidence in ((said, {}), ({}, said), ({}, {"deep": {"deeper": said}})):
        with (
            pytest.raises(ValueError, match="person's data into the ledger for ever"),
            transaction(store) as connection,
        ):
            append_entry(connection, "a", "b", subject, evidence)


def test_a_unit_that_is_forgotten_leaves_the_chain_whole(store):
    with transaction(store) as connection:
        mark = mark_unit(connection, "household", "h-1")
        assert mark == mark_unit(connection, "household", "h-1") != mark_unit(connection, "user", "h-1")
        append_entry(
            connection, "a", "b", {"unit_id": mark}, {"forced": {mark: "control"}, "unit_id": None, "forced_by": "ana"}
        )
        connection.execute("DELETE FROM exp.unit_salts WHERE unit_id = 'h-1'")
        assert verify_ledger(connection).ok
        assert mark_unit(connection, "household", "h-1") != mark


def test_a_secret_is_not_written_into_the_chain(store, monkeypatch):
    monkeypatch.setenv("API_KEY", "pa55-w0rd-of-the-shop")
    resolve_secret("secret://API_KEY")
    with transaction(store) as connection:
        entry = append_entry(connection, "a", "b", {"url": "https://x/?k=pa55-w0rd-of-the-shop"}, {})
        assert "pa55" not in str(entry) and verify_ledger(connection).ok


def test_the_owner_has_no_right_to_change_rows(store):
    with transaction(store) as connection:
        asked = "SELECT privilege_type FROM information_schema.role_table_grants WHERE table_name = 'ledger'"
        held = {row["privilege_type"] for row in connection.execute(asked)}
    assert {"SELECT", "INSERT"} <= held and not held & {"UPDATE", "DELETE", "TRUNCATE"}


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
    with transaction(filled) as connection:
        entry = read_ledger(connection)[0]
    said = {k: v.isoformat() if k.endswith(("_at", "_from")) else v for k, v in vars(entry).items() if k != "digest"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert '"estimate":0.0' in text
    assert hashlib.sha256(text.replace('"estimate":0.0', '"estimate":0').encode()).hexdigest() == entry.digest
    assert check_chain([entry]).ok
