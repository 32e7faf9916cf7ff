"README and site are what the notebooks say, and what is wrong with them is noticed."

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlops_workbench.docs import check_readme, links_from_root, main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "What the site is made from, apart from the checkout: building it leaves files behind."
    target = tmp_path_factory.mktemp("tree") / "a copy"  # paths with spaces have to work
    skipped = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "mlruns", "bases")
    for name in ("nbs", "mlops_workbench"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=skipped)
    for name in ("pyproject.toml", "settings.ini", "_quarto.yml"):
        shutil.copy2(ROOT / name, target / name)
    if (ROOT / "mlops_workbench" / "bases").is_dir():
        (target / "mlops_workbench" / "bases").symlink_to(ROOT / "mlops_workbench" / "bases")
    return target


def make_site(tree):
    command = [sys.executable, "-m", "mlops_workbench.docs", "site"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def site(tree):
    made = make_site(tree)
    assert made.returncode == 0, made.stderr[-3000:]
    return tree / "_docs"


def test_readme_is_current():
    check_readme(ROOT)


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link for link in links if not link.startswith(("http", "#"))]
    assert local, "the README leads nowhere"
    assert [link for link in local if not (ROOT / link.partition("#")[0]).exists()] == []


@pytest.mark.slow
def test_site_has_no_warnings(site):
    assert (site / "index.html").is_file()


@pytest.mark.slow
def test_every_notebook_has_a_page(site):
    names = {p.stem.split("_", 1)[1] for p in (ROOT / "nbs").glob("[0-9][0-9][0-9]_*.ipynb")}
    assert {name for name in names if not (site / f"{name}.html").is_file()} == set()


@pytest.mark.slow
def test_site_asks_no_other_server_for_its_style(site):
    assert [p.name for p in site.rglob("*.css") if "@import url(http" in p.read_text()] == []


@pytest.mark.slow
def test_every_notebook_is_in_the_sidebar(site):
    text = (site / "index.html").read_text()
    pages = [p.relative_to(site).as_posix() for p in site.rglob("*.html")]
    assert [page for page in pages if f'href="{page}"' not in text] == []


@pytest.mark.slow
def test_a_mistake_is_reported(site, tree):
    config = tree / "_quarto.yml"
    written = config.read_text()
    content = yaml.safe_load(written)
    content["website"]["navbarr"] = {}
    content["website"]["navbar"]["left"].append({"text": "Nowhere", "href": "nowhere.ipynb"})
    config.write_text(yaml.safe_dump(content))
    try:
        made = make_site(tree)
    finally:
        config.write_text(written)
    assert made.returncode == 1
    assert "unknown key website.navbarr" in made.stderr
    assert "nowhere.ipynb" in made.stderr


def test_commands_are_told(capsys):
    assert main(["page"]) == 1
    assert "readme, readme --check or site" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[a](b.ipynb)", "[a](nbs/b.ipynb)"),
        ("[a](../b.md)", "[a](b.md)"),
        ("![a](images/b.svg)", "![a](nbs/images/b.svg)"),
        ("[a](mailto:b@example.org)", "[a](mailto:b@example.org)"),
        ("[a](#b)", "[a](#b)"),
        ("[a](/b)", "[a](/b)"),
    ],
)
def test_links_from_root(text, expected):
    assert links_from_root(text) == expected
