"""The ceremony that makes a token fit for an installation: root KEK, row-MAC key, audit key, self-test.

Idempotent: what is there is reported and left alone; what a crash left out is added.
"""

from __future__ import annotations

from dataclasses import dataclass

from keystore.hsm import HsmUnavailable, Material
from keystore.pkcs11.binding import Module, Session, mechanism
from keystore.pkcs11.mechanisms import CKM, CKO, A, pair_at_birth, root_kek, row_mac_key
from keystore.pkcs11.token import AUDIT, ROOT, ROW_MAC, Pkcs11Hsm, TokenConfig, connect


@dataclass(frozen=True, slots=True)
class CeremonyReport:
    """What stands on the token now. Nothing in it is secret."""

    hsm: str
    region: str
    token_label: str
    token_serial: str
    installation: str
    root_kek: str
    audit_algorithm: str
    audit_public_key: str  # hex of the SubjectPublicKeyInfo
    created: tuple[str, ...]
    existing: tuple[str, ...]
    specs: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]


def initialise(config: TokenConfig, loaded: Module | None = None) -> CeremonyReport:
    """Create what is missing, run the self-test, report. HsmUnavailable or SelfTestFailed with the reason."""
    sessions = connect(config, loaded)
    hsm = Pkcs11Hsm(config, sessions)
    created, existing = [], []
    try:
        for role, make in ((ROOT, _make_root), (ROW_MAC, _make_row_mac), (AUDIT, _make_audit)):
            if _present(sessions.home, config, role):
                existing.append(role)
            else:
                make(sessions.home, config, hsm)
                created.append(role)
        hsm.check()
        public = hsm.audit_public_key()
        status = hsm.status()
    finally:
        hsm.close()
    return CeremonyReport(
        hsm=config.name,
        region=config.region,
        token_label=config.token_label,
        token_serial=status.token_serial,
        installation=str(config.installation),
        root_kek=str(config.object_id(ROOT)),
        audit_algorithm="Ed25519" if len(public) == 44 else "ECDSA P-256",
        audit_public_key=public.hex(),
        created=tuple(created),
        existing=tuple(existing),
        specs=status.specs,
        missing=status.missing,
    )


def _present(session: Session, config: TokenConfig, role: str) -> bool:
    kind = CKO.PRIVATE_KEY if role == AUDIT else CKO.SECRET_KEY
    found = session.find({A.CLASS: kind, A.ID: config.object_id(role).bytes, A.TOKEN: True})
    if len(found) > 1:
        raise HsmUnavailable(
            f"token {config.token_label!r} holds more than one {role} key of this installation: remove all but one"
        )
    return bool(found)


def _make_root(session: Session, config: TokenConfig, _: Pkcs11Hsm) -> None:
    session.generate(mechanism(CKM.AES_KEY_GEN), root_kek(config.object_id(ROOT), config.label(ROOT)))


def _make_row_mac(session: Session, config: TokenConfig, _: Pkcs11Hsm) -> None:
    wanted = row_mac_key(config.object_id(ROW_MAC), config.label(ROW_MAC))
    session.generate(mechanism(CKM.GENERIC_SECRET_KEY_GEN), wanted)


def _make_audit(session: Session, config: TokenConfig, hsm: Pkcs11Hsm) -> None:
    """Ed25519 where the token has it, else P-256."""
    edwards = hsm.lists(CKM.EC_EDWARDS_KEY_PAIR_GEN, CKM.EDDSA)
    material = Material.ED25519 if edwards else Material.EC_P256
    how = mechanism(CKM.EC_EDWARDS_KEY_PAIR_GEN if edwards else CKM.EC_KEY_PAIR_GEN)
    session.generate_pair(
        how,
        *pair_at_birth(material, config.object_id(AUDIT), config.profile(), token=True, label=config.label(AUDIT)),
    )
