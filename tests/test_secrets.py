"""Secrets: found in their four places, and out of every text in whatever alphabet it was written."""

import base64
import csv
import html
import io
import json
import pprint
import random
import string
import sys
import traceback
import urllib.parse
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mlops_workbench import settings as module
from mlops_workbench.core import WorkbenchError
from mlops_workbench.redaction import (
    redact_document,
    redact_outputs,
    redact_table,
    refuse_secrets,
    secret_in,
    without_secrets,
)
from mlops_workbench.settings import known_references, known_secrets, redact, redact_value, resolve_secret

PEM = "-----BEGIN PRIVATE KEY-----\n{}\n{}\n{}\n-----END PRIVATE KEY-----\n".format(
    *("".join(random.Random(i).choices(string.ascii_letters + string.digits + "+/", k=64)) for i in range(3))
)
AWKWARD = [
    "plainenough1",
    "a\"b'c\\d<e>&f g%h+i/j=k",
    "\\\\server\\share\\'",
    "pässwörd-☃-😀",
    "line one of it\nline two of it",
    "  spaces around and   inside  ",
    "dG9rZW4tdGhhdC1pcw==/+",
    "$(rm -rf)`x`;|{}[]",
    "tab\tand\rreturn",
    "%41%42%43&amp;&#39;",
    "''''\"\"\"\"",
    "....…....",
    "!!!!",
    PEM,
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_traces", ())
    monkeypatch.setattr(module, "_told", set())
    monkeypatch.setattr(module, "_from_keyring", lambda name: None)
    monkeypatch.delenv("WORKBENCH_SECRETS", raising=False)


def learn(**secrets):
    for name, value in secrets.items():
        resolve_secret(f"secret://{name}", {name: value})


# Places


def test_the_nearest_place_wins(tmp_path, monkeypatch):
    (tmp_path / "KEY").write_text("from-folder\n")
    (tmp_path / "other").write_text("from-file\n")
    places = {"WORKBENCH_SECRETS_FOLDER": str(tmp_path)}
    monkeypatch.setattr(module, "_from_keyring", lambda name: "from-keyring")
    assert resolve_secret("secret://NONE", places) == "from-keyring"
    assert resolve_secret("secret://KEY", places) == "from-folder"
    assert resolve_secret("secret://KEY", places | {"KEY_FILE": str(tmp_path / "other")}) == "from-file"
    assert resolve_secret("secret://KEY", places | {"KEY_FILE": "x", "KEY": "from-variable"}) == "from-variable"
    assert resolve_secret("no reference", {}) == "no reference"


def test_the_keyring_is_asked_by_our_name(monkeypatch):
    asked = []
    answers = SimpleNamespace(get_password=lambda service, name: asked.append((service, name)) or "from-keyring")
    monkeypatch.undo()
    monkeypatch.setattr(module, "_traces", ())
    monkeypatch.setitem(sys.modules, "keyring", answers)
    assert resolve_secret("secret://KEY", {}) == "from-keyring"
    assert asked == [("mlops_workbench", "KEY")]


@pytest.mark.parametrize("broken", [None, SimpleNamespace(get_password=lambda *_: 1 / 0)])
def test_without_a_keyring_a_secret_is_not_set(monkeypatch, broken):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "keyring", broken)  # None: the library is not installed
    with pytest.raises(WorkbenchError, match="secret 'KEY' is not set: export KEY, .* keyring set mlops_workbench KEY"):
        resolve_secret("secret://KEY", {})


@pytest.mark.parametrize("value", ["", "abc", " abc \n"])
def test_a_secret_that_cannot_be_told_from_chance_is_refused(value):
    with pytest.raises(WorkbenchError, match="cannot be kept out of outputs: use a longer one"):
        resolve_secret("secret://PIN", {"PIN": value})


def test_a_value_is_given_as_it_is_set_and_a_file_without_its_last_line_end(tmp_path):
    (tmp_path / "KEY").write_text("in a file\n")
    assert resolve_secret("secret://KEY", {"KEY": " padded "}) == " padded "
    assert resolve_secret("secret://KEY", {"KEY_FILE": str(tmp_path / "KEY")}) == "in a file"
    assert redact("<padded>") == "<secret://KEY>"


@pytest.mark.parametrize("name", ["", "../passwd", "a/b", "a b", "1", "a..b", "NAME\n"])
def test_a_name_that_could_lead_elsewhere_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="write letters, digits and _"):
        resolve_secret(f"secret://{name}", {"WORKBENCH_SECRETS_FOLDER": str(tmp_path)})


def test_a_file_that_cannot_be_read_is_named_and_not_shown(tmp_path):
    with pytest.raises(WorkbenchError, match="secret 'KEY' cannot be read from .*: No such file"):
        resolve_secret("secret://KEY", {"KEY_FILE": str(tmp_path / "none")})
    (tmp_path / "KEY").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkbenchError, match="it is not UTF-8 text"):
        resolve_secret("secret://KEY", {"WORKBENCH_SECRETS_FOLDER": str(tmp_path)})


def test_names_and_never_values_are_told_to_the_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_SECRETS", str(tmp_path / "names"))
    learn(ONE="value-one", TWO="value-two")
    learn(ONE="value-one")
    assert (tmp_path / "names").read_text() == "ONE\nTWO\n"


def test_who_cannot_tell_the_driver_gets_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_SECRETS", str(tmp_path / "gone" / "names"))
    with pytest.raises(WorkbenchError, match="secret 'ONE' is not given out") as caught:
        learn(ONE="value-one")
    assert "value-one" not in str(caught.value)


def test_a_driver_learns_the_references_in_a_text(monkeypatch):
    monkeypatch.setenv("API_KEY", "value-one")
    assert known_references(["key: secret://API_KEY, and secret://NOWHERE.", "secret://API_KEY"]) == ("API_KEY",)
    assert redact("value-one") == "secret://API_KEY"


# Redaction

ALPHABETS = {
    "itself": lambda v: v,
    "repr": repr,
    "repr of a list": lambda v: repr([v, '"', "'"]),
    "repr of its repr": lambda v: repr(repr(v)),
    "ascii": ascii,
    "bytes": lambda v: repr(v.encode()),
    "JSON": json.dumps,
    "JSON as UTF-8": lambda v: json.dumps({"k": v}, ensure_ascii=False),
    "JSON in JSON in JSON": lambda v: json.dumps(json.dumps(json.dumps([v]))),
    "URL": lambda v: urllib.parse.quote(v, safe=""),
    "URL path": urllib.parse.quote,
    "query": lambda v: urllib.parse.urlencode({"key": v}),
    "URL in a URL": lambda v: urllib.parse.quote(urllib.parse.quote(v, safe=""), safe=""),
    "HTML": html.escape,
    "HTML attribute in JSON": lambda v: json.dumps(html.escape(v)),
    "JSON in HTML": lambda v: html.escape(json.dumps(v)),
    "repr in HTML in JSON": lambda v: json.dumps({"text/html": html.escape(repr(v))}),
    "XML character references": lambda v: v.encode("ascii", "xmlcharrefreplace").decode(),
    "hexadecimal": lambda v: v.encode().hex(),
    "HEXADECIMAL": lambda v: v.encode().hex(":").upper(),
    "base64": lambda v: base64.b64encode(v.encode()).decode(),
    "base64 after one byte": lambda v: base64.b64encode(b"u" + v.encode() + b"xyz").decode(),
    "base64 after two bytes": lambda v: base64.b64encode(b"u:" + v.encode() + b"x").decode(),
    "base64 for URLs": lambda v: base64.urlsafe_b64encode(v.encode()).decode(),
    "base64 in lines": lambda v: base64.encodebytes(v.encode()).decode(),
    "YAML": lambda v: yaml.safe_dump({"a": v}),
    "YAML as UTF-8": lambda v: yaml.safe_dump({"a": [v]}, allow_unicode=True),
    "CSV": lambda v: pd.DataFrame({"a": [v]}).to_csv(index=False),
    "pprint": lambda v: pprint.pformat({"a": v}, width=500),
}


def readings(text):
    "Undo what programs do to texts: whatever a reader could recover easily."
    found = {text}
    for _ in range(3):
        for t in list(found):
            found |= {html.unescape(t), urllib.parse.unquote(t), urllib.parse.unquote_plus(t)}
            for undo in (json.loads, yaml.safe_load, lambda t: t.encode("latin-1", "ignore").decode("unicode_escape")):
                try:
                    found.add(str(undo(t)))
                except Exception:  # not in that alphabet
                    continue
    return found


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("value", AWKWARD, ids=range(len(AWKWARD)))
def test_a_value_is_found_in_every_alphabet(value, alphabet):
    learn(KEY=value)
    written = ALPHABETS[alphabet](value.strip())
    hidden = redact(f"before {written} after")
    assert "secret://KEY" in hidden
    assert hidden.startswith("before ") and hidden.endswith(" after")
    if len(value.strip()) > 6:
        assert not any(value.strip() in reading for reading in readings(hidden))


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=6, max_size=30)


@given(TEXTS, st.sampled_from(sorted(set(ALPHABETS) - {"base64 in lines", "YAML", "YAML as UTF-8", "query"})))
@example("\\\\n\\n\\", "JSON in JSON in JSON")
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_value_is_found(value, alphabet):
    value = value.strip()
    if len(value) < 6 or value in "secret://KEY":
        return
    module._traces = ()
    learn(KEY=value)
    written = ALPHABETS[alphabet](value)
    assert redact(f"before {written} after") != f"before {written} after"
    assert value not in redact(written)


def test_no_secret_no_change():
    learn(KEY="a-value-of-one")
    text = "secret://KEY, a-value, 'of-one' and everything else\n\\ \" & %20 ..."
    assert redact(text) == text
    module._traces = ()
    assert redact("a-value-of-one") == "a-value-of-one"


def test_the_longest_is_hidden_first_and_twice_is_once():
    learn(SHORT="abcd", LONG="xx-abcd-yy", KEY="secret", NAME="LONG")
    once = redact("xx-abcd-yy abcd secret://LONG secret LONG")
    assert once == "secret://LONG secret://SHORT secret://LONG secret://KEY secret://NAME"
    assert redact(once) == once


def test_what_was_cut_short_is_hidden():
    token = "tok-" + "0123456789abcdef" * 5
    learn(TOKEN=token)
    frame = pd.DataFrame({"a": [token, f"<{token}>"]})
    for text in (str(frame), frame.to_html(), repr(frame), f"{token[:20]}…", f"({token[:9]}...{token[-9:]})"):
        assert "tok-01" not in redact(text) and "89abcdef" not in redact(text) and "secret://TOKEN" in redact(text)
    assert redact("tok-0123456789abcdef") == "tok-0123456789abcdef", "a part alone is no secret"


def test_what_a_pipe_broke_is_hidden():
    learn(KEY="tok-päss-☃-1234")
    raw = "before tok-päss-☃-1234 after".encode()
    for cut in range(len(raw)):  # a reader that decodes each piece for itself
        text = raw[:cut].decode(errors="replace") + raw[cut:].decode(errors="replace")
        assert redact(text) == "before secret://KEY after"
    assert redact(raw.decode("latin-1")) == "before secret://KEY after"


def test_each_line_of_a_key_is_hidden_and_its_public_frame_is_not():
    learn(KEY=PEM)
    for line in PEM.splitlines()[1:-1]:
        assert redact(f"> {line} <") == "> secret://KEY <"
        assert redact(line.encode().hex()) == "secret://KEY"
    assert redact("-----BEGIN PRIVATE KEY-----") == "-----BEGIN PRIVATE KEY-----"
    assert redact(PEM) == "secret://KEY\n"


def test_the_parts_of_a_service_account_are_hidden():
    account = json.dumps({"type": "service_account", "private_key": PEM, "token_uri": "https://example.org/token"})
    learn(ACCOUNT=account)
    assert redact(json.loads(account)["private_key"]).strip() == "secret://ACCOUNT"
    assert redact(account) == "secret://ACCOUNT"
    assert redact("https://example.org/token service_account") == "https://example.org/token service_account"


def test_passwords_of_urls_are_hidden():
    learn(DB="postgresql://me:p%40ss%2Fword@db/x", OTHER="postgresql://db/x?user=me&password=word-of-mine")
    assert redact("p@ss/word, p%40ss%2Fword, word-of-mine") == "secret://DB, secret://DB, secret://OTHER"
    assert "p%40" not in redact("postgresql+psycopg://me:p%40ss%2Fword@db/x?options=-csearch_path%3Dmlflow")


def test_exceptions_and_nested_values_are_hidden():
    learn(KEY="k\"e'y\\1234")
    try:
        raise ValueError({"token": "k\"e'y\\1234"})
    except ValueError:
        assert "1234" not in redact(traceback.format_exc().split("Error: ")[-1])
    value = {"k\"e'y\\1234": [("k\"e'y\\1234", 1, None, True, 1.5)]}
    assert redact_value(value) == {"secret://KEY": [("secret://KEY", 1, None, True, 1.5)]}


def test_a_number_that_is_a_secret_is_hidden():
    learn(PIN="123456")
    assert redact_value({"pin": 123456, "n": 1234567, "x": 1.5, "b": True}) == {
        "pin": "secret://PIN",
        "n": 1234567,
        "x": 1.5,
        "b": True,
    }


def test_hostile_texts_cost_no_more_than_their_length():
    learn(KEY='\\\\\\\\!!!"""\\   "!\\\\"" \'?')
    for run in ("\\", "'", '"', " ", "%5c", "&amp;", "!", "\\u"):
        assert redact(run * 3000) == run * 3000  # without bounds in the patterns this would not end


# Files


def test_texts_are_copied_without_secrets_and_left_where_they_are(tmp_path):
    learn(KEY="ké\"y'\\1234")
    folder = tmp_path / "made"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.ipynb").write_text(json.dumps({"cells": [{"outputs": [{"text": repr("ké\"y'\\1234")}]}]}))
    (folder / "b.svg").write_text(f"<svg><!-- {html.escape(chr(34))} ké&quot;y&#x27;\\1234 --></svg>")
    (folder / "c.txt").write_text("nothing")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with without_secrets(folder) as clean:
        assert clean.name == folder.name
        texts = {p.name: p.read_text() for p in clean.rglob("*") if p.is_file()}
    assert sorted(texts) == ["a.ipynb", "b.svg", "c.txt"]
    assert "1234" not in "".join(texts.values()) and texts["c.txt"] == "nothing"
    assert json.loads(texts["a.ipynb"])["cells"][0]["outputs"][0]["text"] == "'secret://KEY'"
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert not clean.exists(), "the copy lives as long as the block"


def test_what_holds_no_secret_is_not_copied(tmp_path):
    (tmp_path / "a.json").write_text('{"a":1}')
    learn(KEY="value-one")
    with without_secrets(tmp_path) as clean:
        assert clean == tmp_path


def test_tables_lose_secrets_and_nothing_else(tmp_path):
    learn(KEY="value-one")
    rows = pd.DataFrame(
        {"n": [1, 2], "text": ["a", "x value-one"], "value-one": [None, 1.5], "nested": [["value-one"], []]}
    )
    rows.attrs = {"source": "value-one"}
    rows.to_parquet(tmp_path / "t.parquet")
    with without_secrets(tmp_path / "t.parquet") as clean:
        kept = pd.read_parquet(clean)
        assert b"value-one" not in clean.read_bytes()
    assert list(kept) == ["n", "text", "secret://KEY", "nested"] and kept["n"].tolist() == [1, 2]
    assert kept["text"].tolist() == ["a", "x secret://KEY"] and kept["nested"][0].tolist() == ["secret://KEY"]
    untouched = rows[["n"]].copy()
    untouched.attrs = {}
    assert redact_table(untouched) is untouched


def test_a_secret_in_bytes_is_refused(tmp_path):
    learn(KEY="value-one")
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x04\x00" + b"value-one")
    assert secret_in(path) == "KEY"
    with (
        pytest.raises(WorkbenchError, match="model.pkl is not text and holds the value of secret://KEY"),
        without_secrets(path),
    ):
        pass
    path.write_bytes(b"")
    assert secret_in(path) == ""


def test_a_model_with_a_secret_is_refused(tmp_path):
    learn(KEY="value-one")
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    refuse_secrets(tmp_path)
    (tmp_path / "model.json").write_text('{"base": "https://value-one@host"}')
    with pytest.raises(WorkbenchError, match="file 'model.json' of the model holds the value of a secret"):
        refuse_secrets(tmp_path)


def test_json_stays_json():
    learn(PIN="4321", KEY="one\ntwo\nlast", WORD="true")
    cell = {"source": ["print(x)\n", "one\n", "two\n", "last\n", "end"], "n": 0.14321, "ok": True, "pin": 4321}
    hidden = json.loads(redact_document(json.dumps({"cells": [cell]}), ".ipynb"))["cells"][0]
    assert hidden == {
        "source": ["print(x)\n", "secret://KEY\n", "end"],
        "n": 0.14321,
        "ok": True,
        "pin": "secret://PIN",
    }


def test_a_secret_printed_in_pieces_is_hidden():
    learn(KEY="value-one")

    def stream(text, name="stdout"):
        return {"output_type": "stream", "name": name, "text": text}

    picture = {"output_type": "display_data", "data": {"text/plain": "value-one"}, "metadata": {}}
    outputs = [stream("a val"), picture, stream("ue-"), stream("val", "stderr"), stream(["one\n", "b"])]
    hidden = redact_outputs(outputs)
    assert [o.get("text", o.get("data")) for o in hidden] == [
        "a secret://KEY\nb",
        {"text/plain": "secret://KEY"},
        "val",
    ]
    notebook = json.dumps({"cells": [{"cell_type": "code", "outputs": outputs}]})
    assert json.loads(redact_document(notebook, ".ipynb"))["cells"][0]["outputs"] == hidden
    harmless = [stream("a"), stream("b")]
    assert redact_outputs(harmless) == harmless, "pieces stay pieces"


def test_broken_json_is_redacted_as_text():
    learn(KEY="value-one")
    assert redact_document("{value-one", ".json") == "{secret://KEY"
    assert redact_document('{"a": 1}', ".json") == '{"a": 1}'


def test_a_csv_reader_finds_no_secret():
    learn(KEY='a"b,c"d;e')
    file = io.StringIO()
    csv.writer(file).writerow(["x", 'a"b,c"d;e'])
    assert list(csv.reader(io.StringIO(redact(file.getvalue()))))[0] == ["x", "secret://KEY"]
    assert known_secrets() == {'a"b,c"d;e': "KEY"}
