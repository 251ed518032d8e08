"""Configuration: one TOML file, environment overrides, no secret in it. Unknown options are errors with their place.

`SKMS_<SECTION>_<OPTION>` overrides an option of a plain section: SKMS_LISTEN_PORT=9443. `deploy/skms.example.toml` shows
every option.
"""

from __future__ import annotations

import os
import re
import tomllib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from audit.event import KINDS
from policy.signatures import WHOLE, is_part
from service.webauthn import decoded, usable

Port = Annotated[int, Meta(ge=0, le=65_535)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,17}$")]
Place = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
TenantName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Group = Annotated[str, Meta(pattern=r"^[a-z]{1,32}:[A-Za-z0-9-]{1,64}$")]  # nation:DE
Days = Annotated[int, Meta(ge=0, le=36_500)]
Algorithm = Literal["Ed25519", "ES256"]  # of a person's key: ES256 is ECDSA on P-256 with SHA-256


class ConfigInvalid(Exception):
    """The configuration cannot be used: file, line (0: unknown) and reason."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}" if line else f"{file}: {reason}")
        self.file, self.line, self.reason = file, line, reason


class NodeSection(Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    region: Place
    origin: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,80}/audit(/g[1-9][0-9]*)?$")]
    state_dir: Path
    installation: uuid.UUID


class ListenSection(Struct, frozen=True, forbid_unknown_fields=True):
    certificate: Path
    private_key: Path
    client_ca: Path
    client_crl: Path | None = None
    host: str = "127.0.0.1"
    port: Port = 8443


class DatabaseSection(Struct, frozen=True, forbid_unknown_fields=True):
    url: Annotated[str, Meta(pattern=r"^(sqlite|postgresql)(\+[a-z0-9]+)?://")]


class HsmSection(Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    region: Place
    vendor: str
    module: Path
    token_label: Annotated[str, Meta(min_length=1, max_length=32)]
    pin_file: Path
    token_serial: str = ""
    token_dir: Path | None = None
    backup: bool = False  # stored away: joined and verified, never served from
    supplier: Annotated[str, Meta(pattern=r"^([a-z0-9][a-z0-9-]{0,62})?$")] = ""  # of the charter; none: no labels
    sessions: Annotated[int, Meta(ge=1, le=1_024)] = 8
    environment: dict[str, str] = {}


class HsmGroupSection(Struct, frozen=True, forbid_unknown_fields=True):
    region: Place
    minimum: Annotated[int, Meta(ge=1, le=16)] = 1


class SignerSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Whose signature a part of the bundle's directory must bear: `bundle` is the whole, `tenants/NAME` a tenant's files."""

    part: str
    public_key: Path
    algorithm: Algorithm = "Ed25519"


class PolicySection(Struct, frozen=True, forbid_unknown_fields=True):
    bundle: Path
    signer: tuple[SignerSection, ...] = ()


class TrustSection(Struct, frozen=True, forbid_unknown_fields=True):
    domain: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,254}$")]
    authority: Path


class OidcSection(Struct, frozen=True, forbid_unknown_fields=True):
    issuer: Annotated[str, Meta(pattern=r"^https://")]
    audience: Annotated[str, Meta(min_length=1)]
    algorithms: tuple[Literal["EdDSA", "Ed25519", "ES256", "ES384", "PS256", "PS384", "RS256", "RS384"], ...]
    tenant: Place
    place: Place
    jwks_file: Path | None = None
    jwks_uri: str | None = None
    roles: tuple[str, ...] = ()


class SinkSection(Struct, frozen=True, forbid_unknown_fields=True):
    """A receiver of the audit log. Stands in the file and nowhere else: no API makes or changes one."""

    name: Name
    kind: Literal["https-json", "syslog", "otlp"]
    url: Annotated[str, Meta(max_length=2_048)]
    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    token_file: Path | None = None
    token_scheme: Annotated[str, Meta(pattern=r"^[A-Za-z]{1,32}$")] = "Bearer"  # noqa: S105  (the word before the token)
    tenants: tuple[TenantName, ...] = ()
    kinds: tuple[str, ...] = ()
    on_reject: Literal["stop", "skip"] = "stop"
    enterprise: Annotated[int, Meta(ge=1, le=2**32 - 1)] = 32_473
    timeout_s: Annotated[float, Meta(gt=0, le=60)] = 10.0


class FolderAnchor(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="folder"):
    path: Path
    required: bool = True
    every_s: Annotated[float, Meta(ge=0)] = 0


class WriteOnceAnchor(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="write-once"):
    path: Path
    required: bool = True
    every_s: Annotated[float, Meta(ge=0)] = 60


class HsmAnchor(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="hsm"):
    required: bool = True
    every_s: Annotated[float, Meta(ge=0)] = 3_600


class TimestampSection(Struct, frozen=True, forbid_unknown_fields=True):
    url: Annotated[str, Meta(pattern=r"^https?://")]
    authority: Path
    every_s: Annotated[float, Meta(ge=0)] = 3_600


class WebauthnSection(Struct, frozen=True, forbid_unknown_fields=True):
    """A credential whose assertions approve: `skms approval enrol` tells its id (base64url), relying party and origin."""

    credential: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{22,1364}$")]
    rp: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,252}$")]
    origins: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^https?://[a-z0-9][a-z0-9.-]{0,252}(:[1-9][0-9]{0,4})?$")], ...],
        Meta(min_length=1, max_length=8),
    ]


class ApproverSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Who approves, and as whom the service knows the same person: one who asked does not approve."""

    name: Name
    public_key: Path
    identities: tuple[Annotated[str, Meta(min_length=1, max_length=512)], ...] = ()
    tenants: tuple[Place, ...] = ()  # whose requests; empty: everybody's
    groups: tuple[Group, ...] = ()
    algorithm: Algorithm = "Ed25519"
    webauthn: WebauthnSection | None = None


class GroupSection(Struct, frozen=True, forbid_unknown_fields=True):
    group: Group
    min: Annotated[int, Meta(ge=1, le=16)]


class GroupRuleSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Of which groups the approvers are, beside how many: a person fills one place."""

    groups: Annotated[tuple[GroupSection, ...], Meta(min_length=1, max_length=16)]
    kinds: tuple[
        Literal["destroy_key", "set_key_policy", "lift_freeze", "policy", "audit-recover", "create_exception"], ...
    ] = ()
    tenants: tuple[Place, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """Each place by the group that fills it."""
        return tuple(one.group for one in self.groups for _ in range(one.min))


class ApprovalsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How many different approvers make a quorum, and for how long a request may collect them."""

    needed: Annotated[int, Meta(ge=2, le=16)] = 2
    lifetime_s: Annotated[int, Meta(ge=60, le=86_400)] = 3_600
    approver: tuple[ApproverSection, ...] = ()
    rule: tuple[GroupRuleSection, ...] = ()


class WitnessesSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Who cosigns this log's checkpoints: a C2SP tlog-policy file, and the authorities of the witnesses' TLS."""

    policy: Path
    ca: Path | None = None


class WitnessedLog(Struct, frozen=True, forbid_unknown_fields=True):
    """A log of somebody else that this node cosigns; once for each of its keys: a vkey, or SPKI in base64."""

    origin: Annotated[str, Meta(min_length=1, max_length=128)]
    key: Annotated[str, Meta(min_length=1, max_length=1_024)]


class WitnessSection(Struct, frozen=True, forbid_unknown_fields=True):
    """This service as a witness of other logs, under a name and with a key of its own (`skms witness init`)."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    key_file: Path
    log: tuple[WitnessedLog, ...] = ()


class AuditSection(Struct, frozen=True, forbid_unknown_fields=True):
    slots: Annotated[int, Meta(ge=1, le=256)] = 16
    deadline_s: Annotated[float, Meta(gt=0, le=2)] = 2.0
    disk_warn_percent: Annotated[int, Meta(ge=1, le=100)] = 80
    disk_refuse_percent: Annotated[int, Meta(ge=1, le=100)] = 90
    disk_stop_percent: Annotated[int, Meta(ge=1, le=100)] = 95
    disk_reserve_mb: Annotated[int, Meta(ge=0, le=65_536)] = 16
    sink: tuple[SinkSection, ...] = ()
    anchor: tuple[FolderAnchor | WriteOnceAnchor | HsmAnchor, ...] = ()
    timestamp: tuple[TimestampSection, ...] = ()
    archive_dir: Path | None = None  # where old records go: docs/audit-growth.md
    retention_days: Days = 0  # 0: for ever
    tenant_retention_days: dict[Place, Days] = {}  # longer than that, or 0
    legal_hold: tuple[Place, ...] = ()  # tenants of whom nothing goes
    witnesses: WitnessesSection | None = None
    post_quantum_key: Path | None = None  # an ML-DSA-44 key that signs checkpoints too: docs/witnesses.md


class LimitsSection(Struct, frozen=True, forbid_unknown_fields=True):
    body: Annotated[int, Meta(ge=1_024, le=5_242_880)] = 1_048_576
    batch_body: Annotated[int, Meta(ge=1_024, le=5_242_880)] = 4_194_304
    hsm_deadline_s: Annotated[float, Meta(gt=0, le=30)] = 5.0
    worker_memory_mb: Annotated[int, Meta(ge=0)] = 1_024
    # docs/limits.md, of each worker: requests at once and behind them, connections.
    in_flight: Annotated[int, Meta(ge=1, le=10_000)] = 64
    queue: Annotated[int, Meta(ge=0, le=100_000)] = 1_000
    queue_wait_s: Annotated[float, Meta(gt=0, le=30)] = 1.0
    connections: Annotated[int, Meta(ge=10, le=100_000)] = 1_000
    # Requests and batch items a second on this node; 0: no limit.
    tenant_rate: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    tenant_rates: dict[Place, Annotated[float, Meta(ge=0, le=1e6)]] = {}  # of tenants that differ
    key_rate: Annotated[float, Meta(ge=0, le=1e6)] = 0.0  # uses of one key
    burst_s: Annotated[int, Meta(ge=1, le=60)] = 2  # so many seconds' worth at once


class LogSection(Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"


class TracingSection(Struct, frozen=True, forbid_unknown_fields=True):
    """A collector for spans of requests (OTLP over HTTP). Without `url` there are none."""

    url: Annotated[str, Meta(max_length=2_048)] = ""
    ca: Path | None = None
    sample: Annotated[float, Meta(ge=0, le=1)] = 0.01  # of requests whose caller does not say whether to


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole configuration. Paths are absolute, or relative to the file that named them."""

    node: NodeSection
    listen: ListenSection
    database: DatabaseSection
    hsm: Annotated[tuple[HsmSection, ...], Meta(min_length=1)]
    policy: PolicySection
    trust: Annotated[tuple[TrustSection, ...], Meta(min_length=1)]
    hsm_group: tuple[HsmGroupSection, ...] = ()
    oidc: tuple[OidcSection, ...] = ()
    witness: WitnessSection | None = None
    approvals: ApprovalsSection = ApprovalsSection()
    audit: AuditSection = AuditSection()
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()
    tracing: TracingSection = TracingSection()


_PLAIN: Final = ("node", "listen", "database", "policy", "audit", "limits", "log", "tracing")


def load(path: Path, *, environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration in a file, with environment overrides; ConfigInvalid names file, line and option."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigInvalid(str(path), 0, f"cannot be read: {error.strerror}") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        raise ConfigInvalid(str(path), int(line[1]) if line else 0, f"not TOML: {error}") from None
    _override(raw, environment)
    try:
        config = msgspec.convert(raw, Config, dec_hook=_path(path.parent), strict=True)
    except msgspec.ValidationError as error:
        raise ConfigInvalid(str(path), _line(text, str(error)), str(error)) from None
    _consistent(config, path)
    return config


def _path(base: Path) -> Any:
    def decode(kind: type, value: Any) -> Any:
        if kind is Path and isinstance(value, str):
            return (base / value).absolute()
        raise NotImplementedError(kind)

    return decode


def _override(raw: dict[str, Any], environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        match = re.fullmatch(rf"SKMS_({'|'.join(s.upper() for s in _PLAIN)})_([A-Z_]+)", name)
        if match is None:
            continue
        section = raw.setdefault(match[1].lower(), {})
        if isinstance(section, dict):
            section[match[2].lower()] = int(value) if value.isdigit() else value


def _line(text: str, message: str) -> int:
    """The line of the option a message names, as well as it can be told."""
    where = re.search(r"at `\$\.?([^`]*)`", message)
    parts = re.findall(r"[a-z_]+", where[1]) if where else []
    unknown = re.search(r"unknown field `([^`]+)`", message)
    parts += [unknown[1]] if unknown else []
    lines, at = text.splitlines(), 0
    for part in parts:
        for number in range(at, len(lines)):
            if re.match(rf"\s*(\[+\s*)?{re.escape(part)}\b", lines[number]):
                at = number
                break
    return at + 1 if parts else 0


def _consistent(config: Config, path: Path) -> None:
    regions = [h.region for h in config.hsm if not h.backup]
    if config.node.region not in regions:
        raise ConfigInvalid(str(path), 0, f"no [[hsm]] stands in the node's region {config.node.region!r}")
    names = [h.name for h in config.hsm]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigInvalid(str(path), 0, f"two [[hsm]] have the name {twice[0]!r}: records and rows name HSMs by it")
    grouped = [g.region for g in config.hsm_group]
    for group in config.hsm_group:
        members = regions.count(group.region)
        if grouped.count(group.region) > 1:
            raise ConfigInvalid(str(path), 0, f"two [[hsm_group]] for region {group.region!r}")
        if group.minimum > members:
            reason = f"minimum {group.minimum}, but {members} [[hsm]] stand in region {group.region!r}"
            raise ConfigInvalid(str(path), 0, f"[[hsm_group]]: {reason}")
    marks = (config.audit.disk_warn_percent, config.audit.disk_refuse_percent, config.audit.disk_stop_percent)
    if list(marks) != sorted(marks):
        raise ConfigInvalid(str(path), 0, "[audit]: disk_warn_percent <= disk_refuse_percent <= disk_stop_percent")
    _sinks_consistent(config, path)
    if config.tracing.url and (wrong := _wrong_url(config.tracing.url, ("https",))):
        raise ConfigInvalid(str(path), 0, f"[tracing] url: {wrong}")
    _approvers_consistent(config.approvals, path)
    _signers_consistent(config.policy.signer, path)
    for tenant, days in config.audit.tenant_retention_days.items():
        if 0 < days < config.audit.retention_days:
            reason = f"{tenant} = {days}, but every record stays for retention_days = {config.audit.retention_days}"
            raise ConfigInvalid(str(path), 0, f"[audit] tenant_retention_days: {reason}")
    for issuer in config.oidc:
        if (issuer.jwks_file is None) == (issuer.jwks_uri is None):
            raise ConfigInvalid(str(path), 0, f"[[oidc]] {issuer.issuer}: exactly one of jwks_file and jwks_uri")


def _approvers_consistent(section: ApprovalsSection, path: Path) -> None:
    names = [a.name for a in section.approver]
    known = [i for a in section.approver for i in a.identities]
    if len(set(names)) != len(names):
        raise ConfigInvalid(str(path), 0, "two [[approvals.approver]] have one name: each is one person")
    if len(set(known)) != len(known):
        raise ConfigInvalid(str(path), 0, "two [[approvals.approver]] have one identity: each is one person")
    for approver in section.approver:
        if approver.webauthn is not None:
            _credential_usable(approver.name, approver.webauthn, path)
    if names and len(names) < section.needed:
        reason = f"needed = {section.needed}, but there are {len(names)} [[approvals.approver]]"
        raise ConfigInvalid(str(path), 0, f"[approvals]: {reason}")
    for rule in section.rule:
        named = [one.group for one in rule.groups]
        if len(set(named)) != len(named):
            raise ConfigInvalid(str(path), 0, "[[approvals.rule]]: a group stands there twice: write one `min` for it")
        for one in rule.groups:
            members = sum(one.group in a.groups for a in section.approver)
            if members < one.min:
                reason = f"min = {one.min}, but {members} [[approvals.approver]] have it in `groups`"
                raise ConfigInvalid(str(path), 0, f"[[approvals.rule]] {one.group}: {reason}")


def _credential_usable(name: str, section: WebauthnSection, path: Path) -> None:
    where = f"[[approvals.approver]] {name}: webauthn"
    try:
        decoded(section.credential)
    except ValueError:
        raise ConfigInvalid(str(path), 0, f"{where}.credential: not base64url without padding") from None
    if wrong := [origin for origin in section.origins if not usable(section.rp, origin)]:
        reason = f"no browser lets a page of {wrong[0]} use credentials of {section.rp}"
        raise ConfigInvalid(str(path), 0, f"{where}.origins: {reason}: https, and rp its host or a domain above it")


def _signers_consistent(signers: tuple[SignerSection, ...], path: Path) -> None:
    parts = {signer.part for signer in signers}
    if wrong := sorted(part for part in parts if not is_part(part)):
        raise ConfigInvalid(
            str(path), 0, f"[[policy.signer]]: part {wrong[0]!r} is neither `{WHOLE}` nor `tenants/NAME`"
        )
    if parts and WHOLE not in parts:
        reason = f"nobody signs `{WHOLE}`: the charter and every tenant without a signer would be anybody's"
        raise ConfigInvalid(str(path), 0, f"[[policy.signer]]: {reason}")


_SCHEMES: Final = {"https-json": ("https",), "otlp": ("https",), "syslog": ("tls", "tcp")}
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


def _sinks_consistent(config: Config, path: Path) -> None:
    names = [s.name for s in config.audit.sink]
    for sink in config.audit.sink:
        if wrong := _wrong_with(sink, names.count(sink.name)):
            raise ConfigInvalid(str(path), 0, f"[[audit.sink]] {sink.name}: {wrong}")


def _wrong_url(url: str, schemes: tuple[str, ...]) -> str:
    """What is wrong with a receiver's address; empty if nothing is. Where https:// will do, http:// will to this machine."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        return str(error)
    web = "https" in schemes
    local_agent = web and parts.scheme == "http" and host in _LOOPBACK
    if (parts.scheme not in schemes and not local_agent) or not host or port == 0:
        wanted = " or ".join(f"{scheme}://HOST[:PORT]" for scheme in schemes)
        return f"expected {wanted}{' (http:// to this machine only)' if web else ''}"
    if parts.username is not None or parts.password is not None:
        return "no secret stands in a configuration: a sink has token_file for it"
    return ""


def _wrong_with(sink: SinkSection, named: int) -> str:
    """What is wrong with a sink; empty if nothing is."""
    if named > 1:
        return "two have this name: a position is stored by it"
    if sink.url.startswith("udp:"):
        return "url: UDP loses messages without a trace (RFC 5426, 4.3): use tls:// or tcp://"
    if wrong := _wrong_url(sink.url, _SCHEMES[sink.kind]):
        return f"url: {wrong}"
    if (sink.certificate is None) != (sink.private_key is None):
        return "certificate and private_key come together"
    if sink.kind == "syslog" and sink.token_file is not None:
        return "token_file: syslog carries no token: use certificate and private_key"
    if unknown := sorted(set(sink.kinds) - KINDS):
        return f"kinds: no record is of kind {unknown[0]!r}; there are {', '.join(sorted(KINDS))}"
    return ""
