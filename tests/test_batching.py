"""The drain queue: what queued goes together, what is too much is refused, what was queued is answered."""

import asyncio
import random
import threading
import time

import pytest

from mlops_workbench.batching import Batcher, Closed, Full, Late


class Model:
    "A model that works only while its gate is open, and remembers its batches."

    def __init__(self):
        self.gate, self.batches, self.threads = threading.Event(), [], set()
        self.gate.set()

    def answer(self, items):
        self.gate.wait(10)
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        return [f"answer to {i}" for i in items]


async def queued(batcher, n):
    "Wait until `n` items wait."
    for _ in range(10_000):
        await asyncio.sleep(0.001)
        if batcher.n_waiting == n:
            return
    raise AssertionError(f"{batcher.n_waiting} items wait, not {n}")


def test_every_caller_gets_its_own_answer_from_one_thread():
    model = Model()

    async def main():
        with Batcher(model.answer, "model", max_batch=7) as batcher:
            return await asyncio.gather(*(batcher.ask(i) for i in range(200)))

    assert asyncio.run(main()) == [f"answer to {i}" for i in range(200)]
    assert max(map(len, model.batches)) == 7 and len(model.threads) == 1
    assert sorted(i for batch in model.batches for i in batch) == list(range(200))


def test_a_single_caller_never_waits_for_company():
    model = Model()

    async def main():
        with Batcher(model.answer, "model") as batcher:
            return [await batcher.ask(i) for i in range(20)]

    asyncio.run(main())
    assert model.batches == [[i] for i in range(20)]


def test_what_queued_while_a_batch_ran_is_the_next_batch():
    model = Model()

    async def main():
        with Batcher(model.answer, "model", max_batch=32) as batcher:
            model.gate.clear()
            asked = [asyncio.create_task(batcher.ask("first"))]
            await queued(batcher, 0)  # it was taken
            asked += [asyncio.create_task(batcher.ask(i)) for i in range(10)]
            await queued(batcher, 10)
            model.gate.set()
            await asyncio.gather(*asked)

    asyncio.run(main())
    assert model.batches == [["first"], list(range(10))]


def test_a_full_queue_refuses_with_a_time_to_come_back_and_recovers():
    model = Model()

    async def main():
        with Batcher(model.answer, "model", bound=3) as batcher:
            model.gate.clear()
            asked = [asyncio.create_task(batcher.ask("first"))]
            await queued(batcher, 0)
            asked += [asyncio.create_task(batcher.ask(i)) for i in range(3)]
            await queued(batcher, 3)
            with pytest.raises(Full, match="3 requests wait for model, as many as may: try again in 1 s") as full:
                await batcher.ask("too much")
            model.gate.set()
            await asyncio.gather(*asked)
            return full.value.retry_after_s, await batcher.ask("later")

    assert asyncio.run(main()) == (1, "answer to later")
    assert "too much" not in [i for batch in model.batches for i in batch]


def test_what_is_late_or_was_given_up_is_not_computed():
    model = Model()

    async def main():
        with Batcher(model.answer, "model") as batcher:
            model.gate.clear()
            asked = [asyncio.create_task(batcher.ask("first"))]
            await queued(batcher, 0)
            late = asyncio.create_task(batcher.ask("late", time.monotonic() + 0.01))
            given_up = asyncio.create_task(batcher.ask("given up"))
            kept = asyncio.create_task(batcher.ask("kept"))
            await queued(batcher, 3)
            given_up.cancel()
            await asyncio.sleep(0.02)
            model.gate.set()
            with pytest.raises(Late, match="was not asked in time"):
                await late
            return await asyncio.gather(*asked, kept)

    assert asyncio.run(main()) == ["answer to first", "answer to kept"]
    assert model.batches == [["first"], ["kept"]]


def test_closing_answers_what_is_queued_and_then_refuses():
    model = Model()

    async def main():
        batcher = Batcher(model.answer, "model", max_batch=2)
        model.gate.clear()
        asked = [asyncio.create_task(batcher.ask(i)) for i in range(9)]
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        await asyncio.sleep(0.02)
        with pytest.raises(Closed, match="something else answers"):
            await batcher.ask("after")
        model.gate.set()
        return await asyncio.gather(*asked), await closing, batcher.close()

    answers, ended, again = asyncio.run(main())
    assert answers == [f"answer to {i}" for i in range(9)] and ended and again


def test_a_model_that_hangs_does_not_keep_the_service_from_closing():
    model = Model()

    async def main():
        batcher = Batcher(model.answer, "model")
        model.gate.clear()
        asyncio.create_task(batcher.ask("hangs"))
        await queued(batcher, 0)
        ended = batcher.close(timeout_s=0.05)
        model.gate.set()
        return ended

    assert asyncio.run(main()) is False


def test_one_bad_item_fails_alone():
    model = Model()

    def answer(items):
        if "bad" in items:
            raise RuntimeError("cannot be read")
        return model.answer(items)

    async def main():
        with Batcher(answer, "model") as batcher:
            model.gate.clear()
            first = asyncio.create_task(batcher.ask("first"))
            await queued(batcher, 0)
            asked = [asyncio.create_task(batcher.ask(i)) for i in ("a", "bad", "b")]
            await queued(batcher, 3)
            model.gate.set()
            await first
            return await asyncio.gather(*asked, return_exceptions=True)

    a, bad, b = asyncio.run(main())
    assert (a, b) == ("answer to a", "answer to b") and "cannot be read" in str(bad)


def test_a_model_that_loses_answers_is_noticed():
    async def main():
        with Batcher(lambda items: [], "model") as batcher:
            await batcher.ask(1)

    with pytest.raises(Exception, match="model gave 0 answers to 1 requests"):
        asyncio.run(main())


def test_callers_in_several_loops_share_one_model():
    model = Model()
    batcher = Batcher(model.answer, "model", max_batch=4)
    found = {}

    def caller(n):
        async def main():
            return await asyncio.gather(*(batcher.ask((n, i)) for i in range(50)))

        found[n] = asyncio.run(main())

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.close()
    assert found == {n: [f"answer to {(n, i)}" for i in range(50)] for n in range(4)}


def test_under_random_load_everything_is_answered_once_or_refused():
    rng, model = random.Random(1), Model()

    async def one(batcher, i):
        await asyncio.sleep(rng.random() * 0.02)
        try:
            return await batcher.ask(i)
        except Full:
            return "full"

    async def main():
        with Batcher(model.answer, "model", max_batch=5, bound=20) as batcher:
            return await asyncio.gather(*(one(batcher, i) for i in range(500)))

    found = asyncio.run(main())
    computed = sorted(i for batch in model.batches for i in batch)
    assert computed == [i for i, a in enumerate(found) if a != "full"]
    assert all(a == f"answer to {i}" for i, a in enumerate(found) if a != "full")


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"bound": 0}])
def test_a_batcher_without_room_is_refused(wrong):
    with pytest.raises(ValueError, match="pass 1 or more of each"):
        Batcher(list, "model", **wrong)
