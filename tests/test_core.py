"""Parameters: the cell is the schema, and what does not fit it is refused in one line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from mlops_workbench.core import (
    Range,
    check_parameters,
    check_shadowing,
    describe_parameters,
    imported_names,
    read_parameters,
    read_range,
)

ROOT = Path(__file__).resolve().parent.parent

CELL = """
from typing import Literal

rank: int = 16  # LoRA rank; in [1, 512]
rate: float = 5e-3  # peak; in (0, 1)
until: float | None = None  # hours; in [0, inf)
method: Literal["full", "lora"] = "lora"  # what is trained
looks: list[int] = [1, 2]  # steps
name: str = ""  # words in [1, 5]: prose, as the value is no number
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in [1, 512]", Range(1, 512)),
        ("share; in (0, 1)", Range(0, 1, True, True)),
        ("in [0, 1)", Range(0, 1, False, True)),
        ("in (0,1]", Range(0, 1, True, False)),
        ("share of rows in [0.1, .5], the newest", Range(0.1, 0.5)),
        ("peak, in [1e-6, 1E-2]", Range(1e-6, 1e-2)),
        ("in [10_000, inf)", Range(10_000, math.inf, False, True)),
        ("in (-∞, -3]", Range(-math.inf, -3, True, False)),
        ("in the order of arrival", None),
        ("in (rows, columns)", None),
        ("in [0, n_rows)", None),
        ("in [1, 2, 3]", None),
        ("min [1, 2]", None),
        ("in [1 2]", None),
        ("", None),
    ],
)
def test_a_range_is_read_from_the_comment_and_prose_is_left_alone(text, expected):
    stated, rest = read_range(text)
    assert stated == expected
    assert (rest == text) == (expected is None)


@pytest.mark.parametrize("text", ["in [5, 1]", "in (1, 1)", "in [1, 1)", "in [inf, 3]"])
def test_a_range_that_holds_nothing_is_refused(text):
    with pytest.raises(ValueError, match="no number is in"):
        read_parameters(f"rank: int = 1  # LoRA rank; {text}")


def test_bounds_belong_to_a_range_unless_they_are_open():
    closed, opened = Range(1, 3), Range(1, 3, True, True)
    assert [n in closed for n in (0, 1, 3, 4, math.nan)] == [False, True, True, False, False]
    assert [n in opened for n in (1, 1.001, 3)] == [False, True, False]
    assert (str(closed), str(opened), str(Range(0, math.inf, high_open=True))) == ("[1, 3]", "(1, 3)", "[0, inf)")


WRONG = [
    ({"rank": 0}, "rank is 0, expected int in [1, 512]: LoRA rank"),
    ({"rank": 513}, "rank is 513, expected int in [1, 512]"),
    ({"rank": True}, "rank is True (bool), expected int"),
    ({"rank": 2.0}, "rank is 2.0 (float), expected int"),
    ({"rate": 1}, "rate is 1.0, expected float in (0, 1)"),
    ({"rate": math.nan}, "rate is nan, expected float in (0, 1): write a finite number"),
    ({"until": -1.0}, "until is -1.0, expected float | None in [0, inf)"),
    ({"until": math.inf}, "write a finite number"),
    ({"method": "prefix"}, "expected Literal['full', 'lora']"),
    ({"looks": ["a"]}, "expected list[int]"),
    ({"rnk": 1}, "has no parameter 'rnk': did you mean 'rank'"),
]


@pytest.mark.parametrize(("values", "words"), WRONG)
def test_a_value_that_does_not_fit_is_refused_in_one_line(values, words):
    with pytest.raises(ValueError) as caught:
        check_parameters(read_parameters(CELL), values, "stage 'train'")
    assert words in str(caught.value) and str(caught.value).startswith("stage 'train'")
    assert "\n" not in str(caught.value)


def test_a_value_that_fits_is_taken_and_defaults_are_filled_in():
    given = {
        "rank": 512,
        "rate": 0.5,
        "until": None,
        "method": "full",
        "looks": [3],
        "name": "six words are a lot here",
    }
    assert check_parameters(read_parameters(CELL), given) == given
    assert check_parameters(read_parameters(CELL), {})["rank"] == 16
    assert check_parameters(read_parameters("rate: float = 0.5"), {"rate": 1}) == {"rate": 1.0}


CELLS = [
    ("rank: int = 0  # in [1, 512]", "rank is 0, expected int in [1, 512]"),
    ("rank: int = 'a'", "rank is 'a' (str), expected int"),
    ("rank = 16", "write one annotated assignment a line"),
    ("rank: int", "write one annotated assignment a line"),
    ("folder: Path = ''", "of a type that is not known here: use int, float, str, bool, list, dict"),
    ("rank: int = max(1, 2)", "its default is not a plain value"),
    ("rank: int = 1\nrank: int = 2", "declares 'rank' twice"),
    ("rank: int = = 2", "line 1 of the parameters cell is not Python"),
]


@pytest.mark.parametrize(("cell", "words"), CELLS)
def test_a_cell_that_is_no_schema_is_refused_in_one_line(cell, words):
    with pytest.raises(ValueError) as caught:
        read_parameters(cell)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_comment_inside_brackets_belongs_to_its_parameter():
    (found,) = read_parameters("size: int = (\n    4400  # decisions; in [0, 9000]\n)")
    assert (found.help, found.range, found.default) == ("decisions", Range(0, 9000), 4400)


def test_a_schema_is_told_as_json():
    rows = describe_parameters(read_parameters(CELL))
    assert json.loads(json.dumps(rows)) == rows
    told = {row["name"]: (row["type"], row["range"], row["choices"]) for row in rows}
    assert told["rank"] == ("int", "[1, 512]", [])
    assert told["until"] == ("float | None", "[0, inf)", [])
    assert told["method"] == ("str", "", ["full", "lora"])
    assert told["name"] == ("str", "", [])
    assert [row["help"] for row in rows][:2] == ["LoRA rank", "peak"]


def test_plain_types_are_checked_without_pydantic():
    code = (
        "import sys; from mlops_workbench.core import *; p = read_parameters(sys.argv[1]);"
        "check_parameters(p, {'rank': 3, 'method': 'full'}); print('pydantic' in sys.modules)"
    )
    cell = CELL.replace("looks: list[int] = [1, 2]  # steps\n", "")
    done = subprocess.run([sys.executable, "-c", code, cell], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("json", "import json"),
        ("pandas", "import pandas as pd"),
        ("pd", "import pandas as pd"),
        ("os", "import os.path"),
        ("path", "from os import path"),
        ("mlflow", "from mlflow.entities import Run"),
        ("json", "%matplotlib inline\nimport json"),
        ("json", "%%time\nimport json"),
        ("json", "!ls\ndef f():\n    import json"),
        ("json", "files = !ls\nimport json"),
    ],
)
def test_a_parameter_that_hides_an_import_is_refused(name, code):
    with pytest.raises(ValueError, match=f"parameter '{name}' hides .*give the parameter another name"):
        check_shadowing(read_parameters(f"{name}: str = ''"), ["x = 1", code], "stage 'prep'")


def test_a_parameter_that_hides_nothing_is_taken():
    code = ["import numpy as np", "from mlops_workbench.task import load_task", "%%bash\nimport json", "x = ("]
    check_shadowing(read_parameters("task: str = ''\njson: str = ''\ndataset: str = ''"), code)
    assert imported_names(["x = ("]) == {}


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "pipelines").glob("*.ipynb")), ids=lambda p: p.stem)
def test_our_own_notebooks_hide_nothing(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    (tagged,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    check_shadowing(read_parameters(tagged), ["".join(c["source"]) for c in cells])
