"A backup comes back whole, row by row and byte by byte, or not at all."

import json
import os
import shutil
import threading
from pathlib import Path

import psycopg
import pytest

from mlops_workbench import backup as room
from mlops_workbench.anchor import anchor_head, verify_anchored
from mlops_workbench.backup import check_backup, make_backup, read_backup, restore_backup
from mlops_workbench.core import WorkbenchError, utc_now
from mlops_workbench.dump import describe_tables, existing_relations, find_program, without_password
from mlops_workbench.events import Event, write_events
from mlops_workbench.ledger import append_entry
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, open_store, read_rows, temporary_store, transaction
from mlops_workbench.tracking import log_file, log_metrics, log_parameters, open_run, open_tracking


def fill(store, settings):
    "Write what a real run writes: decisions, events in partitions, MLflow records and files."
    events = [
        Event("plan_proposed", "household", f"h{i}", utc_now(), {"n": i, "tab": "a\tb\\"}, context={"source": "test"})
        for i in range(200)
    ]
    write_events(store, events)
    with transaction(store) as connection:
        for i in range(3):
            append_entry(connection, "policy.promote", "ann", {"policy": "planner", "version": i}, {"share": 0.1 * i})
        connection.execute("INSERT INTO exp.policies (policy, task) VALUES ('planner', 'mlops_workbench.planner')")
        connection.execute(
            "INSERT INTO exp.policy_versions (policy, version, status) VALUES ('planner', 1, 'production')"
        )
        connection.execute(
            "CREATE SCHEMA own; CREATE TABLE own.notes (id serial PRIMARY KEY, said text, raw bytea, at date)"
        )
        row = "INSERT INTO own.notes (said, raw, at) VALUES (%s, %s, '0044-03-15 BC')"
        connection.execute(row, ("\\. 'quoted' $check$\nü", b"\x00\xff\\"))
    tracking = open_tracking(store, settings)
    run = open_run(tracking, settings, "planner", "prep")
    log_parameters(run, {"rank": 16})
    log_metrics(run, {"loss": 0.1 + 0.2})
    note = settings.root / "note.txt"
    note.write_text("seven dinners")
    log_file(run, note)
    (settings.home / "runs" / "r1").mkdir(parents=True)
    (settings.home / "runs" / "r1" / "0-prep.ipynb").write_text("{}")
    (settings.home / "cache").mkdir(exist_ok=True)
    (settings.home / "cache" / "code.json").write_text("{}")
    anchor_head(store, settings, tracking)
    return run.run_id


def tables(url):
    with Store(url) as opened, transaction(opened) as connection:
        return describe_tables(connection)


@pytest.fixture(scope="module")
def source(server, tmp_path_factory):
    "A database with records, its settings, the run in it, and a backup of it."
    root = tmp_path_factory.mktemp("source")
    with server.database() as url, Store(url) as opened:
        here = Settings("local", root, root / "here", url)
        run_id = fill(opened, here)
        yield opened, here, run_id, make_backup(opened, here, root / "kept")


@pytest.fixture
def filled(source, tmp_path):
    "The same, with a copy of the backup to spoil."
    store, here, run_id, made = source
    shutil.copytree(made.folder, tmp_path / "kept")
    return store, here, run_id


def test_a_backup_comes_back_in_another_place(filled, empty_url, tmp_path):
    store, here, run_id = filled
    made, before = read_backup(tmp_path / "kept"), tables(store.url)
    assert made.dump.tables == before and made.dump.ledger.n == 3
    assert oct((here.root / "kept").stat().st_mode)[-3:] == "700"
    assert not any("cache" in name for name in made.files)

    there = Settings("local", tmp_path, tmp_path / "there", empty_url)
    restore_backup(there, tmp_path / "kept", "ann")
    after = tables(empty_url)
    moved = {"exp.ledger", "mlflow.experiments", "mlflow.runs"}
    assert {name for name in before if before[name] != after[name]} == moved
    assert (there.home / "runs" / "r1" / "0-prep.ipynb").read_text() == "{}"
    with open_store(there) as opened:
        tracking = open_tracking(opened, there)
        found = tracking.client.get_run(run_id)
        assert (found.data.params["rank"], found.data.metrics["loss"]) == ("16", 0.1 + 0.2)
        assert found.info.artifact_uri.startswith(str(there.home))
        path = tracking.client.download_artifacts(run_id, "note.txt", str(tmp_path))
        assert Path(path).read_text() == "seven dinners"
        check = verify_anchored(opened, there, tracking)
        assert check.ok and check.chain.n == 4 and check.n_anchors >= 1
        with transaction(opened) as connection:
            last = read_rows(connection, "SELECT actor, action FROM exp.ledger ORDER BY seq DESC LIMIT 1")[0]
            assert last == {"actor": "ann", "action": "backup.restore"}
            assert read_rows(connection, "INSERT INTO own.notes DEFAULT VALUES RETURNING id") == [{"id": 2}]


def test_what_guarded_the_records_still_guards_them(filled, empty_url, tmp_path):
    there = Settings("local", tmp_path, tmp_path / "there", empty_url)
    restore_backup(there, tmp_path / "kept", "ann")
    for change in ("DELETE FROM exp.ledger", "UPDATE exp.policy_versions SET model_name = 'x', model_version = '1'"):
        refused = pytest.raises(Exception, match="append-only|for ever|permission|refuses")
        with Store(empty_url) as opened, refused, transaction(opened) as connection:
            connection.execute(change)
    rights = "SELECT a.privilege_type FROM pg_class c, aclexplode(relacl) a WHERE c.oid = 'exp.ledger'::regclass"
    asked = f"SELECT count(*) AS n FROM ({rights}) AS a WHERE privilege_type = 'UPDATE'"
    with Store(empty_url) as opened, transaction(opened) as connection:
        assert read_rows(connection, asked) == [{"n": 0}]


def test_a_backup_of_the_embedded_server_comes_back_on_any_server(empty_url, tmp_path):
    with temporary_store() as source:
        here = Settings("local", tmp_path, tmp_path / "here", source.url)
        fill(source, here)
        made = make_backup(source, here, tmp_path / "kept")
    restore_backup(Settings("local", tmp_path, tmp_path / "there", empty_url), tmp_path / "kept", "ann")
    found = tables(empty_url)
    assert found["exp.policy_versions"] == made.dump.tables["exp.policy_versions"]
    assert found["own.notes"] == made.dump.tables["own.notes"]


def test_it_is_one_instant_however_much_is_written_meanwhile(store, empty_url, tmp_path):
    here = Settings("local", tmp_path, tmp_path / "here", store.url)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            write_events(store, [Event("click", "user", "u1", utc_now())])
            with transaction(store) as connection:
                append_entry(connection, "policy.promote", "bot", {"policy": "p"}, {})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = make_backup(store, here, tmp_path / "kept")
    finally:
        stop.set()
        writer.join()
    assert made.dump.ledger.ok
    restore_backup(Settings("local", tmp_path, tmp_path / "there", empty_url), tmp_path / "kept", "ann")
    assert tables(empty_url)["exp.event_ids"] == made.dump.tables["exp.event_ids"]


def nothing_left(settings):
    with Store(settings.database_url) as opened, transaction(opened) as connection:
        assert existing_relations(connection) == []
    assert [p for p in settings.home.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("what", ["cut", "altered", "missing"])
def test_a_damaged_backup_is_refused_before_anything_is_touched(filled, empty_url, tmp_path, what):
    made = read_backup(tmp_path / "kept")
    victim = tmp_path / "kept" / next(name for name in made.files if name.endswith("note.txt"))
    {
        "cut": lambda: victim.write_text("seven"),
        "altered": lambda: victim.write_text("seven lunches"[:13]),
        "missing": victim.unlink,
    }[what]()
    there = Settings("local", tmp_path, tmp_path / "there", empty_url)
    with pytest.raises(WorkbenchError, match="cannot be trusted"):
        restore_backup(there, tmp_path / "kept", "ann")
    nothing_left(there)


def test_a_restore_that_fails_leaves_nothing(filled, empty_url, tmp_path):
    manifest = tmp_path / "kept" / "manifest.json"
    said = json.loads(manifest.read_text())
    said["dump"]["tables"]["exp.events_2020_01"] = [1, "0"]
    manifest.write_text(json.dumps(said))
    there = Settings("local", tmp_path, tmp_path / "there", empty_url)
    with pytest.raises(WorkbenchError, match="nothing was kept of it"):
        restore_backup(there, tmp_path / "kept", "ann")
    nothing_left(there)


def test_a_backup_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    store, here, *_ = source

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "digest_file", full)
    with pytest.raises(WorkbenchError, match="No space left"):
        make_backup(store, here, tmp_path / "kept")
    assert [p.name for p in tmp_path.iterdir() if "kept" in p.name] == []


def test_only_an_empty_place_is_restored_into(filled, empty_url, tmp_path):
    store, *_ = filled
    with pytest.raises(WorkbenchError, match="restore into an empty one"):
        restore_backup(Settings("local", tmp_path, tmp_path / "there", store.url), tmp_path / "kept", "ann")
    there = Settings("local", tmp_path, tmp_path / "there", empty_url)
    (there.home / "artifacts" / "1").mkdir(parents=True)
    (there.home / "artifacts" / "1" / "model.bin").write_text("mine")
    with pytest.raises(WorkbenchError, match="is there already"):
        restore_backup(there, tmp_path / "kept", "ann")
    assert [p.name for p in there.home.rglob("*") if p.is_file()] == ["model.bin"]


def test_a_restore_that_was_killed_can_be_repeated(filled, empty_url, tmp_path):
    made = read_backup(tmp_path / "kept")
    there = Settings("local", tmp_path, tmp_path / "there", empty_url)
    note = next(name for name in made.files if name.endswith("note.txt"))
    left = there.home / note
    left.parent.mkdir(parents=True)
    left.write_text("seven dinners")
    left.with_name(".restoring-other").write_text("half")
    restore_backup(there, tmp_path / "kept", "ann")
    assert left.read_text() == "seven dinners"


def test_artefacts_of_any_fsspec_place_are_kept(store, empty_url, tmp_path):
    here = Settings("local", tmp_path, tmp_path / "here", store.url, f"memory://{tmp_path.name}-here")
    there = Settings("local", tmp_path, tmp_path / "there", empty_url, f"memory://{tmp_path.name}-there")
    run_id = fill(store, here)
    make_backup(store, here, tmp_path / "kept")
    restore_backup(there, tmp_path / "kept", "ann")
    with open_store(there) as opened:
        client = open_tracking(opened, there).client
        assert client.get_run(run_id).info.artifact_uri.startswith(there.artifacts)
        assert Path(client.download_artifacts(run_id, "note.txt", str(tmp_path))).read_text() == "seven dinners"


def test_a_manifest_that_points_outside_is_refused(filled, tmp_path):
    manifest = tmp_path / "kept" / "manifest.json"
    said = json.loads(manifest.read_text())
    said["files"]["home/../../evil"] = [0, ""]
    manifest.write_text(json.dumps(said))
    with pytest.raises(WorkbenchError, match="outside the backup"):
        read_backup(tmp_path / "kept")


def test_a_newer_schema_is_refused_before_anything_is_touched(filled, empty_url, tmp_path):
    manifest = tmp_path / "kept" / "manifest.json"
    said = json.loads(manifest.read_text())
    said["migrations"]["9999"] = ["9999_future.sql", "0" * 64]
    manifest.write_text(json.dumps(said))
    there = Settings("local", tmp_path, tmp_path / "there", empty_url)
    with pytest.raises(WorkbenchError, match="newer than this code"):
        restore_backup(there, tmp_path / "kept", "ann")
    nothing_left(there)


def test_a_backup_is_checked_without_a_database(filled, tmp_path):
    check_backup(read_backup(tmp_path / "kept"))


def test_a_password_never_stands_in_a_command():
    for url in ("postgresql://ann:pa%24s@db/x", "postgresql://ann@db/x?password=pa%24s&sslmode=require"):
        shown, variables = without_password(url)
        assert "pa" not in shown.partition("@")[0] + shown.partition("?")[2] and variables == {"PGPASSWORD": "pa$s"}
        assert psycopg.conninfo.conninfo_to_dict(shown)["host"] == "db"


def test_an_encrypted_connection_takes_the_programs_of_the_system(tmp_path, monkeypatch):
    for name, version in (("old", 14), ("new", 99)):
        (tmp_path / name).mkdir()
        program = tmp_path / name / "pg_dump"
        program.write_text(f"#!/bin/sh\necho 'pg_dump (PostgreSQL) {version}.3 (Debian {version}.3-1)'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "old"), str(tmp_path / "new"), os.environ["PATH"]]))
    assert find_program("pg_dump", 16, encrypted=True) == str(tmp_path / "new" / "pg_dump")
    assert find_program("pg_dump", 14, encrypted=True) == str(tmp_path / "old" / "pg_dump")
    monkeypatch.setenv("WORKBENCH_PG_BIN", str(tmp_path / "old"))
    with pytest.raises(WorkbenchError, match="pg_dump 14 is older than the server, 16"):
        find_program("pg_dump", 16)
