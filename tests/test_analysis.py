"Analyses over a database: what is read, what blocks, what is left out, and how traffic is rehearsed."

import json
from datetime import UTC, datetime, timedelta

import pytest

from mlops_workbench.analysis import Views, advise, analyse_experiment, describe_analysis, read_mixed
from mlops_workbench.assignment import Assigned
from mlops_workbench.core import WorkbenchError, new_id
from mlops_workbench.design import to_design
from mlops_workbench.events import Event, write_events
from mlops_workbench.experiment import (
    Experiment,
    create_experiment,
    ramp_experiment,
    read_experiment,
    start_experiment,
    stop_experiment,
)
from mlops_workbench.exposure import record_assignments
from mlops_workbench.readout import plot_metric, tell_analysis, write_page
from mlops_workbench.store import transaction
from mlops_workbench.traffic import Crowd, check_effects, rehearse, send_traffic

BEGIN = datetime(2026, 3, 2, tzinfo=UTC)
QUICK = Views(history=False)
CONTENT = {
    "key": "tone",
    "hypothesis": "Reasons help.",
    "policy": "planner",
    "unit_type": "household",
    "variants": [
        {"name": "plain", "share": 0.5, "control": True},
        {"name": "reasons", "share": 0.5, "parameters": {"reasons": True}},
    ],
    "metrics": [
        {"metric": "acceptance", "role": "primary", "kind": "proportion", "event": "accepted"},
        {"metric": "edits", "role": "guardrail", "kind": "ratio", "event": "edited", "denominator": "proposed"},
        {"metric": "latency", "role": "guardrail", "kind": "quantile", "event": "proposed", "value": "ms"},
    ],
    "mde": 0.1,
    "planned_n": 400,
    "ends_at": "2099-01-01T00:00:00Z",
}
for guardrail in CONTENT["metrics"][1:]:
    guardrail |= {"margin": 0.25, "higher_is_better": False}


@pytest.fixture
def draft(store):
    return create_experiment(store, Experiment(**vars(to_design(CONTENT))), "ada")


@pytest.fixture
def running(store, draft):
    started = start_experiment(store, draft.key, "ada", 2_000, at=BEGIN)
    return ramp_experiment(store, started.key, 10_000, "ada", BEGIN + timedelta(hours=1))


@pytest.fixture
def lived(store, running):
    "Three days with a large gain."
    crowd = Crowd(1_400, 3, {"reasons.acceptance": 0.6}, seed=2)
    begin = BEGIN + timedelta(hours=1)
    send_traffic(store, running, crowd, begin, begin + timedelta(days=3))
    return running


def served(experiment, names, variant, at=BEGIN + timedelta(days=1)):
    "Exposures as somebody's own code would send them."
    return [
        Assigned(experiment.key, "household", u, variant, 1, experiment.phases[-1].number, "assigned") for u in names
    ]


def test_a_rehearsal_is_analysed_from_its_events(store, lived):
    seen = analyse_experiment(store, "tone")
    assert (seen.conclusion.action, seen.conclusion.variant) == ("ship", "reasons")
    assert sum(seen.units.values()) == 1_400
    assert all(check.ok for check in seen.checks)
    effect = seen.findings[0].relative
    assert effect.low < 0.6 < effect.high, "the effect that was put in"
    last = seen.history.groupby("metric").last()
    for f in seen.findings:
        assert last.loc[f.metric, "estimate"] == pytest.approx(f.effect.relative.estimate, rel=1e-12)
        assert last.loc[f.metric, "n"] == sum(f.n)
    assert list(seen.history[seen.history["metric"] == "latency"]["day"]) == [1, 2, 3, 4]
    first, again = seen.to_dict(), analyse_experiment(store, "tone").to_dict()
    assert {k: v for k, v in first.items() if k != "at"} == {k: v for k, v in again.items() if k != "at"}
    json.dumps(first, allow_nan=False)


def test_sending_the_same_traffic_again_changes_nothing(store, lived):
    crowd = Crowd(1_400, 3, {"reasons.acceptance": 0.6}, seed=2)
    begin = BEGIN + timedelta(hours=1)
    again = send_traffic(store, lived, crowd, begin, begin + timedelta(days=3))
    assert (again.n_exposed, again.n_events) == (0, 0)


def test_a_late_event_is_in_the_next_analysis(store, lived):
    before = analyse_experiment(store, "tone", views=QUICK).findings[0].values
    with transaction(store) as connection:
        rows = connection.execute(
            "SELECT unit_id FROM exp.assignments WHERE variant = 'plain' AND unit_id NOT IN "
            "(SELECT unit_id FROM exp.events WHERE type = 'accepted') ORDER BY unit_id LIMIT 1"
        ).fetchall()
    write_events(store, [Event("accepted", "household", rows[0]["unit_id"], BEGIN + timedelta(days=5))])
    after = analyse_experiment(store, "tone", views=QUICK).findings[0].values
    assert after[0] > before[0] and after[1] == before[1]


def test_lost_units_block(store, lived):
    with transaction(store) as connection:
        connection.execute(
            "DELETE FROM exp.assignments WHERE unit_id IN (SELECT unit_id FROM exp.assignments "
            "WHERE variant = 'plain' ORDER BY unit_id LIMIT 300)"
        )
    seen = analyse_experiment(store, "tone", views=QUICK)
    assert seen.conclusion.action == "blocked"
    assert "find out where units were lost" in seen.conclusion.reasons[0]
    assert advise(seen) == "Nothing can be concluded until this is explained."


def test_units_with_two_variants_are_left_out_and_many_block(store, lived):
    with transaction(store) as connection:
        rows = connection.execute("SELECT unit_id, variant FROM exp.assignments ORDER BY unit_id LIMIT 40").fetchall()
    other = {"plain": "reasons", "reasons": "plain"}

    def see_both(rows):
        at = BEGIN + timedelta(days=2)
        seen = [(row["unit_id"], {"tone": other[row["variant"]]}) for row in rows]
        write_events(store, [Event("exposure", "household", u, at, experiments=e, id=new_id()) for u, e in seen])

    see_both(rows[:5])
    few = analyse_experiment(store, "tone", views=QUICK)
    assert read_mixed(store, "tone") == {row["unit_id"] for row in rows[:5]}
    assert sum(few.units.values()) == 1_395 and few.conclusion.action == "ship"
    assert "5 of 1,400 units saw two variants and are left out" in tell_analysis(few)
    see_both(rows[5:])
    many = analyse_experiment(store, "tone", views=QUICK)
    assert many.conclusion.action == "blocked"
    assert "more than 1%, find out who assigns differently" in many.conclusion.reasons[0]


def test_events_without_exposure_are_counted(store, lived):
    at = BEGIN + timedelta(days=2)
    claimed = {"tone": "plain"}
    write_events(store, [Event("accepted", "household", f"stranger-{i}", at, experiments=claimed) for i in range(7)])
    seen = analyse_experiment(store, "tone", views=QUICK)
    told = {check.name: check for check in seen.checks}["events of exposed units"]
    assert not told.ok and not told.blocks
    assert told.words.startswith("7 events of acceptance")
    assert sum(seen.units.values()) == 1_400


def test_a_draft_an_empty_and_an_unknown_experiment(store, draft):
    assert advise(analyse_experiment(store, "tone")) == "Start it: `workbench experiment start tone`."
    start_experiment(store, "tone", "ada", 2_000, at=BEGIN)
    empty = analyse_experiment(store, "tone")
    assert empty.conclusion.action == "no data" and "nobody was exposed" in empty.conclusion.reasons[0]
    json.dumps(empty.to_dict(), allow_nan=False)
    for text in (describe_analysis(empty), tell_analysis(empty), write_page(empty)):
        assert "nobody was exposed" in text
    assert stop_experiment(store, "tone", "ada", "nobody came").status == "completed"
    ended = analyse_experiment(store, "tone")
    assert ended.conclusion.action == "undecided" and "decided nothing" in advise(ended)
    with pytest.raises(WorkbenchError, match="there is no experiment 'tune': did you mean 'tone'"):
        analyse_experiment(store, "tune")


def test_units_that_all_do_the_same_are_no_traceback(store, running):
    for name in ("plain", "reasons"):
        units = [f"{name}-{i}" for i in range(100)]
        record_assignments(store, served(running, units, name), BEGIN + timedelta(days=1))
        at = BEGIN + timedelta(days=2)
        write_events(store, [Event("proposed", "household", u, at, metrics={"ms": 5.0}) for u in units])
    seen = analyse_experiment(store, "tone")
    assert seen.conclusion.action == "keep going"
    assert seen.findings[1].effect is not None and seen.findings[1].outcome == "open"
    plot_metric(seen, "edits")


def test_an_effect_on_what_is_not_there_is_refused(draft):
    with pytest.raises(ValueError, match="did you mean 'reasons.acceptance'"):
        check_effects(draft, {"reason.acceptance": 0.1})
    with pytest.raises(ValueError, match="pass a relative one"):
        check_effects(draft, {"reasons.acceptance": 15.0})


def test_a_rehearsal_starts_a_draft_in_the_past_and_ramps_it(store, draft):
    sent = rehearse(store, "tone", "ada", Crowd(300, 4))
    seen = read_experiment(store, "tone")
    assert sent.n_units == 300
    assert [p.coverage for p in seen.phases] == [2_000, 10_000]
    assert (seen.phases[1].started_at - seen.phases[0].started_at) == timedelta(days=2)
    assert analyse_experiment(store, "tone", views=QUICK).conclusion.action == "keep going"
