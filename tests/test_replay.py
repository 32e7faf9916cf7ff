"A replay in shards is the replay: the same batches, the same answers, the same order."

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlops_workbench.model import Answered, LanguageModel, Predictor
from mlops_workbench.replay import RulePolicy, answer_shard, plan_shards, share


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 12))
def test_a_shard_is_made_of_whole_batches(n_rows, batch_size, n_shards):
    shards = plan_shards(range(n_rows), batch_size, n_shards)
    assert [row for shard in shards for row in shard] == list(range(n_rows))
    assert all(len(shard) % batch_size == 0 for shard in shards[:-1])
    assert len(shards) <= n_shards and all(shards)
    batches = [-(-len(shard) // batch_size) for shard in shards]
    assert not batches or max(batches) - min(batches) <= 1


@dataclass(frozen=True)
class Letters:
    "A tokenizer of letters."

    def prompt(self, text):
        return list(text)

    def piece(self, text):
        return tuple(text)


@dataclass(frozen=True)
class Remembers(LanguageModel):
    "A language model that says with whom it was asked, and how long it may speak."

    asked: list = field(default_factory=list)

    def generate(self, prompts, pieces=None, batch_size=32, max_tokens=256):
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        said = {}
        for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            company = "|".join(prompts[i] for i in batch)
            said |= {i: f"{prompts[i]}<{company}>{max_tokens}{bool(pieces)}" for i in batch}
        return [Answered(None, said[i], 0.0) for i in range(len(prompts))]


class Says:
    "A task that repeats what was said."

    def prompt(self, context):
        return context["text"]

    def pieces(self, context):
        return (context["text"],)

    def parse(self, text):
        return text


@dataclass(frozen=True)
class Crew:
    "Colleagues who have the same predictor."

    predictor: Any
    n: int

    def size(self):
        return self.n

    def ask(self, shards, meanwhile):
        return [meanwhile(), *(answer_shard(self.predictor, shard) for shard in shards)]


class Shares(LanguageModel):
    "What the shared model falls back to for the shard that stays here."


texts = st.lists(st.text("ab", max_size=9), max_size=40)


@given(texts, st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_a_language_model_is_asked_in_the_batches_of_one_machine(texts, batch_size, n, constrained):
    alone = Predictor(Says(), Remembers(None, Letters()))
    crew, original = Crew(alone, n), LanguageModel.generate
    contexts = [{"text": text} for text in texts]
    LanguageModel.generate = Remembers.generate  # the shard that stays here is answered by the class itself
    try:
        together = share(alone, crew).answer(contexts, constrained, batch_size)
    finally:
        LanguageModel.generate = original
    assert [a.text for a in together] == [a.text for a in alone.answer(contexts, constrained, batch_size)]


@dataclass
class Fitted:
    "A task's own model, which sees a batch at a time."

    def answer(self, contexts, constrained=True, batch_size=32):
        batches = [contexts[i : i + batch_size] for i in range(0, len(contexts), batch_size)]
        return [(c, [d["n"] for d in batch], constrained) for batch in batches for c in batch]


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 5))
def test_a_fitted_model_is_asked_in_the_batches_of_one_machine(n_rows, batch_size, n):
    contexts = [{"n": i} for i in range(n_rows)]
    alone = Fitted().answer(contexts, True, batch_size)
    assert share(Fitted(), Crew(Fitted(), n)).answer(contexts, True, batch_size) == alone


def test_who_has_no_crew_and_who_needs_none_stays_alone():
    fitted, rule = Fitted(), RulePolicy(Says())
    assert share(fitted, None) is fitted
    assert share(rule, Crew(rule, 3)) is rule
