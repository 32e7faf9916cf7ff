"Metrics: Prometheus' rules, bounded labels, many workers on one page."

import os
import signal
import subprocess
import sys
import threading
import warnings
from shutil import which

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlops_workbench.instruments import INSTRUMENTS, MAX_SERIES, Instruments

ANSWER = {"policy": "planner", "version": "3", "variant": "", "outcome": "model"}

WORKER = """
import sys, time
from pathlib import Path
from mlops_workbench.instruments import Instruments
told = Instruments(Path(sys.argv[1]))
for _ in range(100):
    told.add("workbench_answers_total", policy="planner", version="3", variant="", outcome="model")
    told.observe("workbench_answer_seconds", 0.02, policy="planner", version="3")
told.set("workbench_queue_length", 2, policy="planner")
told.set("workbench_database_up", float(sys.argv[2]))
print("counted", flush=True)
sys.stdin.read()
"""


def values(told):
    "Read the page: (name, labels) → value."
    families = text_string_to_metric_families(told.page()[0].decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def value(told, name, **labels):
    return values(told).get((name, tuple(sorted(labels.items()))))


@pytest.fixture
def workers(tmp_path):
    "Two processes that counted, and wait."
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path / "metrics", up], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for up in ("1", "0")
    ]
    for process in started:
        assert process.stdout.readline() == b"counted\n"
    yield started
    for process in started:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def test_every_instrument_can_be_counted_and_shown():
    told = Instruments()
    for i in INSTRUMENTS:
        labels = dict.fromkeys(i.labels, "x")
        {"counter": told.add, "gauge": told.set, "histogram": told.observe}[i.kind](i.name, 1, **labels)
    shown = {name for name, _ in values(told)}
    assert {i.name + ("_count" if i.kind == "histogram" else "") for i in INSTRUMENTS} <= shown
    assert not [name for name in shown if name.endswith("_created")]


@pytest.mark.skipif(not which("promtool"), reason="promtool is missing: apt-get install prometheus")
def test_promtool_finds_nothing_to_say_of_the_page():
    told = Instruments()
    for i in INSTRUMENTS:
        labels = dict.fromkeys(i.labels, "x")
        {"counter": told.add, "gauge": told.set, "histogram": told.observe}[i.kind](i.name, 1, **labels)
    checked = subprocess.run(["promtool", "check", "metrics"], input=told.page()[0], capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


@pytest.mark.skipif(not which("promtool"), reason="promtool is missing: apt-get install prometheus")
def test_promtool_says_something_of_a_bad_page():
    page = b"# HELP workbench_answers Answers.\n# TYPE workbench_answers counter\nworkbench_answers 1\n"
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    assert checked.returncode == 3 and b"_total" in checked.stdout + checked.stderr


def test_a_fast_and_a_slow_model_can_be_told_from_their_percentiles():
    "Within the buckets of 0.7 ms (tabular) and 12 s (language model) lies a factor of at most 2.5."
    buckets = next(i.buckets for i in INSTRUMENTS if i.name == "workbench_answer_seconds")
    for seconds in (0.0007, 0.003, 0.04, 0.8, 12, 60):
        above = next(b for b in buckets if b >= seconds)
        assert above / max(b for b in buckets if b < seconds) <= 2.5


def test_two_workers_are_added_up(workers, tmp_path):
    asked = Instruments(tmp_path / "metrics")
    assert value(asked, "workbench_answers_total", **ANSWER) == 200
    assert value(asked, "workbench_answer_seconds_count", policy="planner", version="3") == 200
    assert value(asked, "workbench_answer_seconds_bucket", policy="planner", version="3", le="0.025") == 200
    assert value(asked, "workbench_queue_length", policy="planner") == 4
    assert value(asked, "workbench_database_up") == 0  # one of them does not reach it


def test_a_killed_worker_keeps_its_counts_and_takes_its_gauges(workers, tmp_path):
    asked = Instruments(tmp_path / "metrics")
    workers[0].send_signal(signal.SIGKILL)
    workers[0].wait(10)
    assert value(asked, "workbench_answers_total", **ANSWER) == 200
    assert value(asked, "workbench_queue_length", policy="planner") == 2


def test_a_retired_version_leaves_the_page_of_all_workers_and_comes_back_where_it_was(workers, tmp_path):
    asked = Instruments(tmp_path / "metrics")
    asked.add("workbench_answers_total", **ANSWER | {"version": "4"})
    asked.retire(policy="planner", version="3")
    assert value(asked, "workbench_answers_total", **ANSWER) is None
    assert value(asked, "workbench_answers_total", **ANSWER | {"version": "4"}) == 1
    asked.add("workbench_answers_total", **ANSWER)  # a rollback
    assert value(asked, "workbench_answers_total", **ANSWER) == 201


def test_a_retired_version_leaves_the_page_of_one_process():
    told = Instruments()
    told.add("workbench_answers_total", 5, **ANSWER)
    told.observe("workbench_answer_seconds", 1, policy="planner", version="3")
    told.add("workbench_fallbacks_total", policy="planner", reason="slow")
    assert told.retire(policy="planner", version=3) == 2
    assert value(told, "workbench_answers_total", **ANSWER) is None
    assert value(told, "workbench_fallbacks_total", policy="planner", reason="slow") == 1
    with pytest.raises(ValueError, match="name what is retired"):
        told.retire()


def test_labels_without_end_end(tmp_path):
    for told in (Instruments(), Instruments(tmp_path)):
        for i in range(3 * MAX_SERIES):
            told.add("workbench_requests_total", route=f"/{i}", method="GET", status="200")
        found = {k: v for k, v in values(told).items() if k[0] == "workbench_requests_total"}
        assert len(found) == MAX_SERIES + 1
        assert sum(found.values()) == 3 * MAX_SERIES
        assert len(told._children) <= MAX_SERIES + 1
        assert value(told, "workbench_series_capped_total", metric="workbench_requests_total") == 2 * MAX_SERIES


def test_threads_lose_no_count(tmp_path):
    for told in (Instruments(), Instruments(tmp_path)):

        def count(told=told):
            for _ in range(2_000):
                told.add("workbench_answers_total", **ANSWER)

        threads = [threading.Thread(target=count) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert value(told, "workbench_answers_total", **ANSWER) == 8_000


def test_two_kinds_in_one_process_leave_no_trace_in_each_other(tmp_path):
    several, one = Instruments(tmp_path), Instruments()
    one.add("workbench_events_total", outcome="stored")
    several.add("workbench_events_total", 3, outcome="stored")
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    assert (
        value(one, "workbench_events_total", outcome="stored"),
        value(several, "workbench_events_total", outcome="stored"),
    ) == (1, 3)


def test_retiring_warns_of_nothing(tmp_path):
    told = Instruments(tmp_path)
    told.add("workbench_answers_total", **ANSWER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told.retire(policy="planner", version="3")
        told.page()


def test_label_values_with_quotes_and_lines_stay_one_value():
    told = Instruments()
    told.add("workbench_requests_total", route='/a"b\n# TYPE x', method="GET", status="404")
    assert value(told, "workbench_requests_total", route='/a"b\n# TYPE x', method="GET", status="404") == 1


def test_a_counter_does_not_fall():
    with pytest.raises(ValueError):
        Instruments().add("workbench_events_total", -1, outcome="stored")
