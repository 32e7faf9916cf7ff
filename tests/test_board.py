"What is written for Prometheus and Grafana: current, parsed, and about numbers that exist."

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlops_workbench.board import SECTIONS, board_files, check_board, dashboard_file, lint_dashboard, write_board
from mlops_workbench.instruments import INSTRUMENTS
from mlops_workbench.promise import RULES, lint_expr, rule_tests_file, rules_file

ROOT = Path(__file__).resolve().parent.parent
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is missing: apt-get install prometheus"
)


def promtool(*arguments, cwd):
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_the_files_in_deploy_are_current():
    assert check_board(ROOT) == [], "run `workbench board write`"


def test_writing_twice_changes_nothing(tmp_path):
    assert write_board(tmp_path) == list(board_files())
    assert write_board(tmp_path) == [] == check_board(tmp_path)
    (tmp_path / "deploy/prometheus/rules.yml").write_text("groups: []\n")
    assert check_board(tmp_path) == ["deploy/prometheus/rules.yml"]


@needs_promtool
def test_promtool_accepts_the_rules_and_their_examples(tmp_path):
    write_board(tmp_path)
    folder = tmp_path / "deploy" / "prometheus"
    code, said = promtool("check", "rules", "rules.yml", cwd=folder)
    assert code == 0 and f"{len(RULES)} rules found" in said, said
    code, said = promtool("test", "rules", "tests/rules_test.yml", cwd=folder)
    assert code == 0 and "SUCCESS" in said, said


@needs_promtool
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_each_example_would_fail_without_its_rule(tmp_path, rule):
    "Its own quiet values in place of the firing ones, and the other way round."
    (tmp_path / "rules.yml").write_text(rules_file([rule]))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "it.yml").write_text(rule_tests_file([replace(rule, fires=rule.quiet, quiet=rule.fires)]))
    code, said = promtool("test", "rules", "tests/it.yml", cwd=tmp_path)
    assert code != 0 and said.count("FAILED") >= 1


@needs_promtool
def test_promtool_refuses_what_is_no_rule(tmp_path):
    (tmp_path / "rules.yml").write_text(rules_file([replace(RULES[0], expr="up ==")]))
    assert promtool("check", "rules", "rules.yml", cwd=tmp_path)[0] == 1


def test_every_rule_names_what_exists_and_what_to_run():
    assert [fault for rule in RULES for fault in lint_expr(rule.expr)] == []
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule.severity in ("info", "warning", "critical") and rule.run and rule.words
        assert [f for series in (*rule.fires, *rule.quiet) for f in lint_expr(series)] == []


@pytest.mark.parametrize(
    "expr, fault",
    [
        ("rate(workbench_request_total[5m])", "there is no metric 'workbench_request_total'"),
        ("workbench_request_seconds", "there is no metric 'workbench_request_seconds'"),
        ('workbench_tokens_total{sort="prompt"}', "has no label 'sort'"),
        ("sum by (version) (workbench_tokens_total)", "nothing has the label 'version'"),
        ("a + on (policy) rate(workbench_tokens_total[5m])", "there is no metric 'a'"),
        ("max_over_time(sum(workbench_typo)[10m:1m])", "there is no metric 'workbench_typo'"),
        ("histogram_quantile(0.9, workbench_answer_seconds_buckets)", "workbench_answer_seconds_bucket"),
        ("-workbench_typo", "there is no metric 'workbench_typo'"),
        ("(workbench_typo)", "there is no metric 'workbench_typo'"),
        ("topk(3, workbench_typo)", "there is no metric 'workbench_typo'"),
        ("rate(workbench_tokens_total[5x])", "is not PromQL"),
        ("", "is not PromQL"),
    ],
)
def test_the_lint_finds(expr, fault):
    assert any(fault in found for found in lint_expr(expr)), lint_expr(expr)


def test_every_instrument_has_one_panel():
    panels = [p for p in json.loads(dashboard_file())["panels"] if p["type"] != "row"]
    shown = [
        i.name
        for i in INSTRUMENTS
        for p in panels
        if any(i.name in t["expr"].replace(i.name + "_", i.name) for t in p["targets"])
    ]
    assert set(shown) == {i.name for i in INSTRUMENTS}
    assert len(panels) == len(INSTRUMENTS) == sum(len(names) for names in SECTIONS.values())


def test_panels_do_not_lie_upon_each_other():
    taken = set()
    for panel in json.loads(dashboard_file())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize(
    "spoil, fault",
    [
        (lambda p: p.update(id=1), "two panels have the id 1"),
        (lambda p: p["fieldConfig"]["defaults"].pop("unit"), "has no unit"),
        (lambda p: p["datasource"].update(uid="prometheus-1"), "names a datasource of its own"),
        (lambda p: p.update(targets=[]), "asks nothing"),
        (lambda p: p["targets"][0].update(expr="workbench_typo"), "there is no metric 'workbench_typo'"),
        (lambda p: p["targets"][0].update(expr='workbench_database_up{instance="$host"}'), "uses $host"),
    ],
)
def test_the_dashboards_lint_finds(spoil, fault):
    board = json.loads(dashboard_file())
    assert lint_dashboard(json.dumps(board)) == []
    spoil(board["panels"][1])
    assert any(fault in found for found in lint_dashboard(json.dumps(board)))


def test_grafanas_own_reader_takes_the_dashboard():
    from grafana_foundation_sdk.models.dashboard import Dashboard

    board = Dashboard.from_json(json.loads(dashboard_file()))
    assert board.title == "Workbench" and {v.name for v in board.templating.list_val} == {"datasource", "policy"}


def test_every_other_file_is_yaml():
    for name, text in board_files().items():
        assert json.loads(text) if name.endswith(".json") else yaml.safe_load(text), name
