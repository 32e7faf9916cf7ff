"""Whether the ledger finds who tampers with it, how fast it is checked, and how fast and how rightly past answers are explained.

    python -m benchmarks.ledger                                  # every part
    python -m benchmarks.ledger --only attacks --n 200
    python -m benchmarks.ledger --only explain --promotions 1000 --assignments 100000

attacks  one log of 5 to 40 decisions after another, anchored after each decision as the commands do. First it is checked as it is
         (an alarm would be false), then somebody with every right in the database edits, inserts, deletes, reorders, cuts the tail
         or rewrites all of it, naively or with fresh texts and digests for every later entry. Who rewrites all of it also
         rewrites the file of anchors, without the key.
verify   entries a second of the whole check, chain and anchors, over a long ledger
explain  1,000 random units and times over many promotions, rollbacks, experiments with ramps and assignments: time per
         explanation, and equality with a replay that goes through every record in Python and hashes for itself
"""

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mlops_workbench.anchor import anchor_head, anchors_file, sign, verify_anchored
from mlops_workbench.assignment import assign_many
from mlops_workbench.core import as_utc, stable_id
from mlops_workbench.design import Design, MetricPlan, Variant, describe_design
from mlops_workbench.events import Event, write_events
from mlops_workbench.experiment import Experiment, allocation_at
from mlops_workbench.explanation import Question, explain_unit
from mlops_workbench.features import FeatureSet
from mlops_workbench.ledger import BEGINNING, Entry, append_entry, entry_digest, entry_text, read_ledger
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, as_json, temporary_store, transaction, write_rows
from mlops_workbench.tracking import Tracking, open_tracking

START = as_utc("2025-01-01T00:00:00Z")
KEY = "BENCH_LEDGER_KEY"


def told(value: float, bound: float, unit: str, least: bool = False) -> bool:
    "Print a figure beside its bound, and say whether it is kept."
    kept = value >= bound if least else value <= bound
    print(f"    {value:,.6g}{unit}, {'at least' if least else 'at most'} {bound:,.6g}: {'kept' if kept else 'MISSED'}")
    return kept


# Attacks


def write_chain(store: Store, entries: Sequence[Entry], texts: bool = True) -> None:
    "Replace the ledger, as who has every right in the database can."
    names = [*vars(entries[0])] if entries else []
    with transaction(store) as connection:
        connection.execute("ALTER TABLE exp.ledger DISABLE TRIGGER ALL")
        connection.execute("TRUNCATE exp.ledger")
        if entries:
            with connection.cursor().copy(f"COPY exp.ledger ({', '.join(names)}, said) FROM STDIN") as copy:
                for entry in entries:
                    said = entry_text(entry).decode() if texts else None
                    copy.write_row([*(as_json(v) for v in vars(entry).values()), said])
        connection.execute("ALTER TABLE exp.ledger ENABLE TRIGGER ALL")


def chained(entries: Iterable[Entry]) -> list[Entry]:
    "Number entries anew and give each the digest that fits."
    made: list[Entry] = []
    for entry in entries:
        entry = replace(entry, seq=len(made) + 1, previous=made[-1].digest if made else BEGINNING)
        made.append(replace(entry, digest=entry_digest(entry)))
    return made


def edit(entry: Entry, rng: random.Random) -> Entry:
    "Change what an entry says."
    changes: list[Mapping[str, Any]] = [
        {"actor": f"{entry.actor}x"},
        {"action": "policy.approve" if entry.action != "policy.approve" else "policy.propose"},
        {"subject": entry.subject | {"version": entry.subject["version"] + 1}},
        {"evidence": entry.evidence | {"outcome": "fail"}},
        {"evidence": {k: v for k, v in entry.evidence.items() if k != "reasons"}},
        {"held_from": entry.held_from - timedelta(microseconds=1)},
        {"written_at": entry.written_at + timedelta(days=1)},
    ]
    return replace(entry, **rng.choice(changes))


def attack(entries: list[Entry], kind: str, skill: str, rng: random.Random) -> list[Entry]:
    "Tamper with a log."
    i, forged = rng.randrange(len(entries)), list(entries)
    if kind == "edit":
        forged[i] = edit(entries[i], rng)
    elif kind == "insert":
        i = rng.randrange(len(entries) + 1)
        forged.insert(i, replace(edit(rng.choice(entries), rng), digest=f"{rng.getrandbits(256):064x}"))
    elif kind == "delete":
        del forged[rng.randrange(len(entries) - 1)]
    elif kind == "reorder":
        i, j = rng.sample(range(len(entries)), 2)
        forged[i], forged[j] = forged[j], forged[i]
    elif kind == "tail cut":
        return forged[: rng.randrange(len(entries))]
    else:
        return chained(edit(entry, rng) for entry in entries)
    if skill == "every later entry":
        return chained(forged)
    forged = [replace(e, seq=n) for n, e in enumerate(forged, 1)] if kind != "delete" or rng.random() < 0.5 else forged
    if skill == "its own digest" and kind == "edit":
        forged[i] = replace(forged[i], digest=entry_digest(forged[i]))
    return forged


def put(store: Store, before: Sequence[Entry], forged: Sequence[Entry], rng: random.Random) -> None:
    "Write a forged log; who edits one entry naively leaves its text as it was."
    if len(before) == len(forged) and [e.digest for e in before] == [e.digest for e in forged] and rng.random() < 0.5:
        write_chain(store, before)
        with transaction(store) as connection:
            connection.execute("ALTER TABLE exp.ledger DISABLE TRIGGER ALL")
            for old, new in zip(before, forged, strict=True):
                for name in (n for n in vars(new) if getattr(old, n) != getattr(new, n)):
                    value = as_json(getattr(new, name))
                    connection.execute(f"UPDATE exp.ledger SET {name} = %s WHERE seq = %s", (value, old.seq))
            connection.execute("ALTER TABLE exp.ledger ENABLE TRIGGER ALL")
    else:
        write_chain(store, forged)


def one_log(store: Store, settings: Settings, rng: random.Random) -> list[Entry]:
    "Decide something a few times, anchoring each decision."
    write_chain(store, [])
    for version in range(1, rng.randint(5, 40)):
        subject = {"policy": rng.choice(["planner", "recommender"]), "version": version}
        evidence = {
            "outcome": "pass",
            "reasons": [f"alignment {rng.random():.3f}"],
            "bound": rng.choice([0.5, 1, None]),
        }
        with transaction(store) as connection:
            append_entry(connection, rng.choice(["policy.promote", "model.candidate"]), "ana", subject, evidence)
        anchor_head(store, settings)
    with transaction(store) as connection:
        return read_ledger(connection)


def part_attacks(options: argparse.Namespace) -> bool:
    import os

    os.environ[KEY] = f"{random.Random(1).getrandbits(256):064x}"
    rng, kinds = random.Random(options.seed), ("edit", "insert", "delete", "reorder", "tail cut", "full rewrite")
    found, tried, alarms = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0), 0
    with temporary_store() as store:
        for n in range(options.n):
            with tempfile.TemporaryDirectory() as folder:
                kind, skill = kinds[n % len(kinds)], rng.choice(["none", "its own digest", "every later entry"])
                signs = kind == "full rewrite" or rng.random() < 0.5
                settings = Settings("local", Path(folder), Path(folder), ledger_key=f"secret://{KEY}" if signs else "")
                entries = one_log(store, settings, rng)
                alarms += not verify_anchored(store, settings, strict=True).ok
                forged = attack(entries, kind, skill, rng)
                put(store, entries, forged, rng)
                if kind == "full rewrite":
                    forge_anchors(store, settings, forged, rng)
                tried[kind] += 1
                check = verify_anchored(store, settings, strict=True)
                found[kind] += not check.ok
                if check.ok:
                    print(f"    missed: {kind}, skill: {skill}, log of {len(entries)}")
    for kind in kinds:
        print(f"  {kind:<13} {found[kind]} of {tried[kind]} found")
    print("  attacks found")
    good = told(sum(found.values()), sum(tried.values()), "", least=True)
    print(f"  alarms in {options.n} clean logs")
    return told(alarms, 0, "") and good


def forge_anchors(store: Store, settings: Settings, forged: Sequence[Entry], rng: random.Random) -> None:
    "Rewrite the file of anchors to fit a forged log: unsigned, signed with a guessed key, or with the old signatures."
    from mlops_workbench.anchor import _lines, _read_anchor, _said

    with transaction(store) as connection:
        path = anchors_file(connection, settings)
    anchors = [_read_anchor(line, "") for line in _lines(path)]
    anchors = [replace(a, digest=forged[a.seq - 1].digest) for a in anchors]
    way = rng.choice(["unsigned", "guessed", "kept"])
    if way == "unsigned":
        anchors = [replace(a, key="", signature="") for a in anchors]
    elif way == "guessed":
        anchors = [sign(a, b"a key that somebody guessed") for a in anchors]
    path.write_text("".join(_said(a) + "\n" for a in anchors))


# Speed


def promotion(seq: int, version: int, at: datetime, evidence: Mapping[str, Any]) -> Entry:
    subject = {"policy": "meals", "version": version, "model_version": version % 50 + 1, "digest": f"{version:064x}"}
    return Entry(seq, at, at, "ana", "policy.promote", subject, dict(evidence), "")


def model_entry(number: int, action: str) -> Entry:
    subject = {"model": "meals", "version": number, "digest": f"{number:064x}"}
    evidence = {"dataset_fingerprint": "ab" * 32, "run": "bench"} if action == "model.trained" else EVIDENCE
    return Entry(0, START, START, "gate", action, subject, evidence, "")


EVIDENCE = {
    "outcome": "pass",
    "passed": True,
    "reasons": ["plan_alignment over the baseline's is 1.21 [1.11, 1.32]; asked: at least 1.02"],
    "criteria": [{"metric": "plan_alignment", "rule": "ratio_at_least", "bound": 1.02, "outcome": "pass"}],
    "settings": {"batch_size": 32},
}


def part_verify(options: argparse.Namespace) -> bool:
    with temporary_store() as store, tempfile.TemporaryDirectory() as folder:
        settings = Settings("local", Path(folder), Path(folder))
        n = options.entries
        write_chain(store, chained(promotion(i, i, START + timedelta(minutes=i), EVIDENCE) for i in range(1, n + 1)))
        anchor_head(store, settings)
        rates = []
        for _ in range(options.repeat):
            begun = time.perf_counter()
            check = verify_anchored(store, settings)
            rates.append(n / (time.perf_counter() - begun))
            assert check.ok and check.chain.n == n
        print(f"  whole check of {n:,} entries, median of {options.repeat}")
        return told(statistics.median(rates), 50_000, " entries/s", least=True)


# Explaining

HOUR = timedelta(hours=1)
FEATURES = FeatureSet(
    "last_decision",
    """
    SELECT spine.row_id, d.decision, d.n FROM spine LEFT JOIN LATERAL (
        SELECT max(payload ->> 'decision') AS decision, count(*) AS n FROM exp.events e
        WHERE e.unit_id = spine.unit_id AND e.type = 'plan_decided'
          AND e.event_at <= spine.as_of AND e.received_at <= spine.as_of
    ) AS d ON true
    """,
    ("decision", "n"),
)


def fill_policies(store: Store, tracking: Tracking, options: argparse.Namespace) -> list[Entry]:
    "Promote a version an hour, and take back one of twenty."
    client = tracking.client
    client.create_registered_model("meals")
    for number in range(1, 51):
        tags = {"workbench.digest": f"{number:064x}", "workbench.stage": "archived", "workbench.run": "bench"}
        client.create_model_version("meals", f"{tracking.artifacts}/{number}", tags=tags)
    rng, n, serving = random.Random(options.seed), options.promotions, 0
    entries = [
        model_entry(number, action) for number in range(1, 51) for action in ("model.trained", "model.candidate")
    ]
    rows = [
        {"policy": "meals", "version": v, "model_name": "meals", "model_version": str(v % 50 + 1)}
        | {"model_digest": f"{v % 50 + 1:064x}", "settings": {"batch_size": 8 + v % 7}, "status": "retired"}
        for v in range(1, n + 1)
    ]
    for version in range(1, n + 1):
        at = START + version * HOUR
        entries.append(promotion(0, version, at, EVIDENCE | {"replaced": serving or None}))
        if serving and rng.random() < 0.05:
            at += HOUR / 2
            gone = promotion(0, version, at, {"reason": "fewer plans were accepted", "to": serving})
            entries.append(replace(gone, action="policy.rollback"))
            entries.append(promotion(0, serving, at, {"reason": "fewer plans were accepted", "replaced": version}))
        else:
            serving = version
    write_chain(store, chained(entries))
    with transaction(store) as connection:
        connection.execute("INSERT INTO exp.policies (policy, task) VALUES ('meals', 'benchmarks.ledger')")
        write_rows(connection, "exp.policy_versions", rows)
        connection.execute("ANALYZE exp.ledger")
    return chained(entries)


def fill_experiments(store: Store, options: argparse.Namespace) -> list[str]:
    "Run one experiment after another, each ramped twice and paused once."
    n_hours, keys = options.promotions, [f"list-{i}" for i in range(20)]
    metric = MetricPlan("acceptance", "primary", "proportion", "plan_decided", "accepted")
    for i, key in enumerate(keys):
        begun = START + n_hours * HOUR * i / len(keys)
        length, version = n_hours * HOUR / len(keys), max(1, n_hours * i // len(keys) - 1)
        shares = (0.5, 0.5) if i % 2 else (0.34, 0.33, 0.33)
        names = ("control", "short", "long")[: len(shares)]
        variants = tuple(
            Variant(name, share, None if j == 0 else version + j, control=j == 0)
            for j, (name, share) in enumerate(zip(names, shares, strict=True))
        )
        design = Design(key, "it helps", "meals", "household", variants, (metric,), 0.05, 900, begun + 1_000 * HOUR)
        plant(
            store,
            Experiment(**vars(design)),
            [(begun + length * k / 4, c) for k, c in enumerate((1_000, 2_500, 5_000))],
        )
    return keys


def plant(store: Store, experiment: Experiment, steps: Sequence[tuple[datetime, int]]) -> None:
    "Write what an experiment of the past has left: its phases, a pause in the middle of the last one, and its end."
    key, arms = experiment.key, [vars(a) for a in experiment.arms]
    length = steps[1][0] - steps[0][0]
    ends = [at for at, _ in steps[1:]] + [steps[-1][0] + length]
    row = {"key": key, "policy": experiment.policy, "unit_type": experiment.unit_type, "digest": experiment.digest}
    row |= {
        "definition": describe_design(experiment),
        "author": "ana",
        "status": "completed",
        "ends_at": experiment.ends_at,
    }
    fixed = {"experiment": key, "unit_type": experiment.unit_type, "policy": experiment.policy}
    kept = [fixed | a | {"variant": a["name"], "control": a["name"] == "control"} for a in arms]
    pause = steps[-1][0] + length / 2
    states = [(at, "ramp" if n else "start", "active", n + 1) for n, (at, _) in enumerate(steps)]
    n = len(steps)
    states += [
        (pause, "pause", "paused", n),
        (pause + length / 4, "resume", "active", n),
        (ends[-1], "stop", "completed", n),
    ]
    with transaction(store) as connection:
        write_rows(connection, "exp.experiments", [row])
        write_rows(connection, "exp.variants", [{k: v for k, v in r.items() if k != "name"} for r in kept])
        for n, ((at, coverage), end) in enumerate(zip(steps, ends, strict=True), 1):
            phase = {
                "experiment": key,
                "phase": n,
                "coverage": coverage,
                "arms": arms,
                "started_at": at,
                "ended_at": end,
            }
            write_rows(connection, "exp.experiment_phases", [phase])
        for n, (at, action, status, phase) in enumerate(states, 1):
            state = {"experiment": key, "seq": n, "action": action, "status": status, "phase": phase, "since": at}
            write_rows(connection, "exp.experiment_states", [state])


def fill_assignments(store: Store, keys: Sequence[str], units: Sequence[str], options: argparse.Namespace) -> int:
    "Assign every unit in every phase, until there are enough."
    n = 0
    for key in keys:
        with transaction(store) as connection:
            phases = connection.execute(
                "SELECT phase, started_at FROM exp.experiment_phases WHERE experiment = %s ORDER BY phase", (key,)
            ).fetchall()
        for phase in phases:
            found = assign_many(allocation_at(store, key, phase["started_at"]), units).dropna(subset=["variant"])
            columns = "experiment, phase, unit_type, unit_id, variant, bucket, assigned_at"
            with (
                transaction(store) as connection,
                connection.cursor().copy(f"COPY exp.assignments ({columns}) FROM STDIN") as copy,
            ):
                for unit, variant, bucket in zip(found.unit_id, found.variant, found.bucket, strict=True):
                    copy.write_row([key, phase["phase"], "household", unit, variant, int(bucket), phase["started_at"]])
            n += len(found)
    return n


def fill_events(store: Store, units: Sequence[str], options: argparse.Namespace) -> None:
    "Let the first 5,000 units decide about ten plans each."
    rng, events = random.Random(2), []
    for unit in units[:5_000]:
        for number in range(10):
            at = START + rng.random() * options.promotions * HOUR
            told = {"decision": rng.choice(["accepted", "edited", "rejected"])}
            mark = stable_id(unit, number)
            events.append(Event("plan_decided", "household", unit, at, told, id=mark, received_at=at + HOUR / 60))
    for i in range(0, len(events), 10_000):
        write_events(store, events[i : i + 10_000])


class Replay:
    "Go through all records in Python, sharing nothing with what is measured but the records."

    def __init__(self, store: Store):
        with transaction(store) as connection:
            self.entries = connection.execute(
                "SELECT seq, held_from, action, subject, evidence FROM exp.ledger ORDER BY held_from, seq"
            ).fetchall()
            self.phases = connection.execute("SELECT * FROM exp.experiment_phases ORDER BY started_at").fetchall()
            self.states = connection.execute("SELECT * FROM exp.experiment_states ORDER BY since, seq").fetchall()
            self.seeds = {
                row["key"]: row["definition"]["seed"]
                for row in connection.execute("SELECT key, definition FROM exp.experiments").fetchall()
            }
            self.events = connection.execute(
                "SELECT unit_id, event_at, received_at, payload, id FROM exp.events"
            ).fetchall()

    @staticmethod
    def bucket(unit: str, seed: str) -> int:
        "Hash as GrowthBook's version 2 does."

        def fnv(text: str) -> int:
            value = 0x811C9DC5
            for character in text:
                value = (value ^ ord(character)) * 0x01000193 & 0xFFFFFFFF
            return value

        return fnv(str(fnv(seed + unit))) % 10_000

    def ask(self, unit: str, at: datetime) -> dict[str, Any]:
        "Say what served a unit."
        serving, barred = None, set()
        for entry in self.entries:
            if entry["held_from"] > at:
                break
            version = entry["subject"]["version"]
            if entry["action"].startswith("model."):
                continue
            if entry["action"] == "policy.promote":
                serving, by = version, entry["seq"]
                barred.discard(version)
            else:
                barred.add(version)
        answer = {"source": "production" if serving else "rule", "variant": None, "version": serving}
        answer["entry"] = by if serving else None
        state = {s["experiment"]: s for s in self.states if s["since"] <= at}
        for key, last in state.items():
            phase = next(p for p in self.phases if p["experiment"] == key and p["phase"] == last["phase"])
            if last["status"] != "active":
                continue
            bucket = self.bucket(unit, self.seeds[key])
            arm = next(a for a in phase["arms"] if a["low"] <= bucket < a["high"])
            end = arm["low"] + phase["coverage"] * (arm["high"] - arm["low"]) // 10_000
            if bucket < end and arm["policy_version"] not in barred:
                answer |= {"source": key, "variant": arm["name"], "version": arm["policy_version"], "entry": None}
        known = [e for e in self.events if e["unit_id"] == unit and e["event_at"] <= at and e["received_at"] <= at]
        decisions = [e["payload"]["decision"] for e in known]
        known.sort(key=lambda e: (-e["event_at"].timestamp(), str(e["id"])))
        features = {"decision": max(decisions, default=None), "n": len(known)}
        return answer | features | {"rows": [str(e["id"]) for e in known]}


def part_explain(options: argparse.Namespace) -> bool:
    module = types.SimpleNamespace(FEATURES=FEATURES)
    with temporary_store() as store, tempfile.TemporaryDirectory() as folder:
        tracking = open_tracking(store, Settings("local", Path(folder), Path(folder)))
        fill_policies(store, tracking, options)
        keys = fill_experiments(store, options)
        # a third of the units is served in the mean phase, of sixty
        units = [f"h-{i}" for i in range(max(1_000, options.assignments // 17))]
        n = fill_assignments(store, keys, units, options)
        fill_events(store, units, options)
        with transaction(store) as connection:
            connection.execute("ANALYZE")
        rng, replay, times, wrong, variants, remarks = random.Random(options.seed), Replay(store), [], 0, 0, 0
        gc.collect()
        gc.freeze()  # the replay's records are the benchmark's own, going through them again is not the explanation's cost
        print(f"  {options.promotions:,} promotions, {n:,} assignments, {len(replay.events):,} events")
        for i in range(1_020):
            unit = rng.choice(units[:5_000] if i % 2 else units)
            at = START + rng.random() * (options.promotions + 48) * HOUR
            begun = time.perf_counter()
            found = explain_unit(store, tracking, Question("meals", "household", unit, at), None, module)
            if i >= 20:  # the first ones open connections and caches
                times.append(1_000 * (time.perf_counter() - begun))
            said = {"source": found.source, "variant": found.variant, "version": found.policy_version}
            said |= {"entry": None if found.variant else found.decided and found.decided.seq}
            said |= {
                "decision": found.features["decision"],
                "n": found.features["n"],
                "rows": [e["id"] for e in found.events],
            }
            expected = replay.ask(unit, at)
            if said != expected:
                wrong += 1
                print(f"    {unit} at {at}: explained {said}, replayed {expected}")
            stored = [p for p in found.placements if p.variant and p.stored != p.variant]
            variants, remarks = variants + bool(found.variant), remarks + bool(found.remarks) + bool(stored)
    print(f"  time per explanation, p50 {statistics.median(times):.1f} ms, p95")
    good = told(statistics.quantiles(times, n=20)[-1], 100, " ms")
    print(
        f"  of 1,020 explanations ({variants} within an experiment) those that differ from the replay, or from what is stored"
    )
    return told(wrong + remarks, 0, "") and good


PARTS = {"attacks": part_attacks, "verify": part_verify, "explain": part_explain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--n", type=int, default=1_000, help="attacks, and clean logs")
    parser.add_argument("--entries", type=int, default=200_000, help="of the ledger whose check is timed")
    parser.add_argument("--repeat", type=int, default=5, help="checks that are timed")
    parser.add_argument("--promotions", type=int, default=10_000, help="before explanations are asked for")
    parser.add_argument("--assignments", type=int, default=1_000_000, help="about how many")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    options = parser.parse_args()
    chosen = options.only.split(",")
    for name in chosen:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}: choose from {', '.join(PARTS)}")
    kept = True
    for name in chosen:
        print(name, flush=True)
        kept = PARTS[name](options) and kept
    sys.exit(not kept)


if __name__ == "__main__":
    main()
