"Visitors: what they ask and tell over HTTP is what an application would, and what it is read as."

import json
from pathlib import Path

import pytest
from listening import listening
from typer.testing import CliRunner

from mlops_workbench.core import WorkbenchError, utc_now
from mlops_workbench.events import read_events, read_served
from mlops_workbench.keys import create_key, read_keys
from mlops_workbench.planner import read_context, read_examples, task
from mlops_workbench.service import ServiceOptions
from mlops_workbench.serving import build_app
from mlops_workbench.settings import Settings
from mlops_workbench.visitors import Visits, app, send_visitors


@pytest.fixture
def service(store, tmp_path, monkeypatch):
    "A service of the planner's rule on a free port, and a key."
    (tmp_path / "settings.ini").write_text("[local]\n")
    for name in ("WORKBENCH_HOME", "WORKBENCH_ENVIRONMENT", "WORKBENCH_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)
    monkeypatch.chdir(tmp_path)
    here = Settings("local", Path(tmp_path), tmp_path / ".workbench", store.url)
    served = build_app(ServiceOptions(here, tasks=("mlops_workbench.planner",)))
    with listening(served) as url:
        yield url, create_key(store, "visitors", "client", "ada")[0]


def test_the_same_seed_makes_the_same_visitors_whoever_writes_them(store):
    first, again = (task.write_visitors(store, 4, 3, utc_now()) for _ in range(2))
    assert first == again and len({unit for unit, _ in first}) == 4
    contexts = [read_context(store, unit, utc_now(), said) for unit, said in first]
    assert all(len(c["pantry"]) == 6 and c["recent"] == [] for c in contexts)
    assert all(0 <= (utc_now() - c.known_at).total_seconds() < 8 * 86_400 for c in contexts), "pantries of this week"


def test_what_visitors_did_are_examples_of_tomorrow(service, store):
    (url, key), day = service, utc_now()
    asked = ["simulate", "traffic", "--url", url, "--n", "30", "--rate", "200", "--units", "5"]
    done = CliRunner().invoke(app, [*asked, "--task", "mlops_workbench.planner", "--json"], env={"WORKBENCH_KEY": key})
    assert done.exit_code == 0, (done.output, done.exception)
    told = json.loads(done.stdout)
    assert told["answers"] == told["decisions"] == 30 and told["statuses"] == {"ask 200": 30, "tell 201": 30}
    assert told["variants"] == {"production, version rule": 30}
    assert set(told["fallbacks"]) <= {"invalid"}  # the rule does not always keep the constraints, what is served does
    assert 0 < told["p50_ms"] <= told["p99_ms"] and 0 <= told["means"]["accepted"] <= 1
    decided = read_events(store, "plan_decided")
    assert len(decided) == 30 and set(decided["source"]) == {"visitors"}
    assert all(set(m) == {"accepted", "edits"} for m in decided["metrics"])
    assert read_served(store, "household") == ["visitors"] and read_served(store, "household", day) == []
    examples = read_examples(store, "visitors", None)
    assert len(examples) == 30 and set(examples["unit_id"]) == set(decided["unit_id"])


def test_without_a_key_visitors_get_one_and_give_it_back(service, store):
    asked = ["simulate", "traffic", "--url", service[0], "--n", "5", "--rate", "100", "--units", "2"]
    done = CliRunner().invoke(app, [*asked, "--task", "mlops_workbench.planner", "--json"], env={"WORKBENCH_KEY": ""})
    assert done.exit_code == 0 and json.loads(done.stdout)["statuses"] == {"ask 200": 5, "tell 201": 5}
    (own, lent) = read_keys(store)
    assert (own.name, own.state(utc_now())) == ("visitors", "active") and own.expires_at is None
    assert lent.name.startswith("visitors-") and lent.state(utc_now()) == "revoked"
    assert set(read_events(store, "plan_decided")["source"]) == {lent.name}


def test_a_refused_key_ends_everything_with_one_line(service, store):
    url, _ = service
    with pytest.raises(WorkbenchError, match="the service refuses the key: the key is unknown"):
        send_visitors(store, Visits(url, f"wb_{'0' * 12}_{'x' * 43}", n=5, rate=100), task)


def test_a_service_that_is_not_there_is_said_not_to_be(store):
    tally = send_visitors(store, Visits("http://127.0.0.1:1", "wb_x", n=3, rate=100, units=2), task)
    assert tally.to_dict()["statuses"] == {"ask ConnectError": 3} and tally.waits_ms == []


def test_a_task_without_visitors_is_refused(store):
    class Lonely:
        name = "lonely"

    with pytest.raises(WorkbenchError, match="give it write_visitors and behave"):
        send_visitors(store, Visits("http://127.0.0.1:1", "wb_x"), Lonely())
