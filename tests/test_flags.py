"Real clients, unmodified: the GrowthBook SDKs for Python and JavaScript, and an OpenFeature client with the OFREP provider."

import asyncio
import json
import os
import shutil
import subprocess
import time
from datetime import timedelta

import httpx
import pytest
from listening import listening

from mlops_workbench.assignment import assign
from mlops_workbench.core import utc_now
from mlops_workbench.events import read_events
from mlops_workbench.experiment import (
    Experiment,
    MetricPlan,
    Variant,
    create_experiment,
    pause_experiment,
    ramp_experiment,
    start_experiment,
)
from mlops_workbench.keys import create_key
from mlops_workbench.service import ServiceOptions
from mlops_workbench.serving import build_app
from mlops_workbench.settings import Settings

UNITS = [f"household-{i}" for i in range(60)]


def started(store, key="planner_tone", **more):
    about = {"hypothesis": "A friendly tone helps.", "policy": "planner", "unit_type": "household", "mde": 0.05}
    arms = (Variant("control", 0.5, control=True), Variant("warm", 0.5, parameters={"tone": "warm"}))
    metrics = (MetricPlan("acceptance", "primary", "proportion", "plan_decided", "accepted"),)
    ends = utc_now() + timedelta(days=30)
    wanted = about | {"variants": arms, "metrics": metrics, "planned_n": 3_900, "ends_at": ends} | more
    create_experiment(store, Experiment(key, **wanted), "ada")
    start_experiment(store, key, "ada")
    return ramp_experiment(store, key, 8_000, "ada")


class Served:
    def __init__(self, url, key, service, store, running):
        self.url, self.key, self.service, self.store, self.running = url, key, service, store, running
        self.headers = {"authorization": f"Bearer {key}"}

    def post(self, path, body, **headers):
        return httpx.post(self.url + path, json=body, headers=self.headers | headers, timeout=30)

    def ask(self, unit_id, **more):
        return self.post("/api/v1/assignments", {"unit_id": unit_id} | more).json()


@pytest.fixture
def served(store, tmp_path):
    running = started(store, condition={"country": {"$in": ["NL", "BE"]}})
    key, _ = create_key(store, "shop", "client", "ada")
    app = build_app(ServiceOptions(Settings("local", tmp_path, tmp_path, store.url), models=False))
    with listening(app) as url:
        yield Served(url, key, app.state.service, store, running)


def wait_until(holds):
    for _ in range(400):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen within 8 s")


def test_several_experiments_at_once_and_why_the_others_are_skipped(served):
    other = started(served.store, "layout", policy="shelf", unit_type="session")
    paused = started(served.store, "size", policy="portion")
    pause_experiment(served.store, "size", "ada")
    wait_until(lambda: served.service.roster.listed.statuses.get("size") == "paused")
    asked = ["planner_tone", other.key, paused.key, "planner_ton", "planner_tone"]
    told = served.ask("household-4", experiments=asked, context={"country": "NL"})
    expected = assign(served.running, "household-4", {"country": "NL"})
    assert [(a["experiment"], a["variant"], a["bucket"]) for a in told["assignments"]] == [
        ("planner_tone", expected.variant, expected.bucket)
    ]
    assert {s["experiment"]: s["reason"] for s in told["skipped"]} == {
        "layout": "unit_type",
        "size": "not_active",
        "planner_ton": "unknown",
    }
    assert "did you mean 'planner_tone'" in told["skipped"][-1]["message"]
    assert [s["reason"] for s in served.ask("household-4", context={"country": "US"})["skipped"]] == [
        "targeting",
        "unit_type",
    ]


def test_every_unit_gets_what_assignment_says_and_is_exposed_once(served):
    for _ in range(2):
        for unit in UNITS:
            told = served.ask(unit, context={"country": "NL", "size": 4})
            expected = assign(served.running, unit, {"country": "NL"})
            assert [a["variant"] for a in told["assignments"]] == ([expected.variant] if expected.variant else [])
    served.service.exposures.flush()
    exposed = read_events(served.store, "exposure", source="service")
    assert sorted(exposed["unit_id"]) == sorted(
        u for u in UNITS if assign(served.running, u, {"country": "NL"}).variant
    )
    assert {c["country"] for c in exposed["context"]} == {"NL"} and {c["size"] for c in exposed["context"]} == {4}


def test_who_asks_for_no_exposure_leaves_none_and_who_waits_finds_it_there(served):
    units = [u for u in UNITS if assign(served.running, u, {"country": "NL"}).variant][:2]
    served.ask(units[0], context={"country": "NL"}, expose="no")
    assert served.ask(units[1], context={"country": "NL"}, expose="now")["exposed"]
    assert list(read_events(served.store, "exposure")["unit_id"]) == [units[1]]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"unit_id": 3},
        {"unit_id": " "},
        {"unit_id": "a\x00b"},
        {"unit_id": "u" * 501},
        {"unit_id": "u", "experiments": "planner_tone"},
        {"unit_id": "u", "expose": "perhaps"},
        {"unit_id": "u", "experiments": ["x"] * 1_001},
        {"unit_id": "u", "contxt": {}},
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(served, body):
    answer = served.post("/api/v1/assignments", body)
    assert answer.status_code == 422 and answer.json()["error"]["message"]


def test_a_context_that_a_condition_cannot_be_asked_of_is_skipped_and_not_an_error(served):
    for country in (None, 3, ["US"], {"a": 1}, "\ud7ff", "x" * 10_000):
        assert served.ask("household-4", context={"country": country})["skipped"]


def test_a_policy_change_reaches_the_answers(served):
    assert served.ask("household-1", context={"country": "NL"})
    pause_experiment(served.store, "planner_tone", "ada")
    wait_until(lambda: not served.ask("household-1", context={"country": "NL"})["assignments"])
    wait_until(lambda: served.ask("household-1", experiments=["planner_tone"])["skipped"][0]["reason"] == "not_active")


def test_while_the_database_is_away_assignments_go_on_from_memory(served):
    service, units = served.service, [u for u in UNITS if assign(served.running, u, {"country": "NL"}).variant]
    url = service.exposures.store.url
    service.exposures.store.url = service.roster.store.url = "postgresql://nobody@127.0.0.1:1/nowhere"
    if service.exposures._writer is not None:
        service.exposures._writer.close()
    for unit in units:
        assert served.ask(unit, context={"country": "NL"})["assignments"]
    service.exposures.store.url = service.roster.store.url = url
    service.exposures.flush()
    assert sorted(read_events(served.store, "exposure")["unit_id"]) == sorted(units)


# OpenFeature


def test_an_openfeature_client_gets_our_variants(served):
    from openfeature import api
    from openfeature.contrib.provider.ofrep import OFREPProvider
    from openfeature.evaluation_context import EvaluationContext

    api.set_provider(OFREPProvider(served.url, headers_factory=lambda: served.headers))
    client = api.get_client()
    for unit in UNITS[:20]:
        expected = assign(served.running, unit, {"country": "NL"})
        context = EvaluationContext(unit, {"country": "NL"})
        told = client.get_object_details("planner", {"variant": "default"}, context)
        assert told.value["variant"] == expected.variant
        assert told.variant == (expected.variant or "production")
        assert str(told.reason) == ("SPLIT" if expected.variant else "DEFAULT")
    missing = client.get_object_details("plannr", {"variant": "default"}, EvaluationContext("household-1"))
    assert missing.value == {"variant": "default"} and "FLAG_NOT_FOUND" in str(missing.error_code)
    nobody = client.get_object_details("planner", {"variant": "default"}, EvaluationContext(None, {"country": "NL"}))
    assert "TARGETING_KEY_MISSING" in str(nobody.error_code)
    api.shutdown()


def test_all_flags_at_once_come_with_an_etag_and_expose_nobody(served):
    body = {"context": {"targetingKey": "household-1", "country": "NL"}}
    answer = served.post("/ofrep/v1/evaluate/flags", body)
    assert answer.status_code == 200 and [f["key"] for f in answer.json()["flags"]] == ["planner"]
    again = served.post("/ofrep/v1/evaluate/flags", body, **{"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    served.service.exposures.flush()
    assert len(read_events(served.store, "exposure")) == 0


def test_a_flag_that_is_evaluated_exposes_its_unit(served):
    unit = next(u for u in UNITS if assign(served.running, u, {"country": "NL"}).variant)
    served.post("/ofrep/v1/evaluate/flags/planner", {"context": {"targetingKey": unit, "country": "NL"}})
    served.post("/ofrep/v1/evaluate/flags/planner", {"context": {"targetingKey": "u" * 600, "country": "NL"}})
    served.service.exposures.flush()
    assert list(read_events(served.store, "exposure")["unit_id"]) == [unit]


# GrowthBook


def test_a_growthbook_client_in_python_gets_our_variants_and_reports_its_exposures(served):
    from growthbook import GrowthBook

    seen = []

    def track(experiment, result, **_):
        seen.append((experiment.key, result.key))
        unit = {"unit_id": result.hashValue, "experiments": [experiment.key], "context": {"country": "NL"}}
        (told,) = served.post("/api/v1/assignments", unit).json()["assignments"]
        assert told["variant"] == result.key

    client = GrowthBook(api_host=served.url, client_key=served.key, on_experiment_viewed=track)
    client.load_features()
    for unit in UNITS:
        client.set_attributes({"id": unit, "country": "NL"})
        expected = assign(served.running, unit, {"country": "NL"}).variant
        assert client.get_feature_value("planner", None)["variant"] == expected
    assert {key for key, _ in seen} == {"planner_tone"} and {variant for _, variant in seen} == {"control", "warm"}
    client.destroy()
    served.service.exposures.flush()
    assert len(read_events(served.store, "exposure")) == len(seen)


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory):
    "GrowthBook's SDK as npm installs it."
    folder = tmp_path_factory.mktemp("node")
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("no node or no npm: install them to try GrowthBook's SDK in JavaScript")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), "@growthbook/growthbook@1.8.0"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if told.returncode:
        pytest.skip(f"npm cannot install GrowthBook's SDK here: {told.stderr.strip().splitlines()[-1:]}")
    return folder / "node_modules"


def test_a_growthbook_client_in_javascript_gets_our_variants(served, node_modules):
    code = """
const { GrowthBook } = require("@growthbook/growthbook");
(async () => {
  const [, url, key, units] = process.argv;
  const told = {};
  for (const id of JSON.parse(units)) {
    const gb = new GrowthBook({ apiHost: url, clientKey: key, attributes: { id, country: "NL" } });
    await gb.init({ timeout: 5000 });
    told[id] = gb.getFeatureValue("planner", null).variant;
    gb.destroy();
  }
  console.log(JSON.stringify(told));
})();
"""
    command = ["node", "-e", code, served.url, served.key, json.dumps(UNITS)]
    found = os.environ | {"NODE_PATH": str(node_modules)}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=found)
    told = json.loads(answer.stdout)
    assert told == {u: assign(served.running, u, {"country": "NL"}).variant for u in UNITS}


def test_a_key_in_the_path_is_checked_like_any_other(served):
    assert httpx.get(f"{served.url}/api/features/{served.key}").status_code == 200
    for path in ("nonsense", served.key[:-1] + "x", "%ff", "..%2f..", "a" * 9_000):
        assert httpx.get(f"{served.url}/api/features/{path}").status_code == 401, path
    answer = httpx.get(f"{served.url}/api/features/any-name", headers=served.headers)
    assert answer.status_code == 200
    etag = {"if-none-match": answer.headers["etag"]}
    assert httpx.get(f"{served.url}/api/features/any-name", headers=served.headers | etag).status_code == 304


def test_the_rules_follow_the_roster(served):
    def rules():
        return httpx.get(f"{served.url}/api/features/{served.key}").json()["features"]["planner"]["rules"]

    assert rules()
    pause_experiment(served.store, "planner_tone", "ada")
    wait_until(lambda: not rules())


def test_callers_at_once_get_what_each_asked_for(served):
    async def many():
        async with httpx.AsyncClient(base_url=served.url, headers=served.headers, timeout=30) as client:
            asked = [{"unit_id": u, "context": {"country": "NL"}} for u in UNITS] * 3
            return await asyncio.gather(*[client.post("/api/v1/assignments", json=body) for body in asked])

    for unit, answer in zip(UNITS * 3, asyncio.run(many()), strict=True):
        told = answer.json()
        expected = assign(served.running, unit, {"country": "NL"}).variant
        assert told["unit_id"] == unit and [a["variant"] for a in told["assignments"]] == [expected] * bool(expected)
