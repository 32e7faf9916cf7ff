"Features against a plain Python computation, row by row, with late and future events."

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from mlops_workbench.core import stable_id
from mlops_workbench.events import Event, write_events
from mlops_workbench.features import FeatureSet, compute_features

START = datetime(2026, 1, 1, tzinfo=UTC)
WINDOW = timedelta(days=28)

HISTORY = FeatureSet(
    "history",
    """
    SELECT spine.row_id, h.n, h.mean, h.last
    FROM spine LEFT JOIN LATERAL (
        SELECT count(*) AS n, avg((e.metrics ->> 'value')::float8) AS mean,
               (array_agg((e.metrics ->> 'value')::float8
                          ORDER BY e.event_at DESC, e.received_at DESC, e.id DESC))[1] AS last
        FROM exp.events e
        WHERE e.type = 'seen' AND e.unit_id = spine.unit_id AND e.event_at > spine.as_of - interval '28 days'
          AND e.event_at <= spine.as_of AND e.received_at <= spine.as_of
    ) h ON true
    """,
    ("n", "mean", "last"),
)


def make_events(n=1500, n_units=12, seed=0):
    "Events of three months, of which 5 % arrive late and some exactly at a question's time."
    chance = random.Random(seed)
    events = []
    for i in range(n):
        at = START + timedelta(hours=chance.randrange(24 * 90))
        late = timedelta(hours=chance.randrange(1, 72)) if chance.random() < 0.05 else timedelta()
        unit, value = f"u-{chance.randrange(n_units)}", chance.randrange(100) / 4
        events.append(
            Event("seen", "user", unit, at, id=stable_id("seen", i), metrics={"value": value}, received_at=at + late)
        )
    return events


def make_spine(n=400, n_units=14, seed=1):
    chance = random.Random(seed)
    rows = [
        (f"r{i}", f"u-{chance.randrange(n_units)}", START + timedelta(hours=chance.randrange(24 * 95)))
        for i in range(n)
    ]
    return pd.DataFrame(rows, columns=["row_id", "unit_id", "as_of"])


def by_hand(events, unit_id, as_of, known=True):
    seen = [e for e in events if e.unit_id == unit_id and as_of - WINDOW < e.event_at <= as_of]
    seen = sorted(
        (e for e in seen if not known or e.received_at <= as_of), key=lambda e: (e.event_at, e.received_at, e.id)
    )
    values = [e.metrics["value"] for e in seen]
    return {
        "n": len(values),
        "mean": sum(values) / len(values) if values else None,
        "last": values[-1] if values else None,
    }


def test_every_row_is_what_was_known_then(store):
    events, spine = make_events(), make_spine()
    write_events(store, events)
    expected = pd.DataFrame([by_hand(events, row.unit_id, row.as_of) for row in spine.itertuples()]).astype(float)
    found = compute_features(store, HISTORY, spine)
    assert found["row_id"].tolist() == spine["row_id"].tolist()
    pd.testing.assert_frame_equal(found[["n", "mean", "last"]].astype(float), expected)
    leaky = pd.DataFrame([by_hand(events, row.unit_id, row.as_of, known=False) for row in spine.itertuples()]).astype(
        float
    )
    assert 0 < (leaky["n"] != expected["n"]).mean() < 0.5, (
        "the data must hold late events that matter, or this test proves nothing"
    )


def test_one_row_is_the_same_as_many(store):
    write_events(store, make_events())
    spine = make_spine(12)
    together = compute_features(store, HISTORY, spine)
    alone = pd.concat([compute_features(store, HISTORY, spine.iloc[[i]]) for i in range(len(spine))], ignore_index=True)
    pd.testing.assert_frame_equal(together.astype({"n": float}), alone.astype({"n": float}), check_dtype=False)


def test_the_future_changes_nothing(store):
    "Writing the log piece by piece, as it arrived, gives at each time what the whole log gives for that time."
    events, spine = sorted(make_events(400), key=lambda e: e.received_at), make_spine(20)
    answered, written = [], 0
    for _, question in spine.sort_values("as_of").iterrows():
        known = [e for e in events[written:] if e.received_at <= question["as_of"]]
        write_events(store, known)
        written += len(known)
        answered.append(compute_features(store, HISTORY, question.to_frame().T.astype(spine.dtypes)))
    write_events(store, events[written:])
    then = pd.concat(answered).set_index("row_id").astype(float)
    afterwards = compute_features(store, HISTORY, spine).set_index("row_id").astype(float)
    pd.testing.assert_frame_equal(then.loc[afterwards.index], afterwards)


def test_the_spine_may_carry_more(store):
    at = START + timedelta(days=1)
    one = Event("seen", "user", "u-1", START, received_at=START, context={"source": "a"})
    write_events(store, [replace(one, id=stable_id("s", i), context={"source": s}) for i, s in enumerate("aab")])
    query = """
        SELECT spine.row_id, pg_typeof(flag)::text AS kind, factor * (
            SELECT count(*) FROM exp.events e WHERE e.source = spine.source AND e.received_at <= spine.as_of
        ) AS n FROM spine"""
    spine = pd.DataFrame(
        {
            "row_id": [7, 8],
            "unit_id": "u-1",
            "as_of": [at, at],
            "source": ["a", "b"],
            "factor": 0.5,
            "flag": [True, False],
        }
    )
    found = compute_features(store, FeatureSet("by_source", query, ("n", "kind")), spine)
    assert found.to_dict("list") == {"row_id": [7, 8], "n": [1.0, 0.5], "kind": ["boolean", "boolean"]}


def test_the_time_zone_of_the_spine_does_not_matter(store):
    write_events(store, make_events(200))
    spine = make_spine(40)
    elsewhere = spine.assign(as_of=spine["as_of"].dt.tz_convert("America/Sao_Paulo"))
    pd.testing.assert_frame_equal(compute_features(store, HISTORY, spine), compute_features(store, HISTORY, elsewhere))


def test_an_empty_spine(store):
    assert len(compute_features(store, HISTORY, make_spine(3).iloc[:0])) == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.drop(columns="as_of"), "the spine has no as_of"),
        (lambda s: s.assign(as_of=s["as_of"].dt.tz_localize(None)), "pass aware times"),
        (lambda s: s.assign(as_of=s["as_of"].where(s.index > 0)), "none missing"),
        (lambda s: s.assign(row_id="r1"), "row_id 'r1' comes twice"),
    ],
)
def test_bad_spines(store, change, words):
    with pytest.raises(ValueError, match=words):
        compute_features(store, HISTORY, change(make_spine(3)))


@pytest.mark.parametrize(
    "query, words",
    [
        ("SELECT row_id, 1 AS n FROM spine WHERE row_id <> 'r1'", "returns 0 rows for row_id 'r1'"),
        ("SELECT row_id, 1 AS n FROM spine UNION ALL SELECT row_id, 2 FROM spine", "returns 2 rows for row_id 'r0'"),
        ("SELECT row_id, 1 AS m FROM spine", "returns no n"),
    ],
)
def test_bad_queries(store, query, words):
    with pytest.raises(ValueError, match=words):
        compute_features(store, FeatureSet("bad", f"{query} -- as_of received_at", ("n",)), make_spine(3))


def test_a_query_that_never_asks_when_it_was_known_is_refused():
    with pytest.raises(ValueError, match="never mentions received_at"):
        FeatureSet("leaky", HISTORY.sql.replace("e.received_at", "e.event_at"), HISTORY.columns)
