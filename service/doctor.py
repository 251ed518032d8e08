"""`skms doctor`: look at everything a node needs, and say what to mend."""

from __future__ import annotations

import datetime as dt
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from service import integrity
from service.config import Config


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: whether it is good, and what was found or is to be done."""

    check: str
    good: bool
    detail: str


def examine(config: Config) -> list[Finding]:
    """Every check, in the order in which a node needs them."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("installed files", integrity.check),
        ("state directory", lambda: _directory(config.node.state_dir)),
        ("server certificate", lambda: _certificate(config.listen.certificate)),
        ("server key", lambda: _private(config.listen.private_key)),
        ("client authorities", lambda: _certificate(config.listen.client_ca)),
        *(("client revocation lists", lambda p=p: _crl(p)) for p in [config.listen.client_crl] if p is not None),
        ("disk", lambda: _disk(config.node.state_dir)),
        *((f"authority {t.domain}", lambda t=t: _certificate(t.authority)) for t in config.trust),
        *((f"PIN file of {h.name}", lambda h=h: _private(h.pin_file)) for h in config.hsm),
        *((f"HSM {h.name}", lambda h=h: _hsm(config, h.name)) for h in config.hsm),
        ("policy", lambda: _policy(config)),
        ("suppliers", lambda: _suppliers(config)),
        ("database", lambda: _database(config)),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(Finding(name, True, check()))
        except Exception as error:  # whatever it is, it is what is wrong here
            findings.append(Finding(name, False, f"{error}" or type(error).__name__))
    return findings


def _directory(path: Path) -> str:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: create it with mode 0700 for the service's user")
    return str(path)


def _private(path: Path) -> str:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise PermissionError(f"{path} has mode {mode:04o}: chmod 600 {path}")
    return f"mode {mode:04o}"


def _certificate(path: Path) -> str:
    certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    left = certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
    if left < dt.timedelta(0):
        raise ValueError(f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: renew it")
    return f"valid for {left.days} days"


def _crl(path: Path) -> str:
    from service.tlsfiles import first_update

    left = first_update(path) - time.time()
    if left < 0:
        raise ValueError(
            f"{path}: a revocation list has ended: fetch a new one, or all clients of its authority are refused"
        )
    return f"valid for {left / 3_600:.0f} hours"


def _disk(path: Path) -> str:
    usage = shutil.disk_usage(path)
    used = 100 * usage.used / usage.total
    if used > 90:
        raise OSError(f"{used:.0f} % used: free space, or the audit log cannot be written soon")
    return f"{used:.0f} % used"


def _hsm(config: Config, name: str) -> str:
    from keystore.pkcs11 import open_token
    from service.wiring import token_configs

    token = next(t for t in token_configs(config) if t.name == name)
    hsm = open_token(token)
    try:
        status = hsm.status()
    finally:
        hsm.close()
    return f"token {status.token_label} serial {status.token_serial}: self-test passed, makes {', '.join(status.specs)}"


def _policy(config: Config) -> str:
    from policy import Policy
    from service.wiring import signers_of

    found = Policy.load(config.policy.bundle, signers=signers_of(config))
    development = " DEVELOPMENT CHARTER: not for real keys" if found.development else ""
    signed = f", signed: {', '.join(sorted({s.part for s in config.policy.signer}))}" if config.policy.signer else ""
    return f"version {found.version}, digest {found.digest[:12]}{signed}{development}"


def _suppliers(config: Config) -> str:
    """Which tiers the HSMs of each region can hold today."""
    from policy.bundle import read
    from policy.suppliers import judge

    registry, now = read(config.policy.bundle).registry, time.time_ns() // 1_000
    serving = [h for h in config.hsm if not h.backup]
    for hsm in serving:
        if hsm.supplier and hsm.supplier not in registry.suppliers:
            raise ValueError(
                f"[[hsm]] {hsm.name}: supplier {hsm.supplier!r} is not in charter.yaml: no tier with a bar is met"
            )
    told = []
    for region in dict.fromkeys(h.region for h in serving):
        used = {h.supplier or None for h in serving if h.region == region}
        held = [str(t) for t in (1, 2, 3) if not judge(registry.bar(t), registry.suppliers, used, now).gaps]
        told.append(f"{region} meets the labels of tiers {', '.join(held) or 'none'}")
    return "; ".join(told)


def _database(config: Config) -> str:
    from service.database import SCHEMA, DatabaseUnusable, known_revision, open_engine
    from service.dbroles import look

    engine = open_engine(config.database.url)
    try:
        known_revision(engine)
        found = look(engine)
    finally:
        engine.dispose()
    told = f"{engine.url.render_as_string()}, schema {found.schema or 'none'}"
    if found.schema != SCHEMA:
        return f"{told}: the first start brings it to {SCHEMA}, or `skms db migrate`"
    if found.missing:
        raise DatabaseUnusable(f"the role lacks {'; '.join(found.missing[:3])}: run `skms db migrate --service-role`")
    if found.beyond:
        told += f"; the role may do more than a node needs, as {found.beyond[0]}: docs/operations.md, Database roles"
    return told
