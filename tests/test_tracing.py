"Logs and traces: one id for a request, nothing secret in either, and a collector that is away holds nobody up."

import asyncio
import io
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from mlops_workbench import tracing
from mlops_workbench.settings import resolve_secret


@pytest.fixture
def lines():
    "Log lines as they are written."
    stream = io.StringIO()
    tracing.log_to(stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    tracing.log_to(None)


@pytest.fixture
def collector():
    "A collector over HTTP, as OpenTelemetry's is: (its URL, the spans that it got)."
    spans, paths = [], []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            paths.append(self.path)
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans.extend(span for r in sent.resource_spans for s in r.scope_spans for span in s.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", spans, paths
    tracing.stop_tracing()
    server.shutdown()
    server.server_close()


def attributes(span):
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_one_id_from_request_to_span_to_log_to_run(collector, lines):
    url, spans, paths = collector
    stop = tracing.start_tracing("workbench", url, "1.0")
    with tracing.in_request("checkout-77"), tracing.span("POST /api/v1/plans", policy="planner") as work:
        with tracing.span("model", run_id="8f2c"):
            tracing.log("answered", policy="planner")
        work.set(event_id="e-1")
    stop()
    model, http = spans
    assert paths[0] == "/v1/traces"
    assert attributes(http) == {"workbench.request_id": "checkout-77", "policy": "planner", "event_id": "e-1"}
    assert attributes(model) == {"workbench.request_id": "checkout-77", "mlflow.run_id": "8f2c"}
    assert (model.trace_id, model.parent_span_id) == (http.trace_id, http.span_id)
    (line,) = lines()
    assert (line["request_id"], line["trace_id"], line["span_id"]) == (
        "checkout-77",
        model.trace_id.hex(),
        model.span_id.hex(),
    )


def test_a_callers_trace_is_gone_on_with(collector):
    url, spans, _ = collector
    stop = tracing.start_tracing("workbench", url)
    with tracing.span("predict", parent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"):
        pass
    with tracing.span("predict", parent="not a header"):
        pass
    stop()
    assert spans[0].trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert spans[1].trace_id != spans[0].trace_id


def test_no_secret_leaves_in_a_span_or_a_line(collector, lines):
    url, spans, _ = collector
    key = resolve_secret("secret://TRACE_TEST_KEY", {"TRACE_TEST_KEY": "tk-93ns-0aw7"})
    stop = tracing.start_tracing("workbench", url)
    with pytest.raises(RuntimeError), tracing.span("load", url=f"https://hub/{key}", seen=[key]):
        tracing.log(
            "refused", "error", error=RuntimeError(f"no access with {key}"), headers={"Authorization": f"Bearer {key}"}
        )
        raise RuntimeError(f"no access with {key}")
    stop()
    told = str(spans) + json.dumps(lines())
    assert key not in told and "secret://TRACE_TEST_KEY" in told
    assert spans[0].status.code == 2 and "RuntimeError" in spans[0].status.message


def test_a_collector_that_is_away_loses_spans_and_nothing_else(lines):
    before = logging.getLogger().handlers
    tracing.take_logging()
    try:
        stop = tracing.start_tracing("workbench", "http://127.0.0.1:9")
        answered = 0
        for _ in range(5_000):  # more than is kept
            with tracing.span("predict"):
                answered += 1
        stop()
    finally:
        logging.getLogger().handlers = before
    assert answered == 5_000
    assert {line["level"] for line in lines()} <= {"warning", "error"}
    assert any("opentelemetry" in line.get("logger", "") for line in lines())


def test_requests_that_run_at_once_keep_their_ids(lines):
    async def answer(name):
        with tracing.in_request(name):
            await asyncio.sleep(0)
            tracing.log("answered", who=name)
            await asyncio.to_thread(tracing.log, "in a thread", who=name)

    async def all_at_once():
        await asyncio.gather(*(answer(f"r-{i}") for i in range(50)))

    asyncio.run(all_at_once())
    assert len(lines()) == 100
    assert all(line["request_id"] == line["who"] for line in lines())
    assert tracing.request_id() == ""


def test_a_line_is_one_line_whatever_is_in_it(lines):
    tracing.log(
        "a\nb", text="c\r\nd\u2028e", many=list(range(1_000)), long="x" * 10_000, odd=object(), nan=float("nan")
    )
    (line,) = lines()
    assert line["event"] == "a\nb"
    assert line["nan"] == "nan" and line["text"] == "c\r\nd\u2028e"
    assert len(line["many"]) == 100 and len(line["long"]) == 2_001


def test_nothing_is_made_where_nobody_traces():
    assert tracing.span("predict", policy="planner") is tracing.span("other")
    assert tracing.start_tracing("workbench", "") is tracing.stop_tracing


def test_an_endpoint_that_is_none_is_refused():
    with pytest.raises(ValueError, match="write the collector's URL"):
        tracing.start_tracing("workbench", "ftp://collector")
