"Payloads: GrowthBook's SDK and OpenFeature's provider get the variants that we assign."

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from growthbook import GrowthBook
from openfeature import api
from openfeature.contrib.provider.ofrep import OFREPProvider
from openfeature.evaluation_context import EvaluationContext

from mlops_workbench.assignment import Allocation, Arm, Phase, assign
from mlops_workbench.payload import Flag, evaluate_flag, evaluate_flags, growthbook_payload, resolve_flag

HALVES = (Arm("control", 0, 0, 5000, 3), Arm("treatment", 1, 5000, 10_000, 4, {"n_recipes": 5}))
THIRDS = (Arm("control", 0, 0, 3334, 3), Arm("a", 1, 3334, 6667, 4), Arm("b", 2, 6667, 10_000, 5))
MENU = Allocation("menu-4", "menu-4", "household", "active", Phase(1, 10_000, HALVES))
EVERYTHING = replace(
    MENU,
    phase=Phase(7, 3333, THIRDS),
    namespace=("kitchen", 0.1, 0.9),
    holdout=777,
    condition={"country": {"$in": ["NL", "BE"]}, "size": {"$gte": 2}},
    forced={"household-1": "a", "household-2": "b", "tester": "control"},
)
EXPERIMENTS = {
    "plain": (MENU,),
    "one bucket in ten thousand more": (replace(MENU, phase=Phase(1, 5001, THIRDS)),),
    "namespace": (replace(MENU, namespace=("kitchen", 0.25, 0.75)),),
    "hold-out": (replace(MENU, holdout=1234),),
    "condition": (replace(MENU, condition={"country": "NL"}),),
    "forced": (replace(MENU, phase=Phase(1, 0, HALVES), forced={"household-1": "treatment"}),),
    "everything": (EVERYTHING,),
    "rolled back": (replace(EVERYTHING, barred=frozenset({5})),),
    "rolled back, forced into it": (replace(MENU, barred=frozenset({4}), forced={"household-1": "treatment"}),),
    "all rolled back": (replace(MENU, barred=frozenset({3, 4})),),
    "paused": (replace(MENU, status="paused"),),
    "two of one namespace": (
        replace(MENU, namespace=("kitchen", 0, 0.5)),
        replace(MENU, key="price-2", seed="price-2", namespace=("kitchen", 0.5, 1), phase=Phase(1, 5000, THIRDS)),
    ),
    "two that overlap": (replace(MENU, phase=Phase(1, 4000, HALVES)), replace(EVERYTHING, key="other", seed="other")),
    "words beyond ASCII": (
        replace(MENU, seed="menü-🥕", namespace=("küche", 0.25, 0.75), phase=Phase(1, 4000, HALVES)),
    ),
}
UNITS = [*(f"household-{i}" for i in range(3000)), "tester", "müller", "🥕", "6f1c2f0e-3c0b-5d4a-9a52-0d6f6b8e7a11"]
CONTEXTS = [{"country": c, "size": s} for c in ("NL", "BE", "DE") for s in (1, 2, 5)]


def people():
    "Every unit with a context of its own."
    return [(unit, CONTEXTS[i % len(CONTEXTS)]) for i, unit in enumerate(UNITS)]


def ours(flag, unit, context):
    "What the first experiment with a variant says, without the room under test."
    found = [assign(experiment, unit, context) for experiment in flag.experiments]
    return next(((a.experiment, a.variant) for a in found if a.variant is not None), (None, None))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_growthbooks_sdk_gives_every_unit_the_same_variant(name):
    flag = Flag("planner", 3, EXPERIMENTS[name])
    features = json.loads(json.dumps(growthbook_payload([flag])["features"]))
    sdk = GrowthBook(features=features)
    seen = {}
    for unit, context in people():
        sdk.set_attributes({"id": unit, **context})
        result = sdk.eval_feature("planner")
        experiment, variant = ours(flag, unit, context)
        assert result.value["variant"] == variant, unit
        assert result.value == resolve_flag(flag, {"targetingKey": unit, **context})[0]
        if result.source == "experiment":  # what the SDK reports as an exposure
            assert (result.experiment.key, result.experimentResult.key) == (experiment, variant)
        seen[variant] = seen.get(variant, 0) + 1
    assert None in seen or all(e.phase.coverage == 10_000 for e in flag.experiments)


def test_the_sdk_tracks_who_is_assigned_and_nobody_who_is_forced():
    tracked = []

    def track(experiment, result, user_context):
        tracked.append(result.hashValue)

    flag = Flag("planner", 3, (replace(MENU, forced={"household-1": "treatment"}),))
    sdk = GrowthBook(features=growthbook_payload([flag])["features"], on_experiment_viewed=track)
    for unit in ("household-1", "household-2"):
        sdk.set_attributes({"id": unit})
        sdk.get_feature_value("planner", None)
    assert tracked == ["household-2"]


@pytest.mark.parametrize("experiments", [(), (replace(MENU, status="completed"),)])
def test_a_flag_without_experiments_is_production(experiments):
    flag = Flag("planner", None, experiments, {"n_recipes": 7})
    payload = growthbook_payload([flag])
    value = {"variant": None, "policy_version": None, "parameters": {"n_recipes": 7}}
    assert payload["features"] == {"planner": {"defaultValue": value, "rules": []}}
    assert GrowthBook(features=payload["features"]).get_feature_value("planner", None) == value
    answer = evaluate_flag([flag], "planner", {"context": {}})
    assert (answer.status, answer.body["reason"], answer.body["value"]) == (200, "STATIC", value)


# Over HTTP, with the clients from the registry


@contextmanager
def service(flags):
    "Serve payloads as the next room over will, for as long as a test lasts."

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, body, etag=""):
            content = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if etag:
                self.send_header("ETag", etag)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            assert self.path == "/api/features/sdk-1"
            self.reply(200, growthbook_payload(flags))

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            *start, last = self.path.strip("/").split("/")
            if last == "flags":
                answer = evaluate_flags(flags, request, self.headers.get("If-None-Match", ""))
            else:
                assert start == ["ofrep", "v1", "evaluate", "flags"]
                answer = evaluate_flag(flags, last, request)
            self.reply(answer.status, answer.body, answer.etag)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def openfeature():
    "A way to an OpenFeature client, cleared afterwards."

    def connect(url):
        api.set_provider(OFREPProvider(url))
        return api.get_client()

    yield connect
    api.shutdown()
    api.clear_providers()


def test_openfeatures_provider_gives_every_unit_the_same_variant(openfeature):
    flag = Flag("planner", 3, EXPERIMENTS["everything"])
    reasons = set()
    with service([flag]) as url:
        client = openfeature(url)
        for unit, context in people()[:60] + people()[-4:]:
            details = client.get_object_details("planner", {}, EvaluationContext(unit, context))
            experiment, variant = ours(flag, unit, context)
            assert details.error_code is None
            assert details.variant == (variant or "production")
            assert details.value == resolve_flag(flag, {"targetingKey": unit, **context})[0]
            assert details.flag_metadata.get("experiment") == experiment
            reasons.add(details.reason)
    assert reasons == {"SPLIT", "TARGETING_MATCH", "DEFAULT"}


@pytest.mark.parametrize(
    ("key", "context", "code", "words"),
    [
        ("planer", EvaluationContext("household-1"), "FLAG_NOT_FOUND", "did you mean 'planner'"),
        ("planner", EvaluationContext(), "TARGETING_KEY_MISSING", "pass the stable id of the household"),
        (
            "planner",
            EvaluationContext(attributes={"targetingKey": 7}),
            "INVALID_CONTEXT",
            "pass the household's id as text",
        ),
    ],
)
def test_openfeatures_provider_understands_what_is_wrong(openfeature, key, context, code, words):
    with service([Flag("planner", 3, (MENU,))]) as url:
        details = openfeature(url).get_object_details(key, {"fallback": True}, context)
    assert (details.value, details.error_code.value) == ({"fallback": True}, code)
    assert words in details.error_message


def test_a_rollback_is_seen_with_the_next_request(openfeature):
    treated = next(u for u in UNITS if assign(MENU, u).variant == "treatment")
    flags = [Flag("planner", 3, (MENU,))]
    with service(flags) as url:
        client = openfeature(url)
        before = client.get_object_value("planner", {}, EvaluationContext(treated))
        flags[0] = replace(flags[0], experiments=(replace(MENU, barred=frozenset({4})),))
        after = client.get_object_value("planner", {}, EvaluationContext(treated))
    assert (before["policy_version"], after["policy_version"]) == (4, 3)


def test_growthbooks_sdk_downloads_the_payload():
    flag = Flag("planner", 3, EXPERIMENTS["everything"])
    with service([flag]) as url:
        sdk = GrowthBook(api_host=url, client_key="sdk-1", attributes={"id": "tester"}, stale_while_revalidate=False)
        try:
            sdk.load_features()
            assert sdk.get_feature_value("planner", None)["variant"] == "control"
        finally:
            sdk.destroy()


def test_all_flags_are_sent_once_until_something_changes():
    flags = [Flag("planner", 3, (MENU,)), Flag("price", 1)]
    with service(flags) as url:
        ask = f"{url}/ofrep/v1/evaluate/flags"
        body = {"context": {"targetingKey": "household-1"}}
        first = requests.post(ask, json=body, timeout=5)
        assert [f["key"] for f in first.json()["flags"]] == ["planner", "price"]
        tag = first.headers["ETag"]
        for known in (tag, f"W/{tag}", f'"old", {tag}', "*"):
            again = requests.post(ask, json=body, headers={"If-None-Match": known}, timeout=5)
            assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
        other = next(u for u in UNITS if assign(MENU, u).variant != assign(MENU, "household-1").variant)
        changed = requests.post(
            ask, json={"context": {"targetingKey": other}}, headers={"If-None-Match": tag}, timeout=5
        )
        assert changed.status_code == 200


def test_one_flag_that_cannot_be_evaluated_leaves_the_others():
    answer = evaluate_flags([Flag("planner", 3, (MENU,)), Flag("price", 1)], {"context": {}})
    assert answer.status == 200
    assert [f.get("errorCode", f.get("reason")) for f in answer.body["flags"]] == ["TARGETING_KEY_MISSING", "STATIC"]


@pytest.mark.parametrize("request_body", [None, [], {"context": []}, {"context": None}, "household-1"])
def test_a_body_without_a_context_is_refused(request_body):
    for answer in (
        evaluate_flag([Flag("planner", 3)], "planner", request_body),
        evaluate_flags([Flag("planner", 3)], request_body),
    ):
        assert (answer.status, answer.body["errorCode"]) == (400, "INVALID_CONTEXT")
        assert "the body has no context" in answer.body["errorDetails"]


def test_units_of_two_types_are_told_apart_by_their_attributes():
    price = replace(MENU, key="price-2", seed="price-2", unit_type="user")
    flag, names = Flag("planner", 3, (replace(MENU, phase=Phase(1, 3000, HALVES)), price)), {"user": "user_id"}
    sdk = GrowthBook(features=growthbook_payload([flag], names)["features"])
    for i, household in enumerate(UNITS[:500]):
        for user in ({"user_id": f"user-{i}"}, {}):
            sdk.set_attributes({"id": household, **user})
            value, _ = resolve_flag(flag, {"targetingKey": household, **user}, names)
            assert sdk.get_feature_value("planner", None) == value
    with pytest.raises(ValueError, match="'household' and 'user' both read the attribute 'id': name one for each"):
        growthbook_payload([flag])
    with pytest.raises(LookupError, match="the context has no targetingKey or user_id"):
        resolve_flag(flag, {}, names)
