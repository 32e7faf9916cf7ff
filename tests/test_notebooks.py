"The rules of the house: how a notebook is written, and that what is made from it is current."

import ast
import base64
import configparser
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from mlops_workbench.core import read_parameters

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LIBRARY = sorted(NBS.glob("[0-9][0-9][0-9]_*.ipynb"))
PIPELINES = sorted((NBS / "pipelines").glob("*.ipynb"))
PAGES = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

MAX_CELL_LINES = 40
MAX_NESTING = 3
MAX_PARAMETERS = 6
MAX_EXPORTED_LINES = 330  # "about 300"; blank lines and directives are not counted
MAX_PICTURE_BYTES = 50_000

BLOCKS = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match | ast.AsyncFor | ast.AsyncWith
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def name(path):
    return path.relative_to(ROOT).as_posix()


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=name)


def cells(path, kind="code"):
    found = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]
    return [dict(c, source="".join(c["source"])) for c in found]


def is_exported(source):
    return re.search(r"^#\|\s*exports?\b", source, re.M) is not None


def exported(path):
    return [c["source"] for c in cells(path) if is_exported(c["source"])]


def python(source):
    "Leave out what IPython adds to Python."
    return re.sub(r"^[%!].*$", "pass", source, flags=re.M)


def nesting(node, elif_of=None):
    "Count the levels of blocks below a node; an `elif` is on the level of its `if`."
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        counts = isinstance(child, BLOCKS | FUNCTIONS) and not is_elif
        deepest = max(deepest, nesting(child) + counts)
    return deepest


def arguments(function):
    given = function.args
    found = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [a for a in [*found, given.vararg, given.kwarg] if a is not None and a.arg not in ("self", "cls")]


def functions(tree):
    "List the functions and methods that callers see: those inside a function are its own business."
    bodies = [tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))]
    return [f for body in bodies for f in body if isinstance(f, FUNCTIONS)]


def commented_lines(source):
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0] for t in found if t.type == tokenize.COMMENT}


def is_plain(argument):
    "Say whether a type leaves open what is meant: text and numbers do, a class of ours (`store: Store`) does not."
    if argument.annotation is None or "help=" in ast.unparse(argument.annotation):
        return False
    names = {n.id for n in ast.walk(argument.annotation) if isinstance(n, ast.Name)}
    return bool(names) and names <= {
        "str",
        "int",
        "float",
        "bool",
        "bytes",
        "list",
        "dict",
        "tuple",
        "Path",
        "Any",
        "Mapping",
        "Sequence",
    }


def is_command(function):
    "Say whether a function is a command of the command line: its parameters are options that a person names."
    return any(ast.unparse(d).endswith(".command()") for d in function.decorator_list)


def shape_offences(source):
    "List what is wrong with the shape of one exported cell."
    body = [line for line in source.strip().splitlines() if not line.startswith("#|")]
    tree = ast.parse(python(source))
    wrong = [f"{len(body)} lines, at most {MAX_CELL_LINES}"] * (len(body) > MAX_CELL_LINES)
    for function in functions(tree):
        depth, given = nesting(function), arguments(function)
        bare = [a.arg for a in given if a.annotation is None]
        wrong += [f"{function.name}: {depth} levels of nesting, at most {MAX_NESTING}"] * (depth > MAX_NESTING)
        wrong += [f"{function.name}: {len(given)} parameters, at most {MAX_PARAMETERS}"] * (
            len(given) > MAX_PARAMETERS and not is_command(function)
        )
        wrong += [f"{function.name}: no annotation of {', '.join(bare)}"] * bool(bare)
        untold = function.returns is None and function.name not in ("__init__", "__post_init__")
        wrong += [f"{function.name}: no annotation of what it returns"] * untold
    public = [f for f in tree.body if isinstance(f, FUNCTIONS) and not f.name.startswith("_")]
    comments = commented_lines(python(source))
    silent = [
        f"{f.name}({a.arg})" for f in public for a in arguments(f) if is_plain(a) and a.end_lineno not in comments
    ]
    return wrong + [f"no comment behind {', '.join(silent)}"] * bool(silent)


def is_import(statement):
    return isinstance(statement, ast.Import | ast.ImportFrom)


def is_text(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def text_offences(source):
    "List what no code cell may hold."
    wrong = [
        f"'{m.group()}' without an issue number" for m in re.finditer(r"\b(TODO|FIXME|XXX)\b(?!\s*\(?#\d)", source)
    ]
    stars = [
        m.group(1) for m in re.finditer(r"^\s*from (\S+) import \*", source, re.M) if m.group(1) != "fastcore.test"
    ]
    wrong += [f"from {star} import *" for star in stars]
    wrong += ["a closing nbdev_export cell"] * ("nbdev_export(" in source)
    statements = [s for s in ast.parse(python(source)).body if not is_text(s)]
    kinds = {is_import(s) for s in statements}
    wrong += ["an annotation that names nothing (F821): the page of the function cannot be made"] * (
        "noqa: F821" in source
    )
    return wrong + ["imports and work in one cell"] * (kinds == {True, False})


# What a stored output may hold depends on the machine or the moment.
UNSTABLE = {
    "an absolute path": re.compile(r"(?<![\w.:/-])/(?:tmp|home|root|work|Users|var|private)/\S+"),
    "a clock time": re.compile(r"\d{2}:\d{2}:\d{2}[.,]\d{3}"),
    "an address in memory": re.compile(r"\bat 0x[0-9a-f]{6,}"),
    "a new id": re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[47][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\b"),
}


def output_offences(output):
    "List what is wrong with one stored output."
    data = output.get("data", {})
    texts = [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))]
    text = "\n".join("".join(t) for t in texts)
    wrong = [f"{what}: {m.group()}" for what, pattern in UNSTABLE.items() if (m := pattern.search(text))]
    wrong += [f"printed on stderr: {text[:80]!r}"] * (output.get("name") == "stderr")
    picture = base64.b64decode("".join(data.get("image/png", "")))
    return wrong + [f"a picture of {len(picture)} bytes, at most {MAX_PICTURE_BYTES}"] * (
        len(picture) > MAX_PICTURE_BYTES
    )


def title_offences(source):
    "List what is wrong with a notebook's first cell: an H1, then one full sentence behind `>`."
    lines = [line for line in source.strip().splitlines() if line.strip()]
    wrong = ["does not begin with '# name'"] * (not re.match(r"# \S", lines[0]))
    quoted = [line for line in lines[1:] if line.startswith(">")]
    if len(quoted) != 1 or not lines[1:] or lines[1] != quoted[0]:
        return [*wrong, "needs one '> sentence' right below the title"]
    return wrong + ["the sentence does not end with a period"] * (not quoted[0].rstrip().endswith("."))


@each(PAGES)
def test_opening(path):
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown", "the first cell is the title"
    assert title_offences("".join(first["source"])) == []


@each(LIBRARY)
def test_library_notebook_names_its_module(path):
    second = json.loads(path.read_text())["cells"][1]
    assert re.fullmatch(r"#\|\s*default_exp \S+", "".join(second["source"]).strip()), (
        "the second cell is #| default_exp"
    )


@each(LIBRARY)
def test_exported_cells_are_small(path):
    wrong = [(i, w) for i, source in enumerate(exported(path)) for w in shape_offences(source)]
    assert wrong == []


@each(LIBRARY)
def test_exported_code_is_short(path):
    lines = [line for s in exported(path) for line in s.splitlines() if line.strip() and not line.startswith("#|")]
    assert len(lines) <= MAX_EXPORTED_LINES


@each(PAGES)
def test_code_cells(path):
    # the cell of parameters is one on purpose: its types have to be known where it is read
    code = [c["source"] for c in cells(path) if "parameters" not in c["metadata"].get("tags", [])]
    assert [(i, w) for i, source in enumerate(code) for w in text_offences(source)] == []


@each(PAGES)
def test_stored_outputs(path):
    assert [(i, w) for i, c in enumerate(cells(path)) for o in c["outputs"] for w in output_offences(o)] == []


# Pipelines


def pipeline_offences(path):
    "List what is wrong with a pipeline notebook."
    code = cells(path)
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    wrong = [f"{len(tagged)} cells tagged 'parameters', exactly one is wanted"] * (len(tagged) != 1)
    wrong += ["no '- skip_exec: true' in the title cell"] * (
        "- skip_exec: true" not in cells(path, "markdown")[0]["source"]
    )
    wrong += ["stored outputs"] * any(c["outputs"] for c in code)
    kinds = FUNCTIONS | ast.ClassDef | ast.For | ast.While | ast.AsyncFor
    trees = [ast.parse(python(c["source"])) for c in code]
    wrong += [f"a {type(n).__name__}" for tree in trees for n in ast.walk(tree) if isinstance(n, kinds)]
    texts = [
        n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    return wrong + [f"SQL: {t[:40]!r}" for t in texts if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\s", t)]


def declared(path):
    "Read the parameters that a pipeline notebook declares."
    return {
        p.name
        for c in cells(path)
        if "parameters" in c["metadata"].get("tags", [])
        for p in read_parameters(c["source"])
    }


def stages(path):
    "Read the stages of a parameter file: name → (notebook, keys given, keys needed)."
    content = yaml.safe_load(path.read_text())["stages"]
    return {
        stage: (
            body.get("notebook", f"nbs/pipelines/{stage}.ipynb"),
            sorted(body.get("parameters") or {}),
            sorted(body.get("needs") or {}),
        )
        for stage, body in content.items()
    }


def test_there_are_pipelines():
    assert {p.stem for p in PIPELINES} >= {"prep", "train", "evaluate", "promote"}
    assert (NBS / "pipelines" / ".notest").is_file(), "without .notest nbdev-test runs the templates in place"


@each(PIPELINES)
def test_pipeline_notebook(path):
    assert pipeline_offences(path) == []


NO_PIPELINES = ("alerts.yaml", "retention.yaml")
PARAMS = [p for p in sorted((ROOT / "params").rglob("*.yaml")) if p.parent.name not in ("experiments", "triggers")]


@each([p for p in PARAMS if p.name not in NO_PIPELINES])
def test_parameter_file_names_what_exists(path):
    for stage, (notebook, given, needed) in stages(path).items():
        found = declared(ROOT / notebook)
        assert set(given) | set(needed) <= found, f"stage {stage}: {notebook} has no such parameter"


@each(sorted((ROOT / "params" / "smoke").glob("*.yaml")))
def test_smoke_file_has_the_same_keys(path):
    assert stages(path) == stages(ROOT / "params" / path.name)


# What is made from the notebooks


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the tree without what git ignores, so that a check never touches the checkout."
    target = tmp_path_factory.mktemp("tree") / "copy"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for file in filter(None, names.stdout.decode().split("\0")):
        if (ROOT / file).exists():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target / file, follow_symlinks=False)
    return target


def changed_by(command, tree):
    "Run an nbdev command in a tree and list the files that it changed."
    before = {p: p.read_bytes() for p in tree.rglob("*") if p.is_file()}
    call = f"from nbdev.{command[0]} import {command[1]} as f; f()"
    subprocess.run([sys.executable, "-c", call], cwd=tree, check=True, capture_output=True, timeout=300)
    after = {p: p.read_bytes() for p in tree.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    different = [p for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
    return sorted(p.relative_to(tree).as_posix() for p in different)


def test_clean_changes_nothing(copy):
    assert changed_by(("clean", "nbdev_clean"), copy) == []


def test_export_changes_nothing(copy):
    assert changed_by(("doclinks", "nbdev_export"), copy) == []


def test_export_is_noticed(copy, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(copy, tree, symlinks=True)
    module = tree / "mlops_workbench" / "core.py"
    module.write_text(module.read_text() + "\nforgotten = True\n")
    assert "mlops_workbench/core.py" in changed_by(("doclinks", "nbdev_export"), tree)


# Files at the top


def test_one_site_configuration():
    assert (NBS / "_quarto.yml").read_text() == (ROOT / "_quarto.yml").read_text(), (
        "nbs/_quarto.yml is a symlink to ../_quarto.yml"
    )


def test_environments():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    assert parser.sections() == ["local", "staging", "production"]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_nbdev_keeps_the_parameters_tag():
    assert project()["tool"]["nbdev"]["allowed_cell_metadata_keys"] == ["tags"], (
        "nbdev-clean would delete papermill's tag"
    )


def test_versions_agree():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "mlops_workbench" / "__init__.py").read_text()).group(1)
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert version in headings, f"CHANGELOG.md has no section {version}"


def test_constraints_are_within_the_ranges():
    lines = [Requirement(r) for r in (ROOT / "constraints.txt").read_text().splitlines() if r and not r.startswith("#")]
    pinned = {re.sub(r"[-_.]+", "-", r.name.lower()): str(r.specifier).removeprefix("==") for r in lines}
    assert all(re.fullmatch(r"[\w.!]+", version) for version in pinned.values()), (
        "one exact version, no local suffix such as +cpu"
    )
    wanted = [
        Requirement(r)
        for r in [*project()["project"]["dependencies"], *project()["project"]["optional-dependencies"]["dev"]]
    ]
    missing = [
        str(r)
        for r in wanted
        if not r.specifier.contains(pinned.get(re.sub(r"[-_.]+", "-", r.name.lower()), "0"), prereleases=True)
    ]
    assert missing == []


# The rules can be broken


@pytest.mark.parametrize(
    "source, expected",
    [
        ("#| export\ndef f() -> None:\n    return None", []),
        ("#| export\ndef f(x) -> int: # x\n    return 1", ["f: no annotation of x"]),
        ("#| export\ndef f(\n    x: int,\n) -> int:\n    return x", ["no comment behind f(x)"]),
        ("#| export\ndef f(\n    x: int,  # why\n):\n    return x", ["f: no annotation of what it returns"]),
        ("#| export\n" + "x = 1\n" * 41, ["41 lines, at most 40"]),
        (
            "#| export\ndef f() -> None:\n if 1:\n  for _ in ():\n   with x:\n    if 2:\n     pass",
            ["f: 4 levels of nesting, at most 3"],
        ),
        ("#| export\ndef f() -> None:\n if 1:\n  pass\n elif 2:\n  pass\n elif 3:\n  pass\n elif 4:\n  pass", []),
        (
            "#| export\nclass A:\n    def f(self, a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> None: ...",
            ["f: 7 parameters, at most 6"],
        ),
    ],
)
def test_shape_can_be_wrong(source, expected):
    assert shape_offences(source) == expected


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import os\nimport sys", []),
        ("import os\nos.getcwd()", ["imports and work in one cell"]),
        ("from fastcore.test import *", []),
        ("from pandas import *", ["from pandas import *"]),
        ("x = 1  # TODO faster", ["'TODO' without an issue number"]),
        ("x = 1  # TODO #12 faster", []),
    ],
)
def test_code_can_be_wrong(source, expected):
    assert text_offences(source) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("saved to 'models/m-1'", []),
        ("saved to /tmp/models/m-1", ["an absolute path: /tmp/models/m-1"]),
        ("at 2026-03-01T12:00:00+00:00", []),
        ("12:00:01.123 INFO", ["a clock time: 12:00:01.123"]),
        ("<object at 0x7f0011223344>", ["an address in memory: at 0x7f0011223344"]),
        ("6f1c2f0e-3c0b-5d4a-9a52-0d6f6b8e7a11", []),
        ("019a5b1c-3c0b-7d4a-9a52-0d6f6b8e7a11", ["a new id: 019a5b1c-3c0b-7d4a-9a52-0d6f6b8e7a11"]),
    ],
)
def test_output_can_be_wrong(text, expected):
    assert output_offences({"text": text}) == expected


@pytest.mark.parametrize(
    "source, expected",
    [
        ("# core\n\n> Say it in one sentence.", []),
        ("# core\n\n> Say it in one sentence.\n\n- skip_exec: true", []),
        ("## core\n\n> Say it.", ["does not begin with '# name'"]),
        ("# core\n\n> Say it", ["the sentence does not end with a period"]),
        ("# core\n\nSay it.", ["needs one '> sentence' right below the title"]),
    ],
)
def test_title_can_be_wrong(source, expected):
    assert title_offences(source) == expected
