"The commands that read an experiment."

import json

import pytest
from typer.testing import CliRunner

from mlops_workbench.design import to_design
from mlops_workbench.experiment import Experiment, create_experiment
from mlops_workbench.readings import app

CONTENT = {
    "key": "tone",
    "hypothesis": "Reasons help.",
    "policy": "planner",
    "unit_type": "household",
    "variants": [
        {"name": "plain", "share": 0.5, "control": True},
        {"name": "reasons", "share": 0.5, "parameters": {"reasons": True}},
    ],
    "metrics": [
        {"metric": "acceptance", "role": "primary", "kind": "proportion", "event": "accepted"},
        {"metric": "edits", "role": "guardrail", "kind": "ratio", "event": "edited", "denominator": "proposed"},
    ],
    "mde": 0.1,
    "planned_n": 400,
    "ends_at": "2099-01-01T00:00:00Z",
}
CONTENT["metrics"][1] |= {"margin": 0.25, "higher_is_better": False}


@pytest.fixture
def draft(store):
    return create_experiment(store, Experiment(**vars(to_design(CONTENT))), "ada")


@pytest.fixture
def call(store, monkeypatch):
    "Run a command on the store of the test."
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)

    def run(*words):
        return CliRunner().invoke(app, list(words))

    return run


def test_from_a_rehearsal_to_a_page(call, draft, tmp_path):
    sent = call("simulate", "tone", "--units", "1500", "--days", "3", "--effect", "reasons.acceptance=0.6")
    assert sent.exit_code == 0 and sent.stdout.startswith("1,500 units came"), sent.output
    page, pictures = tmp_path / "page.html", tmp_path / "pictures"
    told = call("analyse", "tone", "--html", str(page), "--picture", str(pictures))
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith("tone (active): SHIP reasons")
    assert page.read_text().count("data:image/png") == 2
    assert sorted(p.name for p in pictures.iterdir()) == [f"tone-{m}.png" for m in ("acceptance", "edits")]
    known = json.loads(call("analyse", "tone", "--json", "--prior", "0.1").stdout)
    assert (known["conclusion"]["action"], known["conclusion"]["variant"]) == ("ship", "reasons")
    assert all(f["words"] in told.stdout for f in known["findings"])
    assert known["beliefs"][0]["chance_better"] > 0.99


def test_what_cannot_be_simulated_and_what_is_needed(call, draft, monkeypatch):
    assert "there is no effect 'warm.x'" in str(call("simulate", "tone", "--effect", "warm.x=1").exception)
    assert "write variant.metric=0.1" in str(call("simulate", "tone", "--effect", "warm").exception)
    asked = ["power", "--baseline", "0.4", "--effect", "0.05", "--json"]
    one, many = (json.loads(call(*asked, *more).stdout) for more in ([], ["--metrics", "3", "--variants", "3"]))
    assert one["units_per_arm"]["once"] == 9_493, "statsmodels' samplesize_proportions_2indep_onetail gives 9,492.04"
    assert one["units_per_arm"]["watched"] > one["units_per_arm"]["once"]
    assert (one["comparisons"], many["comparisons"]) == (1, 6)
    assert many["units_per_arm"]["once"] > one["units_per_arm"]["once"]
    monkeypatch.setenv("WORKBENCH_ENVIRONMENT", "production")
    assert "do not go into production" in str(call("simulate", "tone").exception)
