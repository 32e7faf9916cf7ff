"A result is taken over when it still holds, and only then."

import importlib.util
import json
import math
import os
import random
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from test_code import notebook

import mlops_workbench.cache as cache
from mlops_workbench.cache import Call, _short, decide, key_changes, make_key, seal, written
from mlops_workbench.code import open_memory, place_digest
from mlops_workbench.core import utc_now
from mlops_workbench.events import Event, write_events
from mlops_workbench.plan import Stage
from mlops_workbench.runs import hold_run, note_stage
from mlops_workbench.settings import Settings
from mlops_workbench.state import ask_states, note_reads, noted_reads, read_states
from mlops_workbench.store import transaction

FILES = {
    "work.ipynb": notebook("from lib.task import rule").decode(),
    "lib/__init__.py": "",
    "lib/task.py": "from lib.helper import x",
    "lib/helper.py": "x = 1",
    "data/a.csv": "1",
}


class World:
    "A project, a store, and a stage that can be run as the pipeline would, without a kernel."

    def __init__(self, root, store):
        self.root, self.store, self.stage = root, store, Stage("work", root / "work.ipynb")
        self.settings = Settings("local", root, root / ".workbench")
        for name, text in FILES.items():
            self.write(name, text)
        self.wait()

    def write(self, name, text):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def wait(self):
        time.sleep(0.03)  # what was saved a moment ago counts as saved while the stage ran

    def call(self, **parameters):
        return Call(self.settings, "lib.task", self.stage, parameters, open_memory(self.settings))

    def decide(self, run=("p", "full"), **parameters):
        call = self.call(**parameters)
        with transaction(self.store) as connection:
            return decide(connection, call, make_key(connection, call), run)

    def finish(self, meanwhile=lambda: None, status="finished", recorded=None, **parameters):
        call = self.call(**parameters)
        with hold_run(self.store, {"pipeline": "p", "profile": "full", "task": "lib.task"}) as record:
            with transaction(self.store) as connection:
                key = make_key(connection, call)
            meanwhile()
            with transaction(self.store) as connection:
                columns = seal(connection, call, key, recorded or {})
            columns |= {"status": status, "started_at": utc_now(), "outputs": {"n": 1}}
            note_stage(self.store, record.run_id, self.stage.name, 0, columns)
        return columns


@pytest.fixture
def world(tmp_path, store):
    return World(tmp_path / "project", store)


def stage(world, **fields):
    world.stage = Stage("work", world.root / "work.ipynb", **fields)


# Keys


def test_a_finished_run_is_found_again_with_its_outputs(world):
    assert world.decide(rank=8).reason == "never ran"
    world.finish(rank=8)
    decision = world.decide(rank=8)
    assert not decision.run and decision.hit["outputs"] == {"n": 1} and decision.changes == ()


@pytest.mark.parametrize("status", ["failed", "killed", "cancelled", "running", "skipped", "pruned"])
def test_only_a_finished_run_counts(world, status):
    world.finish(status=status)
    assert world.decide().run


@pytest.mark.parametrize(
    "before, after, reason",
    [
        (1, 2, "parameter p: 1 → 2"),
        (1, 1.0, "parameter p: 1 → 1.0"),
        (1, True, "parameter p: 1 → true"),
        (0.0, -0.0, "parameter p: 0.0 → -0.0"),
        ("1", 1, 'parameter p: "1" → 1'),
        (None, "", 'parameter p: null → ""'),
        (2**63, 2**63 + 1, f"parameter p: {2**63} → {2**63 + 1}"),
        (math.inf, -math.inf, "parameter p: Infinity → -Infinity"),
        ({1: "a"}, {"1": "a"}, None),
        ([1, 2], [2, 1], "parameter p: [1, 2] → [2, 1]"),
        ("é", "e", 'parameter p: "é" → "e"'),
        (datetime(2026, 1, 1), datetime(2026, 1, 2), None),
    ],
)
def test_every_change_of_a_parameter_counts(world, before, after, reason):
    world.finish(p=before)
    decision = world.decide(p=after)
    assert decision.run and (reason is None or decision.reason == reason)
    assert not world.decide(p=before).run


def test_a_mapping_that_a_database_returned_is_the_same():
    assert written({"b": [1, {"d": 1, "c": 2}], "a": 1}) == written({"a": 1, "b": [1, {"c": 2, "d": 1}]})
    assert written((1, 2)) == written([1, 2])


def test_nan_is_a_value(world):
    world.finish(p=math.nan)
    assert not world.decide(p=math.nan).run


def test_everything_that_changed_is_told(world):
    world.finish(rank=8, gone=1)
    world.write("lib/helper.py", "x = 2")
    world.write("work.ipynb", notebook("from lib.task import rule as r").decode())
    world.write("lib/new.csv", "1")
    decision = world.decide(rank=16, new="x" * 100)
    assert decision.reason.endswith("(and 5 more)")
    assert set(decision.changes) == {
        "the notebook's code changed",
        "parameter rank: 8 → 16",
        "parameter gone: 1 → nothing",
        f'parameter new: nothing → "{"x" * 36}…',
        "code changed: lib/helper.py",
        "file is new: lib/new.csv",
    }


def test_a_package_that_changed_is_named():
    was = {"format": 1, "task": "t", "notebook": "n", "parameters": {}, "code": {}, "inputs": {}, "reads": {}}
    told = key_changes(
        was | {"environment": ["numpy-2.2", "torch-2.9"]}, was | {"environment": ["numpy-2.3", "torch-2.9"]}
    )
    assert told == ["environment changed: numpy-2.3 is new, numpy-2.2 is gone"]


def test_a_result_of_another_pipeline_with_the_same_key_holds(world):
    world.finish(rank=8)
    assert not world.decide(("other", "smoke"), rank=8).run
    assert world.decide(("other", "smoke"), rank=9).reason == "parameter rank: 8 → 9"


# Inputs


def test_declared_inputs_count_by_content_and_by_name(world):
    stage(world, inputs=("data/*.csv", "settings.yaml"))
    world.finish()
    assert not world.decide().run
    world.write("data/b.csv", "2")
    assert world.decide().reason == "input is new: data/b.csv"
    (world.root / "data/b.csv").unlink()
    world.write("data/a.csv", "3")
    assert world.decide().reason == "input changed: data/a.csv"
    world.write("data/a.csv", "1")
    world.write("settings.yaml", "a: 1")
    assert world.decide().reason == "input is new: settings.yaml"


def test_a_parameter_that_names_a_file_means_its_content(world):
    world.finish(table="data/a.csv", folder=str(world.root / "data"), words=["some", "data/a.csv"], root=".")
    assert not world.decide(
        table="data/a.csv", folder=str(world.root / "data"), words=["some", "data/a.csv"], root="."
    ).run
    world.write("data/a.csv", "2")
    decision = world.decide(table="data/a.csv", folder=str(world.root / "data"), words=["some", "data/a.csv"], root=".")
    assert set(decision.changes) == {"input changed: data/a.csv", f"input changed: {world.root / 'data'}"}


@pytest.mark.parametrize("text", ["é" * 300, "a/" * 400, "a\nb", "", ".", "/", "..", "~", "*", "a\x7fb", ".workbench"])
def test_a_parameter_may_be_any_text(world, text):
    world.finish(text=text)
    assert not world.decide(text=text).run
    assert world.decide(text=text + "x").changes == (
        f"parameter text: {_short(written(text))} → {_short(written(text + 'x'))}",
    )


@pytest.mark.parametrize("home", ["project", "variable"])
def test_a_base_model_that_a_parameter_names_counts(world, tmp_path, monkeypatch, home):
    homes = {"project": ".workbench/bases", "variable": "../bases"}
    monkeypatch.setenv("WORKBENCH_BASES", str(tmp_path / "bases"))
    world.write(f"{homes[home]}/tiny/config.json", "{}")
    world.write(f"{homes[home]}/tiny/model.safetensors", "1")
    world.wait()
    world.finish(base_model="tiny")
    assert not world.decide(base_model="tiny").run
    world.write(f"{homes[home]}/tiny/model.safetensors", "2")
    assert world.decide(base_model="tiny").reason == "input changed: base tiny"


# What is there


def test_an_output_that_is_gone_or_edited_is_made_again(world):
    place = world.root / "model.bin"
    place.write_text("weights")
    recorded = {"files": [{"place": str(place), "digest": place_digest(place)}]}
    world.finish(recorded=recorded)
    assert not world.decide().run
    place.write_text("other")
    assert world.decide().reason == f"output {place} has changed"
    place.unlink()
    assert world.decide().reason == f"output {place} is missing"


def test_an_older_run_whose_output_is_there_is_taken(world):
    for name in ("old", "new"):
        (world.root / name).write_text(name)
        world.finish(recorded={"files": [{"place": str(world.root / name), "digest": place_digest(world.root / name)}]})
    (world.root / "new").unlink()
    assert world.decide().hit["files"][0]["place"].endswith("old")


def test_a_module_that_only_the_kernel_knew_counts_the_next_time(world):
    world.write("plugins/alpha.py", "x = 1")
    world.wait()
    world.finish(recorded={"modules": ["plugins/alpha.py", "lib/helper.py"]})
    assert not world.decide().run
    world.write("plugins/alpha.py", "x = 1  # one")
    assert not world.decide().run
    world.write("plugins/alpha.py", "x = 2")
    assert world.decide().reason == "code changed: plugins/alpha.py"
    (world.root / "plugins/alpha.py").unlink()
    assert world.decide().run


# What moves while a stage runs


@pytest.mark.parametrize(
    "name, text",
    [
        ("lib/helper.py", "x = 2"),
        ("work.ipynb", notebook("1").decode()),
        ("data/a.csv", "2"),
        ("lib/helper.csv", "new"),
        ("plugins/alpha.py", "x = 2"),
    ],
)
def test_a_file_saved_while_the_stage_ran_makes_its_result_nobody_elses(world, name, text):
    stage(world, inputs=("data/*",))
    world.write("plugins/alpha.py", "x = 1")
    world.wait()
    recorded = {"modules": ["plugins/alpha.py"]}
    columns = world.finish(lambda: world.write(name, text), recorded=recorded)
    assert columns["key_digest"] is None and world.decide().run
    world.write(name, FILES.get(name, "x = 1"))
    assert world.decide().run
    world.wait()
    assert world.finish(recorded=recorded)["key_digest"] and not world.decide().run


@pytest.mark.parametrize("name", ["lib/helper.py", "work.ipynb", "data/a.csv"])
def test_a_file_that_was_put_back_in_time_is_seen_as_well(world, name):
    stage(world, inputs=("data/*",))

    def edit_and_undo():
        before = (world.root / name).stat()
        world.write(name, "x = 2")
        world.write(name, FILES[name])
        os.utime(world.root / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert world.finish(edit_and_undo)["key_digest"] is None
    assert world.decide().reason == f"while it last ran, {'the notebook' if name == 'work.ipynb' else name} was written"


def test_a_base_that_the_stage_built_for_itself_is_part_of_its_result(world):
    def build():
        world.write(".workbench/bases/tiny/config.json", "{}")

    assert world.finish(build, base_model="tiny")["key_digest"]
    assert not world.decide(base_model="tiny").run


# The database


def event(source, unit, day=1, month=3, **context):
    at = datetime(2026, month, day, tzinfo=UTC)
    context |= {"source": source}
    return Event("plan_decided", "household", unit, at, {"plan": []}, context=context, received_at=at)


def states(store, names, parameters, tables=()):
    with transaction(store) as connection:
        return read_states(connection, ask_states(names, "lib.task", parameters, tables))


@pytest.mark.parametrize(
    "parameters, new, is_seen",
    [
        ({"source": "app"}, event("app", "h-9"), True),
        ({"source": "app"}, event("other", "h-9"), False),
        ({"source": "app"}, event("other", "h-1"), True),
        ({"source": "app", "until": "2026-04-01T00:00:00Z"}, event("app", "h-1", month=5), False),
        ({"source": "app", "until": "2026-04-01T00:00:00Z"}, event("app", "h-1", day=2), True),
        ({"source": "", "history_size": 9, "history_seed": 0}, event("lib-s0-n9", "h-9"), True),
        ({"source": "", "history_size": 9, "history_seed": 0}, event("lib-s0-n99", "h-9"), False),
        ({}, event("whoever", "h-9"), True),
        ({"source": "app", "served": True}, event("shop", "h-9", policy_version=3), True),
        ({"source": "app", "served": True}, event("shop", "h-9"), False),
        ({"source": "app", "served": False}, event("shop", "h-9", policy_version=3), False),
    ],
)
def test_events_count_if_the_stage_would_read_them(store, parameters, new, is_seen):
    write_events(store, [event("app", "h-1"), event("lib-s0-n9", "h-2")])
    before = states(store, ["events"], parameters)
    write_events(store, [new])
    assert (states(store, ["events"], parameters) != before) == is_seen


def test_an_index_that_code_names_is_no_table(store):
    named = ("exp.events_by_type", "exp.nowhere")
    assert states(store, ["events"], {}, named) == states(store, ["events"], {})


def test_an_event_that_was_received_later_is_not_known_until_then(store):
    late = event("app", "h-1")
    late = Event(**vars(late) | {"received_at": datetime(2026, 6, 1, tzinfo=UTC)})
    before = states(store, ["events"], {"source": "app", "until": "2026-04-01T00:00:00Z"})
    write_events(store, [late])
    assert states(store, ["events"], {"source": "app", "until": "2026-04-01T00:00:00Z"}) == before


def test_an_event_that_was_altered_or_deleted_counts(store):
    write_events(store, [event("app", "h-1"), event("app", "h-2")])
    seen = [states(store, ["events"], {"source": "app"})]
    for change in (
        "UPDATE exp.events SET payload = '{}' WHERE unit_id = 'h-1'",
        "DELETE FROM exp.events WHERE unit_id = 'h-2'",
    ):
        with transaction(store) as connection:
            connection.execute(change)
        seen.append(states(store, ["events"], {"source": "app"}))
    assert len({s["events"] for s in seen}) == 3


def test_a_tasks_table_with_validity_is_read_as_it_was_known(store):
    with transaction(store) as connection:
        connection.execute("CREATE TABLE exp.stays (id text, valid_from timestamptz, valid_until timestamptz)")
        connection.execute("INSERT INTO exp.stays VALUES ('a', '2026-01-01', NULL)")
    march, always = {"until": "2026-03-01T00:00:00Z"}, {}

    def seen():
        return [states(store, ["events"], given, ["exp.stays", "exp.nothing"])["events"] for given in (march, always)]

    before = seen()
    with transaction(store) as connection:
        connection.execute("UPDATE exp.stays SET valid_until = '2026-05-01'")
        connection.execute("INSERT INTO exp.stays VALUES ('a', '2026-05-01', NULL)")
    after = seen()
    assert after[0] == before[0] and after[1] != before[1]
    with transaction(store) as connection:
        connection.execute("UPDATE exp.stays SET valid_until = '2026-02-01' WHERE valid_until IS NOT NULL")
    assert seen()[0] != before[0]


def test_any_table_can_be_a_state(store):
    assert states(store, ["exp.shops"], {}) == {"exp.shops": "no such table"}
    with transaction(store) as connection:
        connection.execute("CREATE TABLE exp.shops (name text)")
    empty = states(store, ["exp.shops"], {})
    with transaction(store) as connection:
        connection.execute("INSERT INTO exp.shops VALUES ('a'), ('a')")
    assert states(store, ["exp.shops"], {}) != empty


@pytest.mark.parametrize("name", ["", "shops", "a.b; DROP TABLE x", "a.b.c", "Events"])
def test_a_state_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match="there is no state"):
        ask_states([name], "lib.task", {})


def test_new_events_make_a_stage_run_and_are_counted(world):
    stage(world, reads=("events",))
    world.finish(source="app")
    assert not world.decide(source="app").run
    write_events(world.store, [event("app", "h-1"), event("app", "h-2")])
    assert world.decide(source="app").reason == "2 new events"


def test_events_that_came_while_a_stage_ran_belong_to_no_result(world):
    stage(world, reads=("events",))
    columns = world.finish(lambda: write_events(world.store, [event("app", "h-1")]), source="app")
    assert columns["key_digest"] is None
    assert world.decide(source="app").reason == "while it last ran, events changed (and 1 more)"


def noting(world, monkeypatch, recorded, **parameters):
    "What the notebook does between its writing and its reading."
    question = ask_states(["events"], "lib.task", parameters)
    monkeypatch.setenv("WORKBENCH_READS", json.dumps(question))
    monkeypatch.setattr("mlops_workbench.state._noted", {})
    note_reads(world.store)
    recorded["reads"] = noted_reads()


def test_a_stage_that_reads_what_it_wrote_is_cached_at_once(world, monkeypatch):
    stage(world, reads=("events",), writes=("events",))
    recorded = {}

    def work():
        write_events(world.store, [event("app", "h-1")])
        noting(world, monkeypatch, recorded, source="app")

    assert world.finish(work, recorded=recorded, source="app")["key_digest"]
    assert not world.decide(source="app").run
    write_events(world.store, [event("app", "h-2")])
    assert world.decide(source="app").reason == "1 new event"


def test_a_stage_that_wrote_and_did_not_look_again_is_cached_the_second_time(world):
    stage(world, reads=("events",), writes=("events",))
    assert world.finish(lambda: write_events(world.store, [event("app", "h-1")]), source="app")["key_digest"] is None
    assert world.decide(source="app").run
    assert world.finish(source="app")["key_digest"] and not world.decide(source="app").run


def test_who_writes_between_a_stages_writing_and_its_end_is_noticed(world, monkeypatch):
    stage(world, reads=("events",), writes=("events",))
    recorded = {}

    def work():
        write_events(world.store, [event("app", "h-1")])
        noting(world, monkeypatch, recorded, source="app")
        write_events(world.store, [event("app", "h-2")])  # somebody else: read by the stage, or not

    assert world.finish(work, recorded=recorded, source="app")["key_digest"] is None
    assert world.decide(source="app").run


# Effects


def serve(store, model_version, task="lib.task"):
    with transaction(store) as connection:
        connection.execute(
            "INSERT INTO exp.policies (policy, task) VALUES (%s, %s) ON CONFLICT DO NOTHING", (task, task)
        )
        connection.execute("UPDATE exp.policy_versions SET status = 'retired' WHERE policy = %s", (task,))
        connection.execute(
            "INSERT INTO exp.policy_versions (policy, version, model_name, model_version, status) "
            "SELECT %s, count(*) + 1, %s, %s, 'production' FROM exp.policy_versions WHERE policy = %s",
            (task, model_version and "m", model_version, task),
        )


def test_an_effect_is_skipped_only_while_it_is_in_force(world):
    stage(world, effect=True, writes=("production",))
    world.finish(lambda: serve(world.store, "1"), model_version=1)
    assert not world.decide(model_version=1).run
    serve(world.store, "9", task="another.task")
    assert not world.decide(model_version=1).run
    serve(world.store, "2")
    assert world.decide(model_version=1).reason == "production is no longer as it left it"
    serve(world.store, None)
    assert world.decide(model_version=1).run


def test_an_effect_that_somebody_replaced_at_once_is_not_in_force(world):
    stage(world, effect=True, writes=("production",))

    def promote_and_lose():
        serve(world.store, "1")
        serve(world.store, "2")

    world.finish(promote_and_lose, model_version=1)
    assert world.decide(model_version=1).reason == "production is no longer as it left it"


def test_an_effect_without_a_state_is_never_skipped(world):
    stage(world, effect=True)
    world.finish()
    assert world.decide().reason.startswith("it changes the world, and names no state")


def test_a_stage_without_effect_does_not_mind_who_writes_after_it(world):
    stage(world, writes=("production",))
    world.finish(lambda: serve(world.store, "1"))
    serve(world.store, "2")
    assert not world.decide().run


def test_a_candidates_own_promotion_leaves_its_evaluation_alone(world):
    stage(world, reads=("baseline",))
    world.finish(model_version=1)
    serve(world.store, "1")
    assert not world.decide(model_version=1).run
    serve(world.store, "2")
    assert world.decide(model_version=1).reason == "baseline changed"
    world.finish(model_version=3)
    serve(world.store, "3")
    assert not world.decide(model_version=3).run
    serve(world.store, None)  # back to the rule
    assert world.decide(model_version=3).run


# Many at once


def test_threads_may_ask_and_finish_at_the_same_time(world):
    world.finish(rank=0)
    faults = []

    def work(i):
        try:
            for _ in range(3):
                if world.decide(rank=i).run:
                    world.finish(rank=i)
            faults.extend(["not found again"] * world.decide(rank=i).run)
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


# The planner's own history


def test_the_planners_history_is_read_with_its_own_tables(store, tmp_path):
    from mlops_workbench.planner import write_history

    settings = Settings("local", Path(__file__).resolve().parent.parent, tmp_path / "home")
    prep = Stage("prep", settings.root / "nbs/pipelines/prep.ipynb", reads=("events",), writes=("events",))
    given = {"task": "mlops_workbench.planner", "source": "", "history_size": 12, "history_seed": 0, "until": None}
    call = Call(settings, "mlops_workbench.planner", prep, given)
    with transaction(store) as connection:
        key = make_key(connection, call)
    assert {"exp.households", "exp.pantries"} <= set(key.question["tables"])
    assert not set(key.question["tables"]) & {"exp.runs", "exp.events", "exp.ledger"}
    write_history(store, settings, "planner-s0-n12", 12, 0)
    with transaction(store) as connection:
        first = read_states(connection, key.question)
    write_history(store, settings, "planner-s0-n12", 12, 0)
    with transaction(store) as connection:
        assert read_states(connection, key.question) == first
        connection.execute("UPDATE exp.pantries SET items = '[]' WHERE ctid = (SELECT min(ctid) FROM exp.pantries)")
        assert read_states(connection, key.question) != first


# Generated edits (benchmarks/cache_truth.py does hundreds)


def load_benchmark():
    "Import benchmarks/cache_truth.py, which belongs to no package that is installed."
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "cache_truth.py"
    spec = importlib.util.spec_from_file_location("cache_truth", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


truth = load_benchmark()


def judged(tmp_path, store, monkeypatch, n_edits):
    project = truth.Project(tmp_path, store, random.Random(1))
    monkeypatch.syspath_prepend(str(project.site))
    monkeypatch.syspath_prepend(str(project.root))
    judge = truth.Judge(project)
    truth.walk(judge, n_edits)
    return judge


@pytest.mark.slow
def test_no_generated_edit_gives_a_stale_hit(tmp_path, store, monkeypatch):
    judge = judged(tmp_path.resolve(), store, monkeypatch, len(truth.EDITS))
    assert judge.stale.total() == 0 and judge.needless.total() <= 0.02 * judge.asked.total()


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, kinds",
    [
        ("project_code", {"package data"}),
        ("read_environment", {"lock"}),
        ("_inputs", {"input file", "new input file", "big file, same size and time"}),
        ("_module_digests", {"plugin named at run time"}),
        ("read_states", {"outside event"}),
    ],
)
def test_the_judge_notices_when_a_part_of_the_key_is_missing(tmp_path, store, monkeypatch, part, kinds):
    blind = {
        "project_code": {},
        "read_environment": [],
        "_inputs": {},
        "_module_digests": ({}, []),
        "read_states": None,
    }
    nothing = blind[part]
    still = {"events": "0 rows 0"}
    monkeypatch.setattr(cache, part, lambda *given: still if nothing is None else nothing)
    for kind in set(truth.EDITS) - kinds:
        monkeypatch.delitem(truth.EDITS, kind)
    judge = judged(tmp_path.resolve(), store, monkeypatch, 2 * len(kinds))
    assert set(+judge.stale) >= kinds
