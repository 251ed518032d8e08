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

import msgspec
from msgspec import Meta, Struct

Port = Annotated[int, Meta(ge=0, le=65_535)]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,17}$")]
Place = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


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
    sessions: Annotated[int, Meta(ge=1, le=1_024)] = 8
    environment: dict[str, str] = {}


class PolicySection(Struct, frozen=True, forbid_unknown_fields=True):
    bundle: Path


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


class AuditSection(Struct, frozen=True, forbid_unknown_fields=True):
    slots: Annotated[int, Meta(ge=1, le=256)] = 16
    deadline_s: Annotated[float, Meta(gt=0, le=2)] = 2.0


class LimitsSection(Struct, frozen=True, forbid_unknown_fields=True):
    body: Annotated[int, Meta(ge=1_024, le=5_242_880)] = 1_048_576
    batch_body: Annotated[int, Meta(ge=1_024, le=5_242_880)] = 4_194_304


class LogSection(Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole configuration. Paths are absolute, or relative to the file that named them."""

    node: NodeSection
    listen: ListenSection
    database: DatabaseSection
    hsm: Annotated[tuple[HsmSection, ...], Meta(min_length=1)]
    policy: PolicySection
    trust: Annotated[tuple[TrustSection, ...], Meta(min_length=1)]
    oidc: tuple[OidcSection, ...] = ()
    audit: AuditSection = AuditSection()
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()


_PLAIN: Final = ("node", "listen", "database", "policy", "audit", "limits", "log")


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
    regions = [h.region for h in config.hsm]
    if config.node.region not in regions:
        raise ConfigInvalid(str(path), 0, f"no [[hsm]] stands in the node's region {config.node.region!r}")
    if len(set(regions)) != len(regions):
        raise ConfigInvalid(str(path), 0, "two [[hsm]] stand in one region")
    for issuer in config.oidc:
        if (issuer.jwks_file is None) == (issuer.jwks_uri is None):
            raise ConfigInvalid(str(path), 0, f"[[oidc]] {issuer.issuer}: exactly one of jwks_file and jwks_uri")
