"Training: what it refuses, what it leaves behind, and that it is the same every time."

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from mlops_workbench.base import resolve_base
from mlops_workbench.core import WorkbenchError, digest_folder
from mlops_workbench.model import base_predictor, load_predictor
from mlops_workbench.planner import generic_examples
from mlops_workbench.planner import task as planner
from mlops_workbench.pretraining import BasePlan, build_base
from mlops_workbench.settings import Settings
from mlops_workbench.training import TrainingOptions, encode_examples, plan_training, shuffle_targets, train

CONTEXTS = [context for context, _ in generic_examples(20, seed=5)]
QUICK = {"max_steps": 4, "batch_size": 16, "evaluate_every": 2, "rank": 4}


def examples(n, seed):
    "Contexts that somebody answered as the planner's fallback does: in time, which the base has never heard of."
    pairs = [(context, planner.fallback(context)) for context, _ in generic_examples(n, seed)]
    rows = {
        "example_id": [f"{seed}-{i}" for i in range(n)],
        "context": [json.dumps(context) for context, _ in pairs],
        "action": [json.dumps(answer) for _, answer in pairs],
        "propensity": [None] * n,
        "outcome": [json.dumps({"decision": "accepted", "plan": answer}) for _, answer in pairs],
    }
    return pd.DataFrame(rows)


FRAMES = {"train": examples(120, 1), "validation": examples(40, 2)}


def quick_plan(**options):
    return plan_training(planner, FRAMES, TrainingOptions(**QUICK | options))


class Average:
    "A task with a model of its own: the average outcome."

    name = "average"

    def fit(self, train, validation, options, report):
        report(1, {"loss": 1.0, "validation_loss": 0.5})
        return {"mean": float(np.mean([len(text) for text in train["outcome"]])) + torch.rand(1).item()}

    def save(self, model, folder):
        (folder / "average.json").write_text(json.dumps(model))

    def load(self, folder):
        return json.loads((folder / "average.json").read_text())

    def predict(self, model, contexts):
        return [model["mean"] for _ in contexts]


@pytest.fixture(scope="module", params=["lora", "qlora", "full"])
def trained(request, tmp_path_factory):
    "A model folder of each method, far enough from its base to tell the two apart."
    rank = 0 if request.param == "full" else 4
    plan = quick_plan(method=request.param, rank=rank, max_steps=16, evaluate_every=8)
    return train(plan, tmp_path_factory.mktemp(request.param) / "model")


def logits(predictor):
    prompt = torch.tensor([predictor.model.encoder.prompt(planner.prompt(CONTEXTS[0]))])
    with torch.inference_mode():
        return predictor.model.model(input_ids=prompt).logits


def test_training_learns(trained):
    assert trained.metrics["validation_loss"] < 0.97 * trained.metrics["validation_loss_start"]
    assert trained.metrics["best_step"] == 16  # still learning after it was evaluated in between
    assert list(trained.history.columns) == ["step", "loss", "validation_loss"]
    assert trained.history["validation_loss"].notna().sum() == 3


def test_a_model_folder_is_data_without_traces(trained):
    files = [p for p in trained.folder.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    for path in files:
        content = path.read_bytes()
        found = [
            root for root in (trained.folder.parent, resolve_base("planner-base").path) if str(root).encode() in content
        ]
        assert not found, f"{path.name} names {found}"
    assert [p.name for p in trained.folder.parent.iterdir()] == [trained.folder.name]
    assert digest_folder(trained.folder) == trained.digest


def test_loading_twice_gives_one_model_that_is_not_the_base(trained):
    once, again = (load_predictor(trained.folder, planner) for _ in range(2))
    assert torch.equal(logits(once), logits(again))
    assert (logits(once) - logits(base_predictor(planner))).abs().max() > 0.1


def test_what_is_served_is_what_was_trained(tmp_path, monkeypatch):
    "The logits of the model in the Trainer's hands and of the one that is loaded again, for each method."
    import mlops_workbench.training as module

    kept, save = {}, module.save_model
    monkeypatch.setattr(
        module, "save_model", lambda folder, model, *rest: (kept.update(model=model), save(folder, model, *rest))
    )
    for method in ("lora", "qlora", "full"):
        result = train(quick_plan(method=method, rank=4 * (method != "full"), learning_rate=2e-2), tmp_path / method)
        predictor = load_predictor(result.folder, planner)
        prompt = torch.tensor([predictor.model.encoder.prompt(planner.prompt(CONTEXTS[0]))])
        with torch.inference_mode():
            expected = kept["model"].eval()(input_ids=prompt).logits
        assert torch.allclose(logits(predictor), expected, atol=1e-4), method


def test_behind_mlflow(trained, tmp_path, monkeypatch):
    import mlflow.pyfunc

    path = tmp_path / "served"
    mlflow.pyfunc.save_model(
        path, loader_module="mlops_workbench.model", data_path=str(trained.folder), pip_requirements=["mlops_workbench"]
    )
    assert digest_folder(path / "data" / trained.folder.name) == trained.digest
    monkeypatch.chdir(tmp_path)  # no project here: a served model finds its base all the same
    contexts = pd.DataFrame({"context": [json.dumps(c) for c in CONTEXTS]})
    served = [json.loads(text) for text in mlflow.pyfunc.load_model(str(path)).predict(contexts)]
    expected = [a.value for a in load_predictor(trained.folder, planner).answer(CONTEXTS)]
    assert served == expected
    assert [v for c, a in zip(CONTEXTS, served, strict=True) for v in planner.violations(c, a)] == []


SAME = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
from test_training import quick_plan, train
print(train(quick_plan(max_steps=6), sys.argv[3]).digest)
"""


def test_two_processes_give_the_same_bytes(tmp_path):
    here, digests = os.path.dirname(__file__), []
    for threads, place in (("1", tmp_path / "a" / "model"), ("2", tmp_path / "elsewhere" / "other")):
        call = [sys.executable, "-c", SAME, threads, here, str(place)]
        done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=300)
        digests.append(done.stdout.splitlines()[-1])
    assert digests[0] == digests[1] == train(quick_plan(max_steps=6), tmp_path / "here").digest
    assert digests[0] != train(quick_plan(max_steps=6, seed=1), tmp_path / "other-seed").digest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "prefix"}, "choose from full, lora, qlora, task"),
        ({"rank": 0}, "usually 8 to 64"),
        ({"rank": -1}, "usually 8 to 64"),
        ({"method": "full"}, "set rank to 0"),
        ({"method": "task"}, "set rank to 0"),
        ({"method": "task", "rank": 0}, "has no `fit`"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"evaluate_every": 5}, "would never be validated"),
        ({"patience": -1}, "patience is -1: pass 0 or more"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        quick_plan(**options)


def test_rows_that_are_refused():
    train_rows, none = FRAMES["train"], FRAMES["train"].iloc[:0]
    options = TrainingOptions(**QUICK)
    with pytest.raises(ValueError, match="split the dataset again"):
        plan_training(planner, {"train": train_rows, "validation": train_rows}, options)
    with pytest.raises(ValueError, match="both need some"):
        plan_training(planner, {"train": train_rows, "validation": none}, options)
    long = train_rows.assign(context=[json.dumps(CONTEXTS[0] | {"pantry": ["carrot"] * 600})] * len(train_rows))
    with pytest.raises(ValueError, match="reads 512"):
        plan_training(planner, {"train": long, "validation": FRAMES["validation"]}, options)
    with pytest.raises(ValueError, match="is no language task"):
        plan_training(Average(), FRAMES, options)
    with pytest.raises(ValueError, match="trains a model of the task's own"):
        plan_training(Average(), FRAMES, TrainingOptions(**QUICK | {"method": "task", "rank": 0}), base="planner-base")


def test_a_base_that_is_not_there(tmp_path):
    with pytest.raises(WorkbenchError, match="did you mean 'planner-base'"):
        plan_training(planner, FRAMES, TrainingOptions(**QUICK), "planer-base", Settings("test", tmp_path, tmp_path))


def test_only_the_answer_is_learned():
    encoder = load_encoder()
    (row,) = encode_examples(planner, FRAMES["train"].head(1), encoder)
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    plan = json.loads(FRAMES["train"]["action"][0])
    assert encoder.tokenizer.decode(learned[:-1]) == "".join(planner.completion(plan))
    assert learned[-1] == encoder.end


def load_encoder():
    from transformers import AutoTokenizer

    from mlops_workbench.model import Encoder

    return Encoder(AutoTokenizer.from_pretrained(resolve_base("planner-base").path))


def test_a_row_without_a_target_teaches_nothing():
    class Picky(type(planner)):
        def target(self, example):
            return None if example["example_id"].endswith("0") else example["outcome"]["plan"]

    assert len(encode_examples(Picky(), FRAMES["train"], load_encoder())) == 108


def test_shuffling_moves_whole_outcomes():
    frame = FRAMES["train"]
    moved = shuffle_targets(frame, seed=3)
    assert moved["context"].equals(frame["context"])
    assert set(zip(moved["action"], moved["outcome"], strict=True)) == set(
        zip(frame["action"], frame["outcome"], strict=True)
    )
    assert (moved["outcome"].to_numpy() == frame["outcome"].to_numpy()).mean() < 0.1
    assert moved.equals(shuffle_targets(frame, seed=3))


def test_losses_are_reported_as_they_come(tmp_path, capsys):
    told = []
    result = train(quick_plan(), tmp_path / "model", lambda step, values: told.append((step, *values)))
    assert [step for step, name in told if name == "validation_loss"] == [0, 2, 4]
    assert [step for step, _ in told] == sorted(step for step, _ in told)
    assert result.metrics["n_steps"] == 4
    assert len(capsys.readouterr().out.splitlines()) <= 10


def test_the_last_step_is_judged_and_the_best_one_is_kept(tmp_path):
    result = train(quick_plan(max_steps=5), tmp_path / "model")
    assert result.history.dropna(subset="validation_loss")["step"].tolist() == [0, 2, 4, 5]
    assert result.metrics["best_step"] == result.history.set_index("step")["validation_loss"].iloc[1:].idxmin()
    wild = {"max_steps": 40, "learning_rate": 3.0, "patience": 1}
    ruined = train(quick_plan(**wild), tmp_path / "ruined")
    assert ruined.metrics["n_steps"] < 40
    best = ruined.metrics["best_step"]
    shorter = train(quick_plan(**wild | {"patience": 0}), tmp_path / "patient")
    assert shorter.metrics["n_steps"] == 40 and shorter.metrics["validation_loss"] <= ruined.metrics["validation_loss"]
    assert best < ruined.metrics["n_steps"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), OSError(28, "No space left on device")])
def test_a_run_that_fails_leaves_nothing(error, tmp_path):
    def fail(step, values):
        if step == 2:
            raise error

    expected = WorkbenchError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        train(quick_plan(), tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    left = tmp_path / ".model.partial" / "checkpoints"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    train(quick_plan(), tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(WorkbenchError, match="never overwritten"):
        train(quick_plan(), tmp_path / "model")


def test_a_model_of_the_tasks_own(tmp_path):
    options = TrainingOptions(**QUICK | {"method": "task", "rank": 0})
    results = [train(plan_training(Average(), FRAMES, options), tmp_path / name) for name in ("a", "b")]
    assert results[0].digest == results[1].digest
    assert results[0].metrics["validation_loss"] == 0.5
    answered = load_predictor(results[0].folder, Average()).answer([{}, {}, {}], batch_size=2)
    assert answered[0].value == answered[2].value > 0


def test_a_base_is_built_the_same_every_time(tmp_path):
    class Cook(type(planner)):
        generic_examples = staticmethod(generic_examples)

    plan = BasePlan(steps=3, n_examples=64, batch_size=16, hidden=32, layers=1, vocabulary=400)
    first, second = (build_base(Cook(), tmp_path / name, plan) for name in ("first", "second"))
    assert first.digest == second.digest
    assert build_base(Cook(), tmp_path / "third", BasePlan(**vars(plan) | {"seed": 1})).digest != first.digest
