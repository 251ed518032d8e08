"""Identity by client certificate: SPIFFE X.509-SVIDs of configured trust domains.

The TLS layer has checked the chain against all authorities together; here the leaf is held to the authority of its own
trust domain, so that one region's authority cannot vouch for another's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID
from starlette.types import Scope

from policy import Caller, Evidence, Registry, whereabouts
from service.identity import Unidentified, source

_SPIFFE: Final = re.compile(r"spiffe://([a-z0-9._-]{1,255})((?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+)+)")
_CACHE: Final = 4_096
EXPIRED: Final = "certificate_expired"


class Trusted(Protocol):
    """A configured trust domain and the file of its authority."""

    @property
    def domain(self) -> str: ...

    @property
    def authority(self) -> Path: ...


def spiffe_id(certificate: x509.Certificate) -> tuple[str, str]:
    """(trust domain, path) of a leaf that keeps the X509-SVID rules (X509-SVID 2, 4, 5); Unidentified for others."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        constraints = [e.value for e in certificate.extensions if isinstance(e.value, x509.BasicConstraints)]
        purposes = [e.value for e in certificate.extensions if isinstance(e.value, x509.ExtendedKeyUsage)]
    except (x509.ExtensionNotFound, ValueError):
        raise Unidentified("svid_malformed") from None
    if any(c.ca for c in constraints) or usage.key_cert_sign or usage.crl_sign or not usage.digital_signature:
        raise Unidentified("svid_not_a_leaf")
    if any(ExtendedKeyUsageOID.CLIENT_AUTH not in p for p in purposes):
        raise Unidentified("svid_not_for_clients")
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or len(uris[0].encode()) > 2_048:
        raise Unidentified("svid_malformed")
    match = _SPIFFE.fullmatch(uris[0])
    if match is None:
        raise Unidentified("svid_malformed")
    return match[1], match[2]


class MtlsProvider:
    """Callers by the client certificate of their connection."""

    def __init__(
        self, registry: Callable[[], Registry], trust: Sequence[Trusted], *, clock: Callable[[], float]
    ) -> None:
        self._registry, self._clock = registry, clock
        self._trust = trust
        self._authorities = self._read()
        self._proven: dict[bytes, tuple[str, str, float, float]] = {}
        self._callers: dict[tuple[bytes, str], tuple[Registry, Caller]] = {}  # by certificate and peer's address

    def _read(self) -> Mapping[str, list[x509.Certificate]]:
        return {t.domain: _authorities(t.authority) for t in self._trust}

    def reread(self) -> Callable[[], None]:
        """Read the authorities' files anew, OSError or ValueError if one cannot be used; what is returned puts them in force."""
        found = self._read()

        def enforce() -> None:
            self._authorities = found
            self._proven, self._callers = {}, {}  # proven by the others

        return enforce

    async def identify(self, scope: Scope) -> Caller | None:
        """The caller of the connection's certificate; None without one."""
        found = self._shown(scope)
        if found is None:
            return None
        domain, path, evidence = found
        registry, peer = self._registry(), (evidence, source(scope))
        known = self._callers.get(peer)
        if known is not None and known[0] is registry:
            return known[1]
        caller = replace(caller_of_svid(registry, domain, path), source=peer[1], evidence=evidence)
        if len(self._callers) >= _CACHE:
            self._callers.clear()
        self._callers[peer] = registry, caller
        return caller

    def peer(self, scope: Scope) -> str | None:
        """The canonical identity of the connection's certificate, whoever the caller is; None without one of an authority.

        Unidentified if it has expired: nobody gets rid of what their certificate says of them by keeping it too long.
        """
        try:
            found = self._shown(scope)
        except Unidentified as bad:
            if bad.reason == EXPIRED:
                raise
            return None
        return None if found is None else f"mtls:{found[0]}:{found[1]}"

    def _shown(self, scope: Scope) -> tuple[str, str, bytes] | None:
        """(trust domain, path, SHA-256) of the connection's certificate, None without one; Unidentified if it is bad."""
        chain = scope.get("extensions", {}).get("tls", {}).get("client_cert_chain") or []
        if not chain:
            return None
        pem = chain[0].encode()
        evidence = hashlib.sha256(pem).digest()
        known = self._proven.get(evidence)
        if known is None:
            known = self._prove(pem)
            if len(self._proven) >= _CACHE:
                self._proven.clear()
            self._proven[evidence] = known
        domain, path, not_before, not_after = known
        if not not_before <= self._clock() < not_after:
            raise Unidentified(EXPIRED)
        return domain, path, evidence

    def _prove(self, pem: bytes) -> tuple[str, str, float, float]:
        try:
            certificate = x509.load_pem_x509_certificate(pem)
        except ValueError:
            raise Unidentified("svid_malformed") from None
        domain, path = spiffe_id(certificate)
        if not any(_issued_by(certificate, authority) for authority in self._authorities.get(domain, ())):
            raise Unidentified("authority_not_trusted")
        before, after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return domain, path, before.timestamp(), after.timestamp()


def caller_of_svid(registry: Registry, domain: str, path: str) -> Caller:
    """Who the SVID of a trust domain and path is, as the policy sees it; Unidentified if it is nobody's here."""
    identity = f"mtls:{domain}:{path}"
    place = registry.place_of_trust_domain(domain)
    if place is None:
        raise Unidentified("trust_domain_without_place")
    where = whereabouts([Evidence("svid", frozenset({place}), vouches=frozenset({place}))])
    member = registry.member(identity)
    tenant = path.split("/")[1] if member is None else member.tenant
    if member is None and registry.tenant(path.split("/")[1]) is None:
        raise Unidentified("tenant_unknown")
    return Caller(
        id=identity,
        kind="workload" if member is None else "operator",
        tenant=tenant,
        roles=frozenset({"workload" if member is None else member.role}),
        places=where.places,
        proof=where.proof,
        authn="mtls",
    )


def _authorities(path: Path) -> list[x509.Certificate]:
    found = x509.load_pem_x509_certificates(path.read_bytes())
    for certificate in found:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca:
            raise ValueError(f"{path}: a trust anchor must be a certificate authority")
    return found


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
