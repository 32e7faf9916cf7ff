"""OpenAI's and MLflow's protocols, spoken by their own clients against the service on a loopback port."""

import json
import random
import socket
import threading
import time

import httpx
import openai
import pandas as pd
import pytest
import uvicorn

from benchmarks.prediction import World
from mlops_workbench import cookbook, planner
from mlops_workbench.events import read_events
from mlops_workbench.keys import create_key
from mlops_workbench.registry import model_place
from mlops_workbench.service import ServiceOptions
from mlops_workbench.serving import build_app
from mlops_workbench.store import Store, transaction

SOURCE = "simulation-s1-n66"
HOUSEHOLD = f"{SOURCE}/household-0001"


@pytest.fixture(scope="module")
def served(server, tmp_path_factory):
    "Run the service with a planner in production."
    with server.database() as url, Store(url) as store:
        world = World(store, tmp_path_factory.mktemp("served"))
        planner.task.write_history(store, None, SOURCE, 66, 1)
        with transaction(store) as connection:  # the history is over: what was in the house last is there today
            connection.execute(
                "UPDATE exp.pantries p SET valid_until = NULL WHERE valid_from = "
                "(SELECT max(valid_from) FROM exp.pantries q WHERE q.household_id = p.household_id)"
            )
        world.version = world.planning(1)
        world.promoted(world.version, {"latency_budget_ms": 20_000})
        world.secret, _ = create_key(store, "tests", "client", "ana")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            world.port = free.getsockname()[1]
        app = build_app(ServiceOptions(world.settings))
        running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=world.port, log_level="error"))
        thread = threading.Thread(target=running.run)
        thread.start()
        world.headers = {"authorization": f"Bearer {world.secret}"}
        limit = time.monotonic() + 90
        while time.monotonic() < limit:
            try:
                models = httpx.get(f"http://127.0.0.1:{world.port}/v1/models", headers=world.headers)
                if models.status_code == 200 and any(m["id"] == "planner@1" for m in models.json()["data"]):
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield world
        running.should_exit = True
        thread.join(60)


@pytest.fixture
def client(served):
    return openai.OpenAI(api_key=served.secret, base_url=f"http://127.0.0.1:{served.port}/v1", max_retries=0)


def context(seed=0):
    return cookbook.draw_context(random.Random(seed))


def allowed(text, known):
    plan = planner.parse(text)
    return planner.violations(known, plan) == ()


def test_models_are_policies_and_their_versions(client):
    assert [m.id for m in client.models.list()] == ["planner", "planner@1"]
    assert client.models.retrieve("planner@1").id == "planner@1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("planner@9")


def test_a_completion_is_an_allowed_answer_with_its_usage(client):
    known = context()
    said = client.completions.create(model="planner", prompt=json.dumps(known))
    assert said.object == "text_completion" and said.model == "planner@1"
    assert allowed(said.choices[0].text, known) and said.choices[0].finish_reason == "stop"
    assert said.usage.prompt_tokens > 10 and said.usage.completion_tokens > 5
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens


def test_chat_says_the_same_as_completion(client):
    known = context(1)
    said = client.chat.completions.create(model="planner@1", messages=[{"role": "user", "content": json.dumps(known)}])
    plain = client.completions.create(model="planner@1", prompt=json.dumps(known))
    assert said.choices[0].message.content == plain.choices[0].text
    assert said.choices[0].message.role == "assistant"


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_is_the_same_answer_in_pieces(client, usage):
    known, options = context(2), {"stream_options": {"include_usage": True}} if usage else {}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": json.dumps(known)}]
    whole = client.chat.completions.create(model="planner", messages=messages)
    chunks = list(client.chat.completions.create(model="planner", messages=messages, stream=True, **options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 3
    assert [c.usage for c in chunks if c.usage] == ([whole.usage] if usage else [])
    parts = list(client.completions.create(model="planner", prompt=json.dumps(known), stream=True))
    assert "".join(c.choices[0].text for c in parts) == text


def test_a_stream_ends_with_done(served):
    body = {"model": "planner", "prompt": json.dumps(context()), "stream": True}
    said = httpx.post(f"http://127.0.0.1:{served.port}/v1/completions", json=body, headers=served.headers)
    assert said.headers["content-type"].startswith("text/event-stream")
    assert said.text.endswith("data: [DONE]\n\n") and said.text.startswith('data: {"')


def test_a_user_is_a_unit_whose_answer_is_looked_up_and_logged(client, served):
    said = client.completions.create(model="planner", prompt="{}", user=HOUSEHOLD)
    rows = read_events(served.store, "plan_proposed", source="completions")
    row = rows[rows["id"] == said.id.removeprefix("cmpl-")].iloc[0]
    assert row["unit_id"] == HOUSEHOLD and row["payload"]["plan"] == planner.parse(said.choices[0].text)
    assert row["context"]["policy_version"] == 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "planner", "prompt": "What is for dinner?"}, 400, "prompt is no JSON"),
        ({"model": "planner", "prompt": "[1]"}, 400, "prompt is a list in JSON"),
        ({"model": "planner", "prompt": "{}"}, 400, "prompt is an empty context"),
        ({"model": "plonner", "prompt": "{}"}, 404, "there is no model 'plonner'"),
        ({"model": "planner@7", "prompt": "{}"}, 404, "there is no model 'planner@7'"),
        ({"model": "planner", "prompt": '{"size": 2}'}, 400, "the context cannot be answered"),
        ({"model": "planner", "prompt": "{}", "n": 2}, 400, "n is 2: a policy has one answer"),
        ({"model": "planner", "prompt": "{}", "logprobs": 3}, 400, "logprobs is not supported"),
        (
            {"model": "planner", "prompt": "{}", "user": "nobody"},
            404,
            "household 'nobody' has no attributes and pantry",
        ),
        ({"prompt": "{}"}, 400, "model is no text"),
    ],
)
def test_a_wrong_request_gets_openai_s_error_object(served, body, status, words):
    said = httpx.post(f"http://127.0.0.1:{served.port}/v1/completions", json=body, headers=served.headers)
    assert said.status_code == status, said.text
    error = said.json()["error"]
    assert words in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_an_answer_that_does_not_fit_is_not_cut(client):
    with pytest.raises(openai.BadRequestError, match="it is not cut"):
        client.completions.create(model="planner", prompt=json.dumps(context()), max_tokens=3)


def test_without_a_key_nothing_is_said(served):
    client = openai.OpenAI(api_key="wrong", base_url=f"http://127.0.0.1:{served.port}/v1", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.completions.create(model="planner", prompt="{}")


# --- MLflow ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_app(served, tmp_path_factory):
    "Serve the same model with MLflow's own server."
    import mlflow.artifacts
    import mlflow.pyfunc
    from fastapi.testclient import TestClient
    from mlflow.pyfunc.scoring_server import init

    assert model_place(served.tracking, served.version)
    place = mlflow.artifacts.download_artifacts(served.version.source, dst_path=str(tmp_path_factory.mktemp("logged")))
    return TestClient(init(mlflow.pyfunc.load_model(place)), raise_server_exceptions=False)


TEXTS = [json.dumps(context(seed)) for seed in range(3)]
SPLIT = {"dataframe_split": {"columns": ["context"], "data": [[t] for t in TEXTS]}}
SAME = {
    "split": (json.dumps(SPLIT), "application/json"),
    "records": (json.dumps({"dataframe_records": [{"context": t} for t in TEXTS]}), "application/json"),
    "instances": (json.dumps({"instances": [{"context": t} for t in TEXTS]}), "application/json; charset=utf-8"),
    "params": (json.dumps(SPLIT | {"params": {"policy": "planner"}}), "application/json"),
    "csv": (pd.DataFrame({"context": TEXTS}).to_csv(index=False), "text/csv"),
    "parquet": (pd.DataFrame({"context": TEXTS}).to_parquet(index=False), "application/vnd.apache.parquet"),
}
WRONG = {
    "two keys": (json.dumps(SPLIT | {"instances": []}), "application/json", 400),
    "a list": ("[1, 2]", "application/json", 400),
    "no JSON": ("{", "application/json", 400),
    "no key": ('{"data": 1}', "application/json", 400),
    "text": ("hello", "text/plain", 415),
    "another charset": (json.dumps(SPLIT), "application/json; charset=latin-1", 415),
    "missing column": (json.dumps({"dataframe_records": [{"contexts": "{}"}]}), "application/json", 400),
}


def invoke(served, body, kind):
    url = f"http://127.0.0.1:{served.port}/invocations"
    return httpx.post(url, content=body, headers=served.headers | {"content-type": kind}, timeout=30)


@pytest.mark.parametrize("name", SAME)
def test_the_service_answers_what_mlflow_s_server_answers(served, mlflow_app, name):
    body, kind = SAME[name]
    theirs = mlflow_app.post("/invocations", content=body, headers={"content-type": kind})
    ours = invoke(served, body, kind)
    assert theirs.status_code == ours.status_code == 200, (theirs.text, ours.text)
    assert ours.json() == theirs.json() and len(ours.json()["predictions"]) == 3


@pytest.mark.parametrize("name", WRONG)
def test_the_service_refuses_what_mlflow_s_server_refuses(served, mlflow_app, name):
    body, kind, status = WRONG[name]
    theirs = mlflow_app.post("/invocations", content=body, headers={"content-type": kind})
    ours = invoke(served, body, kind)
    assert theirs.status_code == status == ours.status_code, (theirs.text, ours.text)
    assert ours.json()["error_code"]


@pytest.mark.parametrize("path", ["/ping", "/health", "/version"])
def test_the_small_questions_are_answered_alike(served, mlflow_app, path):
    ours = httpx.get(f"http://127.0.0.1:{served.port}{path}", headers=served.headers)
    assert (ours.status_code, ours.text) == (mlflow_app.get(path).status_code, mlflow_app.get(path).text)


def test_a_row_with_a_unit_is_logged(served):
    body = json.dumps({"dataframe_records": [{"unit_id": HOUSEHOLD}, {"unit_id": HOUSEHOLD, "context": TEXTS[0]}]})
    said = invoke(served, body, "application/json")
    assert said.status_code == 200, said.text
    rows = read_events(served.store, "plan_proposed", source="invocations")
    assert len(rows) == 2 and rows["payload"].iloc[1]["context"] == json.loads(TEXTS[0])
    assert json.loads(said.json()["predictions"][1]) == rows["payload"].iloc[1]["plan"]
