"With a real Prometheus and a real Alertmanager: from a number on the page to a record of ours, and from ours to theirs."

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from mlops_workbench.alerting import deliver_alerts, receive_alerts
from mlops_workbench.alerts import Alert, raise_alert, read_alerts, resolve_alert
from mlops_workbench.instruments import Instruments
from mlops_workbench.promise import rules_file
from mlops_workbench.settings import Settings

missing = [name for name in ("prometheus", "prometheus-alertmanager") if not shutil.which(name)]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{' and '.join(missing)} missing: apt-get install prometheus prometheus-alertmanager"
)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def until(what, seconds=60):
    "Wait for something to be so, and give it."
    for _ in range(int(seconds / 0.1)):
        if found := what():
            return found
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} s in vain")


def asked(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read()
    except OSError:
        return b""


@contextmanager
def running(log, *command):
    "A server of the distribution, stopped at the end; what it wrote is shown when it ends early."
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def listening(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def alertmanager(folder, webhook):
    "An Alertmanager that sends everything to a webhook at once."
    hook = {"url": f"http://{webhook}/", "send_resolved": True}
    route = {"receiver": "workbench", "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h"}
    config = {"route": route, "receivers": [{"name": "workbench", "webhook_configs": [hook]}]}
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={folder / 'alertmanager.yml'}", f"--storage.path={folder / 'alertmanager'}"]
    options += [f"--web.listen-address={address}", "--cluster.listen-address="]
    with running(folder / "alertmanager.log", "prometheus-alertmanager", *options):
        until(lambda: asked(f"http://{address}/-/ready"))
        yield address


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_number_on_the_page_becomes_an_alert_and_goes_again(store, tmp_path):
    told, answers = Instruments(), []

    class Page(Quiet):
        def do_GET(self):
            text, kind = told.page()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text)

    class Hook(Quiet):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers.append(receive_alerts(store, body))
            self.send_response(200)
            self.end_headers()

    told.set("workbench_drift_severity", 2, policy="planner")
    (tmp_path / "rules.yml").write_text(rules_file())
    with listening(Page) as page, listening(Hook) as hook, alertmanager(tmp_path, hook) as manager:
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(tmp_path / "rules.yml")],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [manager]}]}]},
            "scrape_configs": [{"job_name": "workbench", "static_configs": [{"targets": [page]}]}],
        }
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        options = [f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'prometheus'}"]
        options += [f"--web.listen-address=127.0.0.1:{free_port()}"]
        with running(tmp_path / "prometheus.log", "prometheus", *options):
            (alert,) = until(lambda: read_alerts(store))
            assert (alert.name, alert.severity, alert.labels["policy"]) == ("WorkbenchDrift", "warning", "planner")
            assert alert.run == "workbench monitor planner"
            assert alert.words == "What planner is asked differs from what it was trained on."
            told.set("workbench_drift_severity", 0, policy="planner")
            until(lambda: not read_alerts(store))
    assert [a.state for a in read_alerts(store, open_only=False)] == ["resolved"]
    assert all(not answer.faults for answer in answers)


def test_an_alertmanager_takes_our_alerts_and_their_end(store, tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    (tmp_path / "settings.ini").write_text("[local]\n")
    (tmp_path / "params" / "alerts.yaml").write_text("tell: {critical: [[alertmanager]]}")
    settings, got = Settings("local", tmp_path, tmp_path / ".workbench"), []

    class Hook(Quiet):
        def do_POST(self):
            got.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"])
            self.send_response(200)
            self.end_headers()

    broken = Alert(
        "model-does-not-load",
        "critical",
        {"policy": "planner", "of.version": "4"},
        "It did not load.",
        "workbench rollback planner",
    )
    raise_alert(store, broken)
    with listening(Hook) as hook, alertmanager(tmp_path, hook) as manager:
        monkeypatch.setenv("WORKBENCH_ALERTMANAGER_URL", f"http://{manager}")
        assert [t.error for t in deliver_alerts(store, settings)] == [""]
        (firing,) = until(lambda: list(got))
        resolve_alert(store, broken.name, broken.labels, datetime.now(UTC))
        assert [(t.occasion, t.error) for t in deliver_alerts(store, settings)] == [("resolved", "")]
        until(lambda: len(got) > 1)
    assert firing["status"] == "firing" and firing["annotations"]["run"] == "workbench rollback planner"
    assert firing["labels"] == {
        "alertname": "model-does-not-load",
        "severity": "critical",
        "policy": "planner",
        "of_version": "4",
    }
    assert got[1]["status"] == "resolved" and got[1]["fingerprint"] == firing["fingerprint"]
