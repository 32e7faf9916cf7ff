"The head of the ledger outside the database: what it finds, and what it does not call an alarm."

import json
from dataclasses import replace

import pytest

from mlops_workbench.anchor import anchor_head, anchors_file, verify_anchored
from mlops_workbench.core import WorkbenchError
from mlops_workbench.ledger import BEGINNING, append_entry, entry_digest, entry_text, read_ledger, verify_ledger
from mlops_workbench.settings import Settings, read_settings
from mlops_workbench.store import as_json, transaction
from mlops_workbench.tracking import open_tracking


def decide(store, *versions):
    for version in versions:
        with transaction(store) as connection:
            subject = {"policy": "planner", "version": version}
            append_entry(connection, "policy.promote", "ana", subject, {"outcome": "pass"})


def settings_of(tmp_path, **more):
    return Settings("local", tmp_path, tmp_path, **more)


@pytest.fixture
def signing(tmp_path, monkeypatch):
    monkeypatch.setenv("LEDGER_KEY", "0123456789abcdef0123456789abcdef")
    return settings_of(tmp_path, ledger_key="secret://LEDGER_KEY")


def rewrite(store, change=lambda entries: entries):
    "Write another chain that is perfect in itself."
    with transaction(store) as connection:
        entries, made = change(read_ledger(connection)), []
        for entry in entries:
            entry = replace(entry, seq=len(made) + 1, previous=made[-1].digest if made else BEGINNING)
            made.append(replace(entry, digest=entry_digest(entry)))
        connection.execute("ALTER TABLE exp.ledger DISABLE TRIGGER ALL")
        connection.execute("TRUNCATE exp.ledger")
        for entry in made:
            row = {k: as_json(v) for k, v in vars(entry).items()} | {"said": entry_text(entry).decode()}
            names = ", ".join(f"%({name})s" for name in row)
            connection.execute(f"INSERT INTO exp.ledger ({', '.join(row)}) VALUES ({names})", row)
        connection.execute("ALTER TABLE exp.ledger ENABLE TRIGGER ALL")
        assert verify_ledger(connection).ok


def file_of(store, settings):
    with transaction(store) as connection:
        return anchors_file(connection, settings)


def test_an_anchored_ledger_is_whole_and_anchoring_again_adds_nothing(store, tmp_path):
    settings = settings_of(tmp_path)
    assert anchor_head(store, settings) is None
    decide(store, 1, 2)
    noted = anchor_head(store, settings)
    assert anchor_head(store, settings) == noted and noted.seq == 2
    decide(store, 3)
    assert anchor_head(store, settings).seq == 3
    check = verify_anchored(store, settings, strict=True)
    assert (check.ok, check.chain.n, check.n_anchors, check.newest.seq) == (True, 3, 2, 3)
    assert json.loads(json.dumps(check.to_dict()))["ok"] and "fit together" in check._repr_markdown_()


@pytest.mark.parametrize(
    "change, bad, words",
    [
        (lambda e: e[:2], 3, "entries 3 to 4 are missing: the tail was cut off"),
        (lambda e: [], 1, "entries 1 to 4 are missing: the tail was cut off"),
        (lambda e: [e[0], replace(e[1], actor="bob"), *e[2:]], 2, "entry 2 is not the one that was anchored"),
        (lambda e: [*e[:3], e[0], e[3]], 4, "entry 4 is not the one that was anchored"),
        (lambda e: [*e[:2], e[3], e[2]], 4, "entry 4 is not the one that was anchored"),
    ],
)
def test_a_chain_that_was_written_anew_is_found_by_its_anchor(store, tmp_path, change, bad, words):
    settings = settings_of(tmp_path)
    for versions in ((1, 2), (3, 4)):
        decide(store, *versions)
        anchor_head(store, settings)
    rewrite(store, change)
    check = verify_anchored(store, settings)
    assert (check.ok, check.chain.first_bad_seq) == (False, bad)
    assert words in check.problems[0] and "restore a backup" in check.problems[0] and "noted 20" in check.problems[0]
    with pytest.raises(WorkbenchError, match="not the one that was anchored.*nothing was anchored"):
        anchor_head(store, settings)


def test_a_ledger_that_nobody_anchored_is_told_and_strictly_refused(store, tmp_path):
    settings = settings_of(tmp_path)
    decide(store, 1)
    anchor_head(store, settings)
    decide(store, 2, 3)
    check = verify_anchored(store, settings)
    assert check.ok and "no anchor vouches for the entries 2 to 3" in check.remarks[0]
    assert not verify_anchored(store, settings, strict=True).ok


def test_who_rewrites_everything_still_cannot_sign(store, signing):
    decide(store, 1, 2, 3)
    anchor_head(store, signing)
    assert verify_anchored(store, signing, strict=True).ok
    rewrite(store, lambda entries: [replace(e, actor="bob") for e in entries])
    path = file_of(store, signing)
    with transaction(store) as connection:
        head = read_ledger(connection)[-1]
    said = json.loads(path.read_text()) | {"digest": head.digest}
    for forged, words in (
        (said, "the signature does not belong to"),
        (said | {"key": "", "signature": ""}, "is not signed with the key"),
        (said | {"key": "0badc0de"}, "is not signed with the key"),
    ):
        path.write_text(json.dumps(forged) + "\n")
        check = verify_anchored(store, signing)
        assert check.chain.ok and not check.ok and words in check.problems[0]
    path.unlink()
    assert "no anchor vouches for the entries 1 to 3" in verify_anchored(store, signing).problems[0]


def test_a_key_can_be_set_and_changed_later(store, tmp_path, signing, monkeypatch):
    decide(store, 1)
    anchor_head(store, settings_of(tmp_path))
    assert "run `workbench ledger anchor`" in verify_anchored(store, signing).problems[0]
    assert anchor_head(store, signing).signature
    assert verify_anchored(store, signing, strict=True).ok
    monkeypatch.setenv("LEDGER_KEY", "another key of thirty-two bytes, or so")
    assert not verify_anchored(store, signing).ok
    anchor_head(store, signing)
    assert verify_anchored(store, signing, strict=True).ok
    unread = verify_anchored(store, settings_of(tmp_path))
    assert unread.ok and "set ledger_key" in unread.remarks[0]


def test_mlflow_remembers_the_head_too(store, tmp_path):
    settings = settings_of(tmp_path)
    tracking = open_tracking(store, settings)
    decide(store, 1, 2)
    anchor_head(store, settings, tracking)
    file_of(store, settings).unlink()
    assert verify_anchored(store, settings, tracking, strict=True).n_anchors == 1
    rewrite(store, lambda entries: entries[:1])
    check = verify_anchored(store, settings, tracking)
    assert not check.ok and "in MLflow" in check.problems[0]
    with pytest.raises(WorkbenchError, match="in MLflow is missing"):
        anchor_head(store, settings, tracking)
    assert tracking.client.get_experiment_by_name("ledger").tags["ledger.head"].count('"seq":2') == 1


def test_places_that_contradict_each_other_are_told(store, tmp_path):
    settings = settings_of(tmp_path)
    tracking = open_tracking(store, settings)
    decide(store, 1)
    noted = anchor_head(store, settings, tracking)
    path = file_of(store, settings)
    path.write_text(path.read_text().replace(noted.digest, "f" * 64))
    check = verify_anchored(store, settings, tracking)
    assert any("contradict each other" in problem for problem in check.problems)


def test_a_torn_line_is_replaced_and_a_strange_one_is_told(store, tmp_path):
    settings = settings_of(tmp_path)
    decide(store, 1)
    anchor_head(store, settings)
    path = file_of(store, settings)
    whole = path.read_text()
    path.write_text(whole + whole[:30])
    assert verify_anchored(store, settings).ok
    decide(store, 2)
    anchor_head(store, settings)
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == [1, 2]
    path.write_text("hello\n" + path.read_text())
    assert "'hello', which is no anchor: somebody wrote into it" in verify_anchored(store, settings).problems[0]


def test_the_file_is_read_from_its_end(store, tmp_path):
    settings = settings_of(tmp_path)
    decide(store, 1)
    noted = anchor_head(store, settings)
    path = file_of(store, settings)
    path.write_text(path.read_text() * 100)
    assert anchor_head(store, settings).seq == noted.seq and len(path.read_text().splitlines()) == 100


def test_two_databases_below_one_home_keep_apart(server, tmp_path):
    from mlops_workbench.store import Store

    with server.database() as one, server.database() as other:
        for url, versions in ((one, (1, 2)), (other, (5,))):
            settings = settings_of(tmp_path, database_url=url)
            decide(Store(url), *versions)
            anchor_head(Store(url), settings)
        assert all(
            verify_anchored(Store(url), settings_of(tmp_path, database_url=url), strict=True).ok for url in (one, other)
        )
        assert len(list((tmp_path / "anchors").iterdir())) == 2


def test_a_place_that_cannot_be_written_says_what_to_do(store, tmp_path):
    (tmp_path / "anchors").write_text("in the way")
    decide(store, 1)
    with pytest.raises(WorkbenchError, match="the decision stands.*run `workbench ledger anchor`"):
        anchor_head(store, settings_of(tmp_path))


def test_the_key_is_given_by_reference_only(tmp_path):
    (tmp_path / "settings.ini").write_text("[local]\nledger_key = 0123456789abcdef\n")
    with pytest.raises(ValueError, match="ledger_key is written out: write ledger_key = secret://NAME"):
        read_settings(root=tmp_path, variables={})
    (tmp_path / "settings.ini").write_text("[local]\nledger_key = secret://LEDGER_KEY\n")
    assert read_settings(root=tmp_path, variables={}).ledger_key == "secret://LEDGER_KEY"
