"""Canary run (L-01): marked secrets through every route at debug level, then looked for in everything that was written."""

from __future__ import annotations

import base64
import json
import os
import uuid
from datetime import datetime
from pathlib import Path

from databases import address, content
from harness import Served, skms, start, stop
from vectors import wrap_import

MARKS = {
    "plaintext": b"CANARY-plaintext-2f8c1d",
    "context": b"CANARY-context-77aa10b3",
    "reference": b"CANARY-reference-9e1044",
    "malformed": b"CANARY-malformed-5d22e1",
    "message": b"CANARY-message-c0ffee01",
    "header": b"CANARY-header-0badcafe0",
    "token": b"skms_api_canary00_" + b"C" * 43 + b"000000",
}


def spellings(secret: bytes) -> list[bytes]:
    """A secret in clear, hex and the base64 of each alignment."""
    found = [secret, secret.hex().encode(), secret.hex().upper().encode()]
    for shift in range(3):
        padded = base64.b64encode(b"\0" * shift + secret)
        found += [
            padded[4 if shift else 0 : -4],
            base64.urlsafe_b64encode(b"\0" * shift + secret)[4 if shift else 0 : -4],
        ]
    return found


def drive(node: Served) -> list[bytes]:
    """Send marked values through every route, well-formed, malformed, denied and foreign; the secrets it was given."""
    plain, context = base64.b64encode(MARKS["plaintext"]).decode(), {"row": MARKS["context"].decode()}
    message = base64.b64encode(MARKS["message"]).decode()
    use = {"context": context, "reason": {"code": "support", "reference": MARKS["reference"].decode()}}
    secrets: list[bytes] = []
    headers = {"Authorization": f"Bearer {MARKS['token'].decode()}", "Cookie": MARKS["header"].decode()}
    with node.client("health-operator") as operator, node.client("health-eu-de-1") as workload:
        keys = {}
        for spec in ("AES_256", "EC_P256", "HMAC_256"):
            body = {"spec": spec, "tier": 2, "home": "eu-de-1"}
            made = operator.post("/v1/keys", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
            keys[spec] = made.json()["id"]
        path = f"/v1/keys/{keys['AES_256']}"
        sealed = workload.post(f"{path}/encrypt", json={"plaintext": plain, **use}).json()["ciphertext"]
        assert workload.post("/v1/decrypt", json={"ciphertext": sealed, **use}).json()["plaintext"] == plain
        workload.post("/v1/decrypt", json={"ciphertext": sealed, "context": {"row": "CANARY-context-other"}})
        workload.post("/v1/rewrap", json={"ciphertext": sealed, **use})
        data = workload.post(f"{path}/data-keys", json={"return": "both", **use}).json()
        secrets.append(base64.b64decode(data["plaintext_key"]))
        workload.post("/v1/data-keys/unwrap", json={"wrapped_key": data["wrapped_key"], **use})
        workload.post(f"/v1/keys/{keys['EC_P256']}/sign", json={"message": message, "algorithm": "ECDSA_SHA_256"})
        workload.post(f"/v1/keys/{keys['HMAC_256']}/mac", json={"message": message, "algorithm": "HMAC_SHA_256"})
        waiting = {"spec": "AES_256", "tier": 2, "home": "eu-de-1", "origin": "external"}
        key = operator.post("/v1/keys", json=waiting, headers={"Idempotency-Key": uuid.uuid4().hex}).json()["id"]
        made = operator.post(f"/v1/keys/{key}/import-parameters", json={"wrapping": wrap_import.HPKE_NAME}).json()
        material = os.urandom(32)
        end = int(datetime.fromisoformat(made["expires_at"]).timestamp())
        info = wrap_import.info("health", uuid.UUID(key).bytes, "AES_256", end)
        public = base64.b64decode(made["wrapping_public_key"])
        wrapped = wrap_import.wrap(wrap_import.HPKE_NAME, public, material, info=info)
        body = {"import_token": made["import_token"], "wrapped_key": base64.b64encode(wrapped).decode()}
        for value in ("0" * 16, wrap_import.check_value(material)):
            sent = {**body, "key_check_value": value}
            answer = operator.post(f"/v1/keys/{key}/import", json=sent, headers={"Idempotency-Key": uuid.uuid4().hex})
        assert answer.status_code == 200, answer.text
        secrets += [material, made["import_token"].encode(), wrapped[64:128]]
        items = [{"key": keys["AES_256"], "plaintext": plain, **use} for _ in range(5)]
        workload.post("/v1/batch/encrypt", json={"items": items})
        random = workload.post("/v1/random", json={"bytes": 32}).json()["random"]
        secrets.append(base64.b64decode(random))
        malformed = MARKS["malformed"].decode()
        for body in (
            {"plaintext": malformed},
            {"plaintext": {"a": malformed}},
            {malformed: 1},
            {"plaintext": plain, "version": malformed},
        ):
            workload.post(f"{path}/encrypt", json=body)
        workload.post(
            f"{path}/encrypt",
            content=b'{"plaintext": "' + MARKS["malformed"],
            headers={"content-type": "application/json"},
        )
        workload.post(f"{path}/encrypt", json={"plaintext": plain, **use}, headers=headers)
        token = operator.post("/v1/tokens", json={"scopes": ["listKeys"]})
        assert token.status_code == 201, token.text
        secrets.append(token.json()["token"].encode())
        bearer = {"Authorization": f"Bearer {token.json()['token']}"}
        with node.client(None) as bare:
            assert bare.get("/v1/keys", headers=bearer).status_code == 200
            bare.get("/v1/keys", headers=headers)
        for stranger in ("defence-eu-de-1", "health-us-mkt-1"):
            with node.client(stranger) as other:
                other.post(f"{path}/encrypt", json={"plaintext": plain, **use})
                other.post("/v1/decrypt", json={"ciphertext": sealed, **use})
    return secrets


def test_L_01_L_06_no_secret_is_in_logs_database_metrics_or_export(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    os.environ["SKMS_LOG_LEVEL"] = "debug"
    try:
        node = start(tmp_path / "node", log=log)
    finally:
        del os.environ["SKMS_LOG_LEVEL"]
    try:
        secrets = drive(node)
        with node.client("platform") as platform:
            metrics = platform.get("/metrics").content
        with node.client("health-auditor") as auditor:
            records = auditor.get("/v1/audit/records?page_size=500").content
    finally:
        stop(node.process)
    config = str(tmp_path / "node" / "skms.toml")
    export = tmp_path / "export"
    assert skms("audit", "export", "--config", config, "--to", str(export)).returncode == 0
    directory = tmp_path / "node"
    pins = [p.read_bytes().strip() for p in directory.rglob("*pin*") if p.is_file()]
    assert pins, "no PIN file found to look for"
    database = content(address(directory))
    assert b"audit_batch" in database
    written = {"log": log.read_bytes(), "metrics": metrics, "records": records, "database": database}
    tokens = {p for p in directory.rglob("*") if "tokens" in p.parts}
    for path in [*directory.rglob("*"), *export.rglob("*")]:
        private = path.suffix in {".key"} or "pin" in path.name or path in tokens
        if path.is_file() and not private:
            written[str(path.relative_to(tmp_path))] = path.read_bytes()
    assert b"request" in written["log"], "the debug log is empty: this run shows nothing"
    found = []
    for name, text in written.items():
        for secret in (*MARKS.values(), *secrets, *pins):
            found += [f"{name}: {secret[:12]!r}" for spelled in spellings(secret) if spelled in text]
    assert not found, json.dumps(found[:10])


def test_the_search_itself_finds_what_it_looks_for() -> None:
    for shift in range(3):
        text = base64.b64encode(b"x" * shift + MARKS["plaintext"] + b"tail")
        assert any(s in text for s in spellings(MARKS["plaintext"])), shift
