"Training: what it refuses, what it leaves behind, and that it is the same every time."

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mlops_workbench.base import resolve_base
from mlops_workbench.checkpoint import digest_plan
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
    assert sorted(p.name for p in trained.folder.parent.iterdir()) == ["model", "model.result.json"]
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


def stop_at(step, error):
    def report(reached, values):
        if reached == step:
            raise error

    return report


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), OSError(28, "No space left on device")])
def test_a_run_that_fails_leaves_no_model(error, tmp_path):
    expected = WorkbenchError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        train(quick_plan(), tmp_path / "model", stop_at(2, error))
    assert [p.name for p in tmp_path.iterdir()] == ["model.checkpoints"]


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / ".model.partial" / "model").mkdir(parents=True)
    (tmp_path / "model.checkpoints" / "checkpoint-2").mkdir(parents=True)
    train(quick_plan(), tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.result.json"]


def test_a_finished_plan_is_not_trained_again(tmp_path):
    first, told = train(quick_plan(), tmp_path / "model"), []
    again = train(quick_plan(), tmp_path / "model", lambda *step: told.append(step))
    assert (again.digest, again.metrics, again.seconds) == (first.digest, first.metrics, first.seconds)
    assert again.history.equals(first.history) and not told
    with pytest.raises(WorkbenchError, match="never overwritten"):
        train(quick_plan(seed=1), tmp_path / "model")
    (tmp_path / "model" / "model.json").write_text("{}")
    with pytest.raises(WorkbenchError, match="never overwritten"):
        train(quick_plan(), tmp_path / "model")


def test_another_plan_does_not_go_on_from_these_checkpoints(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(quick_plan(seed=1), tmp_path / "model", stop_at(4, KeyboardInterrupt()))
    assert (tmp_path / "model.checkpoints" / "checkpoint-2.complete").is_file()
    assert train(quick_plan(), tmp_path / "model").digest == train(quick_plan(), tmp_path / "fresh").digest


def test_plans_differ_in_everything_that_matters():
    plan = quick_plan()
    others = [quick_plan(seed=1), quick_plan(rank=8), replace(plan, dtype="bfloat16")]
    others += [replace(plan, train=plan.train[1:]), replace(plan, base=replace(plan.base, digest="0" * 64))]
    assert len({digest_plan(p) for p in [plan, *others]}) == 6
    assert digest_plan(plan) == digest_plan(quick_plan())


def test_a_damaged_checkpoint_is_skipped(tmp_path):
    fresh = train(quick_plan(max_steps=6), tmp_path / "fresh")
    with pytest.raises(KeyboardInterrupt):
        train(quick_plan(max_steps=6), tmp_path / "model", stop_at(6, KeyboardInterrupt()))
    place = tmp_path / "model.checkpoints"
    (place / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    heard = []
    again = train(quick_plan(max_steps=6), tmp_path / "model", lambda step, values: heard.append(step))
    assert again.digest == fresh.digest and again.history.equals(fresh.history)
    assert heard == [6, 6], "what was told before is not told again"


def test_early_stopping_keeps_its_patience(tmp_path):
    wild = {"max_steps": 40, "learning_rate": 3.0, "patience": 2}
    whole = train(quick_plan(**wild), tmp_path / "whole")
    last = int(whole.metrics["n_steps"])
    assert 4 <= last < 40
    with pytest.raises(KeyboardInterrupt):
        train(quick_plan(**wild), tmp_path / "model", stop_at(last, KeyboardInterrupt()))
    again = train(quick_plan(**wild), tmp_path / "model")
    assert (again.digest, again.metrics["n_steps"]) == (whole.digest, whole.metrics["n_steps"])
    assert again.history.equals(whole.history)


def test_a_full_disk_is_one_line_and_training_goes_on_from_the_last_checkpoint(tmp_path, monkeypatch):
    fresh, save, n_files = train(quick_plan(max_steps=6), tmp_path / "fresh"), torch.save, []

    def full(what, path, *rest, **options):
        n_files.append(path)
        if len(n_files) > 5:  # the first checkpoint has four files
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # a full tmpfs
        save(what, path, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WorkbenchError, match="no space left for the model"):
        train(quick_plan(max_steps=6), tmp_path / "model")
    monkeypatch.undo()
    told = []
    assert train(quick_plan(max_steps=6), tmp_path / "model", lambda *step: told.append(step)).digest == fresh.digest
    assert told[0][0] == 5


SURVIVE = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import peft, torch, transformers
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainingArguments
import mlops_workbench.artifact, mlops_workbench.checkpoint
import test_training as t

home, method, n_random = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
options = {"method": method, "rank": 0 if method == "full" else 4, "max_steps": 14, "evaluate_every": 4}

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(what, path, *rest, **options):
    Path(path).write_bytes(b"half")
    die()

def at(call, function, attribute, module):  # before the n-th call of a function
    original, calls = getattr(module, attribute), []
    def counted(*arguments, **named):
        calls.append(1)
        return (function if len(calls) == call else original)(*arguments, **named)
    setattr(module, attribute, counted)

MOMENTS = {
    "before the first step": (1, die, "step", torch.optim.AdamW),
    "in a step": (6, die, "step", torch.optim.AdamW),
    "in the writing of a checkpoint": (7, half, "save", torch),
    "before a checkpoint counts": (2, die, "complete_checkpoint", mlops_workbench.checkpoint),
    "when older ones are removed": (2, die, "_keep", mlops_workbench.checkpoint),
    "after the last look": (1, die, "save_model", t.train.__globals__),
    "before the result": (1, die, "write_result", t.train.__globals__),
    "before the folder takes its place": (1, die, "replace", mlops_workbench.artifact.os),
}

def attempt(place, moment=None, seconds=None):
    pid = os.fork()  # the parent has imported everything and computed nothing
    if pid == 0:
        try:
            if moment:
                call, function, name, module = MOMENTS[moment]
                at(call, function, name, module) if not isinstance(module, dict) else module.update({name: function})
            told = os.open(f"{place}.told", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
            report = lambda step, values: os.write(told, f"{step} {sorted(values)}\\n".encode())
            result = t.train(t.quick_plan(**options), place, report)
            ended = {"digest": result.digest, "history": result.history.to_json()}
            Path(f"{place}.ended").write_text(json.dumps(ended))
            os._exit(0)
        finally:
            os._exit(1)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def ended(place):
    told = Path(f"{place}.told").read_text().splitlines()
    left = sorted(p.name for p in place.parent.glob(f"*{place.name}*") if p.suffix not in (".told", ".ended"))
    clean = left == [place.name, f"{place.name}.result.json"]
    return json.loads(Path(f"{place}.ended").read_text()) | {"told": told, "clean": clean}

start = time.monotonic()
assert attempt(home / "whole") == 0
took, found = time.monotonic() - start, {"whole": ended(home / "whole")}
for i, moment in enumerate(MOMENTS):
    place = home / f"moment{i}"
    found[moment] = {"killed": attempt(place, moment)}
    assert attempt(place) == 0
    found[moment] |= ended(place)
rng = random.Random(method)
for i in range(n_random):
    place = home / f"random{i}"
    kills = [attempt(place, seconds=rng.uniform(0.1, 0.9) * took) for _ in range(2)]
    assert attempt(place) == 0
    found[f"random {i}"] = {"killed": min(kills)} | ended(place)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_a_run_that_is_killed_ends_at_the_same_bytes(method, tmp_path):
    here = os.path.dirname(__file__)
    call = [sys.executable, "-c", SURVIVE, here, str(tmp_path), method, "4"]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    whole = found.pop("whole")
    assert any(end["killed"] for moment, end in found.items() if moment.startswith("random"))
    assert len(whole["told"]) == len(set(whole["told"])) and whole["clean"]
    for moment, end in found.items():
        assert end["killed"] == -signal.SIGKILL or moment.startswith("random"), f"not killed {moment}"
        assert (end["digest"], end["history"]) == (whole["digest"], whole["history"]), moment
        assert end["clean"], f"something lies about after a kill {moment}"
        assert sorted(end["told"]) == sorted(whole["told"]), f"told twice or never after a kill {moment}"


def test_a_run_that_is_stopped_between_two_looks_ends_at_the_same_bytes(tmp_path):
    options = {"max_steps": 18, "evaluate_every": 9}  # the loss is noted every 2 steps, and at each look
    fresh = train(quick_plan(**options), tmp_path / "fresh")
    with pytest.raises(KeyboardInterrupt):
        train(quick_plan(**options), tmp_path / "model", stop_at(14, KeyboardInterrupt()))
    again = train(quick_plan(**options), tmp_path / "model")
    assert again.digest == fresh.digest and again.history.equals(fresh.history)


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
