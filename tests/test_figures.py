"What the page of metrics shows of the records."

from datetime import timedelta

from mlops_workbench.alerts import Alert, raise_alert, resolve_alert
from mlops_workbench.core import utc_now
from mlops_workbench.figures import Figures, read_figures
from mlops_workbench.instruments import Instruments
from mlops_workbench.store import Store, transaction


def write(store, *rows):
    with transaction(store) as connection:
        for sql, values in rows:
            connection.execute(sql, values)


def shown(store):
    lines = Instruments().page(read_figures(store))[0].decode().splitlines()
    return {line for line in lines if line.startswith("workbench_") and not line.endswith(" 0.0")}


RUN = "INSERT INTO exp.runs (run_id, pipeline, profile, task, status) VALUES (%s, 'planner', 'full', 't', %s)"
REPORT = (
    "INSERT INTO exp.monitor_reports (report_id, policy, task, reference, window_from, window_until, created_at, severity, "
    "broken, n_rows, findings, words, run_id) VALUES (%s, 'planner', 't', 'd-1', %s, %s, %s, %s, false, 10, %s, 'x', NULL)"
)


def test_runs_and_the_newest_report_are_on_the_page(store):
    now = utc_now()
    week, older = now - timedelta(days=7), now - timedelta(days=30)
    write(
        store,
        *((RUN, (name, status)) for name, status in [("a", "finished"), ("b", "finished"), ("c", "failed")]),
        (RUN, ("d", "running")),
        (REPORT, ("1", older, week, week, "high", "[{}, {}, {}]")),
        (REPORT, ("2", week, now, now, "medium", "[{}, {}]")),
    )
    assert shown(store) == {
        'workbench_pipeline_runs_total{pipeline="planner",status="finished"} 2.0',
        'workbench_pipeline_runs_total{pipeline="planner",status="failed"} 1.0',
        'workbench_drift_severity{policy="planner"} 2.0',
        'workbench_drift_features{policy="planner"} 2.0',
    }


def test_an_alert_is_shown_until_it_is_over(store):
    alert = Alert("drift", "critical", {"policy": "planner"}, "planner drifts")
    raise_alert(store, alert)
    assert shown(store) == {'workbench_alerts_open{severity="critical"} 1.0'}
    resolve_alert(store, "drift", {"policy": "planner"})
    assert shown(store) == set()


def test_two_workers_show_the_same_once(store, tmp_path):
    raise_alert(store, Alert("drift", "critical", {}, "planner drifts"))
    pages = [Instruments(tmp_path).page(read_figures(store))[0].decode() for _ in range(2)]
    assert [page.count('workbench_alerts_open{severity="critical"} 1.0') for page in pages] == [1, 1]
    assert [page.count("# TYPE workbench_alerts_open") for page in pages] == [1, 1]


def test_what_was_read_last_stays_while_the_database_is_away(store):
    raise_alert(store, Alert("drift", "critical", {}, "planner drifts"))
    kept = Figures(store, every_s=0)
    before = kept.read()
    kept.store = Store("postgresql://nobody@127.0.0.1:1/nothing")
    assert kept.read() == before != ()
