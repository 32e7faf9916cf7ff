"The service under everything that nobody would send: no answer is a failure that is not explained."

import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from listening import listening

from mlops_workbench.core import new_id
from mlops_workbench.events import read_events
from mlops_workbench.keys import create_key, revoke_key, rotate_key
from mlops_workbench.kitchen import write_visitors
from mlops_workbench.ledger import verify_ledger
from mlops_workbench.service import ServiceOptions
from mlops_workbench.serving import build_app
from mlops_workbench.settings import Settings
from mlops_workbench.store import read_rows, temporary_store, transaction

N_EXAMPLES = 5  # of each kind, for each operation


LOGGED = {}  # request → what the log says of it


class Notes(logging.Handler):
    def emit(self, record):
        if len(record.args) > 3:
            LOGGED[record.args[2]] = f"{record.args[-2]}: {record.args[-1]}"[:300]


class World:
    "A service with a key of each scope."

    def __init__(self, store, url, app):
        self.store, self.url, self.app = store, url, app
        self.keys = {
            scope: create_key(store, f"fuzz-{scope}", scope, "fuzz")[0] for scope in ("client", "operator", "admin")
        }
        self.client = httpx.Client(base_url=url, headers=self.headers("client"), timeout=30, trust_env=False)

    def headers(self, scope):
        return {"authorization": f"Bearer {self.keys[scope]}"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("fuzz"))
    (folder / "settings.ini").write_text("[local]\n")
    with temporary_store() as store:
        here = Settings("local", folder, folder / ".workbench", store.url)
        write_visitors(store, 3, 0, datetime.now(UTC))
        app = build_app(ServiceOptions(here, tasks=("mlops_workbench.planner", "mlops_workbench.recommender")))
        logging.getLogger("mlops_workbench.guard").addHandler(Notes())
        with listening(app) as url:
            found = World(store, url, app)
            with found.client:
                yield found


def fault_of(response):
    "Say what an answer promises and does not keep; '' when it keeps everything."
    status, text = response.status_code, response.text
    if not response.headers.get("x-request-id"):
        return "no request id"
    if "Traceback" not in text and 'File "' not in text and "psycopg" not in text:
        if status < 400 or status == 503 or "/readyz" in str(response.request.url):
            return ""
        if status >= 500:
            return f"a failure: {LOGGED.get(response.headers['x-request-id'], text[:200])}"
        foreign = ("events" in text, "errorCode" in text, "error_code" in text, '"object":"error"' in text)
        if any(foreign) or (text.startswith('{"error"') and text.count("\n") <= 1):
            return ""  # a batch told event by event, or an error in the words of OFREP, MLflow or OpenAI
        return f"an error that is none of ours: {text[:200]}"
    return f"more than a caller may know: {text[:200]}"


def check(response):
    "Hold an answer against what every answer promises."
    fault = fault_of(response)
    assert not fault, f"{response.request.method} {response.request.url} gave {response.status_code}, {fault}"
    return response.status_code


class Faults(list):
    "What went wrong, once for each kind."

    def look(self, label, response):
        if fault := fault_of(response):
            sent = (response.request.body if hasattr(response.request, "body") else response.request.content) or b""
            told = f"{label} gave {response.status_code}, {fault}"
            if not any(told == known for known, _ in self):
                self.append((told, sent[:300]))
        return response.status_code


LIMITS = {"max_examples": N_EXAMPLES, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def explore(world, operation, mode, faults):
    "Call an operation with what its document allows, or with what it does not."
    seen = set()

    @seed(5)
    @settings(phases=[Phase.generate], **LIMITS)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        status = faults.look(operation.label, case.call(base_url=world.url, headers=world.headers("admin")))
        if str(status) not in operation.definition.raw["responses"]:
            faults.append((f"{operation.label} gave {status}, which its document does not know", b""))
        seen.add(status)

    ask()
    return seen


def test_every_operation_survives_what_fits_its_document_and_what_does_not(world):
    fitting, misfits = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    statuses, faults = {}, Faults()
    for result in schemathesis.openapi.from_dict(world.app.openapi()).get_all_operations():
        operation = result.ok()
        statuses[operation.label] = explore(world, operation, fitting, faults)
        if operation.body or operation.path_parameters or operation.query:
            explore(world, operation, misfits, faults)
    assert faults == []
    assert {"POST /api/v1/events", "POST /api/v1/plans", "POST /api/v1/assignments"} <= set(statuses)
    assert 201 in statuses["POST /api/v1/events"]


ODD = [
    "' OR 1=1 --",
    "x'; DROP TABLE exp.events; --",
    "../../../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%00",
    "a\u0000b",
    "${jndi:ldap://x}",
    "{{7*7}}",
    "%s%s%n",
    "\u202e\u0000",
    "\ud83d\ude00" * 40,
    "x" * 5_000,
    " ",
    "null",
    "-1",
    "1e999",
    "<script>alert(1)</script>",
]


def paths_with(app, odd):
    "List every path of the document, with an odd text for each of its parameters."
    for path, operations in app.openapi()["paths"].items():
        if "{" in path:
            parts = [odd if part.startswith("{") else part for part in path.split("/")]
            yield from ((method.upper(), "/".join(parts)) for method in operations)


def test_tricks_in_paths_find_nothing(world):
    faults = Faults()
    for odd in ODD:
        once = quote(odd.encode("utf-8", "replace"), safe="")[:3_000]
        for text in {once, quote(once), odd if odd.isascii() and odd.isprintable() else once}:
            for method, path in paths_with(world.app, text):
                response = world.client.request(method, path, headers=world.headers("admin"), json={})
                faults.look(f"{method} {path[:90]}", response)
    assert faults == []
    with transaction(world.store) as connection:
        assert read_rows(connection, "SELECT to_regclass('exp.events') IS NOT NULL AS there")[0]["there"]


def test_tricks_in_ids_are_kept_as_text_or_refused(world):
    for odd in ODD:
        try:
            body = json.dumps({"type": odd, "unit_type": odd, "unit_id": odd, "payload": {"odd": odd}}).encode()
        except UnicodeError:
            continue
        for path, sent in (
            ("/api/v1/events", body),
            ("/api/v1/events/batch", b'{"events": [' + body + b"]}"),
            ("/api/v1/plans", json.dumps({"unit_id": odd}).encode()),
            ("/api/v1/predict/recommender", json.dumps({"unit_id": odd, "context": {"user": odd}}).encode()),
            ("/api/v1/assignments", json.dumps({"unit_id": odd, "unit_type": odd, "experiments": [odd]}).encode()),
            ("/ofrep/v1/evaluate/flags", json.dumps({"context": {"targetingKey": odd}}).encode()),
            ("/invocations", json.dumps({"inputs": [{odd: odd}]}).encode()),
            ("/v1/completions", json.dumps({"model": odd, "prompt": odd}).encode()),
        ):
            check(world.client.post(path, content=sent, headers={"content-type": "application/json"}))


UNREADABLE = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, '{"unit_id": "h"}'.encode("utf-16"), b"{} {}"]
UNREADABLE += [b'{"unit_id": "\xed\xa0\x80"}', b'{"unit_id": "h", "context": {"a": 1e999}}', b'{"unit_id": NaN}']
ODD_BODIES = [b"null", b"[]", b"7", b'"x"', b'{"events": 7}', b'{"unit_id": []}', b'{"unit_id": "\\ud800"}', b"{}"]
ODD_BODIES += [b'{"unit_id": "h", "context": ' + b'{"a":' * 60 + b"1" + b"}" * 61]
ODD_BODIES += [b'{"model": "x", "messages": ' + b"[" * 60 + b"]" * 60 + b"}"]


def test_bodies_that_are_no_bodies_are_refused(world):
    faults, admin = Faults(), {"content-type": "application/json"} | world.headers("admin")
    for path, operations in world.app.openapi()["paths"].items():
        if "post" not in operations or "{" in path:
            continue
        for body in UNREADABLE + ODD_BODIES:
            response = world.client.post(path, content=body, headers=admin)
            if faults.look(f"{path} with {body[:40]}", response) < 400 and body in UNREADABLE:
                faults.append((f"{path} took {body[:40]}", response.text[:200]))
        large = world.client.post(path, content=b" " * (8 * 2**20 + 1))
        assert large.status_code == 413, path
    assert faults == []


def test_no_operation_answers_without_a_right_key_or_with_too_low_a_scope(world):
    old = create_key(world.store, "gone", "admin", "fuzz")[0]
    revoke_key(world.store, "gone", "fuzz")
    time.sleep(2)
    wrong = [f"Bearer {old}", f"Bearer {world.keys['admin'][:-1]}", f"Basic {world.keys['admin']}", "Bearer null", None]
    public, operator, reached = {"/healthz", "/readyz", "/ping", "/health", "/openapi.json", "/docs"}, [], []
    operations = [(m, p) for p, methods in world.app.openapi()["paths"].items() for m in methods if p not in public]
    with httpx.Client(base_url=world.url, trust_env=False) as client:
        for i, (method, path) in enumerate(operations):
            asked = path.replace("{", "").replace("}", "")
            for header in wrong[i % 4 :: 4]:
                sent = {"authorization": header} if header is not None else {}
                status = client.request(method, asked, headers=sent, json={}).status_code
                if status not in (401, 429):
                    reached.append((method, path, header and header[:12], status))
            if world.client.request(method, asked, json={}).status_code == 403:
                operator.append(path)
        assert reached == []
        assert client.get("/healthz").status_code == 200
    assert any("rollback" in path for path in operator) and len(operator) >= 4


def test_an_event_that_is_sent_again_is_there_once(world):
    event = {
        "type": "fuzz_replayed",
        "unit_type": "household",
        "unit_id": "h-1",
        "id": new_id(),
        "metrics": {"accepted": 1},
    }
    event["event_at"] = datetime.now(UTC).isoformat()
    statuses = [world.client.post("/api/v1/events", json=event).status_code for _ in range(5)]
    batch = world.client.post("/api/v1/events/batch", json={"events": [event] * 5})
    assert statuses == [201, 200, 200, 200, 200] and check(batch) < 300
    assert len(read_events(world.store, "fuzz_replayed")) == 1


def test_a_clock_that_is_wrong_is_told_so(world):
    times = ["2199-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2026-01-01T00:00:00"]
    faults = Faults()
    for at in [*times, "0001-01-01T00:00:00Z", "now", "1e9", "", 7]:
        event = {"type": "fuzz_clock", "unit_type": "household", "unit_id": "h-1", "event_at": at}
        faults.look(f"event at {at}", world.client.post("/api/v1/events", json=event))
        faults.look(f"plan at {at}", world.client.post("/api/v1/plans", json={"unit_id": "h-1", "at": at}))
    assert faults == []


def test_a_rotated_key_works_beside_the_old_one(world):
    old = create_key(world.store, "turned", "client", "fuzz")[0]
    new = rotate_key(world.store, "turned", "fuzz", overlap_s=60)[0]
    for text in (old, new):
        sent = {"authorization": f"Bearer {text}"}
        assert world.client.post("/api/v1/assignments", json={"unit_id": "h-1"}, headers=sent).status_code == 200


def test_after_all_this_the_ledger_is_whole_and_the_service_is_well(world):
    with transaction(world.store) as connection:
        assert verify_ledger(connection).ok
    assert world.client.get("/healthz").status_code == 200
    assert world.client.post("/api/v1/plans", json={"unit_id": "nobody"}).status_code == 404
