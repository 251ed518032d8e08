"""The commands of `skms`. Each asks the REST API, works offline, or looks after a node's files."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from service.cli import filecrypt, sovereignty
from service.cli.client import (
    CONFLICT,
    DENIED,
    FAILED_CHECK,
    INTERNAL,
    NOT_FOUND,
    OK,
    TEMPORARY,
    USAGE,
    WAITING,
    Client,
    Connection,
    Failed,
    open_output,
    read_input,
    write_output,
)

T = TypeVar("T")
out: Final = Console()
err: Final = Console(stderr=True)


@dataclasses.dataclass
class Options:
    """What stands before the command."""

    connection: Connection = dataclasses.field(default_factory=lambda: Connection("", None, None, None, None))
    output: str = "table"
    dry_run: bool = False

    def client(self) -> Client:
        return Client(self.connection, dry_run=self.dry_run)


options = Options()


def group(about: str) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, help=about, rich_markup_mode=None)


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Sovereign KMS. Exit status: 0 ok, 1 internal, 2 usage, 3 denied, 4 not found, 5 conflict or state, "
    "6 waiting for approval, 7 temporary, 8 verification failed.",
)
key_app, alias_app, hsm_app, drill_app = group("Keys"), group("Aliases"), group("HSMs"), group("Drills")
sovereignty_app = group("Figures of sovereignty")
exception_app = group("Exceptions: where callers and plaintexts may be, for a time")
freeze_app, approval_app = group("Freezes: stop at once, lift by a quorum"), group("Requests for approval")
policy_app, token_app, audit_app = group("Policy"), group("API tokens"), group("Audit log")
tenant_app, region_app, envelope_app = group("Tenants"), group("Regions"), group("Ciphertexts, offline")
file_app, dev_app, config_app = group("Files of any size"), group("Development node"), group("Configuration")
transfers_app = group("Data that crosses from one jurisdiction into another")
witness_app, backup_app = group("Being a witness of other logs"), group("Backups of the database")
db_app = group("The database's schema and roles")
for name, sub in {
    "key": key_app,
    "alias": alias_app,
    "hsm": hsm_app,
    "drill": drill_app,
    "freeze": freeze_app,
    "exception": exception_app,
    "sovereignty": sovereignty_app,
    "approval": approval_app,
    "policy": policy_app,
    "transfers": transfers_app,
    "token": token_app,
    "audit": audit_app,
    "tenant": tenant_app,
    "region": region_app,
    "envelope": envelope_app,
    "file": file_app,
    "dev": dev_app,
    "config": config_app,
    "witness": witness_app,
    "backup": backup_app,
    "db": db_app,
}.items():
    app.add_typer(sub, name=name)


transcript_app = group("Transcripts of ceremonies")
hsm_app.add_typer(transcript_app, name="transcript")


@app.callback()
def connection(
    url: Annotated[str, typer.Option(envvar="SKMS_URL", help="https://host:port")] = "",
    ca: Annotated[Path | None, typer.Option(envvar="SKMS_CA", help="authority of the server")] = None,
    cert: Annotated[Path | None, typer.Option(envvar="SKMS_CERT", help="client certificate (PEM)")] = None,
    key: Annotated[Path | None, typer.Option(envvar="SKMS_KEY", help="its private key (PEM)")] = None,
    token_file: Annotated[Path | None, typer.Option(envvar="SKMS_TOKEN_FILE", help="file with a token")] = None,
    dev_dir: Annotated[Path | None, typer.Option(envvar="SKMS_DEV_DIR", help="directory of a development node")] = None,
    identity: Annotated[str, typer.Option(envvar="SKMS_IDENTITY", help="identity of the development node")] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="table or json")] = "table",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="decide and record, but do nothing")] = False,
) -> None:
    """Whom to ask, and as whom."""
    if output not in {"table", "json"}:
        raise Failed(USAGE, "--output: table or json")
    chosen = Connection(url, ca, cert, key, token_file)
    if dev_dir is not None and identity:
        chosen = Connection.of_dev(dev_dir, identity)
    options.connection, options.output, options.dry_run = chosen, output, dry_run


# ---- showing -------------------------------------------------------------------------------------------------------


def show(value: Any) -> None:
    """One object: JSON, or a table of its fields."""
    if options.output == "json":
        print(json.dumps(value, indent=2))
        return
    _rows([(name, _lines(field)) for name, field in (value or {}).items()])


def show_list(items: Sequence[dict[str, Any]], *columns: str) -> None:
    """Objects: JSON, or a table with these columns."""
    if options.output == "json":
        print(json.dumps(list(items), indent=2))
        return
    _rows([columns, *(tuple(_cell(item.get(c)) for c in columns) for item in items)])


def _rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as what is in them: nothing is cut, an id can be copied, and a long line is the terminal's to wrap."""
    split = [[[_printable(line) for line in cell.split("\n")] for cell in row] for row in rows]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*split, strict=True)]
    for row in split:
        for line in zip_longest(*row, fillvalue=""):
            print((" " + "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True))).rstrip())


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _lines(value: Any) -> str:
    """A field of one object: nothing that it holds is left out, one thing a line."""
    match value:
        case list() if value and isinstance(value[0], dict):
            return "\n".join(", ".join(f"{k}={_inner(f)}" for k, f in v.items()) for v in value)
        case dict() if value:
            return "\n".join(f"{k}={_inner(v)}" for k, v in value.items())
    return _cell(value)


def _inner(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else _cell(value)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case list() if value and isinstance(value[0], dict):
            return f"{len(value)}"
        case list():
            return ", ".join(str(v) for v in value) or "-"
        case dict():
            return ", ".join(f"{k}={v}" for k, v in value.items()) or "-"
    return str(value)


def pairs(given: Sequence[str]) -> dict[str, str]:
    """name=value options."""
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or name in found:
            raise Failed(USAGE, "context and tags: name=value, each name once")
        found[name] = value
    return found


def pages(client: Client, path: str, query: dict[str, str], limit: int) -> list[dict[str, Any]]:
    """Up to `limit` items over as many pages as it takes."""
    found: list[dict[str, Any]] = []
    token: str | None = None
    while len(found) < limit:
        page = {**query, "page_size": str(min(500, limit - len(found)))}
        if token is not None:
            page["page_token"] = token
        answer = client.get(path, query=page)
        found += answer["items"]
        token = answer["next_page_token"]
        if token is None:
            break
    return found


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


Context = Annotated[list[str], typer.Option("--context", "-c", help="name=value; repeat for more")]
Input = Annotated[str, typer.Option("--in", "-i", help="file, or - for standard input")]
Output = Annotated[str, typer.Option("--out", "-O", help="file, or - for standard output")]
Key = Annotated[str, typer.Argument(help="UUID or alias/NAME", metavar="KEY")]

# ---- keys ----------------------------------------------------------------------------------------------------------


@key_app.command("create")
def key_create(
    spec: Annotated[
        str, typer.Option(help="AES_256, HMAC_256, HMAC_512, EC_P256, EC_P384, RSA_3072, RSA_4096, ED25519")
    ],
    tier: Annotated[int, typer.Option(help="1 must-control, 2 allied, 3 market", min=1, max=3)],
    home: Annotated[str, typer.Option(help="region of its HSM")],
    alias: Annotated[str, typer.Option()] = "",
    residency: Annotated[list[str], typer.Option(help="where material may exist")] = [],
    execution: Annotated[list[str], typer.Option(help="where it may be used")] = [],
    reach: Annotated[list[str], typer.Option(help="where callers may be")] = [],
    egress: Annotated[list[str], typer.Option(help="where plaintext may go")] = [],
    purpose: Annotated[list[str], typer.Option()] = [],
    origin: Annotated[str, typer.Option(help="hsm, or external: its material is imported")] = "hsm",
    suite: Annotated[str, typer.Option(help="0x0001 or 0x0002; imported: 0x0005 (32 bytes) or 0x0001 (64)")] = "",
    rotate_after: Annotated[str, typer.Option(help="ISO 8601: P90D")] = "",
    rotate_after_uses: Annotated[int, typer.Option()] = 0,
    description: Annotated[str, typer.Option()] = "",
    tag: Annotated[list[str], typer.Option(help="name=value")] = [],
) -> None:
    """Create a key in the HSM of its home region, or one that waits for its import."""
    body: dict[str, Any] = {"spec": spec, "tier": tier, "home": home, "description": description, "tags": pairs(tag)}
    lists = {"residency": residency, "execution": execution, "reach": reach, "egress": egress, "purposes": purpose}
    body |= {name: value for name, value in lists.items() if value}
    body |= {name: value for name, value in (("alias", alias), ("suite", suite)) if value}
    body |= {"origin": origin} if origin != "hsm" else {}
    if rotate_after or rotate_after_uses:
        body["rotation"] = {"max_age": rotate_after or None, "max_uses": rotate_after_uses or None}
    show(options.client().post("/v1/keys", body, idempotent=True))


@key_app.command("list")
def key_list(
    state: Annotated[str, typer.Option()] = "",
    tier: Annotated[str, typer.Option()] = "",
    usage: Annotated[str, typer.Option()] = "",
    region: Annotated[str, typer.Option()] = "",
    tag: Annotated[list[str], typer.Option(help="name=value")] = [],
    limit: Annotated[int, typer.Option(min=1)] = 100,
) -> None:
    """List the tenant's keys."""
    query = {"state": state, "tier": tier, "usage": usage, "region": region}
    query = {k: v for k, v in query.items() if v} | {f"tag.{k}": v for k, v in pairs(tag).items()}
    found = pages(options.client(), "/v1/keys", query, limit)
    show_list(found, "id", "spec", "tier", "home", "state", "latest_version", "description")


@key_app.command("show")
def key_show(key: Key) -> None:
    """A key's metadata and versions."""
    show(options.client().get(f"/v1/keys/{key}"))


@key_app.command("update")
def key_update(
    key: Key,
    description: Annotated[str | None, typer.Option()] = None,
    tag: Annotated[list[str] | None, typer.Option(help="name=value; replaces all tags")] = None,
    rotate_after: Annotated[str, typer.Option(help="ISO 8601: P90D")] = "",
    rotate_after_uses: Annotated[int, typer.Option()] = 0,
    min_decrypt_version: Annotated[str, typer.Option(help="number, latest or latest-N")] = "",
    min_encrypt_version: Annotated[str, typer.Option(help="number, latest or latest-N")] = "",
) -> None:
    """Change description, tags or rotation, or raise fences (`skms key set-policy` lowers them)."""
    body: dict[str, Any] = {}
    if description is not None:
        body["description"] = description
    if tag:
        body["tags"] = pairs(tag)
    if rotate_after or rotate_after_uses:
        body["rotation"] = {"max_age": rotate_after or None, "max_uses": rotate_after_uses or None}
    fences = {"min_decrypt_version": min_decrypt_version, "min_encrypt_version": min_encrypt_version}
    body |= {k: int(v) if v.isdigit() else v for k, v in fences.items() if v}
    show(options.client().change("PATCH", f"/v1/keys/{key}", key, body))


@key_app.command("rotate")
def key_rotate(key: Key) -> None:
    """Make a new version; older ones go on opening what they protected."""
    show(options.client().post(f"/v1/keys/{key}/rotate", idempotent=True))


Wrap = Annotated[str, typer.Option("--wrapping", help="how the key is wrapped: docs/import.md")]
RsaSpec = Annotated[str, typer.Option("--wrapping-key-spec", help="RSA_3072 or RSA_4096")]


@key_app.command("import-parameters")
def key_import_parameters(
    key: Key, wrapping: Wrap = "RSA_AES_KEY_WRAP_SHA_256", wrapping_key_spec: RsaSpec = ""
) -> None:
    """A wrapping key and a token for one import, good for 24 hours; earlier tokens of the key are spent."""
    show(_import_parameters(options.client(), key, wrapping, wrapping_key_spec))


def _import_parameters(client: Client, key: str, wrapping: str, rsa_spec: str) -> Any:
    body = {"wrapping": wrapping} | ({"wrapping_key_spec": rsa_spec} if rsa_spec else {})
    return client.post(f"/v1/keys/{key}/import-parameters", body)


@key_app.command("import")
def key_import(
    key: Key,
    material: Annotated[str, typer.Option(help="secret or private key: a file, or - for standard input")] = "",
    wrapping: Wrap = "RSA_AES_KEY_WRAP_SHA_256",
    wrapping_key_spec: RsaSpec = "",
    expires_at: Annotated[str, typer.Option(help="end of the material, RFC 3339")] = "",
    parameters: Annotated[str, typer.Option(help="file of `import-parameters -o json`, for a key wrapped before")] = "",
    wrapped_key: Annotated[str, typer.Option(help="file with the wrapped key")] = "",
    check_value: Annotated[str, typer.Option(help="its key check value, 16 hex digits")] = "",
    public_key: Annotated[str, typer.Option(help="file with its public half (PEM)")] = "",
) -> None:
    """Wrap a key here and import it; or, with --wrapped-key, import one that was wrapped elsewhere."""
    client = options.client()
    if bool(material) == bool(wrapped_key):
        raise Failed(USAGE, "give --material, or --parameters, --wrapped-key and --check-value")
    if wrapped_key:
        if not (parameters and check_value):
            raise Failed(USAGE, "--wrapped-key needs the --parameters it was made with, and --check-value")
        try:
            token = json.loads(read_input(parameters))["import_token"]
        except (ValueError, KeyError, TypeError):
            raise Failed(USAGE, f"{parameters}: not the answer of `skms -o json key import-parameters`") from None
        body = {"import_token": token, "wrapped_key": b64(read_input(wrapped_key)), "key_check_value": check_value}
        body |= {"public_key": read_input(public_key).decode("ascii", "replace")} if public_key else {}
    else:
        body = _wrapped_here(client, key, read_input(material), wrapping, wrapping_key_spec)
    body |= {"expires_at": expires_at} if expires_at else {}
    show(client.post(f"/v1/keys/{key}/import", body, idempotent=True))


def _wrapped_here(client: Client, key: str, data: bytes, wrapping: str, rsa_spec: str) -> dict[str, Any]:
    from service.cli.importing import Material, body_of

    found = client.get(f"/v1/keys/{key}")
    read = Material.read(found["usage"], data)
    made = _import_parameters(client, key, wrapping, rsa_spec)
    if "would" in made:
        raise Failed(USAGE, "--dry-run: an import needs import parameters; try `skms --dry-run key import-parameters`")
    return body_of(made, found, client.get("/v1/whoami")["tenant"], read)


@key_app.command("disable")
def key_disable(key: Key) -> None:
    """Stop every use of a key at once."""
    show(options.client().post(f"/v1/keys/{key}/disable"))


@key_app.command("enable")
def key_enable(key: Key) -> None:
    """Put a disabled key back into use."""
    show(options.client().change("POST", f"/v1/keys/{key}/enable", key))


@key_app.command("compromise")
def key_compromise(key: Key) -> None:
    """Mark a key compromised, for ever."""
    show(options.client().post(f"/v1/keys/{key}/mark-compromised"))


@key_app.command("schedule-deletion")
def key_schedule_deletion(key: Key, wait: Annotated[str, typer.Option(help="P7D to P90D")] = "P30D") -> None:
    """Stop a key now and destroy it after 7 to 90 days."""
    path = f"/v1/keys/{key}/schedule-deletion"
    show(options.client().change("POST", path, key, {"wait": wait}, idempotent=True))


@key_app.command("cancel-deletion")
def key_cancel_deletion(key: Key) -> None:
    """Take a scheduled deletion back."""
    show(options.client().change("POST", f"/v1/keys/{key}/cancel-deletion", key))


@key_app.command("destroy")
def key_destroy(
    key: Key,
    reason: Annotated[str, typer.Option(help="a reason code, for the record and those who approve")] = "",
) -> None:
    """Ask for the destruction of a key without a waiting time; exit status 6: done once a quorum has signed."""
    _ask(f"/v1/keys/{key}/destroy", key, {"reason": {"code": reason}} if reason else None)


@key_app.command("set-policy")
def key_set_policy(
    key: Key,
    tier: Annotated[int, typer.Option(min=0, max=3, help="1 to 3")] = 0,
    residency: Annotated[list[str], typer.Option(help="it never widens")] = [],
    execution: Annotated[list[str], typer.Option()] = [],
    reach: Annotated[list[str], typer.Option()] = [],
    egress: Annotated[list[str], typer.Option()] = [],
    failover: Annotated[list[str], typer.Option()] = [],
    purpose: Annotated[list[str], typer.Option()] = [],
    min_decrypt_version: Annotated[int, typer.Option(help="the oldest version that opens; it may be lowered")] = 0,
    min_encrypt_version: Annotated[int, typer.Option(help="the oldest version that protects")] = 0,
    reason: Annotated[str, typer.Option(help="a reason code, for the record and those who approve")] = "",
) -> None:
    """Ask for another tier, other places, purposes or fences of a key; exit status 6: done once a quorum has signed."""
    wanted: dict[str, Any] = {"tier": tier, "residency": residency, "execution": execution, "reach": reach}
    wanted |= {"egress": egress, "failover": failover, "purposes": purpose}
    wanted |= {"min_decrypt_version": min_decrypt_version, "min_encrypt_version": min_encrypt_version}
    body = {name: value for name, value in wanted.items() if value}
    if not body:
        raise Failed(USAGE, "name at least one of --tier, --residency, --execution, --reach, --egress, --purpose, ...")
    _ask(f"/v1/keys/{key}/policy", key, body | ({"reason": {"code": reason}} if reason else {}))


def _ask(path: str, key: str, body: dict[str, Any] | None) -> None:
    """Ask for what takes approvals of others (`skms approval sign`)."""
    show(options.client().change("POST", path, key, body, idempotent=True))
    if not options.dry_run:
        raise typer.Exit(WAITING)


@key_app.command("grant")
def key_grant(
    key: Key,
    to: Annotated[str, typer.Option(help="a workload of the tenant, by the id that `skms whoami` shows it")],
    operation: Annotated[list[str], typer.Option(help="an action of policies, such as decrypt; may be repeated")],
    expires_at: Annotated[str, typer.Option(help="when it ends: RFC 3339, at most 365 days from now")],
    purpose: Annotated[str, typer.Option(help="one of the key's; left out: its only one")] = "",
    context_equals: Annotated[list[str], typer.Option(help="NAME=VALUE of the exact encryption context")] = [],
    context_subset: Annotated[list[str], typer.Option(help="NAME=VALUE that the encryption context must hold")] = [],
    max_uses: Annotated[int, typer.Option(min=0, help="0: as often as wanted")] = 0,
    reason: Annotated[str, typer.Option(help="a reason code, for the record")] = "",
) -> None:
    """Let a workload use a key until an end, as far as nothing forbids it."""
    body: dict[str, Any] = {"grantee": to, "operations": operation, "expires_at": expires_at}
    body |= {"purpose": purpose} if purpose else {}
    body |= {"context_equals": pairs(context_equals)} if context_equals else {}
    body |= {"context_subset": pairs(context_subset)} if context_subset else {}
    body |= {"max_uses": max_uses} if max_uses else {}
    body |= {"reason": {"code": reason}} if reason else {}
    show(options.client().post(f"/v1/keys/{key}/grants", body, idempotent=True))


@key_app.command("grants")
def key_grants(key: Key) -> None:
    """Grants of a key, newest first."""
    found = options.client().get(f"/v1/keys/{key}/grants")["items"]
    show_list(found, "id", "grantee", "operations", "state", "expires_at", "max_uses", "granter")


@key_app.command("revoke-grant")
def key_revoke_grant(key: Key, grant: Annotated[str, typer.Argument(help="its id")]) -> None:
    """Take a grant back: it counts nowhere a second later."""
    options.client().call("DELETE", f"/v1/keys/{key}/grants/{grant}")


@key_app.command("versions")
def key_versions(key: Key) -> None:
    """A key's versions."""
    found = options.client().get(f"/v1/keys/{key}/versions")["items"]
    show_list(found, "version", "state", "created_at", "uses", "import_path", "expires_at")


@key_app.command("revoke-version")
def key_revoke_version(key: Key, version: int) -> None:
    """Take one version out of use."""
    show(options.client().post(f"/v1/keys/{key}/versions/{version}/revoke"))


@key_app.command("public-key")
def key_public(
    key: Key, version: Annotated[int, typer.Option()] = 0, jwk: Annotated[bool, typer.Option("--jwk")] = False
) -> None:
    """The public key as PEM or JWK."""
    query = {"version": str(version)} if version else None
    headers = {"Accept": "application/jwk+json"} if jwk else None
    print(options.client().call("GET", f"/v1/keys/{key}/public-key", query=query, headers=headers).text)


@alias_app.command("put")
def alias_put(name: str, key: Key) -> None:
    """Point an alias to a key."""
    show(options.client().call("PUT", f"/v1/aliases/{name}", {"key": key}).json())


@alias_app.command("delete")
def alias_delete(name: str) -> None:
    """Remove an alias; the key stays."""
    options.client().call("DELETE", f"/v1/aliases/{name}")


@alias_app.command("list")
def alias_list(limit: Annotated[int, typer.Option(min=1)] = 100) -> None:
    """List aliases."""
    show_list(pages(options.client(), "/v1/aliases", {}, limit), "alias", "key_id")


# ---- data plane ----------------------------------------------------------------------------------------------------


@app.command()
def encrypt(key: Key, source: Input = "-", context: Context = []) -> None:
    """Encrypt up to 64 KiB; prints the ciphertext."""
    body = {"plaintext": b64(read_input(source)), "context": pairs(context)}
    answer = options.client().post(f"/v1/keys/{key}/encrypt", body)
    print(json.dumps(answer, indent=2) if options.output == "json" or "would" in answer else answer["ciphertext"])


@app.command()
def decrypt(source: Input = "-", target: Output = "-", context: Context = []) -> None:
    """Open a ciphertext."""
    text = read_input(source).decode("ascii", "replace").strip()
    answer = options.client().post("/v1/decrypt", {"ciphertext": text, "context": pairs(context)})
    if "would" in answer:
        show(answer)
        return
    write_output(target, base64.b64decode(answer["plaintext"]))


@app.command()
def rewrap(
    source: Input = "-",
    context: Context = [],
    to_key: Annotated[str, typer.Option()] = "",
    to_context: Annotated[list[str] | None, typer.Option(help="name=value")] = None,
) -> None:
    """Move a ciphertext to the newest version, another key or another context."""
    text = read_input(source).decode("ascii", "replace").strip()
    body: dict[str, Any] = {"ciphertext": text, "context": pairs(context)}
    body |= {"to_key": to_key} if to_key else {}
    body |= {"to_context": pairs(to_context)} if to_context else {}
    answer = options.client().post("/v1/rewrap", body)
    print(json.dumps(answer, indent=2) if options.output == "json" or "would" in answer else answer["ciphertext"])


@app.command("data-key")
def data_key(
    key: Key,
    context: Context = [],
    length: Annotated[int, typer.Option("--bytes", min=16, max=64)] = 32,
    plaintext_out: Annotated[str, typer.Option(help="file for the key in clear; without it, wrapped only")] = "",
) -> None:
    """Make a data key; prints it wrapped."""
    body = {"bytes": length, "context": pairs(context), "return": "both" if plaintext_out else "wrapped"}
    answer = options.client().post(f"/v1/keys/{key}/data-keys", body)
    if plaintext_out and "plaintext_key" in answer:
        write_output(plaintext_out, base64.b64decode(answer.pop("plaintext_key")))
    print(json.dumps(answer, indent=2) if options.output == "json" or "would" in answer else answer["wrapped_key"])


@app.command()
def unwrap(target: Output, source: Input = "-", context: Context = []) -> None:
    """Open a wrapped data key into a file."""
    text = read_input(source).decode("ascii", "replace").strip()
    answer = options.client().post("/v1/data-keys/unwrap", {"wrapped_key": text, "context": pairs(context)})
    if "would" in answer:
        show(answer)
        return
    write_output(target, base64.b64decode(answer["plaintext_key"]))


Algorithm = Annotated[str, typer.Option("--algorithm", "-a")]


@app.command()
def sign(
    key: Key, algorithm: Algorithm, source: Input = "-", form: Annotated[str, typer.Option("--format")] = "der"
) -> None:
    """Sign a message of up to 64 KiB; prints the signature in base64."""
    body = {"message": b64(read_input(source)), "algorithm": algorithm, "format": form}
    answer = options.client().post(f"/v1/keys/{key}/sign", body)
    print(json.dumps(answer, indent=2) if options.output == "json" or "would" in answer else answer["signature"])


@app.command()
def verify(
    key: Key,
    algorithm: Algorithm,
    signature: Annotated[str, typer.Option(help="base64")],
    source: Input = "-",
    form: Annotated[str, typer.Option("--format")] = "der",
) -> None:
    """Verify a signature; exit status 8 if it is wrong."""
    body = {"message": b64(read_input(source)), "algorithm": algorithm, "format": form, "signature": signature}
    _valid(options.client().post(f"/v1/keys/{key}/verify", body))


@app.command()
def mac(key: Key, algorithm: Algorithm, source: Input = "-") -> None:
    """HMAC of a message of up to 64 KiB; prints it in base64."""
    body = {"message": b64(read_input(source)), "algorithm": algorithm}
    answer = options.client().post(f"/v1/keys/{key}/mac", body)
    print(json.dumps(answer, indent=2) if options.output == "json" or "would" in answer else answer["mac"])


@app.command("verify-mac")
def verify_mac(
    key: Key, algorithm: Algorithm, value: Annotated[str, typer.Option("--mac", help="base64")], source: Input = "-"
) -> None:
    """Verify an HMAC; exit status 8 if it is wrong."""
    body = {"message": b64(read_input(source)), "algorithm": algorithm, "mac": value}
    _valid(options.client().post(f"/v1/keys/{key}/verify-mac", body))


def _valid(answer: dict[str, Any]) -> None:
    show(answer)
    if answer.get("valid") is False:
        raise typer.Exit(FAILED_CHECK)


@app.command()
def random(target: Output, length: Annotated[int, typer.Option("--bytes", min=1, max=1024)] = 32) -> None:
    """Random bytes from the HSM."""
    answer = options.client().post("/v1/random", {"bytes": length})
    if "would" in answer:
        show(answer)
        return
    write_output(target, base64.b64decode(answer["random"]))


@app.command()
def batch(operation: str, source: Input = "-") -> None:
    """Run up to 500 items from a JSON file {"items": [...]}; exit status 5 if one failed."""
    try:
        body = json.loads(read_input(source))
    except ValueError:
        raise Failed(USAGE, "the batch file is not JSON") from None
    answer = options.client().call("POST", f"/v1/batch/{operation}", body)
    print(json.dumps(answer.json(), indent=2))
    if answer.headers.get("x-batch-failed", "0") != "0":
        raise typer.Exit(5)


@app.command()
def whoami() -> None:
    """What the service makes of your credential."""
    show(options.client().get("/v1/whoami"))


# ---- files ---------------------------------------------------------------------------------------------------------


def _progress() -> Progress:
    return Progress(
        *(
            *Progress.get_default_columns()[:1],
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        ),
        console=err,
        disable=not sys.stderr.isatty(),
    )


@file_app.command("encrypt")
def file_encrypt(
    source: Path,
    target: Path,
    key: Annotated[str, typer.Option("--key", "-k", help="UUID or alias/NAME")],
    context: Context = [],
    force: Annotated[bool, typer.Option("--force")] = False,
) -> None:
    """Protect a file of any size under a data key of KEY."""
    body = {"bytes": 32, "return": "both", "context": pairs(context)}
    answer = options.client().post(f"/v1/keys/{key}/data-keys", body)
    from keystore import from_text

    envelope, data_key = from_text(answer["wrapped_key"]), base64.b64decode(answer["plaintext_key"])
    try:
        with source.open("rb") as file, filecrypt.atomic(target, force=force) as made, _progress() as bar:
            task = bar.add_task("encrypting", total=source.stat().st_size)
            filecrypt.encrypt(file, made, key=data_key, envelope=envelope, progress=lambda n: bar.advance(task, n))
    except OSError as error:
        raise Failed(USAGE, str(error)) from None
    show({"file": str(target), "key_id": answer["key_id"], "key_version": answer["key_version"]})


@file_app.command("decrypt")
def file_decrypt(
    source: Path,
    target: Path,
    context: Context = [],
    force: Annotated[bool, typer.Option("--force")] = False,
) -> None:
    """Restore a protected file; exit status 8, and no file, if anything of it was changed."""
    from keystore import to_text

    try:
        with source.open("rb") as file, _progress() as bar:
            envelope = filecrypt.read_envelope(file)
            body = {"wrapped_key": to_text(envelope), "context": pairs(context)}
            answer = options.client().post("/v1/data-keys/unwrap", body)
            data_key = base64.b64decode(answer["plaintext_key"])
            task = bar.add_task("decrypting", total=source.stat().st_size)
            with filecrypt.atomic(target, force=force) as made:
                filecrypt.decrypt(file, made, key=data_key, envelope=envelope, progress=lambda n: bar.advance(task, n))
    except filecrypt.NotProtected as error:
        raise Failed(FAILED_CHECK, f"{source}: {error}; nothing was written") from None
    except OSError as error:
        raise Failed(USAGE, str(error)) from None
    show({"file": str(target), "key_id": answer["key_id"], "key_version": answer["key_version"]})


@envelope_app.command("inspect")
def envelope_inspect(source: Input = "-") -> None:
    """What a ciphertext says about itself; needs no service and no key."""
    from keystore import InvalidCiphertext, inspect

    data = read_input(source)
    try:
        text = data.decode("ascii").strip()
        info = inspect(text) if text.startswith("skms:") else inspect(data)
    except UnicodeDecodeError:
        info = _inspected(data)
    except InvalidCiphertext:
        raise Failed(FAILED_CHECK, "not a ciphertext of this service") from None
    show(dataclasses.asdict(info))


def _inspected(data: bytes) -> Any:
    from keystore import InvalidCiphertext, inspect

    try:
        return inspect(data)
    except InvalidCiphertext:
        raise Failed(FAILED_CHECK, "not a ciphertext of this service") from None


# ---- installation --------------------------------------------------------------------------------------------------


@tenant_app.command("list")
def tenant_list() -> None:
    """Tenants of the charter."""
    show_list(options.client().get("/v1/tenants")["items"], "name", "home")


@region_app.command("list")
def region_list() -> None:
    """Places of the charter, and where HSMs are."""
    show_list(options.client().get("/v1/regions")["items"], "name", "jurisdiction", "groups", "hsm")


@hsm_app.command("status")
def hsm_status() -> None:
    """State of the node's HSMs."""
    found = options.client().get("/v1/hsms")["items"]
    show_list(found, "name", "region", "admin", "state", "in_flight", "vendor", "token_label", "last_error")


@hsm_app.command("drain")
def hsm_drain(
    name: str, wait: Annotated[bool, typer.Option("--wait", help="until its last call has ended")] = False
) -> None:
    """Give an HSM no more calls, so that it can be serviced; refused if no other could serve."""
    client = options.client()
    answer = client.post(f"/v1/hsms/{name}/drain")
    while wait and not answer.get("drained", True):
        time.sleep(0.2)
        answer = next(h for h in client.get("/v1/hsms")["items"] if h["name"] == name)
    show(answer)


@hsm_app.command("undrain")
def hsm_undrain(
    name: str, wait: Annotated[bool, typer.Option("--wait", help="until its canary succeeded")] = False
) -> None:
    """Let an HSM serve again."""
    client = options.client()
    answer = client.post(f"/v1/hsms/{name}/undrain")
    while wait and answer.get("state", "UP") == "SUSPECT":
        time.sleep(0.2)
        answer = next(h for h in client.get("/v1/hsms")["items"] if h["name"] == name)
    show(answer)


@freeze_app.command("start")
def freeze_start(
    reason: Annotated[str, typer.Option(help="a reason code, for the record")],
    everything: Annotated[bool, typer.Option("--everything", help="every operation of the installation")] = False,
    key: Annotated[str, typer.Option(help="a key by id or alias/NAME")] = "",
    tag: Annotated[str, typer.Option(help="keys with a tag, as NAME=VALUE")] = "",
    tenant: Annotated[str, typer.Option(help="all keys of a tenant")] = "",
    region: Annotated[str, typer.Option(help="a region, jurisdiction or group of the charter")] = "",
    tier: Annotated[str, typer.Option(help="keys of a tier")] = "",
    caller: Annotated[str, typer.Option(help="whatever this caller asks, by the id that `skms whoami` shows")] = "",
    hsm: Annotated[str, typer.Option(help="whatever this HSM may be asked for")] = "",
    mode: Annotated[
        str, typer.Option(help="halt stops everything, no-release what gives data out, admin-only every use")
    ] = "halt",
    began: Annotated[
        str, typer.Option(help="when the incident began, RFC 3339: the report counts the time to detect")
    ] = "",
) -> None:
    """Stop operations in one scope, on every worker and node; exit status 7 if a worker may still serve."""
    named = {"key": key, "tag": tag, "tenant": tenant, "region": region, "tier": tier, "caller": caller, "hsm": hsm}
    chosen = [{"kind": kind, "value": value} for kind, value in named.items() if value]
    chosen += [{"kind": "everything"}] if everything else []
    if len(chosen) != 1:
        raise Failed(USAGE, "name exactly one scope: --everything, --key, --tag, --tenant, --region, --tier, ...")
    body = {"scope": chosen[0], "reason": {"code": reason}, "mode": mode, **({"began": began} if began else {})}
    found = options.client().post("/v1/freezes", body, idempotent=True)
    show(found)
    if "contained_at" in found and found["contained_at"] is None:
        raise typer.Exit(TEMPORARY)


@freeze_app.command("list")
def freeze_list() -> None:
    """Freezes, newest first."""
    found = options.client().get("/v1/freezes")["items"]
    show_list(found, "id", "scope", "tenant", "reason", "officer", "since", "lifted_at")


@freeze_app.command("show")
def freeze_show(freeze: Annotated[str, typer.Argument(help="its id")]) -> None:
    """A freeze: who obeys it, when it was contained, and the last use in its scope that succeeded."""
    show(options.client().get(f"/v1/freezes/{freeze}"))


@freeze_app.command("drill")
def freeze_drill(
    key: Annotated[str, typer.Option(help="a key with the tag canary=true, by id or alias/NAME")],
) -> None:
    """Stop a canary key, measure how long every worker takes to obey, lift it again; exit status 7 if one stayed silent."""
    found = options.client().post("/v1/freezes/drill", {"key": key}, idempotent=True)
    show(found)
    if "contained_at" in found and found["contained_at"] is None:
        raise typer.Exit(TEMPORARY)


@freeze_app.command("lift")
def freeze_lift(freeze: Annotated[str, typer.Argument(help="its id")]) -> None:
    """Ask for the lift of a freeze; exit status 6: it is done once a quorum has signed (`skms approval sign`)."""
    show(options.client().post(f"/v1/freezes/{freeze}/lift", idempotent=True))
    if not options.dry_run:
        raise typer.Exit(WAITING)


@exception_app.command("ask")
def exception_ask(
    key: Annotated[list[str], typer.Option(help="by id or alias/NAME; may be repeated")],
    kind: Annotated[str, typer.Option(help="reach: where callers may be; egress: where plaintexts may go")],
    place: Annotated[list[str], typer.Option(help="a region, jurisdiction or group of the charter; may be repeated")],
    purpose: Annotated[str, typer.Option(help="a purpose of each of the keys")],
    legal_basis: Annotated[str, typer.Option(help="one of the charter's legal_bases")],
    legal_ref: Annotated[str, typer.Option(help="where that stands")],
    not_after: Annotated[str, typer.Option(help="when it ends: RFC 3339; 30 days on tier 2, 90 on tier 3")],
    not_before: Annotated[str, typer.Option(help="when it begins; left out: at once")] = "",
    reason: Annotated[str, typer.Option(help="a reason code, for the record")] = "",
) -> None:
    """Ask for an exception; exit status 6: it counts once two have signed, a data-protection officer among them."""
    body: dict[str, Any] = {"keys": key, "kind": kind, "places": place, "purpose": purpose, "not_after": not_after}
    body |= {"legal_basis": legal_basis, "legal_ref": legal_ref}
    body |= {"not_before": not_before} if not_before else {}
    body |= {"reason": {"code": reason}} if reason else {}
    show(options.client().post("/v1/exceptions", body, idempotent=True))
    if not options.dry_run:
        raise typer.Exit(WAITING)


@exception_app.command("list")
def exception_list() -> None:
    """Exceptions, newest first."""
    found = options.client().get("/v1/exceptions")["items"]
    show_list(found, "id", "kind", "keys", "places", "purpose", "tier", "state", "not_before", "not_after")


@exception_app.command("show")
def exception_show(exception: Annotated[str, typer.Argument(help="its id")]) -> None:
    """An exception: what was signed, and by whom."""
    show(options.client().get(f"/v1/exceptions/{exception}"))


@exception_app.command("revoke")
def exception_revoke(exception: Annotated[str, typer.Argument(help="its id")]) -> None:
    """Take an exception back: it counts nowhere a second later."""
    options.client().call("DELETE", f"/v1/exceptions/{exception}")


@app.command()
def compliance() -> None:
    """Keys that do not meet their tier, what is missing and since when; exit status 8 if there is one."""
    client = options.client()
    found = client.get("/v1/compliance", query={"page_size": "500"})
    token = found.pop("next_page_token")
    while token is not None:
        more = client.get("/v1/compliance", query={"page_size": "500", "page_token": token})
        found["items"] += more["items"]
        token = more["next_page_token"]
    if options.output == "json":
        show(found)
    else:
        rows = [{**item, **gap} for item in found["items"] for gap in item["missing"]]
        show_list(rows, "key_id", "tenant", "tier", "state", "what", "since", "evidence")
    if found["items"]:
        raise typer.Exit(FAILED_CHECK)


@sovereignty_app.command("report")
def sovereignty_report(
    html: Annotated[Path | None, typer.Option("--html", help="write the report as one HTML file, too")] = None,
) -> None:
    """Systems under sovereign control, time to exit, supplier diversity, time to contain; each with what to count again."""
    found = options.client().get("/v1/sovereignty/metrics")
    if html is not None:
        html.write_text(sovereignty.page(found))
    if options.output == "json":
        show(found)
    else:
        rows = [{"figure": name, "value": value, "query": query} for name, value, query in sovereignty.lines(found)]
        show_list(rows, "figure", "value", "query")


PersonKey = Annotated[Path | None, typer.Option("--key", help="the signer's Ed25519 key (PEM)")]
PasswordFile = Annotated[Path | None, typer.Option("--password-file", help="password of the key")]
CardModule = Annotated[Path | None, typer.Option("--pkcs11-module", help="instead of --key: the card's PKCS#11 module")]
CardToken = Annotated[str, typer.Option("--token-label", help="the card, as the module names it")]
CardLabel = Annotated[str, typer.Option("--key-label", help="the key on it: Ed25519 or P-256")]
CardPin = Annotated[Path | None, typer.Option("--pin-file", help="its PIN; left out: from SKMS_CARD_PIN, or asked for")]
PersonCredential = Annotated[
    Path | None,
    typer.Option("--webauthn", help="instead of --key: the file of `skms approval enrol`; signed on a page"),
]
CARD_PIN: Final = "SKMS_CARD_PIN"
WORDS: Final = {
    "destroy_key": "Destroy every copy of a key, at once and for ever",
    "set_key_policy": "Change what bounds a key",
    "lift_freeze": "Lift a freeze: what it stops goes on",
    "create_exception": "Let callers or plaintexts be where a key's bounds do not let them",
    "policy": "Put another policy bundle in force",
    "audit-recover": "Start the audit log anew",
}


@approval_app.command("list")
def approval_list() -> None:
    """Requests for approval, newest first."""
    found = options.client().get("/v1/approvals")["items"]
    show_list(found, "id", "kind", "state", "approvers", "needed", "missing", "created_at", "expires_at")


@approval_app.command("show")
def approval_show(
    approval: Annotated[str, typer.Argument(help="its id")],
    to: Annotated[
        Path | None, typer.Option(help="write what is signed to a file, for a machine without network")
    ] = None,
) -> None:
    """A request: what exactly is asked, and who has approved it."""
    found = options.client().get(f"/v1/approvals/{approval}")
    if to is not None:
        write_output(str(to), json.dumps(found["request"], indent=2).encode())
    show(found)


@approval_app.command("sign")
def approval_sign(
    approval: Annotated[str, typer.Argument(help="its id, or the file of `skms approval show --to`")],
    name: Annotated[str, typer.Option(help="the approver's name in [[approvals.approver]]")],
    key: PersonKey = None,
    password_file: PasswordFile = None,
    pkcs11_module: CardModule = None,
    token_label: CardToken = "",
    key_label: CardLabel = "",
    pin_file: CardPin = None,
    webauthn: PersonCredential = None,
    to: Annotated[Path | None, typer.Option(help="write the approval to a file, for `skms approval add`")] = None,
) -> None:
    """Approve a request, and hand the approval in or write it to a file."""
    hand = Hand(key, password_file, pkcs11_module, token_label, key_label, pin_file, webauthn)
    _sign(approval, name, hand, to, revoking=False)


@approval_app.command("revoke")
def approval_revoke(
    approval: Annotated[str, typer.Argument(help="its id, or the file of `skms approval show --to`")],
    name: Annotated[str, typer.Option(help="the approver's name in [[approvals.approver]]")],
    key: PersonKey = None,
    password_file: PasswordFile = None,
    pkcs11_module: CardModule = None,
    token_label: CardToken = "",
    key_label: CardLabel = "",
    pin_file: CardPin = None,
    webauthn: PersonCredential = None,
    to: Annotated[Path | None, typer.Option(help="write the revocation to a file, for `skms approval add`")] = None,
) -> None:
    """Take an approval back before the request is executed; whoever did cannot approve that request again."""
    hand = Hand(key, password_file, pkcs11_module, token_label, key_label, pin_file, webauthn)
    _sign(approval, name, hand, to, revoking=True)


@dataclasses.dataclass(frozen=True)
class Hand:
    """What a person signs with: a key in a file, on a card, or a WebAuthn credential."""

    key: Path | None
    password_file: Path | None
    module: Path | None
    token: str
    label: str
    pin_file: Path | None
    webauthn: Path | None = None

    def signs(self) -> Callable[[bytes], bytes]:
        """The signature of a key in a file or on a card."""
        from keystore.pkcs11 import CardKey
        from service.keyfiles import by_card, by_file

        card = self.module is not None or bool(self.token or self.label) or self.pin_file is not None
        if card == (self.key is not None) or (card and not (self.module and self.token and self.label)):
            raise Failed(USAGE, "either --key, or all of --pkcs11-module, --token-label and --key-label")
        if self.key is not None:
            password = None if self.password_file is None else read_input(str(self.password_file)).rstrip(b"\n")
            return by_file(self.key, password)
        return by_card(CardKey(self.module or Path(), self.token, self.label), self._pin)

    def approves(self, kind: str, digest: str, *, name: str, facts: Sequence[tuple[str, str]]) -> Any:
        """An approval; ApprovalRefused. `facts` are what a page shows of the request."""
        from service.approvals import Approval, approve_by, challenge

        if self.webauthn is None:
            return approve_by(self.signs(), kind, digest, name=name)
        if self.key is not None or self.module is not None or self.token or self.label:
            raise Failed(USAGE, "--webauthn stands alone: no --key and no card beside it")
        return Approval(name, kind, digest, _asserted(self.webauthn, challenge(kind, digest), kind, digest, facts))

    def _pin(self) -> bytes:
        if self.pin_file is not None:
            return read_input(str(self.pin_file)).rstrip(b"\r\n")
        if given := os.environ.get(CARD_PIN):
            return given.encode()
        return str(typer.prompt(f"PIN of token {self.token!r}", hide_input=True, err=True)).encode()


def _asserted(enrolled: Path, challenge: bytes, kind: str, digest: str, facts: Sequence[tuple[str, str]]) -> bytes:
    """The assertion that a person makes on a page which shows exactly what it is about."""
    from service.cli.page import RP, Page
    from service.webauthn import Assertion, encoded

    try:
        found = json.loads(enrolled.read_text())
        credential, port = str(found["credential"]), int(found["port"])
    except OSError as error:
        raise Failed(USAGE, f"{enrolled}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise Failed(USAGE, f"{enrolled}: not a file of `skms approval enrol`") from None
    asked = {
        "challenge": encoded(challenge),
        "rpId": RP,
        "allowCredentials": [{"type": "public-key", "id": credential}],
        "userVerification": "required",
    }
    told = [("What", kind), *facts, ("SHA-256 of all this, which is signed", digest)]
    answer = _on_page(Page(_title(kind), told, "Sign exactly this", "get", asked), port)
    try:
        return Assertion(**answer).to_bytes()
    except TypeError:
        raise Failed(INTERNAL, "the browser answered something that is no assertion") from None


def _title(kind: str) -> str:
    from service.approvals import revocation

    back = kind.startswith(revocation(""))
    what = kind.removeprefix(revocation(""))
    return f"{'Take the approval back of: ' if back else ''}{WORDS.get(what, what)}"


def _on_page(page: Any, port: int) -> dict[str, str]:
    from service.cli.page import PageUnanswered, answered

    try:
        return answered(page, port, lambda url: err.print(f"open in a browser of this machine: {url}", soft_wrap=True))
    except PageUnanswered as error:
        raise Failed(TEMPORARY, str(error)) from None


def _facts(asked: Any) -> list[tuple[str, str]]:
    """All that a request says, in the order in which it is read; what is signed is nothing else."""

    def moment(us: int) -> str:
        return f"{datetime.fromtimestamp(us / 1e6, UTC):%Y-%m-%d %H:%M:%S} UTC ({us})"

    plain = [(name.replace("_", " "), shown(value)) for name, value in sorted(asked.parameters.items())]
    return [
        ("Asked by", asked.requester),
        ("Tenant", asked.tenant or "none: the installation"),
        *plain,
        ("Installation", asked.installation),
        ("Asked for at", moment(asked.created)),
        ("Approvals count until", moment(asked.expires)),
        ("Request", asked.id),
    ]


def shown(value: Any) -> str:
    """A value of a request, as it stands in what is signed."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=True)


def _sign(approval: str, name: str, hand: Hand, to: Path | None, *, revoking: bool) -> None:
    from service.approvals import ApprovalRefused, Asked, revocation

    try:
        offline = Path(approval).is_file()
        given = json.loads(Path(approval).read_text()) if offline else None
        request = given if offline else options.client().get(f"/v1/approvals/{approval}")["request"]
        asked = Asked.of(json.dumps(request))
        kind = revocation(asked.kind) if revoking else asked.kind
        made = hand.approves(kind, asked.digest(), name=name, facts=_facts(asked))
    except (ValueError, ApprovalRefused) as refused:
        raise Failed(USAGE, str(refused)) from None
    if to is not None:
        write_output(str(to), made.to_json().encode())
    if offline or to is not None:
        show(dataclasses.asdict(asked) | {"digest": made.digest, "approval": str(to)})
        return
    _hand_in(approval, made)


@approval_app.command("enrol")
def approval_enrol(
    name: Annotated[str, typer.Option(help="the approver's name in [[approvals.approver]]")],
    to: Annotated[Path, typer.Option(help="where to keep what `--webauthn` takes; nothing in it is secret")],
    public_key: Annotated[Path, typer.Option(help="where the public key goes (PEM)")],
    port: Annotated[int, typer.Option(help="of the page on this machine, from now on", min=1024, max=65535)] = 8910,
) -> None:
    """Make a WebAuthn credential for approvals, on a page of this machine; prints the entry for the configuration."""
    import secrets

    from service.cli.page import RP, Page, origin
    from service.webauthn import AssertionRefused, encoded, enrolled, pem

    challenge = secrets.token_bytes(32)
    asked = {
        "challenge": encoded(challenge),
        "rp": {"id": RP, "name": "Sovereign KMS approvals"},
        "user": {"id": encoded(secrets.token_bytes(32)), "name": name, "displayName": name},
        "pubKeyCredParams": [{"type": "public-key", "alg": number} for number in (-7, -8)],  # ES256, EdDSA
        "authenticatorSelection": {"userVerification": "required"},
        "attestation": "none",
    }
    facts = [("Approver", name), ("For pages of", origin(port))]
    answer = _on_page(Page("Enrol an authenticator", facts, "Make a credential", "create", asked), port)
    try:
        credential, key, kind = enrolled(answer, challenge, RP, (origin(port),))
    except AssertionRefused as error:
        raise Failed(FAILED_CHECK, str(error)) from None
    write_output(str(public_key), pem(key))
    write_output(str(to), json.dumps({"credential": encoded(credential.id), "port": port}, indent=2).encode())
    webauthn = {"credential": encoded(credential.id), "rp": RP, "origins": [origin(port)]}
    show({"name": name, "public_key": str(public_key), "algorithm": kind, "webauthn": webauthn})


@approval_app.command("add")
def approval_add(
    approval: Annotated[str, typer.Argument(help="id of the request")],
    file: Annotated[Path, typer.Argument(help="what `skms approval sign --to` or `revoke --to` wrote")],
) -> None:
    """Hand in an approval, or a revocation of one, that was signed elsewhere."""
    from service.approvals import ApprovalRefused, load_approval

    try:
        _hand_in(approval, load_approval(file))
    except ApprovalRefused as refused:
        raise Failed(USAGE, str(refused)) from None


def _hand_in(approval: str, made: Any) -> None:
    from service.approvals import revocation

    body = {"approver": made.approver, "signature": made.signature.hex()}
    where = "revocations" if made.kind.startswith(revocation("")) else "signatures"
    show(options.client().post(f"/v1/approvals/{approval}/{where}", body))


@approval_app.command("cancel")
def approval_cancel(approval: Annotated[str, typer.Argument(help="its id")]) -> None:
    """Withdraw a request before it is executed."""
    show(options.client().post(f"/v1/approvals/{approval}/cancel"))


@drill_app.command("exit")
def drill_exit(
    source: Annotated[str, typer.Option("--from", help="HSM that is to be left")],
    target: Annotated[str, typer.Option("--to", help="HSM that takes over")],
    observe: Annotated[str, typer.Option(help="how long to watch after the switch")] = "PT30S",
    rate: Annotated[int, typer.Option(min=1, help="key versions proven a second")] = 500,
    config: Annotated[Path | None, typer.Option("--config", help="on the node's host: run the join ceremony")] = None,
    so_pin_file: Annotated[Path | None, typer.Option("--so-pin-file", help="of the security officer, for it")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="until it can be confirmed")] = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="wait, then confirm if no request was refused")] = False,
) -> None:
    """Exchange one HSM for another under load; exit status 5 if the drill failed, 8 if requests were refused."""
    client = options.client()
    if config is not None and _state_of(client, target) != "UP":
        _join(config, source, target, so_pin_file)
        _await_state(client, target)
    body = {"kind": "exit", "from": source, "to": target, "observe": observe, "rate": rate}
    drill = client.post("/v1/drills", body, idempotent=True)
    while (wait or confirm) and drill.get("state") == "running" and drill["step"] != "confirm":
        time.sleep(0.5)
        drill = client.get(f"/v1/drills/{drill['id']}")
    if confirm and drill.get("step") == "confirm" and drill["state"] == "running":
        if drill["result"]["refused"]:
            show(drill)
            raise Failed(FAILED_CHECK, "requests were refused: look at `skms drill report`, then confirm or abort")
        drill = client.post(f"/v1/drills/{drill['id']}/confirm")
    show(drill)
    if drill.get("state") in {"failed", "cancelled"}:
        raise typer.Exit(CONFLICT)


def _state_of(client: Client, name: str) -> str:
    found = [h["state"] for h in client.get("/v1/hsms")["items"] if h["name"] == name]
    if not found:
        raise Failed(NOT_FOUND, f"no HSM {name!r} in the node's configuration: add it to [[hsm]] and restart")
    return str(found[0])


def _join(config: Path, source: str, target: str, so_pin_file: Path | None) -> None:
    """The ceremony that brings the region's keys from one token to another; on the node's host."""
    from keystore import HsmUnavailable, SelfTestFailed
    from keystore.pkcs11 import CeremonyRefused, Transcript, join
    from policy import BundleRefused
    from service.rootbackup import check_join
    from service.wiring import token_configs

    found = _config(config)
    tokens = {t.name: t for t in token_configs(found)}
    if missing := {source, target} - set(tokens):
        raise Failed(USAGE, f"{config} names no [[hsm]] {sorted(missing)[0]!r}")
    facts: dict[str, Any] = {"installation": str(tokens[source].installation), "region": tokens[source].region}
    transcript = Transcript("join", facts, lambda: time.time_ns() // 1_000)
    try:
        check_join(found, target)
        report = join(tokens[source], tokens[target], so_pin_file=so_pin_file, transcript=transcript)
    except (BundleRefused, CeremonyRefused, HsmUnavailable, SelfTestFailed) as error:
        raise Failed(INTERNAL, str(error)) from None
    err.print(f"HSM {report.hsm} joined; SHA-256 of the transcript: {transcript.sha256}", highlight=False)


def _await_state(client: Client, name: str, *, seconds: float = 60.0) -> None:
    """Wait until the node has taken an HSM in."""
    until = time.monotonic() + seconds
    while (state := _state_of(client, name)) != "UP":
        if time.monotonic() > until:
            raise Failed(TEMPORARY, f"HSM {name} is {state} after the ceremony: see `skms hsm status`")
        time.sleep(0.5)


@drill_app.command("list")
def drill_list() -> None:
    """Drills, newest first."""
    found = [{**d, **d["parameters"]} for d in options.client().get("/v1/drills")["items"]]
    show_list(found, "id", "state", "step", "from", "to", "progress", "created_at", "result")


@drill_app.command("show")
def drill_show(drill: str) -> None:
    """Where a drill stands."""
    show(options.client().get(f"/v1/drills/{drill}"))


@drill_app.command("report")
def drill_report(drill: str) -> None:
    """What the audit log says of a drill: keys, requests, refused requests, times, and which records say so."""
    show(options.client().get(f"/v1/drills/{drill}/report"))


@drill_app.command("abort")
def drill_abort(drill: str) -> None:
    """End a drill before it is confirmed; both HSMs are used as before."""
    show(options.client().post(f"/v1/drills/{drill}/abort"))


@drill_app.command("confirm")
def drill_confirm(drill: str) -> None:
    """Accept the exchange; the old HSM is drained and may leave the configuration."""
    show(options.client().post(f"/v1/drills/{drill}/confirm"))


ConfigFile = Annotated[Path, typer.Option("--config", help="configuration file (TOML)")]


def _config(path: Path) -> Any:
    from service.config import ConfigInvalid, load

    try:
        return load(path)
    except ConfigInvalid as error:
        raise Failed(USAGE, str(error)) from None


@hsm_app.command("init")
def hsm_init(
    config: ConfigFile,
    sealed_root: Annotated[
        bool, typer.Option("--sealed-root", help="keys that never leave this token: no second token, no backup")
    ] = False,
) -> None:
    """The ceremony: root KEK, row-MAC key and audit key on one token of each region; changes nothing that is there.

    The region's other tokens join it: see `skms hsm join`.
    """
    from keystore import HsmUnavailable, SelfTestFailed
    from keystore.pkcs11 import CeremonyRefused, initialise
    from service import ceremonies
    from service.wiring import serving_tokens

    found = _config(config)
    tokens = serving_tokens(found)
    for region in dict.fromkeys(t.region for t in tokens):
        transcript = ceremonies.begin("init", found, region)
        try:
            token, joining = ceremonies.founder_of([t for t in tokens if t.region == region])
            report = initialise(token, sealed=sealed_root, transcript=transcript)
        except (HsmUnavailable, SelfTestFailed, CeremonyRefused) as error:
            transcript.add("failed", why=str(error))
            kept = ceremonies.keep(transcript, found)
            raise Failed(INTERNAL, f"{error}; transcript: {kept}") from None
        show({**dataclasses.asdict(report), **_kept(transcript, found)})
        for other in joining:
            err.print(
                f"HSM {other.name} holds no root KEK of region {region} yet: run `skms hsm join --config {config} "
                f"--from {token.name} --to {other.name} --so-pin-file FILE`",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


@hsm_app.command("join")
def hsm_join(
    config: ConfigFile,
    source: Annotated[str, typer.Option("--from", help="HSM of the configuration that has the keys")],
    target: Annotated[str, typer.Option("--to", help="HSM of the configuration that shall have them too")],
    so_pin_file: Annotated[
        Path | None, typer.Option(help="file with the PIN of the security officer of the --from token")
    ] = None,
) -> None:
    """The ceremony: bring the region's root KEK and row-MAC key to another token; goes on where it was stopped."""
    from keystore import HsmUnavailable, SelfTestFailed
    from keystore.pkcs11 import CeremonyRefused, join
    from policy import BundleRefused
    from service import ceremonies
    from service.rootbackup import check_join
    from service.wiring import token_configs

    found = _config(config)
    tokens = {token.name: token for token in token_configs(found)}
    for name in (source, target):
        if name not in tokens:
            raise Failed(USAGE, f"no HSM {name!r} in {config}; there are: {', '.join(tokens)}")
    transcript = ceremonies.begin("join", found, tokens[source].region)
    try:
        check_join(found, target)
        report = join(tokens[source], tokens[target], so_pin_file=so_pin_file, transcript=transcript)
    except (BundleRefused, HsmUnavailable, SelfTestFailed, CeremonyRefused) as error:
        transcript.add("failed", why=str(error))
        kept = ceremonies.keep(transcript, found)
        raise Failed(INTERNAL, f"{error}; transcript: {kept}") from None
    show({**dataclasses.asdict(report), **_kept(transcript, found)})


@hsm_app.command("verify-backup")
def hsm_verify_backup(
    config: ConfigFile,
    hsm: Annotated[str, typer.Option(help="HSM of the configuration that holds the backup (backup = true)")],
    sample: Annotated[int, typer.Option(min=1, max=100_000, help="keys of the database that are tried")] = 100,
) -> None:
    """The drill of a backup: canaries of every kind and keys chosen at random come out the same on both tokens."""
    from keystore import HsmUnavailable, SelfTestFailed
    from keystore.pkcs11 import CeremonyRefused
    from policy import BundleRefused
    from service import ceremonies, rootbackup

    found = _config(config)
    transcript = ceremonies.begin("verify-backup", found, next((h.region for h in found.hsm if h.name == hsm), ""))
    try:
        report = rootbackup.verify(found, hsm, sample=sample, transcript=transcript)
    except (BundleRefused, HsmUnavailable, SelfTestFailed, CeremonyRefused) as error:
        raise Failed(INTERNAL, str(error)) from None
    show({**dataclasses.asdict(report), **_kept(transcript, found)})
    if report.wrong:
        raise typer.Exit(FAILED_CHECK)


@hsm_app.command("rotate-root")
def hsm_rotate_root(
    config: ConfigFile,
    region: Annotated[str, typer.Option(help="the region; needed if the node has several")] = "",
    so_pin_file: Annotated[
        Path | None, typer.Option(help="file with the PIN of the security officer of the region's first token")
    ] = None,
    rate: Annotated[int, typer.Option(min=1, max=10_000, help="rows wrapped anew in a second")] = 200,
) -> None:
    """Make a new root KEK and wrap every row anew under it, beside the serving workers; goes on where it was stopped."""
    import asyncio

    from keystore import HsmUnavailable, SelfTestFailed
    from keystore.pkcs11 import CeremonyRefused
    from service import ceremonies, rootrotation

    found = _config(config)
    region = region or found.node.region
    transcript = ceremonies.begin("rotate-root", found, region)
    try:
        with _progress() as progress:
            bar = progress.add_task("rows", total=None)
            rotation = rootrotation.rotate(
                found,
                region,
                so_pin_file=so_pin_file,
                transcript=transcript,
                rate=rate,
                say=lambda done, total: progress.update(bar, completed=done, total=total),
            )
            report = asyncio.run(rotation)
    except (HsmUnavailable, SelfTestFailed, CeremonyRefused) as error:
        transcript.add("failed", why=str(error))
        raise Failed(INTERNAL, f"{error}; transcript: {ceremonies.keep(transcript, found)}") from None
    show({**dataclasses.asdict(report), **_kept(transcript, found)})
    if report.damaged or any(n for kind, n in report.left.items() if kind != "open import tokens"):
        raise typer.Exit(FAILED_CHECK)


@hsm_app.command("retire-root")
def hsm_retire_root(
    config: ConfigFile,
    version: Annotated[int, typer.Option(min=1, help="of the root KEK that is to be destroyed")],
    region: Annotated[str, typer.Option(help="the region; needed if the node has several")] = "",
) -> None:
    """Destroy an old root KEK on every token of a region; refused while any row is wrapped under it."""
    import asyncio

    from keystore import HsmUnavailable, SelfTestFailed
    from keystore.pkcs11 import CeremonyRefused
    from service import ceremonies, rootrotation

    found = _config(config)
    region = region or found.node.region
    transcript = ceremonies.begin("retire-root", found, region)
    try:
        asyncio.run(rootrotation.retire(found, region, version, transcript=transcript))
    except CeremonyRefused as error:
        raise Failed(CONFLICT, str(error)) from None
    except (HsmUnavailable, SelfTestFailed) as error:
        raise Failed(INTERNAL, str(error)) from None
    show({"region": region, "destroyed": version, **_kept(transcript, found)})


def _kept(transcript: Any, config: Any) -> dict[str, str]:
    from service import ceremonies

    return {"transcript": str(ceremonies.keep(transcript, config)), "transcript_sha256": transcript.sha256}


@transcript_app.command("verify")
def transcript_verify(file: Path) -> None:
    """Check a transcript's chain of hashes offline; exit status 8 if it was changed."""
    from keystore.pkcs11 import TranscriptDamaged, verify_transcript

    try:
        found = verify_transcript(file.read_bytes())
    except OSError as error:
        raise Failed(USAGE, f"{file}: {error.strerror}") from None
    except TranscriptDamaged as error:
        raise Failed(FAILED_CHECK, f"{file}: {error}") from None
    show({"kind": found.kind, "steps": len(found.steps), "sha256": found.sha256})


@hsm_app.command("probe")
def hsm_probe(
    config: Annotated[Path | None, typer.Option("--config", help="configuration file (TOML)")] = None,
    hsm: Annotated[str, typer.Option(help="only this HSM of the configuration")] = "",
    vendor: Annotated[str, typer.Option(help="without --config: profile, or path of one")] = "",
    module: Annotated[Path | None, typer.Option(help="without --config: the PKCS#11 module")] = None,
    token_label: Annotated[str, typer.Option(help="without --config")] = "",
    token_dir: Annotated[Path | None, typer.Option(help="without --config: where the vendor wants it")] = None,
    pin_file: Annotated[Path | None, typer.Option(help="without --config: file with the user PIN")] = None,
) -> None:
    """Try on a token everything that a node needs; changes nothing there. Exit status 8 if it must not serve."""
    from keystore import HsmUnavailable
    from keystore.pkcs11 import probe
    from service.wiring import token_configs, token_unconfigured

    if config is not None:
        tokens = [t for t in token_configs(_config(config)) if hsm in ("", t.name)]
    elif vendor and module and token_label and pin_file:
        tokens = [
            token_unconfigured(
                vendor=vendor,
                module=module.absolute(),
                token_label=token_label,
                pin_file=pin_file,
                token_dir=None if token_dir is None else token_dir.absolute(),
            )
        ]
    else:
        raise Failed(USAGE, "--config, or all of --vendor, --module, --token-label and --pin-file")
    if not tokens:
        raise Failed(USAGE, f"--hsm {hsm}: no [[hsm]] of this name")
    try:
        reports = [probe(token) for token in tokens]
    except HsmUnavailable as error:
        raise Failed(FAILED_CHECK, str(error)) from None
    if options.output == "json":
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
    else:
        for report in reports:
            _show_probe(report)
    if any(report.verdict == "must not serve" for report in reports):
        raise typer.Exit(FAILED_CHECK)


def _show_probe(report: Any) -> None:
    """A probe for people: what works, what the self-test found, which kinds, the verdict."""
    print(f"{report.hsm}: {report.title}, token {report.token_label!r}, firmware {report.firmware}")
    if report.tested == "documentation":
        print("the profile is from the vendor's documentation: this run is its test")
    for check in report.checks:
        outcome = f"{check.milliseconds:9.2f} ms" if check.works else f"   no: {check.detail}"
        print(f"  {check.need:18} {check.what:42} {outcome}")
    for finding in report.self_test:
        print(f"  self-test {finding.rule:42} {finding.verdict} {finding.reason}".rstrip())
    for kind, lacking in report.kinds:
        print(f"  {kind:18} {'no: ' + lacking if lacking else 'yes'}")
    print(f"verdict: {report.verdict}")
    for reason in report.reasons:
        print(f"  {reason}")


@policy_app.command("show")
def policy_show() -> None:
    """The policy in force."""
    show(options.client().get("/v1/policy"))


@policy_app.command("reload")
def policy_reload() -> None:
    """Load the bundle anew; the old one stays if the new one is refused."""
    show(options.client().post("/v1/policy/reload"))


@policy_app.command("check")
def policy_check(
    directory: Path,
    against: Annotated[
        Path | None, typer.Option(help="the bundle it is to replace: tells what the change means")
    ] = None,
) -> None:
    """Check a bundle offline: lint, strict validation, its cases, proofs of what the charter promises, idle rules.

    Exit status 8 if anything is refused, or a promise is broken: then with a request that breaks it.
    """
    from policy import BundleRefused, Policy
    from policy.proofs import NotEncodable, told

    try:
        found = Policy.load(directory)
        before = None if against is None else Policy.load(against)
        proved = told(found, before)
    except (BundleRefused, NotEncodable) as error:
        raise Failed(FAILED_CHECK, str(error)) from None
    show({"digest": found.digest, "version": found.version, "development": found.development, **proved})
    if proved["refuted"] or proved["undecided"]:
        raise typer.Exit(FAILED_CHECK)


@policy_app.command("sign")
def policy_sign(
    directory: Path,
    part: Annotated[str, typer.Option(help="`bundle` is the whole; `tenants/NAME` are a tenant's files")] = "bundle",
    key: PersonKey = None,
    password_file: PasswordFile = None,
    pkcs11_module: CardModule = None,
    token_label: CardToken = "",
    key_label: CardLabel = "",
    pin_file: CardPin = None,
    signature: Annotated[
        Path | None, typer.Option(help="64 bytes, made elsewhere of what this command prints without a key")
    ] = None,
) -> None:
    """Sign a bundle's directory offline, once it was checked; without a key, print exactly the bytes to sign elsewhere."""
    from policy import BundleRefused, Policy
    from policy.signatures import add, is_part, statement
    from policy.signing import SIZE
    from service.keyfiles import KeyFileRefused

    if not is_part(part):
        raise Failed(USAGE, f"--part {part}: `bundle`, or `tenants/NAME`")
    try:
        found = Policy.load(directory)
    except BundleRefused as error:
        raise Failed(FAILED_CHECK, str(error)) from None
    if part != "bundle" and part.removeprefix("tenants/") not in found.registry.tenant_names():
        raise Failed(USAGE, f"--part {part}: charter.yaml has no such tenant")
    said = statement(found.bundle, part)
    by_person = any((key, pkcs11_module, token_label, key_label))
    if not by_person and signature is None:
        sys.stdout.buffer.write(said)
        return
    try:
        if by_person:
            made = Hand(key, password_file, pkcs11_module, token_label, key_label, pin_file).signs()(said)
        else:
            made = read_input(str(signature))
    except KeyFileRefused as error:
        raise Failed(USAGE, str(error)) from None
    if len(made) != SIZE:
        raise Failed(USAGE, f"--signature {signature}: {len(made)} bytes, a signature has {SIZE}")
    show({"part": part, "version": found.version, "digest": found.digest, "signature": str(add(directory, part, made))})


@policy_app.command("plan")
def policy_plan(
    directory: Path,
    since: Annotated[
        str, typer.Option("--from", "--since", help="RFC 3339: a recorded period to decide again under the draft")
    ] = "",
    until: Annotated[str, typer.Option("--to", "--until", help="RFC 3339; now if not given")] = "",
    against: Annotated[
        Path | None, typer.Option(help="the bundle it is to replace, offline: no service is asked")
    ] = None,
) -> None:
    """What a draft bundle comes to: files, meaning with witnesses, proofs, who is locked out, a recorded period.

    Exit status 8 if the draft is refused, breaks a promise or locks somebody out: `policy apply` would be refused.
    """
    from policy.plan import broken

    if against is not None:
        if since or until:
            raise Failed(USAGE, "--against is offline: a recorded period is asked of the service")
        told = _planned(directory, against)
    else:
        period = _period(since, until) if since else {}
        told = options.client().post("/v1/policy/plan", {"files": _files_of(directory), **period})
    _show_plan(told)
    if not options.dry_run and broken(told):
        raise typer.Exit(FAILED_CHECK)


def _planned(directory: Path, against: Path) -> dict[str, Any]:
    from policy import BundleRefused, Policy
    from policy.plan import told

    try:
        old = Policy.load(against)
        return told(old, Policy.load(directory, after=old), now=int(time.time()))
    except BundleRefused as error:
        raise Failed(FAILED_CHECK, str(error)) from None


def _show_plan(told: dict[str, Any]) -> None:
    if options.output == "json" or "draft" not in told:
        print(json.dumps(told, indent=2))
        return
    old, new = told["replaces"], told["draft"]
    print(f"version {old['version']} ({old['digest'][:12]}) -> version {new['version']} ({new['digest'][:12]})")
    for change in told["files"]:
        print(f"\n{change['change']}: {change['path']}")
        for line in change["diff"][2:]:
            print(f"  {line}")
    for member in told["members"]:
        was, becomes = (_member(member[side]) for side in ("was", "becomes"))
        print(f"\nmember {member['id']}: {was} -> {becomes}")
    print("\nmeaning:")
    for change in told["changes"]:
        by = ", ".join(change["by"])
        print(f"  newly {change['newly']} on a {change['resource']}, by {by}; for example:")
        print(f"    {json.dumps(change['request'])}")
    if told["unproved"]:
        print(f"  cannot be told: {told['unproved']}")
    elif not told["changes"]:
        print("  no request is decided otherwise by its facts (roles of members are listed above)")
    print(f"\nproofs: {told.get('proved', 0)} promises hold, {len(told['refuted'])} broken")
    for wrong in told["refuted"]:
        print(f"  BROKEN {wrong['code']}: {wrong['promise']}; by {json.dumps(wrong['request'])}")
    for name in told["undecided"]:
        print(f"  not decided in time: {name}")
    for one in told["locked_out"]:
        of = "the installation" if one["tenant"] is None else f"tenant {one['tenant']}"
        print(f"\nLOCKED OUT of {of}: nobody could {one['action']}; today: {', '.join(one['members'])}")
    if "replay" in told:
        print()
        _show_replay(told["replay"])


def _member(found: dict[str, Any] | None) -> str:
    return "not listed" if found is None else f"{found['role']} of {found['tenant'] or 'the installation'}"


@policy_app.command("apply")
def policy_apply(
    directory: Path,
    replaces: Annotated[str, typer.Option(help="digest of the bundle that the draft was planned against")] = "",
) -> None:
    """Ask for a draft to be put in force; exit status 6: it is once a quorum has signed (`skms approval sign`)."""
    body = {"files": _files_of(directory)} | ({"replaces": replaces} if replaces else {})
    _ask_for("/v1/policy/apply", body)


@policy_app.command("rollback")
def policy_rollback(
    to: Annotated[str, typer.Option(help="a bundle that was in force, by at least 12 hex of its digest")] = "",
) -> None:
    """Ask for the bundle before, or an earlier one, under a new version; exit status 6: a quorum has to sign."""
    _ask_for("/v1/policy/rollback", {"to": to} if to else {})


def _ask_for(path: str, body: dict[str, Any]) -> None:
    show(options.client().post(path, body, idempotent=True))
    if not options.dry_run:
        raise typer.Exit(WAITING)


@policy_app.command("explain")
def policy_explain(decision: str) -> None:
    """Why a recorded decision came out as it did: for the tenant's officers and auditors."""
    _show_explanation(options.client().get(f"/v1/policy/decisions/{decision}"))


@policy_app.command("simulate")
def policy_simulate(
    bundle: Annotated[Path, typer.Option(help="the draft: a bundle's directory")],
    request: Annotated[
        Path | None, typer.Option(help="one request as JSON, as `policy explain` shows it; offline")
    ] = None,
    since: Annotated[str, typer.Option(help="RFC 3339: a recorded period, asked of the service")] = "",
    until: Annotated[str, typer.Option(help="RFC 3339; now if not given")] = "",
) -> None:
    """Try a draft bundle: one request with every rule and condition, or what a recorded period would have been.

    Exit status 3 if the draft denies the request, 8 if the draft is refused: file, line and reason.
    """
    if (request is None) is (since == ""):
        raise Failed(USAGE, "give --request, or --since for a recorded period")
    if request is None:
        _show_replay(
            options.client().post("/v1/policy/simulate", {"files": _files_of(bundle), **_period(since, until)})
        )
    else:
        _simulate_one(bundle, request)


def _period(since: str, until: str) -> dict[str, str]:
    return {"from": since, "to": until or time.strftime("%Y-%m-%dT%H:%M:%S.999Z", time.gmtime())}


def _files_of(bundle: Path) -> dict[str, str]:
    """A bundle's files; what does not belong in one is refused by whoever reads it."""
    if not (bundle / "charter.yaml").is_file():
        raise Failed(USAGE, f"{bundle}: no bundle is there (no charter.yaml)")
    from policy.bundle import BundleRefused, files_in

    try:
        return {path: data.decode() for path, data in files_in(bundle).items()}
    except (OSError, UnicodeDecodeError, BundleRefused) as error:
        raise Failed(USAGE, f"{bundle}: {error}") from None


def _show_replay(told: dict[str, Any]) -> None:
    if options.output == "json":
        print(json.dumps(told, indent=2))
        return
    print(f"{told['decisions']} decisions, {told['identical']} identical under their own bundles")
    for why, count in told["unmade"].items():
        print(f"  {count} cannot be told: {why}")
    print(f"newly allowed {told['newly_allowed']}, newly denied {told['newly_denied']}")
    for name, counted in told["radius"].items():
        for which, count in list(counted.items())[:10]:
            print(f"  {count} by {name} {which}")
    for d in told["differences"]:
        print(f"  {d['count']} x {d['newly']}: {d['action']} by {d['caller']} on {d['key'] or '-'}")
        print(f"     {', '.join(d['was'])} -> {', '.join(d['becomes'])}; e.g. {d['examples'][0]}")


def _simulate_one(bundle: Path, request: Path) -> None:
    from policy import BundleRefused, Policy
    from policy.explain import explain, shown
    from policy.written import RequestMalformed, read

    try:
        asked = read(json.loads(request.read_text()))
        told = explain(Policy.load(bundle), asked)
    except BundleRefused as error:
        raise Failed(FAILED_CHECK, str(error)) from None
    except (RequestMalformed, ValueError, OSError) as error:
        raise Failed(USAGE, f"{request}: {error}") from None
    _show_explanation(shown(told))
    if not told.decision.allowed:
        raise typer.Exit(DENIED)


def _show_explanation(told: dict[str, Any]) -> None:
    """An explanation: JSON as it is, or the decision, each rule with its conditions, and the fixes."""
    if options.output == "json":
        print(json.dumps(told, indent=2))
        return
    decision = told["decision"]
    by = ", ".join(decision["rules"]) or decision["rule"]
    print(
        f"{'allowed' if decision['allowed'] else 'denied: ' + decision['code']} by {by}, bundle {decision['policy'][:12]}"
    )
    for rule in told["rules"]:
        applied = "applies" if rule["applied"] else "does not apply"
        print(f"\n{rule['effect']} {rule['id']} {applied}  ({rule['file']}:{rule['line']})")
        for leaf in (*rule["head"], *(leaf for clause in rule["clauses"] for leaf in clause["leaves"])):
            print(f"  {_TRUTH[leaf['holds']]:5} {leaf['text']}   it is {json.dumps(leaf['value'])}")
    for border in told["transfers"]:
        by = f"under {border['agreement']}" if border["agreement"] else "no agreement in force covers it"
        print(f"\ndata crosses from {border['from']} to {border['to']}: {by}")
        for a in border["agreements"]:
            print(f"  {a['id']} ({a['not_before']} to {a['not_after']}): {', '.join(a['lacks']) or 'covers it'}")
    for grant in told["grants"]:
        why = "allows it" if grant["decided"] else ", ".join(grant["lacks"]) or "was not what decided"
        print(f"\ngrant {grant['id']} of {grant['granter']} until {grant['not_after']}: {why}")
    for waiver in told["exceptions"]:
        why = ", ".join(waiver["lacks"]) or "covers it"
        print(f"\nexception {waiver['id']} from {waiver['kind']}, to {waiver['not_after']}: {why}")
    for fix in told["fixes"]:
        changes = "; ".join(
            f"{name} is {json.dumps(f['is'])}, needs {json.dumps(f['needs'])}" for name, f in fix.items()
        )
        print(f"\nwould be allowed if: {changes}")


_TRUTH: Final = {True: "true", False: "false", None: "-"}


@transfers_app.command("report")
def transfers_report(
    since: Annotated[str, typer.Option("--from", help="RFC 3339; else everything")] = "",
    until: Annotated[str, typer.Option("--to", help="RFC 3339; else until now")] = "",
    tenant: Annotated[str, typer.Option(help="for an auditor of the installation: else all")] = "",
) -> None:
    """What crossed a border under which agreement, and what was refused: counted from the audit log."""
    query = {name: value for name, value in (("from", since), ("to", until), ("tenant", tenant)) if value}
    found = options.client().get("/v1/transfers", query=query)
    if options.output == "json":
        print(json.dumps(found, indent=2))
        return
    show_list(found["items"], "from", "to", "agreement", "tenant", "purpose", "crossed", "refused", "first", "last")
    if found["stored_since"] is not None:
        print(f"counted from {found['stored_since']} on: what was recorded before is in the archive alone")


@transfers_app.command("agreements")
def transfers_agreements() -> None:
    """The registered agreements, in force or not."""
    found = options.client().get("/v1/transfer-agreements")["items"]
    columns = ("id", "from", "to", "tenants", "purposes", "legal_basis", "not_before", "not_after", "in_force")
    show_list(found, *columns)


@token_app.command("create")
def token_create(
    scope: Annotated[list[str], typer.Option(help="action: createKey, listKeys, readAudit")],
    target: Output,
    expires_in: Annotated[str, typer.Option(help="at most P90D")] = "P30D",
) -> None:
    """Make a token; its secret goes to a file of mode 0600, this once."""
    answer = options.client().post("/v1/tokens", {"scopes": scope, "expires_in": expires_in})
    if "token" in answer:
        write_output(target, (answer.pop("token") + "\n").encode())
    show(answer)


@token_app.command("list")
def token_list() -> None:
    """The tenant's live tokens."""
    show_list(options.client().get("/v1/tokens")["items"], "id", "role", "scopes", "expires_at")


@token_app.command("revoke")
def token_revoke(token: str) -> None:
    """Revoke a token."""
    options.client().call("DELETE", f"/v1/tokens/{token}")


# ---- audit ---------------------------------------------------------------------------------------------------------


@audit_app.command("search")
def audit_search(
    key: Annotated[str, typer.Option()] = "",
    actor: Annotated[str, typer.Option()] = "",
    op: Annotated[str, typer.Option()] = "",
    outcome: Annotated[str, typer.Option("--out", help="ok, denied, failed, error")] = "",
    since: Annotated[str, typer.Option("--from", help="RFC 3339")] = "",
    until: Annotated[str, typer.Option("--to", help="RFC 3339")] = "",
    limit: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """Search records, newest first."""
    query = {"key": key, "actor": actor, "op": op, "out": outcome, "from": since, "to": until}
    found = pages(options.client(), "/v1/audit/records", {k: v for k, v in query.items() if v}, limit)
    _show_records(found)


@audit_app.command("tail")
def audit_tail(limit: Annotated[int, typer.Option("--lines", "-n", min=1)] = 20) -> None:
    """The newest records, oldest of them first."""
    _show_records(list(reversed(pages(options.client(), "/v1/audit/records", {}, limit))))


def _show_records(found: Sequence[dict[str, Any]]) -> None:
    if options.output == "json":
        print(json.dumps(list(found), indent=2))
        return
    rows = [
        {
            **{k: r["record"].get(k) for k in ("op", "out", "why", "rule", "key", "actor")},
            "time": r["time"],
            "seq": r["seq"],
        }
        for r in found
    ]
    show_list(rows, "time", "seq", "op", "out", "why", "rule", "key", "actor")


@audit_app.command("status")
def audit_status() -> None:
    """State of the worker's chain, of all chains and of the newest checkpoint."""
    show(options.client().get("/v1/audit/status"))


TrustFile = Annotated[
    Path, typer.Option("--trust", envvar="SKMS_TRUST", help="origin and audit keys you trust: from the ceremony")
]
ToFile = Annotated[str, typer.Option("--to", help="file to write, or - for standard output")]
COVERED_S: Final = 15.0  # a checkpoint is signed each second: after this long without one something is wrong


def _covered(ask: Callable[[], T]) -> T:
    """The answer, once a checkpoint covers what is asked for."""
    deadline = time.monotonic() + COVERED_S
    while True:
        try:
            return ask()
        except Failed as failed:
            if failed.status != TEMPORARY or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _trusted(path: Path) -> Any:
    from audit.verify import Unusable, load_trust

    try:
        return load_trust(path)
    except Unusable as error:
        raise Failed(USAGE, str(error)) from None


@audit_app.command("checkpoint")
def audit_checkpoint(
    trust: TrustFile, size: Annotated[int, typer.Option(help="of this size; else the newest")] = 0, to: ToFile = "-"
) -> None:
    """Fetch a signed checkpoint and check its signature. Keep it: whoever holds one detects every later change."""
    from audit.chain import Bad
    from audit.evidence import trusted_checkpoint

    note = options.client().text(f"/v1/audit/checkpoint/{size}" if size else "/v1/audit/checkpoint")
    try:
        found = trusted_checkpoint(note, _trusted(trust))
    except Bad as bad:
        raise Failed(FAILED_CHECK, str(bad)) from None
    write_output(to, note)
    if to != "-":
        print(f"checkpoint {found.size} of {found.origin}, root {found.root.hex()}: written to {to}")


@audit_app.command("proof")
def audit_proof(
    trust: TrustFile,
    receipt: Annotated[str, typer.Option(help="an Audit-Receipt value")] = "",
    record: Annotated[str, typer.Option(help="or a record: LOG/SEQ as `skms audit search` shows them")] = "",
    to: Annotated[str, typer.Option("--to", help="also keep the .tlog-proof here")] = "",
) -> None:
    """Fetch the proof of a record, check it offline, and say what it proves; exit status 8 if it does not."""
    from audit.chain import Bad
    from audit.evidence import check_record_proof
    from audit.offline import shown_proof
    from audit.verify import Unusable, parse_receipt

    try:
        asked = parse_receipt(receipt) if receipt else None
    except Unusable as error:
        raise Failed(USAGE, f"--receipt: {error}") from None
    log, _, seq = record.rpartition("/") if asked is None else (asked.log, "", str(asked.seq))
    trusted = _trusted(trust)
    if not seq.isdigit() or not log.startswith(f"{trusted.origin}/"):
        raise Failed(USAGE, f"name a record of {trusted.origin} by --receipt or --record")
    chain = log.removeprefix(f"{trusted.origin}/")
    try:
        client = options.client()
        data = _covered(lambda: client.text(f"/v1/audit/{chain}/{seq}/proof"))
        proven = check_record_proof(data, trusted, asked=asked)
    except Bad as bad:
        raise Failed(FAILED_CHECK, str(bad)) from None
    except Failed as failed:
        if asked is None or failed.status != NOT_FOUND:
            raise
        lost = f"E_TRUNC {log}/{seq}: the service has no record of yours here, yet it gave you a receipt for one"
        raise Failed(FAILED_CHECK, f"{lost}\n  if the receipt was given to this identity's tenant, keep it") from None
    if (proven.frame.log, proven.frame.n) != (log, int(seq)):
        raise Failed(FAILED_CHECK, f"E_RECEIPT {log}/{seq}: the proof is of {proven.frame.log}/{proven.frame.n}")
    if to:
        write_output(to, data)
    print(shown_proof(proven))


@audit_app.command("consistency")
def audit_consistency(
    old: Annotated[Path, typer.Argument(help="a checkpoint that you kept")],
    trust: TrustFile,
    size: Annotated[int, typer.Option(help="of the newer one; else the newest")] = 0,
    to: Annotated[str, typer.Option("--to", help="also keep the proof and the new checkpoint here")] = "",
) -> None:
    """Prove that a newer checkpoint extends yours: nothing that yours covers was changed; exit status 8 otherwise."""
    from audit.chain import Bad
    from audit.evidence import check_growth, trusted_checkpoint

    trusted, note = _trusted(trust), read_input(str(old))
    try:
        query = {"from": str(trusted_checkpoint(note, trusted).size), **({"to": str(size)} if size else {})}
        data = options.client().text("/v1/audit/consistency", query=query)
        before, after = check_growth(data, note, trusted)
    except Bad as bad:
        raise Failed(FAILED_CHECK, str(bad)) from None
    except Failed as failed:
        if failed.status != NOT_FOUND:
            raise
        lost = f"E_TRUNC {trusted.origin}: the service knows no checkpoint of {query['from']}, which it signed"
        raise Failed(FAILED_CHECK, lost) from None
    if to:
        write_output(to, data)
    print(f"checkpoint {after.size} of {after.origin} extends checkpoint {before.size}")


@audit_app.command("tenant-bundle")
def audit_tenant_bundle(
    trust: TrustFile,
    to: Annotated[str, typer.Option("--to", help="file to write")],
    tenant: Annotated[str, typer.Option(help="else that of the credential")] = "",
    since: Annotated[str, typer.Option("--from", help="RFC 3339; else everything")] = "",
    receipts: Annotated[Path | None, typer.Option(help="Audit-Receipt values, one a line")] = None,
) -> None:
    """Fetch all records of a tenant with the proof that none is missing, and check it; exit status 8 otherwise."""
    from audit.offline import bundle_as_json, instant, shown_bundle
    from audit.tenantbundle import check_bundle
    from audit.verify import Unusable, load_receipts

    client, trusted = options.client(), _trusted(trust)
    whose = tenant or client.get("/v1/whoami")["tenant"]
    if not whose:
        raise Failed(USAGE, "this credential belongs to no tenant: give --tenant")
    try:
        known = None if receipts is None else load_receipts(receipts)
        asked = instant(since) if since else 0
    except Unusable as error:
        raise Failed(USAGE, str(error)) from None
    except ValueError:
        raise Failed(USAGE, "--from: RFC 3339 UTC, as in 2026-01-31T12:00:00Z") from None
    query = {"from": since} if since else {}
    with open_output(to) as file:
        _covered(lambda: client.download(f"/v1/audit/tenants/{whose}/bundle", file, query=query))
    with Path(to).open("rb") as lines:
        verdict = check_bundle(lines, trusted, tenant=whose, since=asked, receipts=known)
    print(bundle_as_json(verdict) if options.output == "json" else shown_bundle(verdict))
    if verdict.report.exit_status != OK:
        raise typer.Exit(FAILED_CHECK)


def _engine_and_trust(config: Path) -> tuple[Any, Any]:
    import asyncio

    from audit.verify import Trust
    from keystore import HsmUnavailable, SelfTestFailed
    from service.config import ConfigInvalid
    from service.database import DatabaseUnusable, open_engine, reader
    from service.wiring import audit_keys
    from service.witnesses import known_of, logs_of

    found = _config(config)
    try:
        logs = {} if found.witness is None else logs_of(found.witness, found.node.origin)
        policy = known_of(found)
        engine = open_engine(found.database.url)
        peers = tuple(key for keys in logs.values() for key in keys)
        return reader(engine), Trust(found.node.origin, asyncio.run(audit_keys(found, engine)), policy, peers)
    except ConfigInvalid as wrong:
        raise Failed(USAGE, str(wrong)) from None
    except (HsmUnavailable, SelfTestFailed, DatabaseUnusable) as error:
        raise Failed(TEMPORARY, str(error)) from None


CLOCK_AGREES_S: Final = 90  # of an operator's watch and this machine, when the time is given to the minute


@audit_app.command("confirm-clock")
def audit_confirm_clock(
    config: ConfigFile, true_time: Annotated[str, typer.Option("--time", help="RFC 3339, to the minute")]
) -> None:
    """Tell this node that its clock is right after it jumped forward by more than ten minutes.

    Say what time it is by another clock. For every worker of this node; the log records it.
    """
    import datetime
    import os

    from audit.clock import Confirmation, confirm

    try:
        said = datetime.datetime.fromisoformat(true_time)
    except ValueError:
        raise Failed(USAGE, f"--time {true_time}: not RFC 3339, as in 2026-01-31T12:00Z") from None
    if said.tzinfo is None:
        raise Failed(USAGE, f"--time {true_time}: no time zone, as in 2026-01-31T12:00Z")
    at = time.time_ns() // 1_000
    off = at / 1e6 - said.timestamp()
    if abs(off) > CLOCK_AGREES_S:
        raise Failed(FAILED_CHECK, f"this machine's clock is {off:+.0f} s from the time you say: set it right first")
    directory = _config(config).node.state_dir
    try:
        confirm(directory, Confirmation(at, os.getuid()))
    except OSError as error:
        raise Failed(TEMPORARY, f"{directory}: {error.strerror}") from None
    show({"confirmed": datetime.datetime.fromtimestamp(at / 1e6, datetime.UTC).isoformat(timespec="seconds")})


@audit_app.command("export")
def audit_export(config: ConfigFile, to: Annotated[Path, typer.Option(help="directory")]) -> None:
    """Export the log for `skms-verify`: entry bundles, seals, and the trust file as a convenience."""
    from audit.export import export

    engine, trust = _engine_and_trust(config)
    made = export(engine, to, trust)
    show({"directory": str(to), "records": made.records, "logs": made.logs})


@audit_app.command("post-quantum-key")
def audit_post_quantum_key(
    config: ConfigFile, key_file: Annotated[Path, typer.Option(help="a new file for the ML-DSA-44 key: PEM, mode 0600")]
) -> None:
    """Make the key that signs checkpoints beside the audit key, and print its verifier key, for trust files."""
    from audit.checkpoint import format_vkey
    from audit.postquantum import UnusableKey, create
    from service.witnesses import cosigner_name

    try:
        print(format_vkey(create(key_file, cosigner_name(_config(config).node.origin)).key))
    except UnusableKey as unusable:
        raise Failed(USAGE, str(unusable)) from None


# ---- witness -------------------------------------------------------------------------------------------------------


@witness_app.command("init")
def witness_init(
    name: Annotated[str, typer.Option(help="what cosignatures are made under, e.g. kms.example/witness")],
    key_file: Annotated[Path, typer.Option(help="a new file for the Ed25519 key: PEM, mode 0600")],
) -> None:
    """Make the key of a witness, and print its verifier key: the operators of other logs configure it."""
    from audit.checkpoint import BadNote
    from service.witnesses import new_cosigner

    try:
        print(new_cosigner(name, key_file))
    except BadNote as bad:
        raise Failed(USAGE, f"--name: {bad}") from None
    except OSError as error:
        raise Failed(USAGE, f"{key_file}: {error.strerror}") from None


# ---- audit, offline from an export -----------------------------------------------------------------------------------

ExportDir = Annotated[Path, typer.Option("--export", help="an export of `skms audit export`")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="C2SP tlog-policy of the witnesses you trust")]
Since = Annotated[str, typer.Option("--from", help="RFC 3339")]
Until = Annotated[str, typer.Option("--to", help="RFC 3339")]


@audit_app.command("report")
def audit_report(
    export: ExportDir,
    trust: TrustFile,
    to_file: Annotated[Path, typer.Option("--out", help="file to write")],
    tenant: Annotated[str, typer.Option(help="one tenant, and nothing of another")] = "",
    since: Since = "",
    until: Until = "",
    form: Annotated[str, typer.Option("--format", help="html or json")] = "html",
    receipts: Annotated[Path | None, typer.Option(help="Audit-Receipt values, one a line")] = None,
    policy: PolicyFile = None,
) -> None:
    """The auditor's report of a period, offline; exit status 8 if anything is tampered with or missing."""
    from audit import report

    writers = {"html": report.as_html, "json": report.as_json}
    if form not in writers:
        raise Failed(USAGE, "--format: html or json")
    made = report.make(_evidence(export, trust, receipts, policy), _wanted(tenant=tenant, since=since, until=until))
    to_file.write_text(writers[form](made))
    show({"file": str(to_file), "integrity": made.integrity, "completeness": made.completeness})
    if any(f.code.startswith("E_") for f in made.findings):
        raise typer.Exit(FAILED_CHECK)


@audit_app.command("count")
def audit_count(
    export: ExportDir,
    trust: TrustFile,
    tenant: Annotated[str, typer.Option()] = "",
    since: Since = "",
    until: Until = "",
    chain: Annotated[str, typer.Option()] = "",
    kind: Annotated[str, typer.Option()] = "",
    op: Annotated[str, typer.Option()] = "",
    outcome: Annotated[str, typer.Option("--out", help="ok, denied, failed, error")] = "",
    region: Annotated[str, typer.Option()] = "",
    why: Annotated[str, typer.Option()] = "",
    rule: Annotated[str, typer.Option()] = "",
) -> None:
    """How many verified records of an export are like this, offline."""
    facts = {"chain": chain, "kind": kind, "op": op, "out": outcome, "region": region, "why": why, "rule": rule}
    print(_evidence(export, trust).count(_wanted(tenant=tenant, since=since, until=until, **facts)))


@audit_app.command("gaps")
def audit_gaps(
    export: ExportDir,
    trust: TrustFile,
    tenant: Annotated[str, typer.Option()] = "",
    since: Since = "",
    until: Until = "",
    policy: PolicyFile = None,
) -> None:
    """When records of an export stood for more than 10 s without a checkpoint, or one that witnesses saw, offline."""
    from audit.report import moment

    evidence, wanted = _evidence(export, trust, policy=policy), _wanted(tenant=tenant, since=since, until=until)
    judged = evidence.source.trust.policy.quorum is not None
    found = [("checkpoint", g) for g in evidence.gaps(wanted)]
    found += [("witness", g) for g in evidence.gaps(wanted, witnessed=True)] if judged else []
    rows = [
        {"lacked": what, "from": moment(g.since), "to": moment(g.until), "seconds": round(g.seconds, 3), "open": g.open}
        for what, g in found
    ]
    show_list(rows, "lacked", "from", "to", "seconds", "open")


def _evidence(export: Path, trust: Path, receipts: Path | None = None, policy: Path | None = None) -> Any:
    from audit.report import Evidence, Source
    from audit.verify import Unusable, load_trust

    try:
        if not export.is_dir():
            raise Unusable(f"{export} is not a directory")
        return Evidence(Source(export, trust, load_trust(trust, policy), receipts, policy))
    except Unusable as error:
        raise Failed(USAGE, str(error)) from None


def _wanted(*, since: str, until: str, **facts: str) -> Any:
    from audit.report import Wanted
    from service.protocols.wire import microseconds

    def instant(option: str, text: str) -> int | None:
        try:
            return microseconds(text) if text else None
        except ValueError:
            raise Failed(USAGE, f"{option}: RFC 3339 UTC, as in 2026-01-31T12:00:00Z") from None

    given = {name: value or None for name, value in facts.items()}
    return Wanted(since=instant("--from", since), until=instant("--to", until), **given)


@audit_app.command("verify")
def audit_verify(
    config: ConfigFile,
    archive: Annotated[Path | None, typer.Option(help="where pruned records were archived")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="a signed checkpoint from outside this database")] = None,
) -> None:
    """Verify the log in the database, every stored column, of every generation; exit status 8 if anything is wrong."""
    from audit.checkpoint import BadNote
    from audit.stored import past_origins, verify_database

    engine, trust = _engine_and_trust(config)
    try:
        held = None if checkpoint is None else checkpoint.read_bytes()
        report = verify_database(engine, trust, archive, held=held)
    except (OSError, BadNote) as error:
        raise Failed(USAGE, f"checkpoint {checkpoint}: {error}") from None
    with engine.connect() as connection:
        for origin in past_origins(connection):
            earlier = verify_database(engine, dataclasses.replace(trust, origin=origin), archive)
            report.findings += earlier.findings
            report.records += earlier.records
            report.logs |= earlier.logs
            report.roots |= earlier.roots
    if options.output == "json":
        print(report.as_json())
    else:
        for finding in report.findings:
            print(finding)
        for log, count in report.logs.items():
            print(f"{'intact' if report.exit_status == OK else 'checked'} {log}: {count} records")
    if report.exit_status != OK:
        raise typer.Exit(FAILED_CHECK)


BackupFile = Annotated[Path, typer.Option("--backup", help="the backup")]
ArchiveDir = Annotated[Path | None, typer.Option(help="where pruned records were archived")]
Anchor = Annotated[Path | None, typer.Option(help="a signed checkpoint from outside, newer than what must not be lost")]


@backup_app.command("create")
def backup_create(
    config: ConfigFile, to: Annotated[Path, typer.Option(help="the new file; put it where this node cannot change it")]
) -> None:
    """Write the database into one signed file, as it is at this moment; the service may go on meanwhile."""
    import asyncio

    from service import backup, ceremonies

    found = _config(config)
    transcript = ceremonies.begin("backup", found, found.node.region)
    with _backup_failures():
        made = asyncio.run(backup.create(found, to, transcript=transcript))
    show({**_shown_backup(made), **_kept(transcript, found)})


@backup_app.command("verify")
def backup_verify(file: BackupFile, trust: TrustFile, archive: ArchiveDir = None, checkpoint: Anchor = None) -> None:
    """Check a backup anywhere, without HSM and network: the file, then the audit log in it; exit status 8 if it is wrong."""
    from audit.verify import load_trust
    from service import backup

    with _backup_failures():
        held = None if checkpoint is None else checkpoint.read_bytes()
        found, report = backup.verify(file, load_trust(trust), archive=archive, held=held)
    for finding in report.findings:
        print(finding, file=sys.stderr)
    show({**_shown_backup(found), "records": report.records, "intact": report.exit_status == OK})
    if report.exit_status != OK:
        raise typer.Exit(FAILED_CHECK)


@backup_app.command("restore")
def backup_restore(
    config: ConfigFile,
    file: BackupFile,
    trust: TrustFile,
    archive: ArchiveDir = None,
    checkpoint: Anchor = None,
    accept_unanchored: Annotated[bool, typer.Option(help="restore without --checkpoint")] = False,
) -> None:
    """Fill the configured, empty database from a backup: all of it, or nothing. The HSMs must hold its root KEKs."""
    import asyncio

    from audit.verify import load_trust
    from service import backup, ceremonies

    if (checkpoint is None) != accept_unanchored:
        raise Failed(
            USAGE,
            "give --checkpoint FILE, a checkpoint from a witness, an auditor or a node's anchors, so that an older backup "
            "than it is refused; or --accept-unanchored, if there is none",
        )
    found = _config(config)
    transcript = ceremonies.begin("restore", found, found.node.region)
    with _backup_failures():
        held = None if checkpoint is None else checkpoint.read_bytes()
        restoring = backup.restore(*(found, file, load_trust(trust)), archive=archive, held=held, transcript=transcript)
        made = asyncio.run(restoring)
    show({**_shown_backup(made), **_kept(transcript, found), "next": "skms audit verify, then start one node"})


@contextlib.contextmanager
def _backup_failures() -> Iterator[None]:
    from audit.checkpoint import BadNote
    from audit.verify import Unusable
    from keystore import HsmUnavailable, SelfTestFailed
    from service.backup import BackupRefused
    from service.database import DatabaseUnusable

    try:
        yield
    except BackupRefused as refused:
        raise Failed(FAILED_CHECK, str(refused)) from None
    except BadNote as error:
        raise Failed(USAGE, f"the checkpoint: {error}") from None
    except (Unusable, DatabaseUnusable) as error:
        raise Failed(USAGE, str(error)) from None
    except OSError as error:
        raise Failed(USAGE, f"{error.filename or 'backup'}: {error.strerror or error}") from None
    except (HsmUnavailable, SelfTestFailed) as error:
        raise Failed(TEMPORARY, str(error)) from None


def _shown_backup(found: Any) -> dict[str, Any]:
    from datetime import UTC, datetime

    head = found.head
    return {
        "backup": str(found.path),
        "sha256": found.sha256,
        "installation": head.installation,
        "log": head.origin,
        "schema": head.schema,
        "made at": datetime.fromtimestamp(head.at / 1e6, UTC).isoformat(timespec="seconds"),
        "root KEKs": ", ".join(f"{region} version {version}" for region, version in sorted(head.roots.items())),
        "keys": found.rows.get("keystore_key", 0),
        "rows": sum(found.rows.values()),
    }


@db_app.command("migrate")
def db_migrate(
    config: ConfigFile,
    service_role: Annotated[
        str | None, typer.Option(help="PostgreSQL role of the nodes: gets what they need, no more")
    ] = None,
    reader_role: Annotated[str | None, typer.Option(help="PostgreSQL role that may read every table")] = None,
) -> None:
    """Bring the schema to this release's, as its owner (SKMS_DATABASE_URL), and grant the nodes' role what they need."""
    from service.database import DatabaseUnusable, migrate, open_engine, revision
    from service.dbroles import grant

    found = _config(config)
    try:
        engine = open_engine(found.database.url)
        try:
            before = revision(engine)
            migrate(engine, lock_dir=found.node.state_dir)
            if service_role or reader_role:
                with engine.begin() as connection:
                    grant(connection, service=service_role, reading=reader_role)
            show(
                {"schema": revision(engine), "before": before or "none", "service role": service_role or "not changed"}
            )
        finally:
            engine.dispose()
    except DatabaseUnusable as error:
        raise Failed(USAGE, str(error)) from None


@db_app.command("check")
def db_check(config: ConfigFile) -> None:
    """Compare schema and rights with what this release needs; exit status 8 if a node would not start, or may do too much."""
    from service.database import SCHEMA, DatabaseUnusable, open_engine
    from service.dbroles import look

    try:
        engine = open_engine(_config(config).database.url)
    except DatabaseUnusable as error:
        raise Failed(USAGE, str(error)) from None
    try:
        found = look(engine)
    finally:
        engine.dispose()
    show(
        {
            "schema": found.schema or "none",
            "this release": SCHEMA,
            "missing": found.missing,
            "beyond need": found.beyond,
        }
    )
    if not found.good:
        raise typer.Exit(FAILED_CHECK)


@audit_app.command("recover")
def audit_recover(
    config: ConfigFile,
    request: Annotated[Path, typer.Option(help="the request: written without --approval, carried out with them")],
    approval: Annotated[list[Path], typer.Option(help="an officer's approval; two different officers")] = [],
) -> None:
    """Go on after a rollback: open a new generation of the log that names what was lost. docs/audit-recovery.md."""
    import asyncio

    from audit.anchors import AnchorUnusable
    from audit.chain import Bad
    from audit.event import BadRecord, decode_recovery, encode_recovery
    from audit.generation import RecoveryRefused, digest_of
    from keystore import HsmUnavailable, SelfTestFailed
    from service.approvals import ApprovalRefused, load_approval
    from service.recovery import prepare, recover

    found = _config(config)
    try:
        if not approval:
            asked = asyncio.run(prepare(found))
            write_output(str(request), encode_recovery(asked))
            show(_told(asked) | {"digest": digest_of(asked), "request": str(request)})
            return
        recovery = decode_recovery(request.read_bytes())
        done = asyncio.run(recover(found, recovery, [load_approval(path) for path in approval]))
    except (RecoveryRefused, ApprovalRefused) as refused:
        raise Failed(CONFLICT, str(refused)) from None
    except BadRecord as bad:
        raise Failed(USAGE, f"{request}: not a request of `skms audit recover`: {bad}") from None
    except OSError as error:
        raise Failed(USAGE, f"{request}: {error.strerror}") from None
    except (AnchorUnusable, Bad) as wrong:
        raise Failed(FAILED_CHECK, str(wrong)) from None
    except (HsmUnavailable, SelfTestFailed) as error:
        raise Failed(TEMPORARY, str(error)) from None
    show({"origin": done.origin, "size": done.size, "next": f'set [node] origin = "{done.origin}" on every node'})


def _told(recovery: Any) -> dict[str, Any]:
    """What an officer must read before approving."""
    checkpoint, (lo, hi) = recovery.anchored.split("\n"), recovery.lost
    return {
        "log": recovery.predecessor,
        "anchor": recovery.anchor,
        "anchored size": checkpoint[1],
        "size in the database": recovery.stands[0],
        "lost entries": "none" if lo == hi else f"{lo} to {hi - 1}",
        "new log": recovery.origin,
    }


@audit_app.command("approve")
def audit_approve(
    request: Annotated[Path, typer.Argument(help="the request of `skms audit recover`")],
    name: Annotated[str, typer.Option(help="the officer's name in [[approvals.approver]]")],
    to: Annotated[Path, typer.Option(help="where the approval goes")],
    key: PersonKey = None,
    password_file: PasswordFile = None,
    pkcs11_module: CardModule = None,
    token_label: CardToken = "",
    key_label: CardLabel = "",
    pin_file: CardPin = None,
    webauthn: PersonCredential = None,
) -> None:
    """Approve a recovery, on the officer's own machine: needs neither node nor network."""
    from audit.event import BadRecord, decode_recovery
    from audit.generation import KIND, digest_of
    from service.approvals import ApprovalRefused

    hand = Hand(key, password_file, pkcs11_module, token_label, key_label, pin_file, webauthn)
    try:
        recovery = decode_recovery(request.read_bytes())
        made = hand.approves(
            KIND, digest_of(recovery), name=name, facts=[(n, str(v)) for n, v in _told(recovery).items()]
        )
    except OSError as error:
        raise Failed(USAGE, f"{request}: {error.strerror}") from None
    except (BadRecord, ApprovalRefused) as refused:
        raise Failed(USAGE, str(refused)) from None
    write_output(str(to), made.to_json().encode())
    show(_told(recovery) | {"digest": made.digest, "approval": str(to)})


@audit_app.command("archive")
def audit_archive(
    config: ConfigFile,
    before: Annotated[str, typer.Option(help="only whole UTC days before this one: 2026-01-31")] = "",
    to: Annotated[Path | None, typer.Option(help="directory; else archive_dir of the configuration")] = None,
) -> None:
    """Move records that retention lets go to signed files: read back, recorded, and only then deleted."""
    import asyncio
    import datetime
    import uuid

    from audit.archive import ArchiveFailed
    from audit.chain import Bad
    from keystore import HsmUnavailable, SelfTestFailed
    from service import archiving
    from service.config import ConfigInvalid

    found = _config(config)
    until: int | None = None
    if before:
        try:
            day = datetime.date.fromisoformat(before)
        except ValueError:
            raise Failed(USAGE, f"--before {before}: a date as 2026-01-31") from None
        until = int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC).timestamp()) * 1_000_000
    try:
        done = asyncio.run(archiving.archive(found, before=until, to=to, owner=f"{found.node.name}/{uuid.uuid4()}"))
    except ConfigInvalid as wrong:
        raise Failed(USAGE, str(wrong)) from None
    except Bad as bad:
        raise Failed(FAILED_CHECK, str(bad)) from None
    except (ArchiveFailed, HsmUnavailable, SelfTestFailed) as error:
        raise Failed(TEMPORARY, str(error)) from None
    show_list(
        [{"log": s.log, "from": s.first, "to": s.to, "sha256": s.sha256, "uri": s.uri} for s in done],
        *("log", "from", "to", "sha256", "uri"),
    )


@audit_app.command("reindex")
def audit_reindex(config: ConfigFile) -> None:
    """Empty the search index: the workers make it again from the records, and searches stay complete meanwhile."""
    from audit.index import forget
    from service.database import DatabaseUnusable, open_engine

    try:
        engine = open_engine(_config(config).database.url)
    except DatabaseUnusable as error:
        raise Failed(TEMPORARY, str(error)) from None
    show({"segments_dropped": forget(engine)})


# ---- node ----------------------------------------------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """Serve the API: --config FILE [--workers N]."""
    from service.cli.serving import serve as run_server

    raise typer.Exit(run_server(context.args))


@config_app.command("check")
def config_check(config: Path) -> None:
    """Check a configuration, and what its witness sections name; says what is wrong."""
    from service.config import ConfigInvalid
    from service.witnesses import checked

    found = _config(config)
    try:
        checked(found)
    except ConfigInvalid as wrong:
        raise Failed(USAGE, str(wrong)) from None
    show({"node": found.node.name, "region": found.node.region, "hsms": [h.name for h in found.hsm]})


@app.command()
def doctor(config: ConfigFile) -> None:
    """Check what a node needs, and say what to mend; exit status 1 if something is wrong."""
    from service.doctor import examine

    findings = examine(_config(config))
    show_list([dataclasses.asdict(f) for f in findings], "check", "good", "detail")
    if not all(f.good for f in findings):
        raise typer.Exit(INTERNAL)


DevDir = Annotated[Path, typer.Option("--dir", help="directory of the node")]


@dev_app.command("up")
def dev_up(
    directory: DevDir,
    region: Annotated[list[str], typer.Option(help="region with an HSM; repeat for more")] = ["eu-de-1"],
    port: Annotated[int, typer.Option(help="0: a free one")] = 8443,
    workers: Annotated[int, typer.Option(min=1, max=64)] = 1,
    hsms: Annotated[int, typer.Option(min=1, max=4, help="SoftHSM2 tokens in each region's group")] = 1,
    nss: Annotated[bool, typer.Option("--nss", help="an NSS token too, in the first region's group")] = False,
    database: Annotated[str, typer.Option(help="URL; default: SQLite in the directory")] = "",
    fronts: Annotated[str, typer.Option(help="native")] = "native",
) -> None:
    """Make a development node in a directory and serve it in the foreground."""
    from keystore import HsmUnavailable, SelfTestFailed
    from service import dev
    from service.config import ConfigInvalid

    if fronts != "native":
        raise Failed(USAGE, "--fronts: only `native` is there")
    try:
        shape = dev.Shape(tuple(region), hsms=hsms, nss=nss)
        status = dev.up(directory, shape, port=port, database=database or None, workers=workers)
    except (dev.DevFailed, HsmUnavailable, SelfTestFailed, OSError) as error:
        raise Failed(INTERNAL, str(error)) from None
    except ConfigInvalid as error:
        raise Failed(USAGE, str(error)) from None
    raise typer.Exit(status)


@dev_app.command("env")
def dev_env(directory: DevDir, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """What a client of the development node needs; exit status 7 while it is not ready."""
    from service import dev

    found = dev.environment(directory)
    if found is None:
        raise Failed(TEMPORARY, f"the development node in {directory} is not ready")
    if as_json or options.output == "json":
        print(json.dumps(found, indent=2))
        return
    print(f"export SKMS_DEV_DIR={directory.absolute()} SKMS_URL={found['base_url']} SKMS_CA={found['ca_file']}")


@dev_app.command("down")
def dev_down(directory: DevDir) -> None:
    """Stop the development node of a directory."""
    from service import dev

    try:
        dev.down(directory)
    except dev.DevFailed as error:
        raise Failed(4, str(error)) from None


def _of_the_database(error: Exception) -> Failed | None:
    """What the database's own refusal means to whoever gave the command; None if it is not one."""
    raised = sys.modules.get("sqlalchemy.exc")  # most commands have not loaded it
    if raised is None or not isinstance(error, raised.DBAPIError):
        return None
    from service.database import INSUFFICIENT_PRIVILEGE

    told = str(error.orig).strip().partition("\n")[0]
    if getattr(error.orig, "sqlstate", None) == INSUFFICIENT_PRIVILEGE:
        mend = "give the address of the schema's owner in SKMS_DATABASE_URL"
        return Failed(DENIED, f"the database role may not do this ({told}): {mend}")
    if isinstance(error, raised.OperationalError):
        return Failed(TEMPORARY, f"the database cannot be used: {told}")
    return None


def run() -> None:
    """Run a command; its exit status is one of the fixed ones."""
    try:
        status = app(standalone_mode=False)
    except Failed as error:
        err.print(f"skms: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.status)
    except typer.Abort:
        sys.exit(USAGE)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # wrong usage, as typer puts it
            err.print(f"skms: {error.format_message()}", highlight=False, markup=False)
            sys.exit(USAGE)
        if (told := _of_the_database(error)) is not None:
            err.print(f"skms: {told}", highlight=False, markup=False, soft_wrap=True)
            sys.exit(told.status)
        err.print(f"skms: internal error ({type(error).__name__})", highlight=False, markup=False)
        sys.exit(INTERNAL)
    sys.exit(status if isinstance(status, int) else OK)
