"The service as a whole: workers on one port, what survives their death, what machines look at, and what administrators may do."

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner

from mlops_workbench.core import new_id, utc_now
from mlops_workbench.events import read_events
from mlops_workbench.experiment import read_experiments
from mlops_workbench.keys import create_key
from mlops_workbench.ledger import read_ledger
from mlops_workbench.operations import app as operations
from mlops_workbench.service import ServiceOptions
from mlops_workbench.serving import Impatient, build_app
from mlops_workbench.settings import Settings
from mlops_workbench.store import transaction

RUN = """
import sys
from pathlib import Path
from mlops_workbench.service import ServiceOptions
from mlops_workbench.serving import Listen, run_service
from mlops_workbench.settings import Settings
if __name__ == "__main__":
    url, home, port, workers, *files = sys.argv[1:]
    options = ServiceOptions(Settings("local", Path(home), Path(home), url), models=False, open_metrics=True)
    certificate, key = map(Path, files) if files else (None, None)
    run_service(options, Listen(port=int(port), workers=int(workers), certificate=certificate, key=key))
"""
TONE = {
    "key": "planner_tone",
    "hypothesis": "A friendly tone makes households accept more plans.",
    "policy": "planner",
    "unit_type": "household",
    "variants": [
        {"name": "control", "share": 0.5, "control": True},
        {"name": "warm", "share": 0.5, "parameters": {"tone": "warm"}},
    ],
    "metrics": [
        {"metric": "acceptance", "role": "primary", "kind": "proportion", "event": "plan_decided", "value": "accepted"}
    ],
    "mde": 0.05,
    "planned_n": 3_900,
    "ends_at": "2099-03-31T00:00:00Z",
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(holds, seconds=20):
    for _ in range(int(seconds / 0.05)):
        with contextlib.suppress(httpx.TransportError):
            if holds():
                return
        time.sleep(0.05)
    raise AssertionError(f"it did not happen within {seconds} s")


@contextlib.contextmanager
def service(store, folder, workers=2, files=()):
    "Run the service in processes of its own."
    port, script = free_port(), folder / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), store.url, str(folder), str(port), str(workers), *map(str, files)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"{'https' if files else 'http'}://127.0.0.1:{port}"
    try:
        wait_until(lambda: httpx.get(f"{url}/readyz", verify=not files).status_code == 200, 60)
        yield url, process
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[0]
    assert "serving on" in said and "Traceback" not in said, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


def event(**more):
    about = {"type": "plan_decided", "unit_type": "household", "unit_id": "household-1", "id": new_id()}
    return about | {"event_at": datetime.now(UTC).isoformat(), "metrics": {"accepted": 1}} | more


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            about = (path / "stat").read_text().rpartition(")")[2].split()
            if int(about[1]) == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return sorted(found)


def test_workers_on_one_port_lose_no_acknowledged_event_when_one_is_killed_and_when_all_end(store, tmp_path):
    key, _ = create_key(store, "shop", "client", "ada")
    acknowledged, failures, stop = [], [], threading.Event()

    def send(url):
        with httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=20) as client:
            while not stop.is_set():
                sent = event()
                try:
                    answer = client.post(f"{url}/api/v1/events", json=sent)
                except httpx.TransportError as error:  # the worker died with the request in its hands
                    failures.append(error)
                    continue
                if answer.status_code in (200, 201, 202):
                    acknowledged.append(sent["id"])
                else:
                    failures.append(answer.text)

    with service(store, tmp_path) as (url, process):
        before = children(process.pid)
        assert len(before) == 2
        threads = [threading.Thread(target=send, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(set(children(process.pid)) - set(before)) == 1)
        n = len(acknowledged)
        wait_until(lambda: len(acknowledged) > n + 50)
        assert before[1] in children(process.pid), "the other worker was not disturbed"
        assert len(failures) <= 4, failures[:5]
        n_failed = len(failures)
        process.terminate()
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()
    kept = set(read_events(store, "plan_decided")["id"])
    assert set(acknowledged) <= kept and len(acknowledged) > 100
    refused = [f for f in failures[n_failed:] if not isinstance(f, httpx.TransportError)]
    assert refused == [], "whoever was answered at the end was answered well"


def test_the_numbers_of_all_workers_are_on_one_page_and_a_change_reaches_each(store, tmp_path):
    key, _ = create_key(store, "shop", "client", "ada")
    ops, _ = create_key(store, "ops", "operator", "ada")
    headers = {"authorization": f"Bearer {key}"}

    def ask(url):
        with httpx.Client() as client:  # a connection of its own: any worker may get it
            body = {"unit_id": "household-1", "expose": "no"}
            return client.post(f"{url}/api/v1/assignments", json=body, headers=headers).json()

    with service(store, tmp_path) as (url, _):
        admin = httpx.Client(base_url=url, headers={"authorization": f"Bearer {ops}"}, timeout=20)
        assert admin.post("/api/v1/experiments", json=TONE).status_code == 201
        assert admin.post("/api/v1/experiments/planner_tone/start", json={"coverage": 2_000}).status_code == 200
        assert admin.post("/api/v1/experiments/planner_tone/ramp", json={"coverage": 10_000}).status_code == 200
        wait_until(lambda: all(ask(url)["assignments"] for _ in range(10)))
        assert admin.post("/api/v1/experiments/planner_tone/pause", json={"reason": "lunch"}).status_code == 200
        wait_until(lambda: not any(ask(url)["assignments"] for _ in range(10)))
        n = sum(ask(url)["unit_id"] == "household-1" for _ in range(40))

        def counted():
            page = httpx.get(f"{url}/metrics").text
            rows = [line for line in page.splitlines() if line.startswith("workbench_requests_total")]
            return sum(float(r.rpartition(" ")[2]) for r in rows if "/api/v1/assignments" in r)

        wait_until(lambda: counted() >= n + 20)
    with transaction(store) as connection:
        entries = read_ledger(connection, subject={"experiment": "planner_tone"})
    assert {e.actor for e in entries} == {"key ops"} and entries[-1].action == "experiment.pause"


def test_tls_files_are_used(store, tmp_path):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
    built = builder.not_valid_before(utc_now() - timedelta(days=1)).not_valid_after(utc_now() + timedelta(days=1))
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(built.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(private.private_bytes(*pem))
    with service(store, tmp_path, 1, (certificate, key)) as (url, _):
        trusted = ssl.create_default_context(cafile=str(certificate))
        trusted.check_hostname = False
        answer = httpx.get(f"{url}/healthz", verify=trusted)
        assert answer.status_code == 200 and answer.headers["strict-transport-security"]


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", b"GET / HTTP/1.1\r\nx: 1\r\n\r\nGET"])
def test_whoever_is_late_with_the_head_of_a_request_is_hung_up_on(said):
    class Hasty(Impatient):
        patience_s = 0.3

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    server = uvicorn.Server(uvicorn.Config(answer, port=0, http=Hasty, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    address = server.servers[0].sockets[0].getsockname()
    with socket.create_connection(address, timeout=20) as late:
        late.sendall(said)
        heard = b"".join(iter(lambda: late.recv(65_536), b""))
    assert heard.count(b"HTTP/1.1 204") == said.count(b"\r\n\r\n")
    with httpx.Client(base_url=f"http://127.0.0.1:{address[1]}") as kept:
        assert kept.get("/").status_code == 204
        time.sleep(0.6)  # a connection that rests between two requests is not late
        line = kept._transport._pool.connections
        assert kept.get("/").status_code == 204 and len(line) == 1 and not line[0].is_closed()
    server.should_exit = True
    thread.join(20)


# In this process


class Called:
    "An application, called without a network."

    def __init__(self, store, folder, **options):
        settings = Settings("local", folder, folder, store.url)
        self.app = build_app(ServiceOptions(settings, models=False, **options))
        self.service, self.store = self.app.state.service, store
        self.keys = {s: create_key(store, s, s, "ada")[0] for s in ("client", "operator", "admin")}

    def __call__(self, method, path, body=None, scope="client", **more):
        headers = {"authorization": f"Bearer {self.keys[scope]}"} if scope else {}

        async def ask():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://workbench", timeout=30) as client:
                return await client.request(method, path, json=body, headers=headers | more)

        return asyncio.run(ask())


@pytest.fixture
def called(store, tmp_path):
    opened = Called(store, tmp_path)
    yield opened
    opened.service.close()


def test_machines_may_look_without_a_key_and_at_nothing_else(called):
    assert called("GET", "/healthz", scope="").json() == {"status": "ok"}
    assert called("GET", "/readyz", scope="").json() == {"ready": True, "database": "up", "problems": []}
    assert called("GET", "/openapi.json", scope="").status_code == 200
    assert called("GET", "/metrics", scope="").status_code == 401
    page = called("GET", "/metrics").content
    assert b"workbench_database_up 1.0" in page and b'workbench_alerts_open{severity="critical"} 0.0' in page
    assert called("GET", "/api/v1/experiments", scope="").status_code == 401


def test_a_worker_that_is_closing_is_not_ready(called):
    called.service.closing = True
    assert called("GET", "/readyz", scope="").status_code == 503
    called.service.closing = False


def test_one_bad_event_of_a_hundred_is_207_and_99_are_stored(called):
    events = [event() for _ in range(100)]
    events[7]["unit_id"] = ""
    answer = called("POST", "/api/v1/events/batch", {"events": events})
    told = answer.json()
    assert answer.status_code == 207 and (told["stored"], told["refused"]) == (99, 1)
    assert told["events"][7]["status"] == "refused" and "unit_id" in told["events"][7]["reason"]
    assert [e["id"] for e in told["events"][:7]] == [e["id"] for e in events[:7]]
    assert len(read_events(called.store, "plan_decided")) == 99
    assert called("POST", "/api/v1/events/batch", {"events": [events[7]]}).status_code == 422
    again = called("POST", "/api/v1/events/batch", {"events": events[:7]})
    assert again.status_code == 200 and again.json()["duplicate"] == 7


def test_a_single_event_says_what_became_of_it(called):
    sent = event()
    assert called("POST", "/api/v1/events", sent).status_code == 201
    assert called("POST", "/api/v1/events", sent).json() == {"id": sent["id"], "status": "duplicate"}
    assert called("POST", "/api/v1/events", sent | {"metrics": {"x": "y"}}).status_code == 422
    del sent["id"]
    made = called("POST", "/api/v1/events", sent).json()
    assert made["status"] == "stored" and len(made["id"]) == 36


def test_while_the_database_is_away_events_are_taken_into_care(called):
    intake = called.service.intake
    url, intake.store.url = intake.store.url, "postgresql://nobody@127.0.0.1:1/nowhere"
    answer = called("POST", "/api/v1/events", event())
    assert (answer.status_code, answer.json()["status"]) == (202, "spooled")
    assert called("POST", "/api/v1/events/batch", {"events": [event(), event()]}).status_code == 202
    health = called("GET", "/readyz", scope="")
    assert health.status_code == 200 and health.json()["database"] == "away" and health.json()["problems"]
    intake.store.url = url
    wait_until(lambda: len(read_events(called.store, "plan_decided")) == 3)


def test_who_may_do_what(called):
    for scope, path, expected in (
        ("client", "/api/v1/experiments", 403),
        ("operator", "/api/v1/experiments", 201),
        ("operator", "/api/v1/policies/planner/approve", 403),
        ("admin", "/api/v1/policies/planner/approve", 404),
    ):
        body = TONE if "experiments" in path else {"version": 1, "reason": "seen"}
        assert called("POST", path, body, scope).status_code == expected, (scope, path)
    assert called("GET", "/api/v1/ledger").status_code == 403
    assert called("GET", "/api/v1/ledger", scope="operator").json()[0]["actor"] == "key operator"


def test_an_experiment_lives_over_http(called):
    assert called("POST", "/api/v1/experiments", TONE, "operator").json()["status"] == "draft"
    path = "/api/v1/experiments/planner_tone"
    steps = [("start", {}), ("ramp", {"coverage": 5_000}), ("pause", {"reason": "lunch"}), ("resume", None)]
    statuses = [called("POST", f"{path}/{step}", body, "operator").json()["status"] for step, body in steps]
    assert statuses == ["active", "active", "paused", "active"]
    assert called("POST", f"{path}/stop", {"reason": "planned n reached"}, "operator").json()["status"] == "completed"
    assert called("POST", f"{path}/start", {}, "operator").status_code == 409
    assert [e.status for e in read_experiments(called.store)] == ["completed"]
    assert [p["number"] for p in called("GET", path).json()["phases"]] == [1, 2]


IMPOSSIBLE = [
    ("POST", "/api/v1/experiments", {"key": "x"}, 422),
    ("POST", "/api/v1/experiments", TONE | {"variants": 3}, 422),
    ("POST", "/api/v1/experiments", TONE | {"hypothesis": "\x00"}, 422),
    ("POST", "/api/v1/experiments", TONE | {"variants": [{"name": "a", "share": "1"}]}, 422),
    ("POST", "/api/v1/experiments/planner_ton/start", {}, 404),
    ("POST", "/api/v1/experiments/x/ramp", {"coverage": 10**12}, 422),
    ("POST", "/api/v1/experiments/x/pause", {"reason": " "}, 422),
    ("POST", "/api/v1/experiments/x/pause", {"reason": "\x00"}, 422),
    ("POST", "/api/v1/rollouts", {"key": "r"}, 422),
    ("POST", "/api/v1/rollouts", {"key": "r", "policy": "planner", "candidate": 1}, 409),
    ("GET", "/api/v1/rollouts/nothing", None, 404),
    ("POST", "/api/v1/rollouts/nothing/step", None, 404),
    ("POST", "/api/v1/policies/planner/rollback", {"reason": "x", "to": 2**40}, 422),
    ("POST", "/api/v1/policies/planner/rollback", {"reason": "x"}, 409),
    ("GET", "/api/v1/experiments/..%2f..%2fetc", None, 404),
    ("GET", "/api/v1/ledger?limit=0", None, 422),
]


def test_what_cannot_be_done_is_said_in_one_line(called):
    for method, path, body, expected in IMPOSSIBLE:
        answer = called(method, path, body, "operator")
        assert answer.status_code == expected, (path, body, answer.text)
        told = answer.json()["error"]
        assert told["message"] and "\n" not in told["message"] and "Traceback" not in answer.text


def test_alerts_are_received_listed_and_taken(called):
    about = {"labels": {"alertname": "TargetDown", "severity": "page"}, "annotations": {"summary": "no answer"}}
    sent = {"status": "firing", "fingerprint": "a1", "startsAt": utc_now().isoformat()} | about
    message = {"version": "4", "alerts": [sent]}
    assert called("POST", "/api/v1/alerts", message).status_code == 403
    assert called("POST", "/api/v1/alerts", message, "operator").json()["n_new"] == 1
    (alert,) = called("GET", "/api/v1/alerts").json()
    assert (alert["name"], alert["severity"], alert["words"], alert["state"]) == (
        "TargetDown", "critical", "no answer", "open",
    )  # fmt: skip
    path = f"/api/v1/alerts/{alert['alert_id']}/acknowledge"
    assert called("POST", path).status_code == 403
    assert called("POST", path, scope="operator").json()["acknowledged_by"] == "key operator"
    with transaction(called.store) as connection:
        assert read_ledger(connection)[-1].action == "alert.acknowledged"
    ended = message | {"alerts": [sent | {"status": "resolved", "endsAt": utc_now().isoformat()}]}
    assert called("POST", "/api/v1/alerts", ended, "operator").json()["n_resolved"] == 1
    assert called("GET", "/api/v1/alerts").json() == [] and len(called("GET", "/api/v1/alerts?resolved=1").json()) == 1
    assert called("POST", path, scope="operator").status_code == 409
    assert called("POST", "/api/v1/alerts", {"alerts": 3}, "operator").status_code == 422


def test_an_event_without_a_source_is_from_the_key_it_came_with(called):
    for more in ({}, {"context": {"source": "kiosk"}}, {"context": {"source": None, "a": 1}}):
        assert called("POST", "/api/v1/events", event(**more)).status_code == 201
    assert called("POST", "/api/v1/events/batch", {"events": [event(payload={"a": "\n"})]}).status_code == 200
    found = read_events(called.store, "plan_decided")["context"]
    assert sorted(c["source"] for c in found) == ["client", "client", "client", "kiosk"]


def test_a_policy_without_models_says_so(called):
    assert called("POST", "/api/v1/plans", {"unit_id": "household-1"}).status_code == 404
    assert called("POST", "/api/v1/predict/planner", {"unit_id": "household-1"}).status_code == 404
    forced = called("POST", "/api/v1/predict/planner", {"unit_id": "household-1", "version": 1})
    assert forced.status_code == 403


def test_the_document_has_every_path_with_its_schemas_and_security(called):
    told = called("GET", "/openapi.json", scope="").json()
    served = {getattr(route, "path", "/openapi.json") for route in called.app.routes}
    served -= {"/openapi.json", "/docs", "/docs/oauth2-redirect"}
    assert len(served) > 15
    assert served <= set(told["paths"])
    assert told["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    asked = told["paths"]["/api/v1/assignments"]["post"]
    assert asked["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/AskedAssignments")
    assert asked["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Assignments")
    assert asked["security"] == [{"key": []}] and told["paths"]["/healthz"]["get"]["security"] == []
    references = {part for part in json.dumps(told).split('"') if part.startswith("#/components/schemas/")}
    assert {r.rpartition("/")[2] for r in references} <= set(told["components"]["schemas"])


def test_an_id_comes_back_with_every_answer(called):
    assert called("GET", "/healthz", scope="", **{"x-request-id": "r-1"}).headers["x-request-id"] == "r-1"
    answer = called("POST", "/api/v1/events", {}, **{"x-request-id": "r-2"})
    assert answer.json()["error"]["request_id"] == "r-2"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--certificate", "a.pem"], "TLS needs both"),
        (["--certificate", "a.pem", "--key", "b.pem"], "there is no file"),
    ],
)
def test_the_command_refuses_what_it_cannot_serve_with(arguments, words):
    result = CliRunner().invoke(operations, arguments)
    assert result.exit_code != 0 and words in str(result.exception)
