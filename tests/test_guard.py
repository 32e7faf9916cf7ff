"The guard: what reaches the service, what does not, and what comes back."

import asyncio
import json
import logging
import socket
import threading
import time

import httpx
import msgspec
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from mlops_workbench.core import WorkbenchError
from mlops_workbench.guard import Guard, GuardOptions, Refused, install_errors, is_deep, read_json, require
from mlops_workbench.store import Store, connect
from mlops_workbench.tokens import Caller, refuse_credentials


class Doorkeeper:
    "Keys of three callers, without a database."

    callers = {f"Bearer {scope}": Caller(scope, scope, "key") for scope in ("client", "operator", "admin")}

    async def admit(self, authorization):
        if authorization not in self.callers:
            raise refuse_credentials("the key is unknown")
        return self.callers[authorization]


def application():
    app = FastAPI()
    install_errors(app)

    @app.get("/healthz")
    async def healthz():
        return {"status": "ok"}

    @app.post("/echo")
    async def echo(request: Request):
        return {"read": len(await request.body()), "caller": require(request.scope).name}

    @app.post("/json")
    async def take(request: Request):
        return {"read": read_json(await request.body())}

    @app.post("/admin")
    async def admin(request: Request):
        require(request.scope, "admin")
        return {}

    @app.get("/number/{n}")
    async def number(n: int):
        return n

    @app.get("/fail/{how}")
    async def fail(how: str):
        if how == "database":
            connect(Store("postgresql://secret-user@127.0.0.1:1/secret-place"))
        if how == "refused":
            raise Refused(418, "no coffee\nhere", {"X-Why": "tea"})
        if how == "state":
            raise WorkbenchError("secret-state")
        raise ValueError("secret-words")

    @app.get("/stream")
    async def stream():
        async def parts():
            yield b"begin "
            raise RuntimeError("secret-words")

        return StreamingResponse(parts())

    return app


def ask(method, path, app=None, options=None, **request):
    "Send one request without a network."
    asked = {"headers": {"authorization": "Bearer client"}} | request

    async def send():
        guarded = Guard(app or application(), options or GuardOptions(Doorkeeper()))
        transport = httpx.ASGITransport(guarded, raise_app_exceptions=False, client=("10.0.0.1", 7))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **asked)

    return asyncio.run(send())


def error_of(answer):
    "Read an error, which is one line and nothing else."
    assert answer.headers["content-type"] == "application/json" and answer.text.count("\n") == 1
    (error,) = json.loads(answer.text).values()
    assert set(error) == {"code", "message", "request_id"} and "\n" not in error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    assert "secret" not in answer.text and "Traceback" not in answer.text and "File" not in answer.text
    return answer.status_code, error["code"]


def test_who_has_no_key_reaches_nothing_but_what_is_public():
    assert ask("GET", "/healthz", headers={}).status_code == 200
    for path in (
        "/echo",
        "/nowhere",
        "/healthz/",
        "/healthz/../echo",
        "//healthz",
        "/HEALTHZ",
        "/docs",
        "/openapi.json",
    ):
        assert error_of(ask("GET", path, headers={})) == (401, "unauthorized")
    assert ask("GET", "/echo", headers={}).headers["www-authenticate"].startswith("Bearer")


def test_a_scope_that_is_too_low_is_forbidden():
    statuses = [
        ask("POST", "/admin", headers={"authorization": f"Bearer {s}"}).status_code
        for s in ("client", "operator", "admin")
    ]
    assert statuses == [403, 403, 200]


def test_a_route_that_asks_who_called_cannot_be_reached_without_a_key():
    answer = ask("POST", "/echo", options=GuardOptions(Doorkeeper(), public=frozenset({"/echo"})), headers={})
    assert error_of(answer) == (401, "unauthorized")


def test_a_well_formed_request_id_is_kept_and_another_is_replaced():
    assert ask("GET", "/healthz", headers={"x-request-id": "r-1:a.b_c"}).headers["x-request-id"] == "r-1:a.b_c"
    for bad in ("", "a b", "x" * 65, "a\tb", "<script>", "é", "a;b"):
        given = ask("GET", "/healthz", headers={"x-request-id": bad.encode()}).headers["x-request-id"]
        assert len(given) == 36 and given != bad


def test_every_answer_has_the_security_headers():
    for answer in (
        ask("GET", "/healthz"),
        ask("GET", "/nowhere"),
        ask("GET", "/fail/x"),
        ask("GET", "/echo", headers={}),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY" and "server" not in answer.headers
        assert "strict-transport-security" not in answer.headers


@pytest.mark.parametrize(
    "how, expected",
    [
        ("refused", (418, "error")),
        ("state", (500, "internal")),
        ("value", (500, "internal")),
        ("database", (503, "unavailable")),
    ],
)
def test_what_goes_wrong_inside_is_told_in_one_line_and_logged(how, expected, caplog):
    answer = ask("GET", f"/fail/{how}")
    assert error_of(answer) == expected
    if how == "refused":
        assert answer.headers["x-why"] == "tea" and not caplog.records
    else:
        assert answer.headers["x-request-id"] in caplog.text and "secret" in caplog.text


def test_a_framework_error_behind_another_middleware_looks_the_same():
    async def plain(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise RuntimeError("secret-words")

    logging.getLogger("mlops_workbench.guard").setLevel(logging.CRITICAL)
    try:
        assert error_of(ask("GET", "/", app=plain)) == (500, "internal")
    finally:
        logging.getLogger("mlops_workbench.guard").setLevel(logging.NOTSET)


def test_a_failure_that_the_service_answers_itself_is_passed_on():
    async def plain(scope, receive, send):
        await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"7")]})
        await send({"type": "http.response.body", "body": b"busy", "more_body": True})
        await send({"type": "http.response.body", "body": b" now"})

    answer = ask("GET", "/", app=plain)
    assert (answer.status_code, answer.text, answer.headers["retry-after"]) == (503, "busy now", "7")


@pytest.mark.parametrize(
    "method, path, expected",
    [
        ("GET", "/nowhere", (404, "not_found")),
        ("GET", "/echo", (405, "error")),
        ("BREW", "/echo", (405, "error")),
        ("GET", "/number/seven", (422, "unprocessable")),
        ("GET", "/number/' OR 1=1", (422, "unprocessable")),
        ("GET", "/number/..%2f..%2fetc%2fpasswd", (404, "not_found")),
    ],
)
def test_the_frameworks_own_errors_look_like_ours(method, path, expected):
    assert error_of(ask(method, path)) == expected


def test_a_body_is_counted_whatever_its_length_claims():
    options = GuardOptions(Doorkeeper(), max_body=1_000)
    assert ask("POST", "/echo", options=options, content=b"x" * 1_000).json()["read"] == 1_000
    assert error_of(ask("POST", "/echo", options=options, content=b"x" * 1_001)) == (413, "too_large")

    async def parts():
        for _ in range(3):
            yield b"x" * 400

    assert error_of(ask("POST", "/echo", options=options, content=parts())) == (413, "too_large")
    for length in ("99999999999999999999999", "-1", "1e3", "0x10", "٣"):
        given = {"authorization": "Bearer client", "content-length": length.encode()}
        assert error_of(ask("POST", "/echo", options=options, content=b"x", headers=given))[0] == 413


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, identity", "IDENTITY"])
def test_a_compressed_body_is_not_unpacked(coding):
    given = {"authorization": "Bearer client", "content-encoding": coding}
    assert error_of(ask("POST", "/json", content=b"{}", headers=given)) == (415, "unsupported")


def nested(depth, inner=b"1"):
    return b"[" * depth + inner + b"]" * depth


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a": "\xff"}',
        b'"\xed\xa0\x80"',
        b'"\\ud800"',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b"NaN",
        b'{"a": Infinity}',
        b"[1,]",
        b"{'a': 1}",
        b"{} {}",
        nested(33),
        nested(900),
        nested(200_000),
        b'{"a":' * 100_000,
        b"[" + b"[]," * 40 + nested(33) + b"]",
        b'["]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",' + nested(33) + b"]",
    ],
    ids=lambda body: repr(body[:16]),
)
def test_what_is_no_plain_json_is_refused(body):
    assert error_of(ask("POST", "/json", content=body)) == (400, "bad_request")


def test_numbers_that_do_not_fit_are_refused():
    for body in (b"1e999", b"-1e999", b"1" * 5_000):
        assert error_of(ask("POST", "/json", content=body))[0] in (400, 422)


def test_depth_is_counted_in_objects_lists_and_structs_alike():
    class Holder(msgspec.Struct):
        held: object

    assert not is_deep({"a": [1, {"b": ()}]}, 3) and is_deep({"a": [1, {"b": ()}]}, 2)
    assert is_deep([Holder([Holder([1])])], 3) and not is_deep([Holder([Holder([1])])], 4)
    assert not is_deep("[[[[", 0)
    assert read_json(nested(32)) == json.loads(nested(32))


def test_a_caller_who_asks_too_fast_is_told_when_to_come_again():
    async def many():
        guarded = Guard(application(), GuardOptions(Doorkeeper(), calls_per_s=3))
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            answers = []
            for _ in range(200):
                answers.append(await client.get("/number/1", headers={"authorization": "Bearer client"}))
                if answers[-1].status_code == 429:
                    break
            other = await client.get("/number/1", headers={"authorization": "Bearer operator"})
            return answers[-1], other

    refused, other = asyncio.run(many())
    assert error_of(refused) == (429, "too_many") and 1 <= int(refused.headers["retry-after"]) <= 2
    assert other.status_code == 200  # callers do not count for each other


def test_guessing_is_slowed_down_by_address_and_right_keys_are_not():
    async def many():
        guarded = Guard(application(), GuardOptions(Doorkeeper(), failures_per_min=5))
        found = {}
        for host in ("10.0.0.1", "10.0.0.2"):
            transport = httpx.ASGITransport(guarded, client=(host, 7))
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                asked = [client.get("/number/1", headers={"authorization": f"Bearer guess{i}"}) for i in range(7)]
                right = await client.get("/number/1", headers={"authorization": "Bearer client"})
                found[host] = [(await a).status_code for a in asked], right.status_code
        return found

    expected = [401] * 5 + [429] * 2, 200
    assert asyncio.run(many()) == {"10.0.0.1": expected, "10.0.0.2": expected}


@pytest.mark.parametrize("name", ["max_body", "body_timeout_s", "calls_per_s", "failures_per_min"])
def test_options_that_let_nothing_through_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        GuardOptions(**{name: 0})


def test_nothing_speaks_over_a_web_socket():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(application(), GuardOptions(Doorkeeper()))({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# Behind a real server: what only shows on a socket.


@pytest.fixture(scope="module")
def port():
    guarded = Guard(application(), GuardOptions(Doorkeeper(), max_body=100_000, body_timeout_s=0.5))
    config = uvicorn.Config(
        guarded, port=0, log_level="critical", lifespan="off", server_header=False, http="httptools"
    )
    server = uvicorn.Server(config)
    opened = config.bind_socket()
    thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield opened.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def talk(port, *parts, pause_s=0.0):
    "Send bytes as they are, and read what comes until the connection ends or falls silent."
    with socket.create_connection(("127.0.0.1", port), timeout=3) as line:
        for part in parts:
            try:
                line.sendall(part)
            except OSError:
                break
            time.sleep(pause_s)
        told = b""
        try:
            while more := line.recv(65_536):
                told += more
        except OSError:
            pass
    return told


def request(path="/echo", *headers, key="client"):
    lines = [f"POST {path} HTTP/1.1", "host: service", f"authorization: Bearer {key}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_caller_who_sends_slowly_is_cut_off(port):
    told = talk(port, request("/echo", "content-length: 100"), b"x", b"x", pause_s=0.05)
    assert told.startswith(b"HTTP/1.1 408") and b"connection: close" in told.lower()


def test_a_caller_without_a_key_is_answered_although_it_is_still_sending(port):
    body = b"x" * 90_000
    told = talk(port, request("/echo", f"content-length: {len(body)}", key="nobody"), body)
    assert told.startswith(b"HTTP/1.1 401") and b"unauthorized" in told
    told = talk(port, request("/echo", "content-length: 9000000"), *[b"x" * 65_536] * 10)
    assert told.startswith(b"HTTP/1.1 413") and b"too_large" in told


def test_an_answer_that_breaks_off_is_seen_to_break_off(port):
    told = talk(port, b"GET /stream HTTP/1.1\r\nhost: service\r\nauthorization: Bearer client\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 200") and not told.endswith(b"0\r\n\r\n") and b"secret" not in told


def test_a_connection_is_used_again_after_an_error(port):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": "Bearer client"}) as client:
        assert client.post("/json", content=b"{").status_code == 400
        assert client.post("/echo", content=b"1234").json()["read"] == 4


def test_what_is_no_http_is_no_request(port):
    for bytes_ in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"\x00" * 100,
        request("/echo", "content-length: x"),
    ):
        told = talk(port, bytes_)
        assert b"HTTP/1.1 2" not in told and b"HTTP/1.1 5" not in told
    both = (
        request("/echo", "content-length: 4", "transfer-encoding: chunked") + b"0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n"
    )
    assert talk(port, both).count(b"HTTP/1.1 200") <= 1  # no second request hides in the first one's body
