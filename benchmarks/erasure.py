"""Whether erased units are gone: a byte search of its own over database, artefacts, archives and notebooks, 50 erasures.

    python -m benchmarks.erasure              # a real run of the planner first, then 50 erasures, about five minutes
    python -m benchmarks.erasure --n 10 --bare  # without the run

Before each erasure new traces are left where work leaves them: a frozen dataset and its copy in the artefact store, a table,
a page and an executed notebook of an MLflow run, a tag and a parameter in MLflow, an archive of events, an exposure, an event
of a neighbour that names the unit, a spooled line, a kernel's state with compressed columns, a forced unit in an experiment's
definition. The search then knows nothing of the workbench: it copies every table of every schema as text, decodes parquet,
JSON, notebooks and pages, opens pickles, and looks for the unit's id and for the ids of its plans and events as they are, in
JSON, in HTML and in URLs. One column is left out, `exp.event_ids`, where an id without anything beside it keeps an event
from being imported again.

The files of the embedded server are searched as well and told apart: its tables, and its write-ahead log, which keeps what was
written to it until its segments are used again.
"""

import argparse
import contextlib
import html
import io
import json
import os
import pickle
import pickletools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import nbformat
import pandas as pd
import psycopg

from mlops_workbench.assignment import assign
from mlops_workbench.core import new_id, utc_now
from mlops_workbench.dataset import freeze_dataset, plan_split, typed_examples
from mlops_workbench.erasure import erase_unit
from mlops_workbench.events import Event, write_events
from mlops_workbench.experiment import Experiment, MetricPlan, Variant, create_experiment, start_experiment
from mlops_workbench.exposure import expose
from mlops_workbench.ledger import verify_ledger
from mlops_workbench.page import notebook_html
from mlops_workbench.planner import task
from mlops_workbench.retention import EventClass, Retention, apply_retention
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, open_store, transaction
from mlops_workbench.tracking import end_run, log_file, log_parameters, log_table, log_tags, open_tracking, start_run

SOURCE = "planner-s0-n1500"  # the history of the smoke profile
ROOT = Path(__file__).resolve().parent.parent


def spelled(text: str) -> set[bytes]:
    "Write a text in the ways that files write it."
    plain = json.dumps(text)[1:-1]
    ways = {text, plain, plain.replace("/", "\\/"), html.escape(text), quote(text), quote(text, safe="")}
    return {w.encode() for w in ways}


def decoded(path: Path) -> bytes:
    "Read a file so that nothing in it is compressed or escaped."
    raw = path.read_bytes()
    if path.suffix == ".parquet":
        rows = pd.read_parquet(io.BytesIO(raw))
        return raw + repr(rows.attrs).encode() + "\n".join(map(repr, rows.to_dict("list").values())).encode()
    if path.suffix in (".ipynb", ".json"):
        with contextlib.suppress(ValueError):
            return raw + repr(json.loads(raw)).encode()
    if path.suffix == ".html":
        return raw + html.unescape(raw.decode("utf-8", "replace")).encode()
    if path.suffix in (".state", ".pkl"):
        with contextlib.suppress(Exception):
            return raw + repr([a for _, a, _ in pickletools.genops(raw[raw.find(b"\x80") :])]).encode()
    return raw


def search_tables(url: str, needles: set[bytes]) -> list[str]:
    "Copy every table as text and look for the needles."
    found = []
    listed = "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE relkind IN ('r', 'm') "
    with psycopg.connect(url, autocommit=True) as connection:
        for schema, name in connection.execute(listed + "ORDER BY 1, 2").fetchall():
            if (schema, name) == ("exp", "event_ids") or schema == "pg_toast":
                continue
            with connection.cursor().copy(f'COPY (SELECT t::text FROM "{schema}"."{name}" t) TO STDOUT') as copy:
                text = b"".join(copy)
            text += text.replace(b"\\\\", b"\\") + text.replace(b'""', b'"')
            found += [f"{schema}.{name}"] * any(needle in text for needle in needles)
    return found


def search_files(home: Path, needles: set[bytes], below: str = "") -> list[str]:
    "Look for the needles in every file, the database's own files apart."
    found = []
    for path in sorted((home / below).rglob("*")):
        name = str(path.relative_to(home))
        if not path.is_file() or (not below and name.startswith("postgres/data") and path.name != "server.log"):
            continue
        content = decoded(path) if not below else path.read_bytes()
        found += [name] * (any(n in content for n in needles) or any(n in name.encode() for n in needles))
    return found


def leave_traces(place: tuple, unit: str, number: int, rng: random.Random) -> None:
    "Leave a unit's traces where work leaves them."
    store, tracking, settings = place
    now = utc_now()
    examples = task.read_examples(store, SOURCE, None)
    dataset = freeze_dataset(
        store, settings, "planner", SOURCE, examples, plan_split(typed_examples(examples)["decided_at"])
    )
    rows = pd.read_parquet(dataset.path / "data.parquet")
    own = rows[rows["unit_id"] == unit]
    folder = settings.home / "runs" / f"made-{number}"
    folder.mkdir(parents=True)
    output = nbformat.v4.new_output("execute_result", {"text/plain": own.to_string(), "text/html": own.to_html()})
    cells = [nbformat.v4.new_code_cell(f"explain({unit!r})", outputs=[output]), nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "0-look.ipynb")
    (folder / "0-look.html").write_text(notebook_html(folder / "0-look.ipynb"))
    (folder / "page.html").write_text(f"<a href='/units/{quote(unit, safe='')}'>one</a>{own.to_html()}")
    own.to_csv(folder / "rows.csv", index=False)
    (folder / "served.jsonl").write_text(json.dumps({"unit_id": unit, "n": 1}) + "\n" + json.dumps({"n": 2}) + "\n")
    (folder / "0-look.state").write_bytes(b"{}\n" + pickle.dumps({"rows": own}))
    spool = settings.home / "spool"
    spool.mkdir(exist_ok=True)
    line = (
        f"{new_id()}\tplan_decided\thousehold\t{unit}\t{{}}\t{{}}\t{{}}\t{{}}\t{now.isoformat()}\t{now.isoformat()}\n"
    )
    (spool / f"{number}.lines").write_text(line)
    run = start_run(tracking, "planner", f"look {number}", {})
    log_parameters(run, {"unit": unit})
    log_tags(run, {"looked_at": f"the weeks of {unit}"})
    log_table(run, rows.sample(200, random_state=number), "rows")
    log_table(run, own, "own")
    log_file(run, folder / "0-look.ipynb", "notebook")
    log_file(run, folder / "page.html", "notebook")
    log_file(run, dataset.path / "summary.md")
    end_run(run)
    other = rng.choice([u for u in rows["unit_id"].unique() if u != unit])
    plan = str(own["example_id"].iloc[0])
    events = [
        Event("shared", "household", other, now, {"with": unit, "plan": plan, "note": f"like {unit} did"}),
        Event("heartbeat", "household", unit, now - timedelta(days=400), {"n": number}),
        Event("heartbeat", "household", other, now - timedelta(days=400), {"n": number}),
    ]
    write_events(store, events)
    apply_retention(store, settings, Retention((EventClass("heartbeat", 90, "archive"),)), "bench", now)


def begin_experiment(store: Store, units: list[str]) -> None:
    "Start an experiment that forces some units into an arm, and expose all of them."
    made = Experiment(
        key="tone",
        hypothesis="A friendlier tone is accepted more often.",
        policy="planner",
        unit_type="household",
        variants=(Variant("control", 0.5, control=True), Variant("treatment", 0.5, parameters={"tone": "friendly"})),
        metrics=(MetricPlan("acceptance", "primary", "proportion", "plan_decided", "accepted"),),
        mde=0.05,
        planned_n=3_900,
        ends_at=utc_now() + timedelta(days=30),
        forced=dict.fromkeys(units, "treatment"),
    )
    create_experiment(store, made, "bench")
    running = start_experiment(store, "tone", "bench")
    served = [assign(running, unit) for unit in units]
    expose(store, [a for a in served if a.variant], utc_now())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=50, help="erasures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bare", action="store_true", help="without a real run of the planner before")
    options = parser.parse_args()
    rng, clean, seconds, places = random.Random(options.seed), 0, [], []
    with tempfile.TemporaryDirectory(prefix="wb-") as folder:
        home = Path(folder) / "home"
        os.chmod(folder, 0o755)
        home.mkdir()
        settings = Settings("local", ROOT, home)
        if not options.bare:
            command = [Path(sys.executable).parent / "workbench", "run", "planner", "--profile", "smoke"]
            subprocess.run(
                command, env={**os.environ, "WORKBENCH_HOME": str(home)}, cwd=ROOT, check=True, capture_output=True
            )
        with open_store(settings) as store:
            tracking = open_tracking(store, settings)
            task.write_history(store, settings, SOURCE, 1500, 0)
            units = sorted(set(task.read_examples(store, SOURCE, None)["unit_id"]))
            begin_experiment(store, units)
            data, log = 0, 0
            for number, unit in enumerate(rng.sample(units, min(options.n, len(units)))):
                leave_traces((store, tracking, settings), unit, number, rng)
                with transaction(store) as connection:
                    asked = "SELECT id::text AS id, payload ->> 'plan_id' AS plan FROM exp.events WHERE unit_id = %s"
                    rows = connection.execute(asked, (unit,)).fetchall()
                ids = {unit, *(r["id"] for r in rows), *(r["plan"] for r in rows if r["plan"])}
                needles = set().union(*map(spelled, ids))
                before = len(search_tables(store.url, needles)) + len(search_files(home, needles))
                begun = time.perf_counter()
                erase_unit(store, tracking, settings, "household", unit, "bench")
                seconds.append(time.perf_counter() - begun)
                left = search_tables(store.url, needles) + search_files(home, needles)
                clean += not left
                places.append(before)
                data += bool(search_files(home, spelled(unit), "postgres/data/base"))
                log += bool(search_files(home, spelled(unit), "postgres/data/pg_wal"))
                if left:
                    print(f"  {unit}: {', '.join(left[:5])}")
            with transaction(store) as connection:
                whole = verify_ledger(connection).ok
    n = len(seconds)
    print(f"places with traces before       {statistics.median(places):.0f} (at least {min(places)})")
    print(f"erasures without a trace after  {clean} of {n}: {'kept' if clean == n else 'MISSED'}")
    print(f"the ledger verifies             {'kept' if whole else 'MISSED'}")
    print(f"an erasure                      {statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s")
    print(
        f"in the server's table files     {data} of {n};  in its write-ahead log {log} of {n} (until it is overwritten)"
    )
    sys.exit(clean != n or not whole)


if __name__ == "__main__":
    main()
