"Monitoring: from events to a report, an alert and a row that triggers read."

import json
import sys
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from mlops_workbench.alerts import read_alerts
from mlops_workbench.bulletin import Notice, Report, report_facts, tell_report, write_page
from mlops_workbench.core import WorkbenchError, as_utc
from mlops_workbench.dataset import freeze_dataset, plan_split, typed_examples
from mlops_workbench.drift import DriftPlan
from mlops_workbench.events import Event, write_events
from mlops_workbench.metrics import Metric
from mlops_workbench.monitoring import alert_report, monitor_policy, read_reports, write_report
from mlops_workbench.quality import Window, judge_promise, read_maturity, score_served
from mlops_workbench.settings import Settings
from mlops_workbench.stats import Interval
from mlops_workbench.tracking import open_tracking, read_artifact
from mlops_workbench.watch import MonitorOptions, decision_tests, gather
from mlops_workbench.watching import app

QUICK = DriftPlan(n_simulations=20)


def day(text):
    return as_utc(f"{text}T00:00:00Z")


def sell(n, first, days, seed):
    "Let shops ask how much to bake: contexts, loaves, and what was sold."
    rng = np.random.default_rng(seed)
    at = pd.Timestamp(first, tz="UTC") + pd.to_timedelta(np.sort(rng.uniform(0, 24 * days, n)), unit="h")
    at = at.floor("ms")
    warmth, flour, loaves = rng.normal(15, 5, n), rng.choice(["rye", "spelt"], n), rng.integers(20, 60, n)
    rows = {"example_id": [f"{seed}-{i}" for i in range(n)], "unit_id": [f"shop-{i % 60}" for i in range(n)]}
    rows |= {"decided_at": at, "propensity": 1.0, "action": [str(k) for k in loaves]}
    rows["context"] = [json.dumps({"warmth": w, "flour": str(f)}) for w, f in zip(warmth, flour, strict=True)]
    sold = loaves + rng.normal(0, 4, n)
    return pd.DataFrame(rows | {"outcome": [json.dumps({"sold": int(k)}) for k in sold]})


class Bakery:
    "A place with a history, a dataset of January, and a task that reads the history."

    def __init__(self, store, folder, monkeypatch):
        self.store, self.delay = store, timedelta(hours=1)
        self.settings = Settings("local", folder, folder, store.url)
        self.history = pd.concat(
            [sell(1_200, "2026-01-05", 28, 0), sell(1_400, "2026-02-02", 28, 1)], ignore_index=True
        )
        made = dict.fromkeys(("fit", "save", "load", "predict", "write_history"), print)
        self.task = SimpleNamespace(
            name="bakery",
            unit_type="device",
            metrics=(Metric("loaves_off", "Loaves too many or too few.", False, 0, 100),),
            criteria=(),
            read_examples=lambda store, source, until: self.history[self.history["decided_at"] + self.delay < until],
            rule=lambda context: 40,
            fallback=lambda context: 40,
            violations=lambda context, answer: (),
            score=lambda example, answer: {"loaves_off": abs(answer - example["outcome"]["sold"])},
            **made,
        )
        monkeypatch.setitem(sys.modules, "bakery", SimpleNamespace(task=self.task))
        january = typed_examples(self.history[self.history["decided_at"] < day("2026-02-02")])
        plan = plan_split(january["decided_at"])
        self.dataset = freeze_dataset(store, self.settings, "bakery", "shops", january, plan)

    def gather(self, until, **options):
        chosen = MonitorOptions(task="bakery", until=day(until), plan=QUICK, **options)
        return gather((self.store, None, self.settings), "bakery", day(until), chosen)

    def change(self, since, **columns):
        "Change contexts from a day on: column → function of the old value."
        late = self.history["decided_at"] >= day(since)
        contexts = [json.loads(text) for text in self.history["context"]]
        for name, change in columns.items():
            contexts = [c | {name: change(c[name])} if late[i] else c for i, c in enumerate(contexts)]
        self.history = self.history.assign(context=[json.dumps(c) for c in contexts])


@pytest.fixture
def bakery(store, tmp_path, monkeypatch):
    return Bakery(store, tmp_path, monkeypatch)


def test_from_a_quiet_week_to_a_lasting_drift_and_a_broken_feed(bakery):
    bakery.change("2026-02-09", warmth=lambda w: w + 4)
    bakery.change("2026-02-23", flour=lambda f: None)
    tracking = open_tracking(bakery.store, bakery.settings)
    options = MonitorOptions(task="bakery", plan=QUICK)
    days = ("2026-02-09", "2026-02-16", "2026-02-23", "2026-03-02")
    quiet, once, twice, broken = (
        monitor_policy(bakery.store, tracking, bakery.settings, "bakery", day(d), options) for d in days
    )
    assert [(r.severity, r.broken) for r in (quiet, once, twice)] == [("none", False), ("low", False), ("high", False)]
    assert [n.name for n in twice.pick()] == ["context.warmth"]
    assert broken.broken and "flour is gone" in broken.words
    assert "context.flour" not in {n.name for n in broken.notices if n.kind == "data"}, "broken data are not drift"
    rows = read_reports(bakery.store, "bakery")
    assert [(r["severity"], r["broken"]) for r in rows][::-1] == [
        (r.severity, r.broken) for r in (quiet, once, twice, broken)
    ]
    assert [f["name"] for f in rows[1]["findings"]] == ["context.warmth"] and rows[3]["findings"] == []
    assert rows[1]["reference"] == bakery.dataset.version and rows[1]["created_at"] == day("2026-02-23")
    alerts = {a.name: a for a in read_alerts(bakery.store)}
    assert set(alerts) == {"drift", "broken-data"} and alerts["drift"].run.endswith("bakery")
    page = read_artifact(tracking, twice.run_id, "monitoring.html", bakery.settings.home / "copy").read_text()
    assert page.count("<img") == 2 and "splits of its own reference" in page and "<script" not in page


def test_a_window_without_decisions_is_broken_and_says_who_sends_instead(bakery):
    write_events(bakery.store, [Event("asked", "device", "shop-1", day("2026-05-01"), context={"source": "till"})])
    tracking = open_tracking(bakery.store, bakery.settings)
    report = monitor_policy(
        bakery.store, tracking, bakery.settings, "bakery", day("2026-05-04"), MonitorOptions(task="bakery", plan=QUICK)
    )
    assert report.broken and report.severity == "none" and "'till' (1)" in report.words
    with pytest.raises(WorkbenchError, match="holds 0 decisions before 2026-01-01"):
        bakery.gather("2026-01-08")
    bakery.history = bakery.history.iloc[::40]
    few = monitor_policy(
        bakery.store, tracking, bakery.settings, "bakery", day("2026-02-16"), MonitorOptions(task="bakery", plan=QUICK)
    )
    assert not few.broken and "too few to be judged" in few.words


def test_who_asks_now_is_followed_where_the_source_of_the_reference_fell_silent_long_ago(bakery):
    def ask(source, on):
        asked = {"context": {"warmth": 20.0, "flour": "rye"}}
        write_events(bakery.store, [Event("asked", "device", "shop-1", day(on), asked, context={"source": source})])

    ask("till", "2026-02-17")
    ask("till", "2026-02-18")
    ask("kiosk", "2026-02-18")
    assert bakery.gather("2026-02-23").source == "till"
    assert bakery.gather("2026-02-23", source="kiosk").source == "kiosk"
    assert bakery.gather("2026-02-16").source == "shops", "nobody asked then"
    ask("shops", "2026-02-10")
    assert bakery.gather("2026-02-23").source == "shops", "it was there a week ago: a feed that broke"


def test_features_do_not_wait_for_labels(bakery):
    bakery.delay = timedelta(days=14)
    rng = np.random.default_rng(2)
    asked = [
        Event(
            "baking_asked", "device", f"shop-{i % 60}", day("2026-02-16") + timedelta(minutes=10 * i),
            {"context": {"warmth": float(rng.normal(22, 5)), "flour": "rye" if i % 2 else "spelt"}},
            context={"source": "shops", "policy_version": 1}, metrics={"latency_ms": 5.0},
            received_at=day("2026-02-16") + timedelta(minutes=10 * i),
        )
        for i in range(900)
    ]  # fmt: skip
    write_events(bakery.store, asked)
    scene = bakery.gather("2026-02-23")
    found = decision_tests(scene)
    assert (len(scene.current), len(scene.asked)) == (0, 900)
    assert {t.about for t in found.tests} == {"data"}
    assert scene.maturity.until is None and any("900 decisions wait for their label" in note for note in found.notes)


def test_a_labelled_decision_is_not_counted_twice(bakery):
    rows = bakery.history[bakery.history["decided_at"] >= day("2026-02-16")].head(50)
    rows = rows[rows["decided_at"] < day("2026-02-22")]
    sent = [
        Event("asked", "device", r.unit_id, r.decided_at.to_pydatetime(), {"context": json.loads(r.context)},
              context={"source": "shops"}, received_at=r.decided_at.to_pydatetime())
        for r in rows.itertuples()
    ]  # fmt: skip
    write_events(bakery.store, sent)
    scene = bakery.gather("2026-02-23")
    assert len(scene.asked) == len(scene.current)


def test_rows_of_the_window_are_no_reference(bakery):
    scene = bakery.gather("2026-02-02", window_days=7)
    assert scene.reference["decided_at"].max() < day("2026-01-26") <= scene.current["decided_at"].min()


def test_a_policy_that_nobody_knows_is_refused(bakery):
    with pytest.raises(WorkbenchError, match="nothing is known of policy 'oven'"):
        gather((bakery.store, None, bakery.settings), "oven", day("2026-02-16"), MonitorOptions())
    with pytest.raises(WorkbenchError, match="bakery holds the task 'bakery', not 'oven'"):
        gather((bakery.store, None, bakery.settings), "oven", day("2026-02-16"), MonitorOptions(task="bakery"))
    with pytest.raises(ValueError, match="the window ends"):
        bakery.gather("2026-02-16", since=day("2026-02-16"))


def test_labels_that_never_come_leave_a_window_unjudged():
    week = Window(day("2026-03-09"), day("2026-03-16"))
    before = pd.Series(pd.date_range("2026-03-02", "2026-03-08 23:00", freq="h", tz="UTC"))
    complete, half = read_maturity(before, before, week), read_maturity(before, before[:80], week)
    assert complete.until == week.until and complete.share == 1
    assert half.until == day("2026-03-12") and half.share == pytest.approx(80 / 168)
    assert read_maturity(before, before[:0], week).until is None
    assert read_maturity(before[:10], before[:10], week).share is None


def test_scores_leave_out_rows_without_weight():
    rate = Metric("rate", "Clicks.", True, 0, 1, value="clicks", weight="shown")
    task = SimpleNamespace(
        metrics=(rate,), violations=lambda c, a: (), score=lambda e, a: {"clicks": a["c"], "shown": a["s"]}
    )
    rows = pd.DataFrame({"example_id": ["a", "b"], "unit_id": ["u", "v"], "context": "{}", "outcome": "{}"})
    rows["action"] = ['{"c": 1, "s": 2}', '{"c": 0, "s": 0}']
    assert score_served(task, rows) == {"rate": [0.5, None]}
    assert score_served(task, rows.iloc[:0]) == {}


@pytest.mark.parametrize(
    "online, outcome",
    [
        (Interval(0.40, 0.38, 0.42, 300, 90), "kept"),
        (Interval(0.30, 0.28, 0.32, 300, 90), "broken"),
        (Interval(0.50, 0.48, 0.52, 300, 90), "beaten"),
        (Interval(0.30, 0.28, 0.32, 300, 5), "open"),
        (None, "open"),
    ],
)
def test_a_promise_is_judged_within_the_common_error(online, outcome):
    metric = Metric("m", "", True, 0, 1)
    promise = judge_promise(metric, Interval(0.41, 0.39, 0.43, 500, 100), online)
    assert promise.outcome == outcome
    assert (promise.p_value < 0.05) == (outcome in ("broken", "beaten"))
    cost = judge_promise(Metric("c", "", False, 0, 1), Interval(0.41, 0.39, 0.43, 500, 100), online)
    assert cost.outcome == {"broken": "beaten", "beaten": "broken"}.get(outcome, outcome)


def report_of(severity, broken=False):
    week = Window(day("2026-03-09"), day("2026-03-16"))
    notices = [Notice("data", "context.a<b", severity, "moved & more", True, 0.001, 0.01, 0.3, facts={"n": 3})]
    notices += [Notice("fault", "context.c", "high", "is gone")] * broken
    name = f"{severity}-{broken}"
    return Report(name, "planner", "my.planner", "d-1", week, week.until, 9, tuple(notices), "words")


def test_alerts_are_raised_for_what_lasts_and_resolved_when_it_is_gone(store):
    for severity, broken, expected in (
        ("low", False, set()),
        ("medium", False, {("drift", "warning")}),
        ("high", True, {("drift", "critical"), ("broken-data", "critical")}),
        ("none", True, {("drift", "critical"), ("broken-data", "critical")}),
        ("none", False, set()),
    ):
        alert_report(store, report_of(severity, broken))
        assert {(a.name, a.severity) for a in read_alerts(store)} == expected


def test_a_report_is_kept_once_and_says_the_same_everywhere(store):
    report = report_of("medium", True)
    write_report(store, report)
    write_report(store, report)
    (row,) = read_reports(store, "planner")
    assert (row["severity"], row["broken"], row["n_rows"]) == ("medium", True, 9)
    assert row["findings"] == json.loads(json.dumps(report.findings()))
    assert [f["kind"] for f in row["findings"]] == ["fault", "data"]
    assert json.loads(json.dumps(report_facts(report)))["notices"][0]["facts"] == {"n": 3}
    page = write_page(report)
    assert "context.a&lt;b" in page and "a<b" not in page and "broken data" in page
    assert "BROKEN DATA" in tell_report(report)


def test_the_command_says_what_is_wrong_with_a_time(store, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)
    for words, told in ((["--until", "March"], "--until is 'March'"), (["--days", "0"], "--days is 0")):
        result = CliRunner().invoke(app, ["planner", *words])
        assert result.exit_code == 1 and told in str(result.exception)
    assert "nothing is known of policy 'oven'" in str(CliRunner().invoke(app, ["oven"]).exception)
