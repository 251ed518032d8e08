"""The commands of `skms`. Each asks the REST API, works offline, or looks after a node's files."""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from service.cli import filecrypt
from service.cli.client import (
    FAILED_CHECK,
    INTERNAL,
    OK,
    TEMPORARY,
    USAGE,
    Client,
    Connection,
    Failed,
    read_input,
    write_output,
)

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
key_app, alias_app, hsm_app = group("Keys"), group("Aliases"), group("HSMs")
policy_app, token_app, audit_app = group("Policy"), group("API tokens"), group("Audit log")
tenant_app, region_app, envelope_app = group("Tenants"), group("Regions"), group("Ciphertexts, offline")
file_app, dev_app, config_app = group("Files of any size"), group("Development node"), group("Configuration")
for name, sub in {
    "key": key_app,
    "alias": alias_app,
    "hsm": hsm_app,
    "policy": policy_app,
    "token": token_app,
    "audit": audit_app,
    "tenant": tenant_app,
    "region": region_app,
    "envelope": envelope_app,
    "file": file_app,
    "dev": dev_app,
    "config": config_app,
}.items():
    app.add_typer(sub, name=name)


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
    table = Table(show_header=False, box=None)
    for name, field in (value or {}).items():
        table.add_row(name, _cell(field))
    out.print(table)


def show_list(items: Sequence[dict[str, Any]], *columns: str) -> None:
    """Objects: JSON, or a table with these columns."""
    if options.output == "json":
        print(json.dumps(list(items), indent=2))
        return
    table = Table(box=None)
    for column in columns:
        table.add_column(column)
    for item in items:
        table.add_row(*(_cell(item.get(c)) for c in columns))
    out.print(table)


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
    suite: Annotated[str, typer.Option(help="0x0001 or 0x0002")] = "",
    rotate_after: Annotated[str, typer.Option(help="ISO 8601: P90D")] = "",
    rotate_after_uses: Annotated[int, typer.Option()] = 0,
    description: Annotated[str, typer.Option()] = "",
    tag: Annotated[list[str], typer.Option(help="name=value")] = [],
) -> None:
    """Create a key in the HSM of its home region."""
    body: dict[str, Any] = {"spec": spec, "tier": tier, "home": home, "description": description, "tags": pairs(tag)}
    lists = {"residency": residency, "execution": execution, "reach": reach, "egress": egress, "purposes": purpose}
    body |= {name: value for name, value in lists.items() if value}
    body |= {name: value for name, value in (("alias", alias), ("suite", suite)) if value}
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
    """Change description, tags, rotation or fences."""
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


@key_app.command("versions")
def key_versions(key: Key) -> None:
    """A key's versions."""
    found = options.client().get(f"/v1/keys/{key}/versions")["items"]
    show_list(found, "version", "state", "created_at", "uses")


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
    show_list(found, "name", "region", "vendor", "state", "token_label", "token_serial", "specs", "missing")


ConfigFile = Annotated[Path, typer.Option("--config", help="configuration file (TOML)")]


def _config(path: Path) -> Any:
    from service.config import ConfigInvalid, load

    try:
        return load(path)
    except ConfigInvalid as error:
        raise Failed(USAGE, str(error)) from None


@hsm_app.command("init")
def hsm_init(config: ConfigFile) -> None:
    """The ceremony: root KEK, row-MAC key and audit key on every token; changes nothing that is there."""
    from keystore import HsmUnavailable, SelfTestFailed
    from keystore.pkcs11 import initialise
    from service.wiring import token_configs

    try:
        reports = [dataclasses.asdict(initialise(token)) for token in token_configs(_config(config))]
    except (HsmUnavailable, SelfTestFailed) as error:
        raise Failed(INTERNAL, str(error)) from None
    for report in reports:
        show(report)


@policy_app.command("show")
def policy_show() -> None:
    """The policy in force."""
    show(options.client().get("/v1/policy"))


@policy_app.command("reload")
def policy_reload() -> None:
    """Load the bundle anew; the old one stays if the new one is refused."""
    show(options.client().post("/v1/policy/reload"))


@policy_app.command("check")
def policy_check(directory: Path) -> None:
    """Check a bundle offline: lint, strict validation, its cases."""
    from policy import BundleRefused, Policy

    try:
        found = Policy.load(directory)
    except BundleRefused as error:
        raise Failed(FAILED_CHECK, str(error)) from None
    show({"digest": found.digest, "version": found.version, "development": found.development})


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
    """State of the worker's chain."""
    show(options.client().get("/v1/audit/status"))


def _engine_and_trust(config: Path) -> tuple[Any, Any]:
    from audit.verify import Trust
    from keystore import HsmUnavailable, SelfTestFailed
    from keystore.pkcs11 import open_token
    from service.database import DatabaseUnusable, open_engine, reader
    from service.wiring import token_configs

    found = _config(config)
    try:
        token = next(t for t in token_configs(found) if t.region == found.node.region)
        public = open_token(token).audit_public_key()
        return reader(open_engine(found.database.url)), Trust(found.node.origin, (public,))
    except (HsmUnavailable, SelfTestFailed, DatabaseUnusable) as error:
        raise Failed(TEMPORARY, str(error)) from None


@audit_app.command("export")
def audit_export(config: ConfigFile, to: Annotated[Path, typer.Option(help="directory")]) -> None:
    """Export the log for `skms-verify`: entry bundles, seals, and the trust file as a convenience."""
    from audit.log import export

    engine, trust = _engine_and_trust(config)
    made = export(engine, to, trust)
    show({"directory": str(to), "records": made.records, "logs": made.logs})


@audit_app.command("verify")
def audit_verify(config: ConfigFile) -> None:
    """Verify the log in the database, every stored column; exit status 8 if anything is wrong."""
    from audit.log import verify_database

    report = verify_database(*_engine_and_trust(config))
    if options.output == "json":
        print(report.as_json())
    else:
        for finding in report.findings:
            print(finding)
        for log, count in report.logs.items():
            print(f"{'intact' if report.exit_status == OK else 'checked'} {log}: {count} records")
    if report.exit_status != OK:
        raise typer.Exit(FAILED_CHECK)


# ---- node ----------------------------------------------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """Serve the API: --config FILE [--workers N]."""
    from service.cli.serving import serve as run_server

    raise typer.Exit(run_server(context.args))


@config_app.command("check")
def config_check(config: Path) -> None:
    """Check a configuration; names each wrong line."""
    found = _config(config)
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
    database: Annotated[str, typer.Option(help="URL; default: SQLite in the directory")] = "",
    fronts: Annotated[str, typer.Option(help="native")] = "native",
) -> None:
    """Make a development node in a directory and serve it in the foreground."""
    from keystore import HsmUnavailable, SelfTestFailed
    from service import dev

    if fronts != "native":
        raise Failed(USAGE, "--fronts: only `native` is there")
    try:
        status = dev.up(directory, regions=tuple(region), port=port, database=database or None, workers=workers)
    except (dev.DevFailed, HsmUnavailable, SelfTestFailed, OSError) as error:
        raise Failed(INTERNAL, str(error)) from None
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
        err.print(f"skms: internal error ({type(error).__name__})", highlight=False, markup=False)
        sys.exit(INTERNAL)
    sys.exit(status if isinstance(status, int) else OK)
