"""Files of requests: complete or not there, computed once, the same as online."""

import json
import random
from datetime import UTC, datetime
from types import SimpleNamespace

import pandas as pd
import pytest

from mlops_workbench import cookbook, planner
from mlops_workbench.bulk import Bulk, predict_file
from mlops_workbench.core import WorkbenchError
from mlops_workbench.model import Answered
from mlops_workbench.slots import Slot
from mlops_workbench.task import safe_answer

AT = datetime(2026, 3, 2, tzinfo=UTC)


class Model:
    "Answers as the rule does, counts, and may be cut short."

    def __init__(self, until=10**9):
        self.contexts, self.until = [], until

    def answer(self, contexts, batch_size=32):
        assert len(contexts) <= 1_000
        self.contexts += contexts
        if len(self.contexts) > self.until:
            raise KeyboardInterrupt
        return [Answered(planner.rule(c), "", 1.0) for c in contexts]


def slot(model, version=1):
    return Slot("planner", version, planner.task, model, None)


def request(folder, n, name="in.parquet", **columns):
    rng = random.Random(0)
    contexts = [json.dumps(cookbook.draw_context(rng)) for _ in range(n)]
    pd.DataFrame({"unit_id": [f"h{i}" for i in range(n)], "context": contexts} | columns).to_parquet(folder / name)
    return Bulk(folder / name, folder / "out.parquet", AT, part_rows=10), contexts


def test_every_row_has_a_safe_answer_in_the_order_of_the_input(tmp_path):
    bulk, contexts = request(tmp_path, 57)
    scored = predict_file(slot(Model()), None, bulk)
    found = pd.read_parquet(bulk.target)
    expected = [safe_answer(planner.task, c, planner.rule(c)) for c in map(json.loads, contexts)]
    assert [json.loads(a) for a in found["answer"]] == [answer for answer, _ in expected]
    assert list(found["unit_id"]) == [f"h{i}" for i in range(57)] and set(found["policy_version"]) == {1}
    n_unsafe = sum(bool(why) for _, why in expected)
    assert scored.n_rows == 57 and scored.fallbacks == ({"invalid": n_unsafe} if n_unsafe else {})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["in.parquet", "out.parquet"]


@pytest.mark.parametrize("until", [0, 5, 15, 30, 50])
def test_a_run_that_was_cut_short_goes_on_and_says_the_same(tmp_path, until):
    bulk, _ = request(tmp_path, 57)
    predict_file(slot(Model()), None, bulk)
    expected = bulk.target.read_bytes()
    bulk.target.unlink()
    first, second = Model(until), Model()
    with pytest.raises(KeyboardInterrupt):
        predict_file(slot(first), None, bulk)
    assert not bulk.target.exists()
    scored = predict_file(slot(second), None, bulk)
    assert bulk.target.read_bytes() == expected
    assert scored.n_kept == until // 10 * 10 and len(second.contexts) == 57 - scored.n_kept


def test_parts_of_another_version_input_or_time_are_not_kept(tmp_path):
    bulk, _ = request(tmp_path, 30)
    later = Bulk(bulk.source, bulk.target, datetime(2026, 3, 3, tzinfo=UTC), part_rows=10)
    for other, version in ((bulk, 2), (later, 1)):
        with pytest.raises(KeyboardInterrupt):
            predict_file(slot(Model(15)), None, bulk)
        assert predict_file(slot(Model(), version), None, other).n_kept == 0
    with pytest.raises(KeyboardInterrupt):
        predict_file(slot(Model(15)), None, bulk)
    request(tmp_path, 29)
    assert predict_file(slot(Model()), None, bulk).n_kept == 0


def test_a_row_that_cannot_be_answered_says_why_and_ends_nothing(tmp_path):
    bulk, contexts = request(tmp_path, 3)
    rows = [contexts[0], "[]", "{", None]
    pd.DataFrame({"unit_id": ["a", "b", "c", None], "context": rows}).to_parquet(bulk.source)
    scored = predict_file(slot(Model()), None, bulk)
    found = pd.read_parquet(bulk.target)
    assert scored.fallbacks["error"] == 3
    assert list(found["answer"].isna()) == [False, True, True, True]
    assert "pass a JSON object" in found["error"][1] and "pass one of them" in found["error"][3]


def test_a_context_that_breaks_the_contract_asks_no_model(tmp_path):
    bulk, _ = request(tmp_path, 5)
    contract = SimpleNamespace(check_row=lambda c: ["size is large"] if c["size"] > 2 else [])
    model = Model()
    predict_file(Slot("planner", 1, planner.task, model, None, contract=contract), None, bulk)
    found = pd.read_parquet(bulk.target)
    assert (found["fallback"] == "refused").sum() == 5 - len(model.contexts) > 0


def test_features_are_the_ones_of_training(tmp_path, store):
    planner.task.write_history(store, None, "simulation-s2-n110", 110, 2)
    examples = planner.task.read_examples(store, "simulation-s2-n110", None)
    for at, rows in list(examples.groupby("decided_at"))[40:44]:
        for row in rows.itertuples():
            online = planner.task.read_context(store, row.unit_id, at.to_pydatetime(), {})
            assert json.loads(row.context) == online
    row, model = examples.iloc[-1], Model()
    pd.DataFrame({"unit_id": [row["unit_id"], "nobody"]}).to_parquet(tmp_path / "in.parquet")
    bulk = Bulk(tmp_path / "in.parquet", tmp_path / "out.parquet", row["decided_at"].to_pydatetime())
    predict_file(slot(model), store, bulk)
    assert model.contexts == [json.loads(row["context"])]
    assert "household 'nobody' has no attributes" in pd.read_parquet(bulk.target)["error"][1]


def test_an_empty_file_gives_an_empty_file(tmp_path):
    bulk, _ = request(tmp_path, 0)
    assert predict_file(slot(Model()), None, bulk).n_rows == 0
    assert list(pd.read_parquet(bulk.target)) == ["unit_id", "policy_version", "answer", "fallback", "error"]


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "in.parquet").write_text("unit_id\nh1\n")
    with pytest.raises(WorkbenchError, match="in.parquet cannot be read: .*: pass a parquet file"):
        predict_file(slot(Model()), None, Bulk(tmp_path / "in.parquet", tmp_path / "out.parquet", AT))
    pd.DataFrame({"name": ["h1"]}).to_parquet(tmp_path / "in.parquet")
    with pytest.raises(ValueError, match="has the columns name: give it unit_id or context"):
        predict_file(slot(Model()), None, Bulk(tmp_path / "in.parquet", tmp_path / "out.parquet", AT))
