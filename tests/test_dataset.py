"Dataset versions travel through the artefact store: whole, once, and unchanged."

import json
import shutil
import threading

import pandas as pd
import pytest

from mlops_workbench.core import WorkbenchError
from mlops_workbench.dataset import (
    describe_dataset,
    fetch_dataset,
    fingerprint,
    freeze_dataset,
    plan_split,
    publish_dataset,
    read_dataset,
    split_examples,
    typed_examples,
    write_dataset,
)
from mlops_workbench.settings import Settings


def examples(n=60):
    return pd.DataFrame(
        {
            "example_id": [f"e{i:03d}" for i in range(n)],
            "unit_id": [f"u{i % 7}" for i in range(n)],
            "decided_at": pd.date_range("2026-03-01T08:00Z", periods=n, freq="D"),
            "context": ['{"size":2}'] * n,
            "action": ['["r01"]'] * n,
            "propensity": [None] * n,
            "outcome": [f'["r{i:02d}"]' for i in range(n)],
        }
    )


SPLIT = plan_split(typed_examples(examples())["decided_at"])


@pytest.fixture(params=["folder", "url", "memory"])
def homes(request, tmp_path):
    "Two machines that share an artefact store and nothing else."
    shelf = tmp_path / "shelf"
    place = {"folder": str(shelf), "url": shelf.as_uri(), "memory": f"memory://{tmp_path.name}"}[request.param]
    return [Settings("local", tmp_path, tmp_path / name, None, place) for name in ("here", "there")]


def frozen(settings):
    rows = split_examples(typed_examples(examples()), SPLIT)
    dataset = describe_dataset(rows, "planner", "simulation", SPLIT, settings.home / "datasets")
    write_dataset(rows, dataset)
    return dataset


def test_another_machine_reads_what_this_one_froze(homes):
    here, there = homes
    dataset = frozen(here)
    assert [publish_dataset(here, dataset) for _ in range(2)] == [True, False]
    fetched, rows = read_dataset(there, "planner", dataset.version)
    assert fetched.fingerprint == dataset.fingerprint and len(rows) == 60
    assert sorted(p.name for p in fetched.path.parent.iterdir()) == [dataset.version], "nothing is left beside it"
    shutil.rmtree(here.home)
    assert read_dataset(here, "planner", dataset.version)[0] == dataset, "also a version that was removed here"


def test_freezing_publishes(store, tmp_path):
    here, there = (Settings("local", tmp_path, tmp_path / name, None, str(tmp_path / "shelf")) for name in "ab")
    dataset = freeze_dataset(store, here, "planner", "simulation", examples(), SPLIT)
    assert freeze_dataset(store, here, "planner", "simulation", examples(), SPLIT) == dataset
    assert read_dataset(there, "planner", dataset.version)[0].fingerprint == dataset.fingerprint


@pytest.mark.parametrize("damage", [b"PAR1", None])
def test_a_damaged_copy_is_replaced_from_the_store(homes, damage):
    here, there = homes
    dataset = frozen(here)
    publish_dataset(here, dataset)
    data = dataset.path / "data.parquet"
    data.unlink() if damage is None else data.write_bytes(damage)  # in place: the store's copy must not notice
    assert read_dataset(here, "planner", dataset.version)[0] == dataset
    assert fingerprint(typed_examples(pd.read_parquet(data))) == dataset.fingerprint
    assert sorted(p.name for p in dataset.path.parent.iterdir()) == [dataset.version], "nothing is left beside it"
    assert read_dataset(there, "planner", dataset.version)[0].fingerprint == dataset.fingerprint


def test_a_folder_that_holds_another_version_is_not_taken_for_it(tmp_path):
    here = Settings("local", tmp_path, tmp_path / "home")
    dataset = frozen(here)
    dataset.path.rename(dataset.path.parent / "d-000000000000")
    with pytest.raises(WorkbenchError, match="has changed: its content has fingerprint .*, expected 000000000000"):
        read_dataset(here, "planner", "d-000000000000")


@pytest.mark.parametrize("name", ["data.parquet", "schema.json", "stored.json"])
def test_half_a_version_is_none_and_is_written_again(tmp_path, name):
    here, there = (Settings("local", tmp_path, tmp_path / n, None, str(tmp_path / "shelf")) for n in ("here", "there"))
    dataset = frozen(here)
    publish_dataset(here, dataset)
    (tmp_path / "shelf" / "datasets" / "planner" / dataset.version / name).unlink()
    assert fetch_dataset(there, "planner", dataset.version) is False
    with pytest.raises(WorkbenchError, match="is not in .* nor in .*: run the prep stage again"):
        read_dataset(there, "planner", dataset.version)
    assert publish_dataset(here, dataset) is True
    assert read_dataset(there, "planner", dataset.version)[0].fingerprint == dataset.fingerprint


def test_a_damaged_version_is_not_taken(tmp_path):
    here, there = (Settings("local", tmp_path, tmp_path / n, None, str(tmp_path / "shelf")) for n in ("here", "there"))
    dataset = frozen(here)
    publish_dataset(here, dataset)
    kept = tmp_path / "shelf" / "datasets" / "planner" / dataset.version / "data.parquet"
    damaged = bytearray(kept.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept.write_bytes(damaged)
    with pytest.raises(WorkbenchError, match="data.parquet in .* is damaged"):
        read_dataset(there, "planner", dataset.version)
    assert not list((there.home / "datasets" / "planner").iterdir())
    assert publish_dataset(here, dataset) is True, "what is damaged is written again"
    assert read_dataset(there, "planner", dataset.version)[0].fingerprint == dataset.fingerprint


def test_a_note_that_makes_no_sense_is_no_version(tmp_path):
    here = Settings("local", tmp_path, tmp_path / "here", None, str(tmp_path / "shelf"))
    dataset = frozen(here)
    publish_dataset(here, dataset)
    note = tmp_path / "shelf" / "datasets" / "planner" / dataset.version / "stored.json"
    for text in ("", "[]", "{", json.dumps({"data.parquet": 1}), json.dumps({"data.parquet": {}})):
        note.write_text(text)
        assert fetch_dataset(here, "planner", dataset.version) is False
        assert publish_dataset(here, dataset) is True


def test_a_store_that_cannot_be_used_is_told_in_one_line(tmp_path):
    for place in ("nowhere://models", "/proc/nothing/here"):
        here = Settings("local", tmp_path, tmp_path / "here", None, place)
        with pytest.raises(WorkbenchError, match="the artefact store cannot be used") as told:
            publish_dataset(here, frozen(here))
        assert "\n" not in str(told.value)


def test_many_may_fetch_at_once(homes):
    here, there = homes
    if here.artifacts.startswith("memory:"):
        pytest.skip("fsspec's memory files share one position among all readers")
    dataset = frozen(here)
    publish_dataset(here, dataset)
    found, begin = [], threading.Barrier(6)

    def fetch():
        begin.wait()
        found.append(read_dataset(there, "planner", dataset.version)[0].fingerprint)

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [dataset.fingerprint] * 6
    assert len(list((there.home / "datasets" / "planner").iterdir())) == 1
