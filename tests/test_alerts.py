"The record of alerts: one row whoever notices, however often and at the same time."

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from mlops_workbench.alerts import Alert, acknowledge, count_open, raise_alert, read_alerts, resolve_alert
from mlops_workbench.core import WorkbenchError
from mlops_workbench.ledger import read_ledger
from mlops_workbench.settings import resolve_secret
from mlops_workbench.store import transaction

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
SLOW = Alert("slow-plans", "warning", {"policy": "planner"}, "p95 is 2.3 s", "workbench history planner")


def test_eight_who_notice_at_once_raise_one(store):
    with ThreadPoolExecutor(8) as pool:
        new = list(pool.map(lambda _: raise_alert(store, SLOW), range(40)))
    (record,) = read_alerts(store)
    assert sum(new) == 1
    assert record.times == 40


def test_labels_tell_alerts_apart_in_any_order(store):
    assert raise_alert(store, replace(SLOW, labels={"policy": "planner", "version": "3"}))
    assert not raise_alert(store, replace(SLOW, labels={"version": 3, "policy": "planner"}))
    assert raise_alert(store, SLOW)
    assert count_open(store) == {"info": 0, "warning": 2, "critical": 0}


def test_severity_rises_and_does_not_fall(store):
    for severity in ("info", "critical", "warning"):
        raise_alert(store, replace(SLOW, severity=severity))
    assert read_alerts(store)[0].severity == "critical"


def test_times_are_those_of_a_simulated_clock(store):
    raise_alert(store, SLOW, NOON)
    raise_alert(store, SLOW, NOON + timedelta(hours=1))
    raise_alert(store, SLOW, NOON - timedelta(hours=9))  # a clock that jumped back
    resolve_alert(store, SLOW.name, SLOW.labels, NOON - timedelta(hours=8))
    (record,) = read_alerts(store, open_only=False)
    assert (record.started_at, record.seen_at, record.ended_at) == (NOON, NOON + timedelta(hours=1), NOON)


def test_what_was_resolved_comes_back_as_another(store):
    assert raise_alert(store, SLOW) and resolve_alert(store, SLOW.name, SLOW.labels)
    assert not resolve_alert(store, SLOW.name, SLOW.labels)
    assert raise_alert(store, SLOW)
    assert [a.state for a in read_alerts(store, open_only=False)] == ["resolved", "open"]
    assert len({a.alert_id for a in read_alerts(store, open_only=False)}) == 2


def test_taking_an_alert_stands_in_the_ledger_once(store):
    raise_alert(store, SLOW)
    (record,) = read_alerts(store)
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda who: acknowledge(store, record.alert_id, who).acknowledged_by, "abcd"))
    assert len(set(taken)) == 1
    with transaction(store) as connection:
        entries = read_ledger(connection, subject={"alert": record.alert_id})
    assert [(e.action, e.actor) for e in entries] == [("alert.acknowledged", taken[0])]


def test_only_an_open_alert_can_be_taken(store):
    with pytest.raises(WorkbenchError, match="there is no alert 7: choose from nothing"):
        acknowledge(store, 7, "anna")
    raise_alert(store, SLOW)
    (record,) = read_alerts(store)
    resolve_alert(store, SLOW.name, SLOW.labels)
    with pytest.raises(WorkbenchError, match="is resolved"):
        acknowledge(store, record.alert_id, "anna")
    with pytest.raises(ValueError, match="actor"):
        raise_alert(store, SLOW)
        acknowledge(store, read_alerts(store)[0].alert_id, " ")


def test_a_secret_is_not_kept(store):
    key = resolve_secret("secret://ALERT_TEST_KEY", {"ALERT_TEST_KEY": "kd93-ns0a-wq7z"})
    raise_alert(store, replace(SLOW, words=f"refused {key}", labels={"policy": key}, run=f"curl -H {key}"))
    (record,) = read_alerts(store)
    assert key not in repr(record)
    assert record.labels == {"policy": "secret://ALERT_TEST_KEY"}
    assert resolve_alert(store, SLOW.name, {"policy": key})


@pytest.mark.parametrize("label", ["unit_id", "household_id", "email", "user_ids"])
def test_a_label_does_not_name_a_person(label):
    with pytest.raises(ValueError, match="never one"):
        replace(SLOW, labels={label: "h-17"})


def test_odd_texts_are_kept_and_long_ones_cut(store):
    raise_alert(store, replace(SLOW, name="a'; DROP TABLE exp.alerts; --", words="nul \x00 and " + "ü" * 10_000))
    (record,) = read_alerts(store)
    assert record.name == "a'; DROP TABLE exp.alerts; --"
    assert len(record.words) == 4_000
