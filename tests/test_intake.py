"Events in: what is read, what is refused, what waits on disk, and who is told what."

import asyncio
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import msgspec
import pytest

from mlops_workbench.core import WorkbenchError, new_id, utc_now
from mlops_workbench.events import Event, read_events
from mlops_workbench.intake import DUPLICATE, SPOOLED, Intake
from mlops_workbench.line import Line, open_writer, settle_lines, write_line
from mlops_workbench.sent import read_batch, read_sent
from mlops_workbench.spool import Spool, count_spooled, hand_over, spool_lines
from mlops_workbench.store import Store, read_rows, transaction
from mlops_workbench.tokens import Refused

NOWHERE = "postgresql://nobody@127.0.0.1:1/nowhere"


def sent(**more):
    about = {"type": "plan_decided", "unit_type": "household", "unit_id": "h-7", "id": new_id()}
    return about | {"event_at": utc_now().isoformat()} | more


def body(**more):
    return msgspec.json.encode(sent(**more))


def line(**more):
    return read_sent(body(**more), utc_now())


@pytest.fixture
def intake(store, tmp_path):
    opened = Intake(Store(store.url), Spool(tmp_path / "spool"))
    yield opened
    opened.close()
    opened.store.close()


def keep(intake, items):
    return asyncio.run(intake.keep(items))


def go_away(intake):
    "Take the database away from an intake."
    url, intake.store.url = intake.store.url, NOWHERE
    if intake._writer is not None:
        intake._writer.close()
    return url


def wait_until(holds):
    done = threading.Event()
    for _ in range(400):
        if holds():
            return
        done.wait(0.02)
    raise AssertionError("it did not happen within 8 s")


@pytest.mark.parametrize(
    "text",
    [
        '{"note": "caf\\u00e9 \\ud83c\\udf7d"}',
        '{"note": "tab\\tline\\nquote\\"backslash\\\\"}',
        '{\n  "spread":\t"over lines",\r\n  "n": 1\n}',
        '{"n": 1.5e3, "m": -2E-7, "big": 123456789012345678901234567890}',
        '{"N": "\\\\N", "dot": "\\\\.", "empty": ""}',
        '{"a": {"b": [[1, 2], {"c": null}]}, "t": true}',
    ],
)
def test_a_payload_is_kept_as_it_was_sent(intake, store, text):
    raw = body().replace(b"{", b'{"payload": ' + text.encode() + b", ", 1)
    assert keep(intake, [read_sent(raw, utc_now())]) == [""]
    (kept,) = read_events(store, "plan_decided")["payload"]
    assert kept == json.loads(text)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"metrics": {"accepted": True}}, "Expected `float`"),
        ({"metrics": {"accepted": None}}, "Expected `float`"),
        ({"payload": {"note": "\x00"}}, "NUL"),
        ({"payload": [1]}, "Expected `object`, got `array`"),
        ({"unit_id": ""}, "unit_id is empty"),
        ({"unit_id": "  "}, "unit_id is empty"),
        ({"unit_id": "a\x00"}, "unit_id is empty or not text"),
        ({"unit_id": "a\tb"}, "control characters"),
        ({"unit_id": "u" * 501}, "501 characters"),
        ({"type": "t" * 201}, "201 characters"),
        ({"id": "1; DROP TABLE exp.events"}, "id is not a UUID"),
        ({"event_at": "2026-03-02T08:00:00"}, "no time zone"),
        ({"event_at": "9999-12-31T23:59:59Z"}, "more than a day ahead"),
        ({"event_at": "0001-01-01T00:00:00Z"}, "more than ten years ago"),
        ({"context": {"source": {"a": 1}}}, "source that is no name"),
        ({"context": {"source": "s" * 201}}, "source that is no name"),
        ({"type": 3}, "Expected `str`"),
    ],
)
def test_an_event_that_cannot_be_kept_is_refused_in_one_line(more, words):
    with pytest.raises(ValueError, match=words) as refused:
        line(**more)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "data",
    [
        b'{"type": "a", "unit_type": "b", "unit_id": "c", "payload": {"x": 1e999}}',
        b'{"type": "a", "unit_type": "b", "unit_id": "c", "payload": {"x": "\xff"}}',
        b'{"type": "a", "unit_type": "b", "unit_id": "c", "payload": {"x": "\\ud800"}}',
        b'{"type": "a", "unit_type": "b", "unit_id": "c", "payload": ' + b'{"a":' * 40 + b"1" + b"}" * 41,
        b'{"type": "a", "unit_type": "b", "unit_id": "c", "payload": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"type": "a"',
        b"\xff\xfe",
        b"[]",
    ],
)
def test_bytes_that_are_no_event_are_refused(data):
    with pytest.raises(ValueError):
        read_sent(data, utc_now())


def test_one_bad_event_of_a_hundred_costs_only_itself(intake, store):
    events = [sent(unit_id=f"h-{i}") for i in range(100)]
    events[41]["metrics"] = {"accepted": "yes"}
    told = keep(intake, read_batch(msgspec.json.encode({"events": events}), utc_now()))
    assert [i for i, fate in enumerate(told) if fate] == [41]
    assert len(read_events(store, "plan_decided")) == 99


@pytest.mark.parametrize("content", [b'{"events": []}', b"{}", b'{"events": 3}', b""])
def test_a_batch_that_is_none_is_refused_as_a_whole(content):
    with pytest.raises(Refused) as refused:
        read_batch(content, utc_now())
    assert refused.value.status in (400, 422)


def test_an_event_is_kept_once_however_often_and_by_whomever_it_is_sent(intake, store, tmp_path):
    lines = [line(unit_id=f"h-{i}") for i in range(50)]
    other = Intake(Store(store.url), Spool(tmp_path / "other"))

    async def all_at_once():
        return await asyncio.gather(*[door.keep(lines) for door in (intake, other) for _ in range(5)])

    told = asyncio.run(all_at_once())
    other.close()
    assert len(read_events(store, "plan_decided")) == 50
    assert {fate for fates in told for fate in fates} == {"", DUPLICATE}


def test_an_id_that_comes_twice_in_a_batch_with_other_content_is_refused(intake):
    first = line()
    second = replace_text(first, "h-7", "h-8")
    told = keep(intake, [first, second, first])
    assert told[0] == "" and told[1].startswith("id is the one of an earlier event") and told[2] == DUPLICATE


def replace_text(line, old, new):
    return line._replace(text=line.text.replace(old, new))


def test_what_postgresql_refuses_does_not_take_the_others_with_it(intake, store):
    bad = line(metrics={"accepted": 1})
    bad = replace_text(bad, '"accepted":1', '"accepted":?')
    told = keep(intake, [line(), bad, line()])
    assert told[0] == told[2] == "" and told[1].startswith("PostgreSQL refuses it")
    assert len(read_events(store, "plan_decided")) == 2


def test_events_of_our_own_are_checked_too(intake, store):
    good = Event("note", "household", "h1", utc_now(), {"a": 1}, context={"source": "x"})
    told = asyncio.run(intake.write([good, replace(good, id=new_id(), unit_id="h" * 600), good]))
    assert told[0] == "" and "600 characters" in told[1] and told[2] == DUPLICATE
    assert len(read_events(store, "note", source="x")) == 1


def test_a_partition_that_was_dropped_meanwhile_is_made_again(intake, store):
    at = "2020-05-05T00:00:00Z"
    assert keep(intake, [line(event_at=at)]) == [""]
    with transaction(store) as connection:
        connection.execute("DROP TABLE exp.events_2020_05")
    assert keep(intake, [line(event_at=at)]) == [""]


def test_while_the_database_is_away_events_wait_on_disk_and_are_there_when_it_is_back(intake, store):
    assert keep(intake, [line()]) == [""]
    url = go_away(intake)
    waiting = [line(unit_id=f"away-{i}") for i in range(7)]
    assert keep(intake, waiting) == [SPOOLED] * 7
    assert keep(intake, waiting[:2]) == [SPOOLED] * 2, "sent again, they are as safe as before"
    assert "not reachable" in intake.error and len(read_events(store, "plan_decided")) == 1
    intake.store.url = url
    wait_until(lambda: not count_spooled(intake.spool))
    assert len(read_events(store, "plan_decided")) == 8
    assert keep(intake, waiting[:1]) == [DUPLICATE]


def test_what_a_dead_worker_left_on_disk_is_handed_over_by_another(store, tmp_path):
    code = """
import sys, os
from pathlib import Path
from mlops_workbench.core import utc_now
from mlops_workbench.sent import read_sent
from mlops_workbench.spool import Spool, spool_lines
body = b'{"type": "plan_decided", "unit_type": "household", "unit_id": "left-%d"}'
spool_lines(Spool(Path(sys.argv[1])), [read_sent(body % i, utc_now()) for i in range(3)])
os.kill(os.getpid(), 9)
"""
    folder = tmp_path / "spool"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], timeout=60).returncode == -9
    intake = Intake(Store(store.url), Spool(folder))
    wait_until(lambda: len(read_events(store, "plan_decided")) == 3)
    intake.close()
    assert list(folder.glob("*.lines")) == []


def test_a_file_whose_owner_lives_is_left_alone(tmp_path):
    owner, other = Spool(tmp_path), Spool(tmp_path)
    spool_lines(owner, [line()])
    assert list(hand_over(other)) == []
    owner.close()
    assert [len(group) for group in hand_over(other)] == [1]


def test_a_torn_line_is_no_event(tmp_path):
    spool = Spool(tmp_path)
    spool_lines(spool, [line(), line()])
    spool._file.write(b"half of a li")
    spool.close()
    assert [len(group) for group in hand_over(Spool(tmp_path))] == [2]


def test_a_line_comes_back_from_disk_as_it_went(tmp_path):
    spool, kept = Spool(tmp_path), line(payload={"note": "a\tb\nc\\d \u2028 é"})
    spool_lines(spool, [kept])
    ((back,),) = hand_over(spool)
    assert back == kept


def test_a_full_disk_refuses_and_leaves_no_half_line(tmp_path):
    spool = Spool(tmp_path)
    spool_lines(spool, [line()])

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(bytes(data)[:10])
            raise OSError(28, os.strerror(28))

        def __getattr__(self, name):
            return getattr(self.file, name)

    spool._file = Full(spool._file)
    with pytest.raises(WorkbenchError, match="No space left"):
        spool_lines(spool, [line()])
    spool._file = spool._file.file
    spool_lines(spool, [line()])
    assert sum(len(group) for group in hand_over(spool)) == 2


def test_neither_database_nor_disk_is_said_and_not_swallowed(store, tmp_path):
    intake = Intake(Store(NOWHERE), Spool(tmp_path / "spool", limit=1))
    with pytest.raises(Refused) as refused:
        keep(intake, [line()])
    assert refused.value.status == 503 and "Retry-After" in refused.value.headers
    intake.close()


def test_too_much_at_once_is_refused(store, tmp_path):
    intake = Intake(Store(store.url), Spool(tmp_path / "spool"), bound=10)
    with pytest.raises(Refused) as refused:
        keep(intake, [line() for _ in range(11)])
    assert refused.value.status == 429
    intake.close()


def test_what_waits_when_it_is_closed_is_still_committed(store, tmp_path):
    intake = Intake(Store(store.url), Spool(tmp_path / "spool"))

    async def close_under_way():
        waiting = [asyncio.ensure_future(intake.keep([line(unit_id=f"h-{i}")])) for i in range(20)]
        await asyncio.sleep(0)
        await asyncio.to_thread(intake.close)
        return await asyncio.gather(*waiting)

    assert asyncio.run(close_under_way()) == [[""]] * 20
    with pytest.raises(Refused):
        keep(intake, [line()])
    assert len(read_events(store, "plan_decided")) == 20


def test_lines_and_events_are_the_same_rows(store):
    event = Event("note", "household", "h1", utc_now(), {"a": [1, "b"]}, context={"source": "x"}, metrics={"m": 2})
    writer = open_writer(store)
    from mlops_workbench.events import make_partitions, write_events

    make_partitions(store, [event.event_at])
    assert settle_lines(writer, [write_line(event, utc_now())]) == {event.id: ""}
    write_events(store, [replace(event, id=new_id())])
    writer.close()
    one, two = read_events(store, "note").drop(columns=["id", "received_at"]).to_dict("records")
    assert one == two


@pytest.mark.parametrize("n", [3, 700])
def test_a_few_and_many_are_kept_alike(intake, store, n):
    note = "back\\slash \\n \\N \\\\ tab\t é \u2028 'quote' $1 %s"
    lines = [line(unit_id=f"h\\{i}", payload={"note": note}) for i in range(n)]
    assert keep(intake, [*lines, lines[0]]) == [""] * n + [DUPLICATE]
    assert keep(intake, [*lines[:2], line()]) == [DUPLICATE, DUPLICATE, ""]
    kept = read_events(store, "plan_decided")
    assert len(kept) == n + 1 and sum(p == {"note": note} for p in kept["payload"]) == n
    assert set(kept["unit_id"]) == {f"h\\{i}" for i in range(n)} | {"h-7"}


def test_a_line_has_ten_columns(store):
    assert line().text.count("\t") == 9 and isinstance(line(), Line)
    with transaction(store) as connection:
        assert read_rows(connection, "SELECT 1 AS one") == [{"one": 1}]
