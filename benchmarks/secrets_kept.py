"""Whether a secret ever gets out: 200 are planted, told in every way a notebook has, and looked for in everything that is left.

    python -m benchmarks.secrets_kept            # a few minutes
    python -m benchmarks.secrets_kept --direct   # only what a process records in MLflow by itself, without kernels

The secrets are of fourteen alphabets (quotes, backslashes, URL and HTML characters, other scripts, base64, numbers, keys in many
lines) and come from variables, files, a folder of files and the database's URL. Notebooks print them, raise them, put them into
tables, log them, and die with them on their lips. Then every notebook, its HTML, every artefact, everything the driver printed and
every row of every table is searched: for the value as it is, for each line of it, for its beginning where it is long, and for
both in every encoding, in the text and in what the text says once it is decoded. The search shares no code with what hides them,
and is itself put to the test first, on texts that nobody redacted. Exit code 1: something was found, or was never planted.
"""

import argparse
import base64
import html
import json
import os
import random
import re
import string
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from benchmarks.bench import ROOT, Place, write_notebook
from mlops_workbench.store import connect, read_rows, temporary_store

N = 200
WORD = string.ascii_letters + string.digits
ALPHABETS = (
    WORD,
    string.digits,
    WORD + "'\"",
    WORD + "\\",
    WORD + "\\\"'nrtxu",
    WORD + "%&=+?/#:@;,",
    WORD + "<>&\"';",
    WORD + "+/=",
    WORD + "-_.~",
    WORD + " ",
    WORD + "äöüßéñ",
    "абвгдежз" + "漢字仮名" + "😀🚀☃" + WORD,
    string.punctuation,
    WORD + "${}()[]|`!*^",
)


def value_of(number: int) -> str:
    "Make one secret."
    rng = random.Random(number)
    if number % 20 == 19:  # a key in many lines
        lines = ["".join(rng.choices(WORD + "+/", k=64)) for _ in range(4)]
        return "\n".join(["-----BEGIN PRIVATE KEY-----", *lines, "-----END PRIVATE KEY-----"])
    n = 90 if number % 10 == 7 else rng.randint(10, 40)
    return "".join(rng.choices(ALPHABETS[number % len(ALPHABETS)], k=n)).strip().ljust(8, "x")


PRELUDE = """
import base64, html, json, logging, os, pprint, subprocess, sys, traceback, urllib.parse, warnings
from pathlib import Path
import pandas as pd
from IPython.display import HTML, Markdown, display
from mlops_workbench.settings import read_settings, resolve_secret
from mlops_workbench.store import open_store
from mlops_workbench.tracking import (
    log_dataset, log_figure, log_file, log_model, log_parameters, log_table, log_tags, open_run, open_tracking, start_run
)
settings = read_settings()
store = open_store(settings)
run = open_run(open_tracking(store, settings), settings, "leaky", "stage")
secrets = {name: resolve_secret(f"secret://{name}") for name in names}
"""

SPEAK = [
    "for name, value in secrets.items():\n    print(name, value)",
    "for value in secrets.values():\n    print(value[: len(value) // 2], end='')\n    print(value[len(value) // 2 :])",
    "for value in secrets.values():\n    print(value[:3], end='', flush=True)\n    print(value[3:])",
    "print(list(secrets.values()), repr(secrets))\nprint(json.dumps(secrets), json.dumps(json.dumps(secrets)))",
    "print(json.dumps(secrets, ensure_ascii=False))\npprint.pprint(secrets, width=300)",
    "for value in secrets.values():\n    print(html.escape(value), urllib.parse.quote(value), urllib.parse.quote_plus(value))",
    "for value in secrets.values():\n    print(value.encode(), ascii(value), value.encode().hex())",
    "for value in secrets.values():\n"
    "    print('Basic', *(base64.b64encode(('u' * i + value).encode()).decode() for i in range(3)))",
    "for value in secrets.values():\n    logging.getLogger('leak').error('token %s', value)\n    print(value, file=sys.stderr)",
    "warnings.warn('|'.join(secrets.values()))",
    "secrets",
    "pd.DataFrame({'token': list(secrets.values())})",
    "pd.set_option('display.max_rows', 500)\ndisplay(pd.DataFrame({'token': list(secrets.values()), 'n': 1}))",
    "display(HTML(pd.DataFrame(secrets, index=['x']).T.to_html(max_rows=None)))",
    "display(HTML(''.join(f'<p title=\"{html.escape(v)}\">{html.escape(v, quote=False)}</p>' for v in secrets.values())))",
    "display(Markdown('\\n'.join(f'- `{value}`' for value in secrets.values())))",
    "handle = display('nothing', display_id=True)\nhandle.update(list(secrets.values()))",
    "print({name: os.environ[name] for name in names if name in os.environ})",
    "echo = [sys.executable, '-c', 'import sys; print(*sys.argv[1:])', *secrets.values()]\n"
    "print(subprocess.run(echo, capture_output=True, text=True).stdout)\nsubprocess.run(echo)",
    "class Client:\n    def __repr__(self):\n        return f'Client(keys={list(secrets.values())!r})'\n\nClient()",
    "print(settings, store, run, settings.database_url, store.url)",
    "for value in secrets.values():\n    try:\n        raise ValueError(value)\n"
    "    except ValueError:\n        traceback.print_exc()",
    "try:\n    try:\n        int('|'.join(secrets.values()))\n    except ValueError as error:\n"
    "        raise KeyError(secrets) from error\nexcept KeyError:\n    print(traceback.format_exc())",
]

TRACK = [
    "log_parameters(run, {f'p.{name}': value for name, value in secrets.items()})",
    "log_parameters(run, {f'nested.{name}': {'key': [value]} for name, value in secrets.items()})",
    "log_tags(run, {f't.{name}': f'https://host/?token={urllib.parse.quote(value)}' for name, value in secrets.items()})",
    "log_tags(run, {f'r.{name}': repr(value) for name, value in secrets.items()})",
    "for name, value in list(secrets.items())[:20]:\n"
    "    log_dataset(run, f'd/{name}-{value}'[:200], name * 9, f's3://{value}@host/d', 'training')\n"
    "    start_run(run.tracking, 'leaky', value[:200], {'token': value})",
    "folder = Path(os.environ['SCRATCH']) / str(os.getpid())\nfolder.mkdir(parents=True)\nvalues = list(secrets.values())\n"
    "(folder / 'a.txt').write_text('\\n'.join(values))\n(folder / 'a.md').write_text('\\n\\n'.join(values))\n"
    "(folder / 'a.log').write_text('\\n'.join(map(repr, values)))\n(folder / 'a.json').write_text(json.dumps(secrets))\n"
    "(folder / 'b.json').write_text(json.dumps({'inner': json.dumps(secrets)}))\n"
    "(folder / 'a.html').write_text('<br>'.join(map(html.escape, values)))\n"
    "(folder / 'a.yaml').write_text(__import__('yaml').safe_dump(secrets))\n"
    "(folder / 'b.yaml').write_text(__import__('yaml').safe_dump(values, allow_unicode=True, width=40))\n"
    "pd.DataFrame({'token': values}).to_csv(folder / 'a.csv', index=False)\n"
    "(folder / 'a.svg').write_text('<svg>' + ''.join(f'<text>{html.escape(v)}</text>' for v in values) + '</svg>')\n"
    "(folder / 'a.ipynb').write_text(json.dumps({'cells': [{'source': repr(v), 'outputs': [{'text': [v]}]} for v in values]}))\n"
    "log_file(run, folder)\nlog_file(run, folder / 'a.txt', 'alone')",
    "rows = pd.DataFrame({'token': values, 'n': range(len(values)), 'nested': [[v] for v in values]})\n"
    "rows.attrs = {'notes': values}\nlog_table(run, rows, 'tokens')\nrows.to_parquet(folder / 'rows.parquet')\n"
    "log_file(run, folder / 'rows.parquet', 'parquet')",
    "from matplotlib.figure import Figure\nfigure = Figure()\nfigure.subplots().set_title('plain ' + values[0])\n"
    "log_figure(run, figure, 'title.svg')",
    "model = folder / 'model'\nmodel.mkdir()\n(model / 'model.json').write_text('{}')\n"
    "log_model(run, 'm', model, 'mlops_workbench.model', ['mlops_workbench'], {'tokens': secrets})",
]

LAST = "from mlops_workbench.stage import record_outputs\nrecord_outputs(run, tokens=secrets, token=secrets[names[0]])"

PIPELINES = {
    "leaky": {"speak": [*SPEAK, LAST], "track": [*TRACK, LAST], "take": ["print(token, tokens)", LAST]},
    "failing": {"fail": ["print(secrets)", "raise RuntimeError(f'no luck with {list(secrets.values())}')", LAST]},
    "dying": {"die": ["print(secrets, flush=True)\nimport time\ntime.sleep(2)\nos.kill(os.getpid(), 9)", LAST]},
}


def plant(place: Place, values: Mapping[str, str]) -> dict[str, str]:  # variables of the driver
    "Put the secrets into their places, and the notebooks that cannot keep them into a project."
    files, folder, variables = place.folder / "files", place.folder / "secrets", {}
    files.mkdir()
    folder.mkdir()
    for number, (name, value) in enumerate(values.items()):
        if number % 4 == 1:
            (files / name).write_text(value + "\n", encoding="utf-8")
            variables[f"{name}_FILE"] = str(files / name)
        elif number % 4 == 2:
            (folder / name).write_text(value, encoding="utf-8")
        else:
            variables[name] = value
    for name, stages in PIPELINES.items():
        text = ["task: mlops_workbench.planner", "stages:"]
        for stage, cells in stages.items():
            path = place.project / "nbs" / name / f"{stage}.ipynb"
            taken = "token: str = ''  # one\ntokens: dict = {}  # all\n" if stage == "take" else ""
            write_notebook(path, [f"{taken}names: list = []  # of the secrets", PRELUDE, *cells])
            text += [f"  {stage}:", f"    notebook: nbs/{name}/{stage}.ipynb"]
            text += ["    parameters:", f"      names: [{', '.join(values)}]"]
            text += ["    needs: {token: track.token, tokens: track.tokens}"] if stage == "take" else []
        (place.project / "params" / f"{name}.yaml").write_text("\n".join(text) + "\n")
    return variables | {"WORKBENCH_SECRETS_FOLDER": str(folder), "WORKBENCH_ROOT": str(place.project)}


def drive(name: str) -> None:
    "Run one pipeline in this process, and say everything there is to say."
    from mlops_workbench.core import WorkbenchError
    from mlops_workbench.pipeline import run_pipeline
    from mlops_workbench.plan import read_pipeline
    from mlops_workbench.settings import read_settings

    settings = read_settings()
    try:
        done = run_pipeline(
            read_pipeline(settings.root, name),
            settings,
            listen=lambda event: print(json.dumps(event, default=str, ensure_ascii=False)),
        )
        print(json.dumps(done, default=str))
    except WorkbenchError as error:
        print(error, file=sys.stderr)


def direct() -> None:
    "Do what the notebook `track` does, without a kernel."
    names = {"names": os.environ["PLANTED"].split()}
    for cell in (PRELUDE, *TRACK):
        exec(cell, names)


# The search


def forms(value: str) -> set[str]:
    "List what gives a value away, as it is and encoded."
    lines = [line for line in value.splitlines() if len(line) >= 8 and not line.startswith("-----")]
    beginnings = [value[:24]] if len(value) >= 60 and "\n" not in value else []
    found = {value, *lines}
    for text in list(found):
        raw = text.encode()
        found |= {raw.hex(), raw.hex().upper(), repr(text)[1:-1], json.dumps(text)[1:-1], html.escape(text)}
        found |= {ascii(text)[1:-1], repr(raw)[2:-1], urllib.parse.quote(text), urllib.parse.quote_plus(text)}
        for skipped in range(3):
            whole = base64.b64encode(bytes(skipped) + raw).decode()
            found.add(whole[-(-8 * skipped // 6) : 8 * (skipped + len(raw)) // 6])
    return found | set(beginnings)


def decoded(text: str) -> list[str]:
    "Read a text as programs would: once and twice unescaped, as HTML, as a URL."
    short = {"n": "\n", "t": "\t", "r": "\r"}

    def unescape(text: str) -> str:
        text = re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text)
        text = re.sub(r"\\(.)", lambda m: short.get(m[1], m[1]), text)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    once, page = unescape(text), html.unescape(text)
    return [once, unescape(once), page, unescape(page), urllib.parse.unquote(text), urllib.parse.unquote_plus(once)]


def strings(value: object) -> Iterator[str]:
    "List the texts in a JSON value, the lines of an output joined."
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list):
        yield from ["".join(value)] if value and all(isinstance(v, str) for v in value) else ()
        for inner in value:
            yield from strings(inner)


def find(text: str, needles: Mapping[str, set[str]]) -> set[str]:
    "Name the secrets that a text gives away."
    texts = [text]
    with suppress(ValueError):
        texts.append("\n".join(strings(json.loads(text))))
    texts += [reading for each in list(texts) for reading in decoded(each)]
    return {
        name
        for name, wanted in needles.items()
        if any(VALUES[name] in each for each in texts) or any(form in each for form in wanted for each in texts[:2])
    }


VALUES = {f"S{number:03}": value_of(number) for number in range(N)}


def streams(notebook: dict) -> Iterator[str]:
    "List what each cell printed, the pieces put together as a reader does."
    for cell in notebook.get("cells", []):
        for name in ("stdout", "stderr"):
            yield "".join("".join(o["text"]) for o in cell.get("outputs", []) if o.get("name") == name)


def page(text: str) -> str:
    "Add to HTML what stands side by side on the page, the tags in between left out."
    return text + html.unescape(re.sub(r"\s*<[^>]*>\s*", "", text))


def contents(path: Path) -> str:
    "Read a file as text; a table as its values and its bytes."
    if path.suffix == ".parquet":
        import pandas as pd

        rows = pd.read_parquet(path)
        told = [*map(str, rows.columns), *(str(v) for row in rows.to_numpy().tolist() for v in row), str(rows.attrs)]
        return "\n".join(told) + path.read_bytes().decode(errors="replace")
    text = path.read_bytes().decode(errors="replace")
    return page(text) if path.suffix == ".html" else text


def left_behind(place: Place, url: str, printed: str) -> Iterator[tuple[str, str, str]]:  # (kind, name, text)
    "List everything that runs leave."
    sys.modules.setdefault("rfc3987_syntax", None)
    from nbconvert import HTMLExporter

    for path in sorted(p for p in place.home.rglob("*") if p.is_file()):
        inside = path.relative_to(place.home)
        if path.suffix == ".state" and not path.stat().st_mode & 0o077:
            continue  # what a stopped notebook had computed, for `workbench resume`: its owner's alone, and gone once it ends
        kind = "MLflow" if inside.parts[0] == "artifacts" else "notebooks" if path.suffix == ".ipynb" else "other files"
        yield kind, str(inside), contents(path)
        if path.suffix == ".ipynb" and inside.parts[0] == "runs":
            told = json.loads(path.read_text())
            yield "notebooks", f"{inside} as printed", "\n".join(streams(told))
            yield "HTML", f"{inside} as HTML", page(HTMLExporter().from_filename(str(path))[0])
    yield "logs", "what the drivers printed", printed
    with connect(type("Opened", (), {"url": url})) as connection:
        tables = read_rows(
            connection,
            "SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1",
        )
        for table in tables:
            rows = read_rows(connection, f"SELECT row_to_json(t)::text AS row FROM {table['name']} t")
            yield "database", table["name"], "\n".join(row["row"] for row in rows)
            yield "database", f"values of {table['name']}", json.dumps([json.loads(row["row"]) for row in rows])


def control(needles: Mapping[str, set[str]]) -> int:
    "Count the secrets that the search finds where nobody redacted, in the least visible of many writings."
    ways = [
        lambda v: v,
        repr,
        lambda v: json.dumps([v]),
        lambda v: json.dumps(json.dumps(v)),
        lambda v: html.escape(repr(v)),
        urllib.parse.quote,
        lambda v: base64.b64encode(f"u:{v}".encode()).decode(),
        lambda v: v.encode().hex(),
    ]
    return sum(all(name in find(way(value), {name: needles[name]}) for way in ways) for name, value in VALUES.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--direct", action="store_true", help="without kernels: only what a process records in MLflow")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive or arguments.here:
        return direct() if arguments.here else drive(arguments.drive)
    password = "p'w/of&the db%"
    needles = {name: forms(value) for name, value in VALUES.items()}
    seen = control(needles)
    print(f"{'search':<12} finds {seen} of {N} where nobody redacts")
    with Place() as place, temporary_store() as store, tempfile.TemporaryFile("w+") as output:
        url = store.url.replace("postgres@", f"postgres:{urllib.parse.quote(password, safe='')}@", 1)
        variables = (
            place.variables | plant(place, VALUES) | {"WORKBENCH_DATABASE_URL": url, "PLANTED": " ".join(VALUES)}
        )
        variables["SCRATCH"] = str(place.folder / "scratch")  # what a notebook writes itself is its own business
        modes = [["--here"]] if arguments.direct else [["--drive", name] for name in PIPELINES]
        for mode in modes:
            command = [sys.executable, "-m", "benchmarks.secrets_kept", *mode]
            subprocess.run(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, timeout=600)
        output.seek(0)
        printed = output.read()
        VALUES["password"] = password
        needles["password"] = forms(password)
        found, looked, told = {}, {}, set()
        for kind, name, text in left_behind(place, store.url, printed):
            looked[kind] = looked.get(kind, 0) + 1
            told |= set(re.findall(r"secret://(S\d{3})", text)) if kind in ("notebooks", "MLflow", "logs") else set()
            for secret in sorted(find(text, needles)):
                found.setdefault(kind, []).append(f"{secret} in {name}")
        if len(told) < N:
            print(printed[-3000:])
    print(f"{'planted':<12} {N} secrets and the database's password; {len(told)} of {N} left their reference behind")
    for kind in looked:
        leaks = found.get(kind, [])
        print(
            f"{kind:<12} {len(leaks)} found in {looked[kind]} files or tables{': ' if leaks else ''}{', '.join(leaks[:5])}"
        )
    if found or len(told) < N or seen < N:
        sys.exit(1)


if __name__ == "__main__":
    main()
