"Triggers: what holds when, and what follows from it, without a clock, a database or a file."

from datetime import UTC, datetime, timedelta

import pytest
import yaml

from mlops_workbench.occasion import Facts, Past, Quality, Report, Request, decide_start, look
from mlops_workbench.trigger import (
    AllOf,
    AnyOf,
    Budget,
    Code,
    Drift,
    Manual,
    NewData,
    Regression,
    Schedule,
    Trigger,
    leaves,
    next_slot,
    read_span,
    read_trigger,
    slots_between,
    tell_span,
)

MONDAY = datetime(2026, 3, 2, 3, tzinfo=UTC)
DAY = timedelta(days=1)
ROWS, DAYS = NewData("plan_decided", rows=500), NewData("plan_decided", days=7)
ASKED = (Request("request 1", "new menu", "ann"),)
SLOT = {"schedule 2026-03-02T03:00Z": MONDAY - timedelta(hours=1)}
ACCEPTED = Regression("plan_decided", "accepted", promised=0.6, loss=0.02, units=100)


def reports(*severities):
    "Make reports, newest first; one that begins with ! is broken."
    return tuple(
        Report(f"r{len(severities) - i}", s.removeprefix("!"), s.startswith("!")) for i, s in enumerate(severities)
    )


CASES = [
    ("a slot that has come", Schedule("0 3 * * 1"), Facts(MONDAY - DAY), True),
    ("a slot at the anchor was answered", Schedule("0 3 * * 1"), Facts(MONDAY), False),
    ("a slot that started a run", Schedule("0 3 * * 1"), Facts(MONDAY - DAY, handled=SLOT), False),
    ("enough rows", ROWS, Facts(MONDAY, {ROWS: 500}), True),
    ("one row too few", ROWS, Facts(MONDAY, {ROWS: 499}), False),
    ("enough days", DAYS, Facts(MONDAY, {DAYS: 7}), True),
    ("drift that stays", Drift("medium", 2, 3), Facts(MONDAY, reports=reports("high", "none", "medium")), True),
    ("drift that has gone", Drift("medium", 2, 3), Facts(MONDAY, reports=reports("low", "high", "high")), False),
    ("one bad night", Drift("medium", 2, 3), Facts(MONDAY, reports=reports("high", "low", "none", "high")), False),
    ("broken data are no drift", Drift("medium", 2, 3), Facts(MONDAY, reports=reports("!high", "high", "low")), False),
    ("a broken report does not hide drift", Drift("medium", 2, 3), Facts(MONDAY, reports=reports("high", "!none", "high")), True),
    ("milder than asked", Drift("high", 1, 1), Facts(MONDAY, reports=reports("medium")), False),
    ("no report yet", Drift(), Facts(MONDAY), False),
    ("worse beyond doubt", ACCEPTED, Facts(MONDAY, quality={ACCEPTED: Quality(100, 0.5, 0.02, 0.6)}), True),
    ("worse, perhaps", ACCEPTED, Facts(MONDAY, quality={ACCEPTED: Quality(100, 0.5, 0.03, 0.6)}), False),
    ("worse, but within the loss", ACCEPTED, Facts(MONDAY, quality={ACCEPTED: Quality(9000, 0.59, 0.001, 0.6)}), False),
    ("too few units", ACCEPTED, Facts(MONDAY, quality={ACCEPTED: Quality(99, 0.1, 0.001, 0.6)}), False),
    ("nobody answered", ACCEPTED, Facts(MONDAY, quality={ACCEPTED: None}), False),
    ("the expectation is unsure too", ACCEPTED, Facts(MONDAY, quality={ACCEPTED: Quality(100, 0.5, 0.02, 0.6, 0.03)}), False),
    ("changed code", Code(), Facts(MONDAY, code=("tasks/planner.py",)), True),
    ("the same code", Code(), Facts(MONDAY), False),
    ("a request", Manual(), Facts(MONDAY, requests=ASKED), True),
    ("no request", Manual(), Facts(MONDAY), False),
    ("one of two", AnyOf((Code(), ROWS)), Facts(MONDAY, {ROWS: 900}), True),
    ("none of two", AnyOf((Code(), ROWS)), Facts(MONDAY, {ROWS: 9}), False),
    ("both of two", AllOf((Code(), ROWS)), Facts(MONDAY, {ROWS: 900}, code=("a.py",)), True),
    ("only one of two", AllOf((Code(), ROWS)), Facts(MONDAY, {ROWS: 900}), False),
    ("nested", AnyOf((AllOf((Code(), ROWS)), AllOf((Manual(), ROWS)))), Facts(MONDAY, {ROWS: 900}, requests=ASKED), True),
]  # fmt: skip


@pytest.mark.parametrize("condition, facts, holds", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_condition_holds_or_not_and_says_why(condition, facts, holds):
    found = look(condition, facts, MONDAY + DAY)
    assert found.holds is holds and found.words
    assert bool(found.causes) is holds


def test_a_metric_that_should_be_low_is_worse_when_it_is_high():
    edits = Regression("plan_decided", "edits", promised=1.0, loss=0.1, higher_is_better=False)
    assert look(edits, Facts(MONDAY, quality={edits: Quality(500, 1.5, 0.05, 1.0)}), MONDAY).holds
    assert not look(edits, Facts(MONDAY, quality={edits: Quality(500, 0.5, 0.05, 1.0)}), MONDAY).holds


def test_a_slot_whose_run_was_made_in_a_future_that_never_came_is_due_when_it_comes():
    long_ago = Facts(MONDAY - 8 * DAY, handled={"schedule 2026-03-02T03:00Z": MONDAY - 8 * DAY})
    found = look(Schedule("0 3 * * 1"), long_ago, MONDAY)
    assert found.holds and found.causes == ("schedule 2026-03-02T03:00Z again since 2026-02-22T03:00:00Z",)


NIGHTLY = Trigger("planner", "planner", AnyOf((Schedule("0 3 * * *"), Drift(), Manual())), "planner", cooldown_s=43_200)


@pytest.mark.parametrize("nights", [1, 2, 30, 400, 2_000])
def test_an_outage_is_made_up_for_by_one_run(nights):
    made = decide_start(NIGHTLY, Past((MONDAY,)), Facts(MONDAY), MONDAY + nights * DAY)
    assert (made.outcome, len(made.causes)) == ("start", 1)
    after = decide_start(NIGHTLY, Past((MONDAY + nights * DAY,)), Facts(MONDAY + nights * DAY), MONDAY + nights * DAY)
    assert after.outcome == "wait"


def test_what_is_held_back_starts_when_the_cool_down_is_over_and_not_before():
    facts = Facts(MONDAY, reports=reports("high", "high"))
    held = decide_start(NIGHTLY, Past((MONDAY,)), facts, MONDAY + timedelta(hours=1))
    assert held.outcome == "held" and held.until == MONDAY + timedelta(hours=12)
    assert decide_start(NIGHTLY, Past((MONDAY,)), facts, held.until - timedelta(seconds=1)).outcome == "held"
    assert decide_start(NIGHTLY, Past((MONDAY,)), facts, held.until).outcome == "start"


def test_the_budget_counts_a_rolling_period():
    trigger = Trigger("t", "planner", Drift("low", 1, 1), budget=Budget(2, 7 * 86_400))
    facts, starts = Facts(MONDAY, reports=reports("high")), (MONDAY - DAY, MONDAY - 3 * DAY, MONDAY - 9 * DAY)
    held = decide_start(trigger, Past(starts), facts, MONDAY)
    assert (held.outcome, held.key, held.until) == ("held", "budget", MONDAY + 4 * DAY)
    assert decide_start(trigger, Past(starts), facts, held.until).outcome == "start"
    assert decide_start(trigger, Past(starts[1:]), facts, MONDAY).outcome == "start"


def test_who_asks_passes_the_brakes_but_not_the_guard_unless_forced():
    trigger = Trigger("t", "planner", Manual(), cooldown_s=86_400, budget=Budget(1, 86_400))
    past = Past((MONDAY,))
    asked = Facts(MONDAY, requests=(Request("request 1", "new menu", "ann"),))
    broken = Facts(MONDAY, requests=asked.requests, broken="prices are missing")
    forced = Facts(MONDAY, requests=(Request("request 1", "new menu", "ann", True),), broken="prices are missing")
    assert [decide_start(trigger, past, f, MONDAY).outcome for f in (asked, broken, forced)] == [
        "start",
        "blocked",
        "start",
    ]


def test_broken_data_says_nothing_when_nothing_is_due():
    assert decide_start(NIGHTLY, Past((MONDAY,)), Facts(MONDAY, broken="no rows"), MONDAY).outcome == "wait"


def test_a_run_that_goes_on_is_waited_for_even_by_who_asks():
    asked = Facts(MONDAY, requests=(Request("request 1", "new menu", "ann", True),))
    assert decide_start(NIGHTLY, Past((MONDAY,), "the run of decision 3"), asked, MONDAY + DAY).outcome == "wait"


def test_slots_are_those_of_utc_and_of_leap_years():
    assert slots_between("0 0 29 2 *", datetime(2025, 1, 1, tzinfo=UTC), datetime(2029, 1, 1, tzinfo=UTC)) == (
        datetime(2028, 2, 29, tzinfo=UTC),
    )
    assert next_slot("0 3 * * 1", MONDAY) == MONDAY + 7 * DAY
    half = MONDAY + timedelta(microseconds=1)
    assert slots_between("0 3 * * 1", MONDAY - DAY, half) == (MONDAY,)
    assert len(slots_between("* * * * *", MONDAY - 9 * DAY, MONDAY)) == 1_000


def test_a_length_of_time_reads_and_tells():
    assert [read_span(t) for t in ("30s", "15m", "12h", "7d", "1w")] == [30, 900, 43_200, 604_800, 604_800]
    assert [tell_span(s) for s in (1, 90, 43_200, -86_400)] == ["1 s", "1.5 m", "12 h", "-1 d"]


BAD = [
    ("when: sometimes", "expected one condition"),
    ("pipeline: planner", "lacks 'when'"),
    ("when: {}", "lacks 'when'"),
    ("- manual", "write names with values"),
    ("{when: manual, cooldwn: 1h}", "did you mean 'cooldown'"),
    ("{when: manual, cooldown: 3}", "write seconds to weeks"),
    ("{when: manual, cooldown: 0h}", "write seconds to weeks"),
    ("{when: {schedule: '61 * * * *'}}", "Bad minute"),
    ("{when: {schedule: '* * * *'}}", "five fields"),
    ("{when: {schedule: 5}}", "schedule"),
    ("{when: {any_of: []}}", "expected a list of conditions"),
    ("{when: {any_of: manual}}", "expected a list of conditions"),
    ("{when: {drift: {}, code: {}}}", "write any_of or all_of above them"),
    ("{when: {drift: {severity: severe}}}", "drift asks for severity"),
    ("{when: {drift: {reports: 4, of: 3}}}", "at least as many"),
    ("{when: {drift: {reports: true}}}", "write a number"),
    ("{when: {new_data: {rows: 5}}}", "lacks a value"),
    ("{when: {new_data: {event: x, rows: 5, days: 5}}}", "make one of them positive"),
    ("{when: {regression: {event: x, metric: y, loss: -1}}}", "none is negative"),
    ("{when: manual, budget: {runs: 0, period: 7d}}", "1 or more"),
    ("{when: manual, budget: {runs: 2}}", "write seconds to weeks"),
    ("{when: manual, guard: {feed: x}}", "write both or none"),
    ("{when: manual, guard: {report: 'no'}}", "write true or false"),
    ("{when: manual, parameters: train.rank=8}", "write a list"),
    ("{when: manual, pipeline: 7}", "write text"),
    ("{when: manual, monitor: never}", "five fields"),
]


@pytest.mark.parametrize("text, words", BAD)
def test_a_file_that_is_wrong_is_refused_in_one_line(text, words):
    with pytest.raises(ValueError, match=words) as told:
        read_trigger("t", yaml.safe_load(text))
    assert "\n" not in str(told.value)


def test_a_file_says_everything():
    said = """
    pipeline: planner
    policy: kitchen
    profile: smoke
    parameters: [train.rank=8]
    monitor: "0 * * * *"
    when: {all_of: [manual, {any_of: [code, {drift: {severity: high}}]}]}
    cooldown: 1.5h
    budget: {runs: 3, period: 1w}
    guard: {report: false, feed: plan_decided, gap: 2d}
    """
    found = read_trigger("t", yaml.safe_load(said))
    assert leaves(found.when) == (Manual(), Code(), Drift("high"))
    assert (found.name, found.policy, found.profile, found.monitor) == ("t", "kitchen", "smoke", "0 * * * *")
    assert (found.cooldown_s, found.budget, found.guard.gap_s) == (5_400, Budget(3, 604_800), 172_800)
