"Alerts end to end: rules hold, people are told once, the next one is called, and what an Alertmanager sends is taken in once."

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from mlops_workbench.alerting import deliver_alerts, evaluate_rules, receive_alerts, try_channel
from mlops_workbench.alerts import Alert, acknowledge, raise_alert, read_alerts, resolve_alert
from mlops_workbench.channel import Channel, tell
from mlops_workbench.core import WorkbenchError
from mlops_workbench.events import Event, write_events
from mlops_workbench.settings import Settings
from mlops_workbench.store import transaction
from mlops_workbench.threshold import AlertRule, Reading, chance_of_alarm, judge, read_watch, read_windows

NIGHT = datetime(2026, 3, 2, tzinfo=UTC)
BROKEN = Alert(
    "model-does-not-load", "critical", {"policy": "planner"}, "planner@4 did not load", "workbench rollback planner"
)
TELL = "tell: {warning: [[webhook]], critical: [[webhook], [mail]]}\nescalate_after_min: 15\n"
RULES = """
rules:
  slow-plans:
    severity: warning
    read: {source: events, name: plan_proposed, value: latency_ms, statistic: p95, by: policy_version}
    over: 2000
    unit: ms
    min_rows: 5
    labels: {policy: planner}
    words: One plan in twenty takes longer than people wait
    run: workbench history planner
"""


class Web:
    "A chat, or an Alertmanager: keeps what is posted, and answers as it is told."

    def __init__(self):
        self.got, self.status = [], 200
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                web.got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self.send_response(web.status)
                self.end_headers()
                self.wfile.write(b"no_service")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Post:
    "A mail server that keeps what it gets."

    def __init__(self):
        self.letters = []

    async def handle_DATA(self, server, session, envelope):
        self.letters.append((envelope, message_from_bytes(envelope.content, policy=policy.default)))
        return "250 OK"


class AnyPort(Controller):
    "A mail server on a free port."

    def _trigger_server(self):
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()


@pytest.fixture
def web():
    opened = Web()
    yield opened
    opened.close()


@pytest.fixture
def post():
    "A mail server: (its address, what it got)."
    handler = Post()

    def known(server, session, envelope, mechanism, data):
        return AuthResult(success=(data.login, data.password) == (b"work@bench", b"s3cret:pw"), handled=False)

    server = AnyPort(handler, "127.0.0.1", 0, authenticator=known, auth_require_tls=False)
    server.start()
    yield f"127.0.0.1:{server.port}", handler.letters
    server.stop()


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project's settings; what it watches can be rewritten."
    (tmp_path / "params").mkdir()
    (tmp_path / "settings.ini").write_text("[local]\n")
    (tmp_path / "params" / "alerts.yaml").write_text(TELL + RULES)
    return Settings("local", tmp_path, tmp_path / ".workbench")


def wire(monkeypatch, web=None, mail=None, manager=None):
    "Wire the environment."
    if web:
        monkeypatch.setenv("WORKBENCH_ALERT_WEBHOOKS", f"{web.url}/T1/B2/secret-path")
    if mail:
        monkeypatch.setenv(
            "WORKBENCH_SMTP_URL", f"smtp://{mail}/?from=workbench@example.org&to=anna@example.org,ben@example.org"
        )
    if manager:
        monkeypatch.setenv("WORKBENCH_ALERTMANAGER_URL", manager.url)


def plans(hours, version="3", n=10):
    "Plans proposed: hour → milliseconds."
    found = [
        Event(
            "plan_proposed", "household", f"h{i}", NIGHT + timedelta(hours=h, minutes=5 * i),
            metrics={"latency_ms": ms + i}, context={"policy_version": version},
        )
        for h, ms in hours.items()
        for i in range(n)
    ]  # fmt: skip
    return [replace(e, received_at=e.event_at) for e in found]


def after(minutes):
    return NIGHT + timedelta(minutes=minutes)


# Rules


def test_a_rule_raises_once_and_resolves_per_group(store, project):
    write_events(store, plans({0: 900, 1: 3_000, 2: 3_100, 3: 900}, "3") + plans({0: 900, 1: 900, 2: 900, 3: 900}, "4"))
    changes = []
    for hour in (1, 2, 3, 3, 4, 4):
        found = evaluate_rules(store, project, after(60 * hour + 1))
        changes += [(hour, e.labels["policy_version"], e.changed) for e in found if e.changed]
    assert changes == [(3, "3", "raised"), (4, "3", "resolved")]
    (alert,) = read_alerts(store, open_only=False)
    assert alert.run == "workbench history planner"
    assert "3,109 ms, over 2,000 ms in 2 of the last 3 windows" in alert.words


def test_two_controllers_raise_one(store, project):
    write_events(store, plans({1: 3_000, 2: 3_100}))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: evaluate_rules(store, project, after(181)), range(8)))
    assert [a.name for a in read_alerts(store, open_only=False)] == ["slow-plans"]


def test_a_window_without_rows_neither_raises_nor_resolves(store, project):
    write_events(store, plans({1: 3_000, 2: 3_100}))
    evaluate_rules(store, project, after(181))
    (found,) = evaluate_rules(store, project, after(241))  # nobody asks for a plan between three and four
    assert found.state == "unknown"
    assert [a.state for a in read_alerts(store)] == ["open"]


def test_a_group_that_is_gone_takes_its_alert_with_it(store, project):
    write_events(store, plans({1: 3_000, 2: 3_100}))
    evaluate_rules(store, project, after(181))
    assert evaluate_rules(store, project, after(60 * 9)) == []
    assert read_alerts(store) == []


def test_a_rule_that_was_taken_out_takes_its_alert_with_it_and_no_other(store, project):
    write_events(store, plans({1: 3_000, 2: 3_100}))
    evaluate_rules(store, project, after(181))
    raise_alert(store, BROKEN)
    (project.root / "params" / "alerts.yaml").write_text(TELL)
    evaluate_rules(store, project, after(182))
    assert [a.name for a in read_alerts(store)] == ["model-does-not-load"]


def test_what_arrived_later_was_not_known(store, project):
    late = [replace(e, received_at=after(600)) for e in plans({1: 3_000, 2: 3_100})]
    write_events(store, late)
    assert evaluate_rules(store, project, after(181)) == []
    assert evaluate_rules(store, project, after(181)) == []


def test_windows_are_the_same_numbers_that_numpy_finds(store):
    rng = np.random.default_rng(1)
    times, latencies = np.sort(rng.uniform(0, 360, 400)), rng.lognormal(6, 1, 400)
    events = [
        Event(
            "plan_proposed", "household", f"h{i % 9}", after(t), metrics={"latency_ms": v, "intervened": float(v > 900)}
        )
        for i, (t, v) in enumerate(zip(times, latencies, strict=True))
    ]
    write_events(store, [replace(e, received_at=e.event_at) for e in events])
    for statistic, expected in {
        "mean": np.mean, "p50": np.median, "p95": lambda v: np.quantile(v, 0.95), "p99": lambda v: np.quantile(v, 0.99),
    }.items():  # fmt: skip
        rule = AlertRule(
            "r", "info", Reading("events", "plan_proposed", "latency_ms", statistic), "w", "c", over=1, last=6
        )
        (found,) = read_windows(store, rule, after(361))
        np.testing.assert_allclose(found.values, [expected(latencies[(times // 60) == h]) for h in range(6)])
    counted = AlertRule("r", "info", Reading("events", "plan_proposed", statistic="count"), "w", "c", over=1, last=6)
    assert read_windows(store, counted, after(361))[0].values == tuple(
        np.bincount((times // 60).astype(int), minlength=6)
    )


def test_a_ratio_of_two_types_of_events(store):
    asked = plans({1: 1}, n=8)
    taken = [
        replace(e, type="plan_decided", id=f"00000000-0000-4000-8000-{i:012}", metrics={"edits": 2.0})
        for i, e in enumerate(asked[:4])
    ]
    write_events(store, asked + taken)
    rule = AlertRule(
        "r",
        "info",
        Reading("events", "plan_decided", "edits", "per", "plan_proposed"),
        "w",
        "c",
        over=1,
        last=1,
        at_least=1,
    )
    assert read_windows(store, rule, after(121))[0].values == (1.0,)


def test_reports_of_monitoring_are_windows(store, project):
    sql = """INSERT INTO exp.monitor_reports (report_id, policy, task, reference, window_from, window_until, created_at, severity,
                                             broken, n_rows, words)
             VALUES (%s, %s, 't', 'd', %s, %s, %s, %s, %s, 100, 'w')"""
    with transaction(store) as connection:
        for day, severity in enumerate(["none", "high", "medium"]):
            at = NIGHT + timedelta(days=day)
            for policy_name, level in (("planner", severity), ("recommender", "none")):
                connection.execute(
                    sql,
                    (
                        f"{policy_name}-{day}",
                        policy_name,
                        at,
                        at + timedelta(days=1),
                        at + timedelta(days=1),
                        level,
                        False,
                    ),
                )
    rule = AlertRule("drift", "warning", Reading("reports", value="severity"), "w", "c", over=1.5)
    found = {w.labels["policy"]: w for w in read_windows(store, rule, NIGHT + timedelta(days=3, hours=1))}
    assert found["planner"].values == (0.0, 3.0, 2.0) and found["recommender"].values == (0.0, 0.0, 0.0)
    assert judge(found["planner"].values, rule) == "beyond"
    assert judge(read_windows(store, rule, NIGHT + timedelta(days=2))[0].values, rule) == "fine"


@pytest.mark.parametrize("m, n", [(1, 1), (2, 3), (3, 3), (1, 4)])
def test_chance_fires_as_often_as_the_formula_says(m, n):
    "200,000 independent windows; the standard error of a share of 5 % is 0.05 percentage points, doubled by the overlap."
    rule = AlertRule("r", "info", Reading("events", "t", "v"), "w", "c", over=0.95, at_least=m, last=n)
    values = np.random.default_rng(2).uniform(size=200_000)
    beyond = values > 0.95
    counts = sum(np.roll(beyond, k) for k in range(n))
    assert (beyond & (counts >= m)).mean() == pytest.approx(chance_of_alarm(rule, 0.05), abs=0.002)
    assert all(
        judge(values[i - n : i], rule) == ("beyond" if beyond[i - 1] and counts[i - 1] >= m else "fine")
        for i in range(n, 300)
    )


@pytest.mark.parametrize(
    "text, said",
    [
        ("rules: [", "alerts.yaml is not YAML"),
        ("rule: {}", "alerts.yaml has no 'rule': did you mean 'rules'"),
        ("tell: {fatal: []}", "tells about 'fatal'"),
        ("tell: {critical: [mail]}", "each a list of channels"),
        ("rules: {a: {over: 1}}", "rule 'a' has no read"),
        ("rules: {a: {read: {source: events, name: x, value: y}, over: 1}}", "severity, words, run is missing"),
        (RULES.replace("over: 2000", "over: 2000\n    ovr: 1"), "has no 'ovr': did you mean 'over'"),
        (RULES.replace("p95", "p9"), "statistic is 'p9'"),
        (RULES.replace("over: 2000", ""), "write either over or under"),
        (RULES.replace("warning", "loud"), "severity of 'slow-plans' is 'loud'"),
        (RULES.replace("labels: {policy: planner}", "labels: {user_id: u1}"), "a label names a kind of unit"),
        (RULES.replace("source: events", "source: metrics"), "source is 'metrics'"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path, text, said):
    (tmp_path / "alerts.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_watch(tmp_path / "alerts.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)


# Telling


def test_a_chat_is_told_once_and_of_the_end(store, project, web, monkeypatch):
    wire(monkeypatch, web)
    raise_alert(store, replace(BROKEN, severity="warning"), NIGHT)
    for minute in (0, 1, 600):
        deliver_alerts(store, project, after(minute))
    resolve_alert(store, BROKEN.name, BROKEN.labels, after(601))
    for minute in (601, 602):
        deliver_alerts(store, project, after(minute))
    raised, resolved = [body["text"] for _, body in web.got]
    assert "[warning] model-does-not-load" in raised and "`workbench rollback planner`" in raised
    assert "[resolved]" in resolved and "over after 601 min" in resolved


def test_four_controllers_tell_once(store, project, web, monkeypatch):
    wire(monkeypatch, web)
    for i in range(5):
        raise_alert(store, replace(BROKEN, labels={"policy": f"p{i}"}), NIGHT)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: deliver_alerts(store, project, after(0)), range(8)))
    assert len(web.got) == 5


def test_nobody_takes_it_and_the_next_one_is_called(store, project, web, post, monkeypatch):
    address, letters = post
    wire(monkeypatch, web, f"work%40bench:s3cret%3Apw@{address}")
    raise_alert(store, BROKEN, NIGHT)
    told = [[(t.channel, t.error) for t in deliver_alerts(store, project, after(minute))] for minute in (0, 14, 15, 16)]
    assert told == [[("webhook", "")], [], [("mail", "")], []]
    ((envelope, letter),) = letters
    assert envelope.rcpt_tos == ["anna@example.org", "ben@example.org"]
    assert letter["Subject"] == "[critical] model-does-not-load (policy=planner)"
    text = letter.get_content()
    assert (
        "run: workbench rollback planner" in text and "workbench alerts ack 1" in text and "webhook came before" in text
    )


def test_taken_in_time_nobody_else_is_called(store, project, web, post, monkeypatch):
    wire(monkeypatch, web, post[0])
    raise_alert(store, BROKEN, NIGHT)
    deliver_alerts(store, project, after(0))
    acknowledge(store, read_alerts(store)[0].alert_id, "anna")
    assert deliver_alerts(store, project, after(500)) == [] and post[1] == []


def test_a_chat_that_is_down_is_tried_again_later_and_the_next_one_is_called(store, project, web, post, monkeypatch):
    wire(monkeypatch, web, post[0])
    web.status = 503
    for i in range(3):
        raise_alert(store, replace(BROKEN, labels={"policy": f"p{i}"}), NIGHT)
    tried = deliver_alerts(store, project, after(0))
    assert [t.error for t in tried] == [
        "channel 'webhook' answers 503: no_service"
    ]  # the others wait for the next round
    assert deliver_alerts(store, project, after(0.1))[0].alert_id == 2
    for minute in (1, 2, 4, 8):
        deliver_alerts(store, project, after(minute))
    assert {letter["Subject"] for _, letter in post[1]} == {
        f"[critical] model-does-not-load (policy=p{i})" for i in range(1)
    }
    web.status = 200
    for minute in (60, 120, 121):
        deliver_alerts(store, project, after(minute))
    texts = [body["text"] for _, body in web.got]
    assert all(any(f"policy=p{i}" in text for text in texts) for i in range(3))
    assert "secret-path" not in repr(read_alerts(store))


def test_an_alert_that_gets_worse_is_told_again(store, project, web, monkeypatch):
    wire(monkeypatch, web)
    raise_alert(store, replace(BROKEN, severity="warning"), NIGHT)
    deliver_alerts(store, project, after(0))
    raise_alert(store, BROKEN, after(1))
    deliver_alerts(store, project, after(1))
    assert [body["text"].split("]")[0] for _, body in web.got] == ["*[warning", "*[critical"]


def test_what_was_over_before_anybody_was_told_is_not_told(store, project, web, monkeypatch):
    wire(monkeypatch, web)
    raise_alert(store, BROKEN, NIGHT)
    resolve_alert(store, BROKEN.name, BROKEN.labels, after(1))
    assert deliver_alerts(store, project, after(2)) == [] and web.got == []


def test_a_controller_that_died_while_telling_is_stood_in_for(store, project, web, monkeypatch):
    wire(monkeypatch, web)
    raise_alert(store, BROKEN, NIGHT)
    with transaction(store) as connection:
        columns = "alert_id, channel, occasion, claimed_until"
        claim = f"INSERT INTO exp.alert_deliveries ({columns}) VALUES (1, 'webhook', 'critical', %s)"
        connection.execute(claim, (after(2),))
    assert deliver_alerts(store, project, after(1)) == []
    assert [t.error for t in deliver_alerts(store, project, after(2))] == [""]


def test_an_alertmanager_is_told_again_until_the_end(store, project, web, monkeypatch):
    (project.root / "params" / "alerts.yaml").write_text("tell: {critical: [[alertmanager]]}")
    wire(monkeypatch, manager=web)
    raise_alert(store, BROKEN, NIGHT)
    for minute in (0, 1, 6):
        deliver_alerts(store, project, after(minute))
    resolve_alert(store, BROKEN.name, BROKEN.labels, after(7))
    deliver_alerts(store, project, after(8))
    paths, bodies = zip(*web.got, strict=True)
    assert set(paths) == {"/api/v2/alerts"} and len(bodies) == 3
    assert bodies[0][0]["labels"] == {"alertname": "model-does-not-load", "severity": "critical", "policy": "planner"}
    ends = [datetime.fromisoformat(body[0]["endsAt"]) for body in bodies]
    assert ends == [after(30), after(36), after(7)]


def test_without_channels_nothing_is_tried(store, project):
    raise_alert(store, BROKEN, NIGHT)
    assert deliver_alerts(store, project, NIGHT) == []


def test_a_password_is_not_sent_in_the_clear(monkeypatch, store):
    channel = Channel("mail", "mail", "smtp://user:password@mail.example.org:25/?from=a@example.org&to=b@example.org")

    class Plain:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def ehlo(self): ...
        def has_extn(self, _):
            return False

        def login(self, *_):
            pytest.fail("the password was sent")

    # fmt: on

    monkeypatch.setattr("mlops_workbench.channel.smtplib.SMTP", Plain)
    raise_alert(store, BROKEN)
    with pytest.raises(WorkbenchError, match="offers no TLS"):
        tell(channel, read_alerts(store)[0], "critical", NIGHT)


def test_a_wrong_password_is_told_without_it(store, project, post, monkeypatch):
    wire(monkeypatch, mail=f"work%40bench:wrong-pw@{post[0]}")
    with pytest.raises(WorkbenchError) as error:
        try_channel(project, "mail")
    assert "cannot be reached" in str(error.value) and "wrong-pw" not in str(error.value)


def test_every_wired_channel_can_be_tried(project, web, post, monkeypatch):
    wire(monkeypatch, web, post[0], web)
    for name in ("mail", "webhook", "alertmanager"):
        try_channel(project, name)
    assert len(post[1]) == 1 and len(web.got) == 2


def test_a_name_cannot_begin_a_header(store, project, post, monkeypatch):
    wire(monkeypatch, mail=post[0])
    (project.root / "params" / "alerts.yaml").write_text("tell: {critical: [[mail]]}")
    raise_alert(store, replace(BROKEN, name="a\r\nBcc: eve@example.org"), NIGHT)
    assert [t.error for t in deliver_alerts(store, project, NIGHT)] == [""]
    ((envelope, letter),) = post[1]
    assert letter["Bcc"] is None and "eve@example.org" not in envelope.rcpt_tos


# What an Alertmanager sends


def sent(status="firing", fingerprint="5ef77f1f8a3ecfe2", start="2026-03-02T04:10:00.123456789Z", **labels):
    return {
        "status": status,
        "labels": {"alertname": "WorkbenchDrift", "severity": "warning", "policy": "planner"} | labels,
        "annotations": {"summary": "What planner is asked differs.", "run": "workbench monitor planner"},
        "startsAt": start,
        "endsAt": "2026-03-02T05:00:00Z" if status == "resolved" else "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus:9090/graph",
        "fingerprint": fingerprint,
    }  # fmt: skip


def body(*alerts):
    return {"version": "4", "groupKey": "{}", "status": "firing", "receiver": "workbench", "alerts": list(alerts)}


def test_an_alertmanager_repeats_itself(store):
    got = [receive_alerts(store, body(sent(), sent(fingerprint="b", policy="recommender"))) for _ in range(3)]
    assert [(g.n_new, g.n_known) for g in got] == [(2, 0), (0, 2), (0, 2)]
    first = read_alerts(store)[0]
    assert (first.origin, first.run, first.times, first.severity) == (
        "alertmanager",
        "workbench monitor planner",
        3,
        "warning",
    )


def test_two_alertmanagers_at_once_make_one_alert(store):
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: receive_alerts(store, body(sent())), range(24)))
    assert sum(g.n_new for g in got) == 1 and len(read_alerts(store)) == 1


def test_an_end_ends_it_and_a_late_beginning_does_not_open_it_again(store):
    for message in (sent(), sent("resolved"), sent(), sent("resolved")):
        receive_alerts(store, body(message))
    assert [a.state for a in read_alerts(store, open_only=False)] == ["resolved"]


def test_an_end_that_comes_first_stays_an_end(store):
    receive_alerts(store, body(sent("resolved")))
    receive_alerts(store, body(sent()))
    assert [a.state for a in read_alerts(store, open_only=False)] == ["resolved"]


def test_a_new_start_is_a_new_alert_and_ends_the_one_before(store):
    later = sent(start="2026-03-02T06:00:00Z")
    for message in (sent(), later, sent()):
        receive_alerts(store, body(message))
    assert [a.state for a in read_alerts(store, open_only=False)] == ["resolved", "open"]


def test_a_bad_alert_does_not_hold_up_the_others(store):
    odd = [
        None,
        {},
        sent() | {"startsAt": "yesterday"},
        sent() | {"labels": [1]},
        sent() | {"status": "maybe"},
        sent() | {"fingerprint": ""},
    ]
    got = receive_alerts(store, body(*odd, sent()))
    assert got.n_new == 1 and len(got.faults) == len(odd)
    assert all("\n" not in fault for fault in got.faults)


@pytest.mark.parametrize(
    "message", [None, [], "x", {}, {"version": "3", "alerts": []}, {"version": "4"}, {"version": "4", "alerts": {}}]
)
def test_another_message_is_refused(store, message):
    with pytest.raises(ValueError, match="no message of an Alertmanager"):
        receive_alerts(store, message)


def test_a_label_that_names_a_person_is_left_out(store):
    receive_alerts(store, body(sent(user_id="u-17", email="anna@example.org")))
    assert dict(read_alerts(store)[0].labels) == {"policy": "planner"}


def test_what_came_from_an_alertmanager_does_not_go_back(store, project, web, monkeypatch):
    (project.root / "params" / "alerts.yaml").write_text("tell: {warning: [[webhook, alertmanager]]}")
    other = Web()
    wire(monkeypatch, web, manager=other)
    receive_alerts(store, body(sent()), NIGHT)
    assert [t.channel for t in deliver_alerts(store, project, NIGHT)] == ["webhook"]
    other.close()
    assert other.got == []


def test_receiving_works_inside_an_event_loop(store):
    async def answer():
        return await asyncio.to_thread(receive_alerts, store, body(sent()))

    assert asyncio.run(answer()).n_new == 1


def test_the_command_names_which_one_and_cannot_bring_its_own(store, project):
    (project.root / "params" / "alerts.yaml").write_text(
        RULES.replace("history planner", "rollback planner --to {policy_version}")
    )
    write_events(store, plans({1: 3_000, 2: 3_100}, "3; rm -rf ."))
    evaluate_rules(store, project, after(181))
    assert read_alerts(store)[0].run == "workbench rollback planner --to '3; rm -rf .'"


def test_the_projects_own_rules_are_read():
    path = Path(__file__).resolve().parent.parent / "params" / "alerts.yaml"
    watch = read_watch(path)
    assert {rule.name for rule in watch.rules} >= {"slow-plans", "drift", "broken-data"}
    assert all(watch.steps[rule.severity] for rule in watch.rules)
