"Keys and tokens: who is let in, who is not, and what can be read about it."

import asyncio
import json
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import jwt
import psycopg
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from typer.testing import CliRunner

from mlops_workbench import keys as keys_module
from mlops_workbench import tokens
from mlops_workbench.access import app
from mlops_workbench.core import WorkbenchError, utc_now
from mlops_workbench.keys import Caller, Keys, Refused, create_key, read_keys, revoke_key, rotate_key
from mlops_workbench.ledger import read_ledger, verify_ledger
from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, connect, read_rows, transaction
from mlops_workbench.tokens import Issuer, check_wiring, read_published, verify_token
from mlops_workbench.wiring import Wiring

HERE = Settings("local", Path("."), Path("."))


@pytest.fixture
def opened(store):
    with closing(Keys(store, HERE)) as keys:
        yield keys


def admit(keys, text):
    return asyncio.run(keys.admit(f"Bearer {text}"))


def refusal(call, *arguments):
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value.status, caught.value.words


def within(seconds, holds):
    "Wait for something that must happen."
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def lets_in(keys, text):
    try:
        return keys.check(f"Bearer {text}")
    except Refused:
        return None


def test_a_key_made_after_the_service_started_is_known_at_once(store, opened):
    text, key = create_key(store, "shop", "operator", "ada", 3_600)
    assert admit(opened, text) == Caller("shop", "operator", "key")
    assert key.state(utc_now()) == "active" and text.startswith(key.shown.rstrip("…"))


def test_nothing_that_is_kept_lets_anybody_in(store):
    text, _ = create_key(store, "shop", "client", "ada")
    newer, _ = rotate_key(store, "shop", "ada")
    with transaction(store) as connection:
        tables = read_rows(
            connection,
            "SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables WHERE schemaname = 'exp'",
        )
        kept = "".join(
            str(read_rows(connection, f"SELECT t::text AS row FROM {t['name']} AS t")).lower() for t in tables
        )
    for secret in (text, newer):
        assert secret[16:].lower() not in kept and secret.encode().hex() not in kept
        assert secret[3:15] in kept  # the public name is


def test_a_wrong_secret_of_a_known_key_is_refused(store, opened):
    text, _ = create_key(store, "shop", "client", "ada")
    for wrong in (
        text[:-1] + ("A" if text[-1] != "A" else "B"),
        text[:-1],
        text + "A",
        text.upper(),
        text[:16] + "x" * 43,
    ):
        assert refusal(admit, opened, wrong)[0] == 401
    assert admit(opened, text).name == "shop"


def test_a_header_that_is_no_key_is_refused_in_one_line(opened):
    long = "Bearer " + "x" * 9_000
    for header in (None, "", "Bearer", "Bearer ", "bearer", "Basic YTpi", "Token x", long, "Bearer \x00", "wb_x"):
        status, words = refusal(opened.check, header)
        assert status == 401 and "\n" not in words and "xxxx" not in words


def test_the_word_bearer_may_be_written_as_one_likes(store, opened):
    text, _ = create_key(store, "shop", "client", "ada")
    admit(opened, text)
    assert opened.check(f"bEaReR {text}").name == "shop"


def test_secrets_are_compared_in_constant_time(store, opened, monkeypatch):
    seen = []
    compare = keys_module.hmac.compare_digest
    monkeypatch.setattr(keys_module.hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or compare(a, b))
    text, _ = create_key(store, "shop", "client", "ada")
    admit(opened, text)
    refusal(opened.check, f"Bearer {text[:-1]}_")
    refusal(opened.check, f"Bearer wb_{'0' * 12}_{'x' * 43}")
    assert len(seen) >= 3 and set(seen) == {(32, 32)}  # an unknown key takes the same way


def test_a_revoked_key_is_refused_within_two_seconds(store, opened):
    text, _ = create_key(store, "shop", "client", "ada")
    admit(opened, text)
    revoke_key(store, "shop", "ada", "lost")
    within(2, lambda: lets_in(opened, text) is None)


def test_an_expired_key_is_refused_without_reading_the_table(store, opened, monkeypatch):
    text, key = create_key(store, "shop", "client", "ada", 60)
    admit(opened, text)
    later = time.time() + 61
    monkeypatch.setattr(keys_module.time, "time", lambda: later)
    assert refusal(opened.check, f"Bearer {text}")[0] == 401


def test_a_rotated_key_lives_on_for_its_overlap_only(store, opened):
    old, _ = create_key(store, "shop", "operator", "ada", 10 * 86_400)
    new, key = rotate_key(store, "shop", "ben", overlap_s=3_600)
    assert admit(opened, old) == admit(opened, new) == Caller("shop", "operator", "key")
    before, after = read_keys(store)
    assert before.expires_at - after.created_at == timedelta(hours=1)
    assert after.expires_at - after.created_at == timedelta(days=10)
    newest, _ = rotate_key(store, "shop", "ben", overlap_s=0)
    within(2, lambda: lets_in(opened, old) is None and lets_in(opened, new) is None)
    assert admit(opened, newest).name == "shop"


def test_an_overlap_never_gives_a_key_more_time(store):
    create_key(store, "shop", "client", "ada", 600)
    rotate_key(store, "shop", "ada", overlap_s=86_400)
    before, after = read_keys(store)
    assert before.expires_at - before.created_at == timedelta(seconds=600)


def test_one_key_of_several_can_be_revoked_by_its_public_name(store):
    text, _ = create_key(store, "shop", "client", "ada")
    rotate_key(store, "shop", "ada")
    ended = revoke_key(store, text, "ada")  # a whole key may be pasted
    assert [k.key_id for k in ended] == [text[3:15]]
    assert [k.state(utc_now()) for k in read_keys(store)] == ["revoked", "active"]
    with pytest.raises(WorkbenchError) as caught:
        revoke_key(store, text, "ada")
    assert text[16:] not in str(caught.value) and text[3:15] in str(caught.value)


def test_every_change_is_in_the_ledger_with_its_actor(store):
    create_key(store, "shop", "client", "ada", 3_600)
    rotate_key(store, "shop", "ben")
    revoke_key(store, "shop", "cleo", "left the company")
    with transaction(store) as connection:
        entries = read_ledger(connection, subject={"name": "shop"})
        assert verify_ledger(connection).ok
    told = [(e.action, e.actor) for e in entries]
    assert told == [("key.create", "ada"), ("key.rotate", "ben"), ("key.revoke", "cleo"), ("key.revoke", "cleo")]
    assert entries[-1].evidence == {"scope": "client", "reason": "left the company"}


def test_nothing_is_written_when_the_ledger_cannot_be(store, monkeypatch):
    def full(*_, **__):
        raise WorkbenchError("the ledger is closed")

    monkeypatch.setattr(keys_module, "append_entry", full)
    with pytest.raises(WorkbenchError, match="the ledger is closed"):
        create_key(store, "shop", "client", "ada")
    assert read_keys(store) == []


def test_a_key_cannot_be_given_more_than_it_had(store):
    create_key(store, "shop", "client", "ada", 3_600)
    revoke_key(store, "shop", "ada")
    for change in (
        "UPDATE exp.api_keys SET scope = 'admin'",
        "UPDATE exp.api_keys SET secret_sha256 = sha256('known')",
        "UPDATE exp.api_keys SET revoked_at = NULL",
        "UPDATE exp.api_keys SET expires_at = expires_at + interval '1 day'",
        "UPDATE exp.api_keys SET expires_at = NULL",
        "DELETE FROM exp.api_keys",
        "TRUNCATE exp.api_keys",
    ):
        with connect(store) as connection, pytest.raises(psycopg.errors.RaiseException):
            connection.execute(change)


def test_two_that_make_the_same_key_at_once_make_one(store):
    async def both():
        made = [asyncio.to_thread(create_key, Store(store.url), "shop", "client", f"a{i}") for i in range(4)]
        return await asyncio.gather(*made, return_exceptions=True)

    made = asyncio.run(both())
    assert sum(isinstance(m, tuple) for m in made) == 1
    assert all(isinstance(m, tuple | WorkbenchError) for m in made) and len(read_keys(store)) == 1


@pytest.mark.parametrize(
    "name, scope, seconds, words",
    [
        ("Shop!", "client", None, "use at most 63"),
        ("", "client", None, "use at most 63"),
        ("x" * 64, "client", None, "use at most 63"),
        ("shop'; DROP TABLE exp.api_keys; --", "client", None, "use at most 63"),
        ("shop", "root", None, "choose from admin, client, operator"),
        ("shop", "client", 1, "choose a minute to ten years"),
        ("shop", "client", float("nan"), "choose a minute to ten years"),
    ],
)
def test_what_makes_no_key_is_refused(name, scope, seconds, words):
    with pytest.raises(ValueError, match=words):  # before the database is asked
        create_key(None, name, scope, "ada", seconds)


def test_many_that_come_with_unknown_keys_cost_a_few_looks(store, monkeypatch):
    looks = []
    read = keys_module._read_known
    monkeypatch.setattr(keys_module, "_read_known", lambda store: looks.append(1) or read(store))
    monkeypatch.setattr(keys_module, "_EVERY_S", 60.0)

    async def flood(keys):
        texts = [f"Bearer wb_{i:012d}_{'x' * 43}" for i in range(200)]
        return await asyncio.gather(*map(keys.admit, texts), return_exceptions=True)

    with closing(Keys(store, HERE)) as keys:
        answers = asyncio.run(flood(keys))
    assert {a.status for a in answers} == {401} and len(looks) <= 4


def test_known_keys_stay_good_while_the_database_is_away_and_not_for_ever(server, monkeypatch, caplog):
    with server.database() as url:
        text, _ = create_key(Store(url), "shop", "client", "ada")
        keys = Keys(Store(url), HERE)
    # the database is gone
    with closing(keys):
        within(5, lambda: "keys are" in caplog.text)
        assert keys.check(f"Bearer {text}").name == "shop"
        assert refusal(admit, keys, f"wb_{'0' * 12}_{'x' * 43}")[0] == 401
        monkeypatch.setattr(keys_module, "_KNOWN_S", 0.0)
        assert refusal(keys.check, f"Bearer {text}")[0] == 503


# Tokens: an issuer whose keys lie in a file.

KEYS = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "PS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
CLAIMS = {"iss": "https://login.example.org", "aud": "workbench", "sub": "ana", "scope": "workbench:admin"}


def published(algorithm, kid):
    writer = jwt.algorithms.get_default_algorithms()[algorithm]
    return writer.to_jwk(KEYS[algorithm].public_key(), as_dict=True) | {"kid": kid}


def sign(algorithm="RS256", secret=None, kid=None, headers=None, **other):
    said = {"exp": int(time.time()) + 600} | CLAIMS | other
    claims = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(claims, secret or KEYS[algorithm], algorithm, {"kid": kid or algorithm} | (headers or {}))


@pytest.fixture
def wiring(tmp_path):
    place = tmp_path / "keys.json"
    place.write_text(json.dumps({"keys": [published(a, a) for a in KEYS]}))
    return Wiring(jwt_jwks=str(place), jwt_issuer=CLAIMS["iss"], jwt_audience="workbench")


@pytest.fixture
def issuer(wiring):
    issuer = Issuer(wiring)
    issuer.refresh()
    return issuer


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_of_each_asymmetric_algorithm_is_read(issuer, algorithm):
    assert issuer.check(sign(algorithm)) == Caller("ana", "admin", "token")


def raw_token(header, claims, signature=b""):
    parts = [jwt.utils.base64url_encode(json.dumps(p).encode()).decode() for p in (header, claims)]
    return ".".join([*parts, jwt.utils.base64url_encode(signature).decode()])


def forged(name):
    "Make a token that must not be let in."
    now, public = int(time.time()), KEYS["RS256"].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    good = CLAIMS | {"exp": now + 600}

    def hmac_of(key, header):
        body = raw_token(header, good).rsplit(".", 1)[0]
        return body + "." + jwt.utils.base64url_encode(keys_module.hmac.digest(key, body.encode(), "sha256")).decode()

    made = {
        "none": raw_token({"alg": "none", "kid": "RS256"}, good),
        "None": raw_token({"alg": "None", "kid": "RS256"}, good),
        "no alg": raw_token({"kid": "RS256"}, good),
        "hs256 with the public key": hmac_of(pem, {"alg": "HS256", "kid": "RS256"}),
        "hs256 claiming rs256": hmac_of(pem, {"alg": "RS256", "kid": "RS256"}),
        "hs256 with the jwk": hmac_of(published("RS256", "RS256")["n"].encode(), {"alg": "HS256", "kid": "RS256"}),
        "its own key in the header": sign(
            "ES256", ec.generate_private_key(ec.SECP256R1()), headers={"jwk": published("ES256", "x")}
        ),
        "a key from elsewhere": sign(
            "RS256", rsa.generate_private_key(65537, 2048), headers={"jku": "https://evil.example.org"}
        ),
        "a path as key id": sign(kid="../../../../dev/null"),
        "sql as key id": sign(kid="' OR 1=1 --"),
        "another key's id": sign("RS256", KEYS["PS256"]),
        "another type's key id": sign("ES256", kid="RS256"),
        "expired": sign(exp=now - 60),
        "no end": sign(exp=None),
        "not yet": sign(nbf=now + 600),
        "no issuer": sign(iss=None),
        "another issuer": sign(iss="https://login.example.org.evil.com"),
        "no audience": sign(aud=None),
        "another audience": sign(aud="billing"),
        "no subject": sign(sub=None),
        "a critical extension": sign(headers={"crit": ["exp2"], "exp2": 1}),
        "cut": sign()[:-8],
        "changed": ".".join([sign().split(".")[0], sign(sub="root").split(".")[1], sign().split(".")[2]]),
        "empty": "..",
        "no token": "a.b.c",
        "text": "x" * 5_000,
    }
    return made[name] if name else list(made)


@pytest.mark.parametrize("name", forged(""))
def test_a_forged_token_is_refused(issuer, name):
    status, words = refusal(issuer.check, forged(name))
    assert status == 401 and len(words) < 300 and "\n" not in words


@pytest.mark.parametrize("claim", ["openid", "", None, ["workbench"], {"workbench:admin": 1}, "workbench:root", 7])
def test_a_token_without_a_scope_of_ours_is_forbidden(issuer, claim):
    assert refusal(issuer.check, sign(scope=claim))[0] == 403


@pytest.mark.parametrize(
    "claims, scope",
    [
        ({"scope": "workbench:client workbench:operator"}, "operator"),
        ({"scope": None, "scp": ["workbench:client"]}, "client"),
        ({"scope": ["workbench:admin", "workbench:client"]}, "admin"),
    ],
)
def test_the_highest_scope_of_a_token_counts(issuer, claims, scope):
    assert issuer.check(sign(**claims)).scope == scope


def test_a_key_that_was_published_later_is_fetched_and_a_withdrawn_one_is_forgotten(wiring, monkeypatch):
    place = Path(wiring.jwt_jwks)
    place.write_text(json.dumps({"keys": [published("RS256", "old")]}))
    issuer = Issuer(wiring)
    issuer.refresh()
    assert issuer.check(sign(kid="old")).name == "ana"
    place.write_text(json.dumps({"keys": [published("ES256", "new")]}))
    assert not issuer.is_due(sign("ES256", kid="new"))  # asked a moment ago
    monkeypatch.setattr(tokens, "_OFTEN_S", 0.0)
    assert issuer.is_due(sign("ES256", kid="new")) and not issuer.is_due("no.token.here")
    issuer.refresh()
    assert issuer.check(sign("ES256", kid="new")).name == "ana"
    assert refusal(issuer.check, sign(kid="old"))[0] == 401


def test_an_issuer_that_is_away_keeps_its_keys_for_a_day(wiring, issuer, monkeypatch):
    Path(wiring.jwt_jwks).unlink()
    issuer.refresh()
    assert issuer.check(sign()).name == "ana"
    monkeypatch.setattr(tokens, "_LONGEST_S", 0.0)
    assert refusal(issuer.check, sign())[0] == 503


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys": 7}',
        b'{"keys": [7]}',
        b'{"keys": []}',
        b"<html>",
        b'{"keys": [{"kty": "EC", "crv": "P-256"}]}',
    ],
)
def test_what_is_no_list_of_keys_is_said_to_be_none(document):
    with pytest.raises(WorkbenchError, match="check jwt_jwks"):
        read_published(document)


def test_keys_that_others_could_know_are_passed_over():
    shared = {"kty": "oct", "k": "c2VjcmV0", "kid": "RS256", "alg": "HS256"}
    weak = rsa.generate_private_key(65537, 1024).public_key()
    small = jwt.algorithms.RSAAlgorithm.to_jwk(weak, as_dict=True) | {"kid": "small"}
    hidden = published("RS256", "enc") | {"use": "enc"}
    listed = {"keys": [shared, small, hidden, published("ES256", "good")]}
    assert list(read_published(json.dumps(listed).encode())) == ["good"]


@pytest.mark.parametrize(
    "wiring, words",
    [
        (Wiring(jwt_jwks="http://login.example.org/keys", jwt_issuer="i", jwt_audience="a"), "write https"),
        (Wiring(jwt_jwks="ftp://login.example.org/keys", jwt_issuer="i", jwt_audience="a"), "write https"),
        (Wiring(jwt_jwks="keys.json", jwt_audience="a"), "jwt_issuer is not"),
        (Wiring(jwt_jwks="keys.json", jwt_issuer="i"), "jwt_audience is not"),
    ],
)
def test_settings_under_which_anybody_could_sign_are_refused(wiring, words):
    with pytest.raises(ValueError, match=words):
        check_wiring(wiring)


def test_a_service_takes_keys_and_tokens_beside_each_other(store, wiring, tmp_path):
    section = "\n".join(f"{n} = {getattr(wiring, n)}" for n in ("jwt_jwks", "jwt_issuer", "jwt_audience"))
    (tmp_path / "settings.ini").write_text(f"[local]\n[local.service]\n{section}\n")
    text, _ = create_key(store, "shop", "client", "ada")
    with closing(Keys(store, Settings("local", tmp_path, tmp_path))) as keys:
        assert admit(keys, text) == Caller("shop", "client", "key")
        assert admit(keys, sign()).actor == "token ana"
        assert refusal(admit, keys, sign(aud="billing"))[0] == 401


def test_a_service_without_an_issuer_takes_no_token(opened):
    assert refusal(admit, opened, sign())[0] == 401


def test_a_token_without_a_key_id_fits_a_key_without_one():
    keys = read_published(
        json.dumps({"keys": [{k: v for k, v in published("RS256", "x").items() if k != "kid"}]}).encode()
    )
    token = jwt.encode(CLAIMS | {"exp": int(time.time()) + 60}, KEYS["RS256"], "RS256")
    wiring = Wiring(jwt_jwks="keys.json", jwt_issuer=CLAIMS["iss"], jwt_audience="workbench")
    assert verify_token(token, keys, wiring).name == "ana"


# The commands.


@pytest.fixture
def workbench(store, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[local]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORKBENCH_DATABASE_URL", store.url)
    monkeypatch.setenv("WORKBENCH_ACTOR", "ben")
    for name in ("WORKBENCH_HOME", "WORKBENCH_ENVIRONMENT", "WORKBENCH_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: CliRunner().invoke(app, ["keys", *arguments])


def test_the_commands_make_show_replace_and_end_keys(workbench, store):
    made = json.loads(workbench("create", "shop", "--scope", "client", "--expires-in", "90d", "--json").stdout)
    assert made["key"].startswith("wb_") and made["scope"] == "client" and made["created_by"] == "ben"
    done = workbench("create", "ops", "--scope", "operator", "--expires-in", "never")
    assert done.stdout.startswith("wb_") and len(done.stdout.splitlines()) == 1 and "without an end" in done.stderr
    listed = workbench("list")
    assert "shop" in listed.stdout and "never" in listed.stdout
    assert made["key"] not in listed.stdout and made["key"][16:] not in workbench("list", "--json").stdout
    newer = json.loads(workbench("rotate", "shop", "--overlap", "0", "--json").stdout)
    assert newer["key"] != made["key"]
    assert "revoked: shop" in workbench("revoke", "shop", "--reason", "test").stdout
    assert [k["name"] for k in json.loads(workbench("list", "--json").stdout)] == ["ops"]
    states = {(k["name"], k["state"]) for k in json.loads(workbench("list", "--all", "--json").stdout)}
    assert states == {("ops", "active"), ("shop", "expired"), ("shop", "revoked")}
    with transaction(store) as connection:
        assert {e.actor for e in read_ledger(connection)} == {"ben"}


def test_a_wrong_command_changes_nothing(workbench, store):
    for arguments in (
        ("create", "shop", "--scope", "king"),
        ("create", "shop", "--scope", "client", "--expires-in", "soon"),
        ("create", "shop", "--scope", "client", "--expires-in", "1s"),
        ("rotate", "nobody"),
        ("revoke", "nobody"),
        ("rotate", "shop", "--overlap", "never"),
    ):
        assert workbench(*arguments).exit_code != 0
    assert read_keys(store) == []
