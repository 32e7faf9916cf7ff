"""Answers on a real store with real models: who answers, what is logged, and what happens when a model does not do its work."""

import asyncio
import json
import shutil
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest

from benchmarks.prediction import PASSED, World
from mlops_workbench import recommender
from mlops_workbench.alerts import read_alerts
from mlops_workbench.assignment import assign
from mlops_workbench.batching import Full, Late
from mlops_workbench.controller import start_rollout
from mlops_workbench.decision import Asked
from mlops_workbench.events import read_events, write_events
from mlops_workbench.experiment import read_experiment
from mlops_workbench.gauge import read_evidence, read_rollout
from mlops_workbench.instruments import Instruments
from mlops_workbench.lineup import Keeper
from mlops_workbench.outcome import place
from mlops_workbench.policy import promote, rollback
from mlops_workbench.prediction import PredictionOptions, Predictions, find_keeper
from mlops_workbench.rollout import Guardrail, RolloutPlan, Step
from mlops_workbench.store import read_rows, transaction
from mlops_workbench.task import Known

CONTEXT = {"position": 2, "user": ["u0-1", "u1-2", "u2-0", "u3-3"], "affinity": {"3": 1.0, "17": 0.5}}
MODULE = "mlops_workbench.recommender"


class Bench(World):
    "A world, and policies that are served from it."

    def __enter__(self):
        self.predictions = Predictions(
            self.store, self.tracking, self.settings, None, self.write, PredictionOptions(tasks=(MODULE,))
        )
        self.until(self.predictions.is_ready)
        return self

    def __exit__(self, *_):
        self.predictions.close()

    async def write(self, events):
        await asyncio.to_thread(write_events, self.store, events)
        return [""] * len(events)

    def until(self, what, timeout_s=60):
        limit = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < limit, self.predictions.problems()
            time.sleep(0.02)

    @property
    def lineup(self):
        return find_keeper(self.predictions, "recommender").lineup

    def serving(self, version):
        self.until(lambda: self.lineup.production == version)

    def ask(self, *units, deadline_s=10, **facts):
        "Ask for several units at once."

        async def main():
            asked = [Asked(u, CONTEXT, deadline_s=deadline_s, **facts) for u in units]
            found = await asyncio.gather(*(self.predictions.answer("recommender", a) for a in asked))
            while self.predictions._shadows:
                await asyncio.sleep(0.01)
            return found

        found = asyncio.run(main())
        return found[0] if len(units) == 1 else found

    def behave(self, version, answer):
        "Let a loaded version behave differently from now on."
        slot = self.lineup.slots[version]
        slot.batcher.answer = answer


@pytest.fixture
def bench(store, tmp_path):
    # the latency budget of the recommender is 50 ms, too little for a machine that runs tests
    with Bench(store, tmp_path) as opened:
        yield opened


SLOW = {"latency_budget_ms": 10_000}


def test_before_any_promotion_the_rule_answers_and_it_is_logged(bench):
    answered = bench.ask("profile-1", request_id="r-1")
    assert (answered.policy_version, answered.variant, answered.fallback) == (None, None, "")
    assert answered.answer == recommender.rule(CONTEXT)
    (row,) = read_events(bench.store, "item_shown").to_dict("records")
    assert row["id"] == answered.event_id and row["unit_id"] == "profile-1" and row["unit_type"] == "profile"
    assert row["payload"]["request"] == CONTEXT and row["payload"]["policy"] == "random"
    assert row["context"] == {"source": "workbench", "policy_version": None, "request_id": "r-1"}
    assert set(row["metrics"]) == {"latency_ms", "intervened", "cost_eur"} and row["metrics"]["intervened"] == 0


def test_what_is_served_is_an_example_tomorrow_with_the_same_context(bench):
    bench.promoted(bench.ranking(), SLOW)
    bench.serving(1)
    answered = bench.ask("profile-1")
    examples = recommender.task.read_examples(bench.store, "workbench", None)
    (example,) = examples.to_dict("records")
    assert json.loads(example["context"]) == dict(answered.context) == CONTEXT
    assert example["propensity"] == answered.answer["probabilities"][answered.payload["item"]]
    assert json.loads(example["action"]) == {"item": answered.payload["item"], "policy": "recommender@1"}


def test_a_promotion_and_a_rollback_reach_whoever_asks_and_what_served_before_is_not_loaded_again(bench):
    bench.promoted(bench.ranking(1), SLOW)
    bench.serving(1)
    bench.proposed(second := bench.ranking(2), SLOW)
    before = bench.ask("profile-1").answer
    promote(bench.tracking, bench.store, second, PASSED, "ana", SLOW)
    bench.serving(2)  # loaded beside the first one
    assert bench.ask("profile-1").policy_version == 2 and bench.ask("profile-1").answer != before
    kept = bench.lineup.slots[1]
    rollback(bench.tracking, bench.store, "recommender", "ben", "worse")
    bench.serving(1)
    assert bench.lineup.slots[1] is kept and bench.ask("profile-1").answer == before


def test_no_request_fails_while_versions_are_switched_under_load(bench):
    bench.promoted(bench.ranking(1), SLOW)
    bench.serving(1)
    seen, stop = [[] for _ in range(4)], threading.Event()

    async def caller(n):
        while not stop.is_set():
            seen[n].append(await bench.predictions.answer("recommender", Asked(f"p-{n}", CONTEXT, deadline_s=10)))

    async def main():
        await asyncio.gather(*(caller(n) for n in range(4)))

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    for seed in (2, 3):
        bench.promoted(bench.ranking(seed), SLOW)
        bench.serving(seed)
    time.sleep(0.2)
    stop.set()
    thread.join()
    for answers in seen:  # nobody goes back to an old version
        versions = [a.policy_version for a in answers]
        assert set(versions) == {1, 2, 3} and versions == sorted(versions)
        assert {a.fallback for a in answers} == {""}


def test_a_model_that_does_not_load_leaves_the_old_one_and_raises_an_alert(bench):
    bench.promoted(bench.ranking(1), SLOW)
    bench.serving(1)
    broken = bench.ranking(2)
    shutil.rmtree(next(bench.folder.glob("home/artifacts/**/models"), bench.folder / "nothing"), ignore_errors=True)
    for path in bench.folder.glob(f"home/**/{broken.source.removeprefix('models:/')}/artifacts/data/*/model.json"):
        path.write_text("{}")
    bench.promoted(broken, SLOW)
    bench.until(lambda: bench.lineup.faults)
    assert bench.lineup.production == 1
    answered = bench.ask("profile-1")
    assert (answered.policy_version, answered.fallback) == (1, "")
    (alert,) = read_alerts(bench.store)
    assert alert.name == "model-does-not-load" and alert.labels == {"policy": "recommender", "version": "2"}
    assert "what served before goes on" in alert.words and "rollback" in alert.run
    with Keeper(find_keeper(bench.predictions, "recommender").room) as begun:  # a worker that starts now
        bench.until(lambda: begun.lineup)
        assert begun.lineup.production == 1 and begun.lineup.find(1)[0]
    bench.promoted(bench.ranking(3), SLOW)
    bench.serving(3)
    bench.until(lambda: not read_alerts(bench.store))  # nobody asks for version 2 any more


def test_a_version_without_a_passed_verdict_is_refused(bench):
    unjudged = bench.ranking(1)
    subject = json.dumps(unjudged.subject)
    with transaction(bench.store) as connection:  # by the side door
        connection.execute("INSERT INTO exp.policies (policy, task) VALUES ('recommender', %s)", (MODULE,))
        connection.execute(
            "INSERT INTO exp.policy_versions (policy, version, model_name, model_version, model_digest, settings, "
            "status, author, created_at) VALUES ('recommender', 1, 'recommender', '1', %s, '{}', 'production', 'eve', now())",
            (unjudged.digest,),
        )
    bench.until(lambda: bench.lineup.faults)
    reason, words = bench.lineup.faults[1]
    assert reason == "refused" and "has no passed verdict on record" in words, subject
    assert bench.lineup.production is None and bench.ask("profile-1").policy_version is None


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (lambda items: 1 / 0, "broken"),
        (lambda items: time.sleep(0.5) or [None] * len(items), "slow"),
        (lambda items: [SimpleNamespace(value={"top_item": 0}, latency_ms=1.0)] * len(items), "invalid"),
        (lambda items: [SimpleNamespace(value=None, latency_ms=1.0)] * len(items), "invalid"),
    ],
)
def test_a_bad_model_is_replaced_by_the_fallback_within_the_budget_and_the_event_says_so(bench, behave, reason):
    bench.promoted(bench.ranking(1), SLOW)
    bench.serving(1)
    bench.behave(1, behave)
    answered = bench.ask("profile-1", deadline_s=0.3)
    assert (answered.fallback, answered.policy_version) == (reason, 1)
    assert answered.answer == recommender.rule(CONTEXT)
    row = read_events(bench.store, "item_shown").iloc[-1]
    assert row["context"]["fallback"] == reason and row["metrics"]["intervened"] == 1


def test_the_age_of_features_is_measured(bench, monkeypatch):
    def read_context(store, unit_id, at, request):
        return Known(request, at - timedelta(hours=1))

    monkeypatch.setattr(type(recommender.task), "read_context", staticmethod(read_context))
    bench.predictions.instruments = Instruments()
    assert dict(bench.ask("profile-1").context) == CONTEXT
    page = bench.predictions.instruments.page()[0].decode()
    assert 'workbench_feature_age_seconds_sum{policy="recommender"} 3600.0' in page


def test_features_that_do_not_come_are_not_waited_for(bench, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(type(recommender.task), "read_context", staticmethod(lambda *_: ended.wait(20)))
    monkeypatch.setattr("mlops_workbench.prediction._PATIENCE_S", 0.2)
    with pytest.raises(Late, match="features of recommender take over 0.2 s: the database is slow"):
        bench.ask("profile-1")
    ended.set()
    assert len(read_events(bench.store, "item_shown")) == 0


def test_a_contract_that_is_broken_asks_no_model(bench, monkeypatch):
    bench.promoted(bench.ranking(1), SLOW)
    bench.serving(1)
    slot = bench.lineup.slots[1]
    asked = []
    bench.behave(1, lambda items: asked.extend(items))
    monkeypatch.setitem(
        vars(slot), "contract", SimpleNamespace(check_row=lambda c: ["position is text: expected 1 to 3"])
    )
    answered = bench.ask("profile-1")
    assert (answered.fallback, answered.words, asked) == ("refused", "position is text: expected 1 to 3", [])


def test_a_full_queue_is_told_to_the_caller_and_nothing_is_logged(store, tmp_path):
    bench = Bench(store, tmp_path)
    options = PredictionOptions(tasks=(MODULE,), bound=1, max_batch=1)
    bench.predictions = Predictions(store, bench.tracking, bench.settings, None, bench.write, options)
    gate = threading.Event()
    try:
        bench.until(bench.predictions.is_ready)
        slot = bench.lineup.slots[None]
        real = slot.batcher.answer
        slot.batcher.answer = lambda items: (gate.wait(10), real(items))[1]

        async def main():
            tasks = []
            for i in range(6):
                asked = Asked(f"profile-{i}", CONTEXT, deadline_s=10, given=True)
                tasks.append(asyncio.create_task(bench.predictions.answer("recommender", asked)))
                await asyncio.sleep(0.05)
            gate.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

        found = asyncio.run(main())
    finally:
        gate.set()
        bench.predictions.close()
    refused = [f for f in found if isinstance(f, Full)]
    assert len(refused) == 4 and all(f.retry_after_s >= 1 for f in refused)
    assert len(read_events(store, "item_shown")) == 2


def test_a_task_is_served_before_anything_of_it_was_written(bench):
    options = PredictionOptions(tasks=("mlops_workbench.planner",))
    predictions = Predictions(bench.store, bench.tracking, bench.settings, None, bench.write, options)
    bench.until(lambda: predictions.is_ready())
    with pytest.raises(LookupError, match="household 'h-1' has no attributes and pantry"):
        asyncio.run(predictions.answer("planner", Asked("h-1")))
    predictions.close()


def test_the_same_request_is_the_same_decision(bench):
    one, two = bench.ask("profile-1", request_id="r-9"), bench.ask("profile-1", request_id="r-9")
    other = bench.ask("profile-2", request_id="r-9")
    assert one.event_id == two.event_id != other.event_id and one.payload == two.payload
    assert len(read_events(bench.store, "item_shown")) == 2


def test_bad_requests_are_refused_in_one_line(bench):
    async def ask(**facts):
        return await bench.predictions.answer("recommender", Asked(**{"unit_id": "p", "context": CONTEXT} | facts))

    for facts, error, words in (
        ({"context": {}}, ValueError, "the request has no affinity, position, user"),
        ({"context": CONTEXT | {"position": "2"}}, ValueError, "position is '2': send a number from 1 to 3"),
        ({"force": 7}, LookupError, "recommender@7 is not loaded"),
        ({"unit_id": ""}, ValueError, "the request names no profile"),
    ):
        with pytest.raises(error, match=words):
            asyncio.run(ask(**facts))
    assert len(read_events(bench.store, "item_shown")) == 0


GUARD = (Guardrail("latency", 0.5, event="item_shown", value="latency_ms", higher_is_better=False),)


def roll_out(bench, candidate, mode):
    steps = (Step(2_000, 0, 1),) if mode == "canary" else (Step(1_000, 0, 1),)
    plan = RolloutPlan(f"r-{mode}", "recommender", candidate.version, mode, steps, GUARD, unit_type="profile")
    return start_rollout(bench.tracking, bench.store, plan, "ana")


def test_a_canary_serves_each_arm_by_its_own_version_and_exposes_it(bench):
    bench.promoted(bench.ranking(1), SLOW)
    candidate = bench.proposed(bench.ranking(2), SLOW)
    bench.serving(1)
    roll_out(bench, candidate, "canary")
    bench.until(lambda: bench.lineup.flag.experiments and 2 in bench.lineup.slots)
    units = [f"profile-{i}" for i in range(200)]
    found = bench.ask(*units)
    expected = {u: assign(read_experiment(bench.store, "r-canary"), u).variant for u in units}
    assert {a.variant for a in found} == {"control", "treatment", None}
    for unit, answered in zip(units, found, strict=True):
        assert answered.variant == expected[unit]
        assert answered.policy_version == (2 if answered.variant == "treatment" else 1)
    with transaction(bench.store) as connection:
        rows = read_rows(connection, "SELECT unit_id, variant FROM exp.assignments WHERE experiment = 'r-canary'")
    assert {r["unit_id"]: r["variant"] for r in rows} == {u: v for u, v in expected.items() if v}
    events = read_events(bench.store, "item_shown")
    assert {e.get("r-canary") for e in events["experiments"]} == {"control", "treatment", None}
    evidence = read_evidence(bench.tracking, bench.store, read_rollout(bench.store, "r-canary"))
    assert sum(sample.n for sample in evidence.samples["latency"]) == len(rows)


def test_a_candidate_that_cannot_load_gets_the_fallback_and_the_event_says_so(bench, monkeypatch):
    bench.promoted(bench.ranking(1), SLOW)
    bench.serving(1)
    monkeypatch.setattr("mlops_workbench.lineup.load_slot", lambda room, version: 1 / 0)
    candidate = bench.proposed(bench.ranking(2), SLOW)
    roll_out(bench, candidate, "canary")
    bench.until(lambda: bench.lineup.flag.experiments)
    found = bench.ask(*(f"profile-{i}" for i in range(100)))
    by_arm = {a.variant: a for a in found}
    assert by_arm["control"].fallback == "" and by_arm["control"].policy_version == 1
    assert by_arm["treatment"].fallback == "broken" and by_arm["treatment"].policy_version == 2


def test_a_shadow_is_computed_beside_and_never_served(bench):
    bench.promoted(bench.ranking(1), SLOW)
    candidate = bench.proposed(bench.ranking(2), SLOW)
    bench.serving(1)
    roll_out(bench, candidate, "shadow")
    bench.until(lambda: bench.lineup.shadow is not None)
    found = bench.ask(*(f"profile-{i}" for i in range(4)))
    assert {a.policy_version for a in found} == {1}
    shadows = read_events(bench.store, "shadow")
    assert {c["policy_version"] for c in shadows["context"]} == {2} and len(shadows) == 4
    assert {c["of"] for c in shadows["context"]} == {a.event_id for a in found}
    evidence = read_evidence(bench.tracking, bench.store, read_rollout(bench.store, "r-shadow"))
    assert [sample.n for sample in evidence.samples["latency"]] == [4, 4]


def test_a_slow_shadow_is_capped_and_holds_up_nobody(bench):
    bench.promoted(bench.ranking(1), SLOW)
    candidate = bench.proposed(bench.ranking(2), SLOW)
    bench.serving(1)
    roll_out(bench, candidate, "shadow")
    bench.until(lambda: bench.lineup.shadow is not None)
    real, gate, shadow = bench.lineup.shadow.batcher.answer, threading.Event(), bench.lineup.shadow
    shadow.batcher.answer = lambda items: (gate.wait(10), real(items))[1]

    async def main():
        for i in range(30):
            await bench.predictions.answer("recommender", Asked(f"profile-{i}", CONTEXT, deadline_s=10))
        pending = len(bench.predictions._shadows)
        gate.set()
        while bench.predictions._shadows:
            await asyncio.sleep(0.01)
        return pending

    assert asyncio.run(main()) == 8  # all thirty were answered while none of the shadows was
    assert len(read_events(bench.store, "shadow")) == 8 and len(read_events(bench.store, "item_shown")) == 30


def test_a_version_that_was_rolled_back_is_met_by_nobody(bench):
    bench.promoted(bench.ranking(1), SLOW)
    bench.promoted(bench.ranking(2), SLOW)
    bench.serving(2)
    rollback(bench.tracking, bench.store, "recommender", "ben", "worse")
    bench.until(lambda: 2 in bench.lineup.barred)
    assert bench.ask("profile-1").policy_version == 1
    assert place(bench.lineup, Asked("profile-1")).version == 1
    with pytest.raises(LookupError, match="recommender@2 was rolled back: it serves nobody"):
        bench.ask("profile-1", force=2)


def test_a_keeper_goes_on_with_what_it_knew_while_the_database_is_away(bench, monkeypatch):
    bench.promoted(bench.ranking(1), SLOW)
    bench.serving(1)
    keeper: Keeper = find_keeper(bench.predictions, "recommender")
    monkeypatch.setattr("mlops_workbench.lineup.read_mark", lambda store, policy: 1 / 0)
    bench.until(lambda: keeper.error)
    assert "may be old" in keeper.error and bench.ask("profile-1").policy_version == 1
    monkeypatch.undo()
    bench.until(lambda: not keeper.error)
