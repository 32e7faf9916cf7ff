"Pages: one file, nothing loaded, nothing run, and every cell and picture of the notebook in it."

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_workbench.core import WorkbenchError
from mlops_workbench.page import notebook_html, quiet_html, read_figures

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
PAGES = Path(__file__).resolve().parent.parent / "nbs"


class Sources(HTMLParser):
    "Collects every address that a browser would load, and everything that it would run."

    def __init__(self):
        super().__init__()
        self.found, self._style = [], False

    def handle_starttag(self, tag, attrs):
        self._style = tag == "style"
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form"):
            self.found.append(tag)
        for name, value in attrs:
            loads = name in ("src", "srcset", "poster", "data", "background", "xlink:href") or (
                name == "href" and tag != "a"
            )
            if loads and not (value or "").startswith(("data:image/", "#")):
                self.found.append(f"{tag} {name}={value}")
            if name.startswith("on") or (value or "").strip().lower().startswith("javascript:"):
                self.found.append(f"{tag} {name}={value}")
            if name == "style" and re.search(r"url\(|@import", value or ""):
                self.found.append(value)

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        if self._style and re.search(r"url\((?!['\"]?(data:|#))|@import", data):
            self.found.append(data)


def sources(html):
    parser = Sources()
    parser.feed(html)
    parser.close()
    return parser.found


def code(source, *outputs, **metadata):
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": list(outputs), "execution_count": 1}


def shown(**data):
    return {"output_type": "display_data", "metadata": {}, "data": {k.replace("_", "/", 1): v for k, v in data.items()}}


@pytest.fixture
def page(tmp_path):
    def write(*cells):
        path = tmp_path / "1-train.ipynb"
        path.write_text(json.dumps({"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        return notebook_html(path)

    return write


@pytest.mark.parametrize("path", sorted(PAGES.rglob("*.ipynb")), ids=lambda p: p.stem)
def test_no_notebook_of_ours_loads_anything(path):
    html = notebook_html(path)
    assert sources(html) == []
    assert html.count("Content-Security-Policy") >= 1 and "default-src 'none'" in html


@pytest.mark.parametrize(
    "hostile",
    [
        "<script src=https://cdn.example/x.js></script>",
        "<script>go()</script>",
        "<SCRIPT>go()</SCRIPT >",
        "<img src='https://e.example/x.png' onerror=go()>",
        "<img srcset='https://e.example/x.png 2x'>",
        "<link rel=stylesheet href='//e.example/x.css'>",
        "<style>@import 'https://e.example/x.css'; p { background: url(https://e.example/x.png) }</style>",
        "<p style='background: url(https://e.example/x.png)'>",
        "<svg><image xlink:href='https://e.example/x.png'/><use href='https://e.example/x.svg#a'/></svg>",
        "<iframe src='https://e.example'></iframe>",
        "<a href='javascript:go()'>x</a>",
        "<a href=' JavaScript:go()'>x</a>",
        "<object data='https://e.example/x.svg'></object>",
        "<base href='https://e.example/'>",
        "<video poster='https://e.example/x.png'></video>",
        "<table background='https://e.example/x.png'>",
        "<div onclick='go()'>",
    ],
)
def test_what_would_be_loaded_or_run_is_taken_out(hostile):
    assert sources(hostile) != [] or "href" in hostile or "srcset" in hostile
    quieted = quiet_html(f"<p>before</p>{hostile}<p>after</p>")
    assert sources(quieted) == []
    assert "<p>before</p>" in quieted and "go()" not in quieted and "e.example" not in quieted


@given(st.text(alphabet="<>/='\" abcimgsrhef:onurl()&;#!-", max_size=80))
def test_no_text_becomes_a_source(text):
    assert sources(quiet_html(text)) == []


@given(st.text(alphabet="abc <>/b&;#x1", max_size=60))
def test_quieting_twice_changes_nothing_more(text):
    once = quiet_html(f"{text}<img src='https://e.example/x.png'>")
    assert quiet_html(once) == once


def test_what_is_quiet_stays_as_it_is():
    table = "<table border='1' class=\"dataframe\"><tr><td>a &amp; b</td><td>1 &lt; 2</td></tr></table>"
    assert quiet_html(table) == table
    assert quiet_html("<a href='https://mlflow.org'>MLflow</a>") == '<a href="https://mlflow.org">MLflow</a>'


def test_an_output_of_each_kind_is_on_the_page(page):
    html = page(
        {"cell_type": "markdown", "source": ["# Train\n", "- skip_exec: true\n", "\n", "Some *prose* and $x^2$."]},
        code("n = 1", tags=["parameters"]),
        code(
            "go()",
            {"output_type": "stream", "name": "stdout", "text": ["step 1\n", "\x1b[31mred\x1b[0m <b>\n"]},
            {"output_type": "stream", "name": "stderr", "text": "careful"},
            shown(image_png=DOT, text_plain="<Figure>"),
            shown(text_html=["<table class='dataframe'>", "</table>"], text_plain="table"),
            shown(text_markdown="**verdict**: pass"),
            shown(**{"image_svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'><rect width='3'/></svg>"}),
            {"output_type": "execute_result", "metadata": {}, "data": {"text/plain": ["{'a': 1,\n", " 'b': '<c>'}"]}},
            papermill={"duration": 3.21},
        ),
        {"cell_type": "raw", "source": "raw"},
    )
    for told in (
        "<em>prose</em>",
        "$x^2$",
        "1 · parameters",
        "2 · 3.2 s",
        'class="ansi-red-fg">red</span> &lt;b&gt;',
        "careful",
        f"data:image/png;base64,{DOT}",
        "<table class='dataframe'>",
        "<strong>verdict</strong>",
        "<rect width='3'/>",
        "&#39;b&#39;: &#39;&lt;c&gt;&#39;",
    ):
        assert told in html or told.replace("&#39;", "'") in html, told
    assert "skip_exec" not in html and "MathJax" not in html


def test_a_failed_cell_is_marked_and_its_error_told(page):
    error = {
        "output_type": "error",
        "ename": "ValueError",
        "evalue": "no rows",
        "traceback": ["\x1b[31mValueError\x1b[39m: no rows"],
    }
    html = page(code("fine()"), code("fail()", error))
    assert html.count("class='failed'") == 1
    assert "no rows" in html[html.index("class='failed'") :]


def test_an_attachment_is_embedded(page):
    cell = {
        "cell_type": "markdown",
        "source": "![curve](attachment:c.png)",
        "attachments": {"c.png": {"image/png": DOT}},
    }
    assert f"data:image/png;base64,{DOT}" in page(cell)


def test_a_picture_from_elsewhere_is_not_fetched(page):
    html = page({"cell_type": "markdown", "source": "![curve](https://e.example/x.png)\n\n[link](https://e.example)"})
    assert sources(html) == [] and 'href="https://e.example"' in html


def test_figures_are_found_under_their_heading(tmp_path):
    path = tmp_path / "n.ipynb"
    cells = [
        {"cell_type": "markdown", "source": "# Train\n\n## Act"},
        code("a"),
        code("plot()", shown(image_png=DOT + "\n"), shown(text_plain="no picture")),
        {"cell_type": "markdown", "source": "no heading"},
        code("plot()", shown(**{"image_svg+xml": "<svg><script>go()</script></svg>", "image_png": DOT})),
    ]
    path.write_text(json.dumps({"cells": cells}))
    found = read_figures(path)
    assert [(f.cell, f.heading) for f in found] == [(2, "Act"), (3, "Act")]
    assert base64.b64decode(found[0].source.split(",")[1]) == base64.b64decode(DOT)
    assert found[1].source == "<svg></svg>"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"cells": 1}', "null"])
def test_a_file_that_is_no_notebook_is_told_in_one_line(tmp_path, content):
    path = tmp_path / "1-train.ipynb"
    path.write_text(content)
    with pytest.raises(WorkbenchError, match="^1-train.ipynb is not a notebook"):
        notebook_html(path)


def test_a_notebook_that_is_gone_is_told_in_one_line(tmp_path):
    with pytest.raises(WorkbenchError, match="^there is no notebook 1-train.ipynb"):
        notebook_html(tmp_path / "1-train.ipynb")
