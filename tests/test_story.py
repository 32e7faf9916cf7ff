"Stories: what is known of a run follows from its events, and every line of it can be read by itself."

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_workbench.story import (
    RunState,
    brief,
    duration,
    end_state,
    json_lines,
    plain_lines,
    take_event,
    tell_event,
    tell_stage,
)

START = {
    "event": "run_started",
    "run_id": "r-1",
    "pipeline": "planner",
    "profile": "smoke",
    "stages": ["prep", "train"],
}

names = st.sampled_from(["prep", "train", "evaluate"])
numbers = st.integers(0, 500)
texts = st.text(max_size=40)
values = st.dictionaries(st.sampled_from(["loss", "validation_loss"]), st.floats(allow_nan=True))
events = st.one_of(
    st.builds(lambda s, n: {"event": "stage_started", "stage": s, "cells": n}, names, numbers),
    st.builds(
        lambda s, n, t: {"event": "cell_started", "stage": s, "cell": n, "of": 9, "title": t}, names, numbers, texts
    ),
    st.builds(
        lambda s, n, m, v: {"event": "step", "stage": s, "step": n, "max_steps": m, "values": v, "left_s": None},
        names,
        numbers,
        numbers,
        values,
    ),
    st.builds(lambda s, v: {"event": "stage_finished", "stage": s, "seconds": 1.0, "outputs": v}, names, values),
    st.builds(lambda s, t: {"event": "stage_failed", "stage": s, "error": t, "status": "failed"}, names, texts),
    st.builds(lambda s, t: {"event": "stage_cached", "stage": s, "run_id": "r-0", "reason": t}, names, texts),
    st.builds(lambda s, t: {"event": "stage_skipped", "stage": s, "reason": t}, names, texts),
    st.builds(lambda t: {"event": "note", "text": t}, texts),
    st.just({"event": "run_finished", "run_id": "r-1", "status": "finished", "seconds": 2.0}),
    st.just({"event": "something_new", "stage": "prep"}),
)


def step(n, of=200, **more):
    return {"event": "step", "stage": "train", "step": n, "max_steps": of, "values": {"loss": 1.5}, "left_s": 9} | more


def lines(told, **options):
    stream = io.StringIO()
    listen = plain_lines(stream, **options)
    for event in told:
        listen(event)
    return stream.getvalue().splitlines()


@given(st.lists(events))
def test_any_order_of_events_can_be_followed(told):
    state = RunState()
    for moment, event in enumerate([START, *told]):
        take_event(state, event, float(moment))
        assert all("\n" not in tell_stage(stage, moment + 1.0) for stage in state.stages.values())
        assert "\n" not in tell_event(event)
    assert all(0 <= stage.share <= 1 for stage in state.stages.values())


@given(st.lists(events))
def test_every_event_is_json_and_every_line_is_one(told):
    stream = io.StringIO()
    with json_lines(stream) as listen:
        for event in told:
            listen(event)
    written = [json.loads(line, parse_constant=pytest.fail) for line in stream.getvalue().split("\n")[:-1]]
    assert [w["event"] for w in written] == [e["event"] for e in told]
    assert all(list(w)[0] == "at" for w in written)


def test_steps_are_told_at_each_tenth():
    told = lines([START, {"event": "stage_started", "stage": "train", "cells": 7}, *(step(n) for n in range(1, 201))])
    assert len(told) == 2 + 11
    assert told[-1] == "planner: train step 200/200, loss 1.5, 9 s left"


def test_the_tenths_of_two_stages_are_their_own():
    told = [step(100), step(100, stage="evaluate"), step(105), step(105, stage="evaluate")]
    assert len(lines([START, *told])) == 1 + 2


def test_cells_are_told_where_they_are_wanted():
    cell = {"event": "cell_started", "stage": "prep", "cell": 2, "of": 6, "title": "Plan"}
    assert lines([START, cell])[1:] == []
    assert lines([START, cell], cells=True)[1:] == ["planner: prep cell 2/6 Plan"]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"event": "stage_started", "stage": "prep", "cells": 3}, "prep …"),
        (
            {"event": "stage_finished", "stage": "prep", "seconds": 3.14, "outputs": {"n": 5}},
            "prep finished in 3.1 s: n 5",
        ),
        ({"event": "stage_finished", "stage": "prep", "seconds": 75, "outputs": {}}, "prep finished in 1 min 15 s"),
        ({"event": "stage_cached", "stage": "prep", "run_id": "r-0", "reason": "as in r-0"}, "prep cached: as in r-0"),
        ({"event": "stage_skipped", "stage": "prep", "reason": "not asked for"}, "prep skipped: not asked for"),
        ({"event": "stage_failed", "stage": "prep", "error": "no\n rows", "status": "failed"}, "prep failed: no rows"),
        (
            {"event": "stage_failed", "stage": "prep", "error": "stage 'prep' was interrupted", "status": "cancelled"},
            "stage 'prep' was interrupted",
        ),
        ({"event": "note", "text": "the cluster is full"}, "the cluster is full"),
        ({"event": "run_finished", "run_id": "r", "status": "refused", "seconds": 9.0}, "run refused in 9.0 s"),
        ({"event": "something_new", "stage": "prep"}, ""),
    ],
)
def test_an_event_is_told_in_one_line(event, line):
    assert tell_event(event) == line


def test_what_a_stream_cannot_encode_does_not_stop_a_run():
    raw = io.BytesIO()
    listen = plain_lines(io.TextIOWrapper(raw, encoding="ascii"))
    listen(START)
    listen({"event": "stage_started", "stage": "prep", "cells": 3})
    assert raw.getvalue().decode("ascii").splitlines()[1] == "planner: prep ?"


def test_what_libraries_print_stays_out_of_the_json(capsys):
    with json_lines() as listen:
        listen(START)
        print("downloading …")
    print("after")
    out, err = capsys.readouterr()
    assert [json.loads(line)["event"] for line in out.splitlines()[:1]] == ["run_started"]
    assert out.splitlines()[1:] == ["after"] and err == "downloading …\n"


def test_standard_output_comes_back_after_an_error():
    before = sys.stdout
    with pytest.raises(KeyboardInterrupt), json_lines(io.StringIO()):
        raise KeyboardInterrupt
    assert sys.stdout is before


def test_trials_are_told_as_stages_of_their_sweep():
    train = {"stage": "train", "trial": 0}
    told = [
        {"event": "trial_started", "trial": 0, "values": {"rank": 8}, "pipeline": "planner"},
        START | {"trial": 0},
        {"event": "stage_started", **train},
        {"event": "cell_started", **train, "cell": 1, "of": 3},
        {"event": "stage_cached", "stage": "prep", "trial": 0, "run_id": "r-0", "reason": "as in r-0"},
        step(100, trial=0),
        {"event": "run_finished", "run_id": "r-1", "status": "finished", "seconds": 3.0, "trial": 0},
        {"event": "trial_finished", "trial": 0, "status": "finished", "value": 0.41, "error": ""},
        {"event": "trial_finished", "trial": 1, "status": "pruned", "value": None, "error": "worse than the median"},
    ]
    assert lines(told) == [
        "planner: trial 0 …: rank 8",
        "planner: trial 0 step 100/200, loss 1.5, 9 s left",
        "planner: trial 0 finished: value 0.41",
        "planner: trial 1 pruned: worse than the median",
    ]


def test_dates_are_told_as_stages_of_their_backfill():
    told = [
        START | {"date": "2026-05-01"},
        {"event": "stage_failed", "stage": "prep", "error": "no rows", "status": "failed", "date": "2026-05-01"},
        {"event": "run_finished", "run_id": "r", "status": "failed", "seconds": 2.0, "date": "2026-05-01"},
        START | {"date": "2026-05-08"},
        {"event": "run_finished", "run_id": "r", "status": "finished", "seconds": 3.0, "date": "2026-05-08"},
    ]
    assert lines(told) == [
        "planner: 2026-05-01 …",
        "planner: 2026-05-01 failed: no rows",
        "planner: 2026-05-08 …",
        "planner: 2026-05-08 finished in 3.0 s",
    ]


def test_a_machine_is_told_of_trials_as_they_are():
    stream = io.StringIO()
    with json_lines(stream) as listen:
        listen(step(100, trial=3))
    assert json.loads(stream.getvalue())["trial"] == 3


def test_the_steps_of_one_cell_are_forgotten_in_the_next():
    state = RunState()
    for event in [START, step(50), {"event": "cell_started", "stage": "train", "cell": 6, "of": 8, "title": ""}]:
        take_event(state, event, 1.0)
    assert state.stages["train"].share == 5 / 8


def test_what_runs_when_nobody_tells_more_was_stopped():
    state = RunState()
    for moment, event in enumerate([START, {"event": "stage_started", "stage": "prep", "cells": 3}]):
        take_event(state, event, float(moment))
    end_state(state, 5.0)
    assert (state.status, state.seconds) == ("stopped", 5.0)
    assert [(s.status, s.seconds) for s in state.stages.values()] == [("stopped", 4.0), ("waiting", None)]


def test_durations_are_rounded_to_what_is_shown():
    assert [duration(s) for s in (0, 59.94, 59.95)] == ["0.0 s", "59.9 s", "1 min 00 s"]
    assert [duration(s) for s in (3599.4, 3599.6)] == ["59 min 59 s", "1 h 00 min"]


def test_long_outputs_are_left_out_of_the_line():
    assert brief({"a": "x" * 41, "b": [1], "c": True, "d": 0.123456}) == "c True, d 0.1235"
