"""A new root KEK for a region, and the one window in which what the old one wrapped can be wrapped anew.

CKA_UNWRAP_TEMPLATE of a root KEK forces everything that it unwraps to stay inside, so no row can simply move. For the time
of a rotation the security officer trusts a transport key of the same token; the old root crosses to it and comes back as
a session object that unwraps, has no such template and does nothing else. It exists in one process, which ends with the
rotation, and never without the officer.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from keystore.hsm import HsmFault, HsmUnavailable, StoredKey, Wrapped
from keystore.pkcs11.binding import mechanism
from keystore.pkcs11.ceremony import Station, make_root, note_keys, one_ceremony
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.mechanisms import KWP_NAME, A, in_use, on_arrival, root_kek
from keystore.pkcs11.officer import CeremonyRefused
from keystore.pkcs11.token import ROOT, TokenConfig
from keystore.pkcs11.transcript import Transcript
from keystore.pkcs11.transfer import join, transport, unwrapped


def next_root(tokens: Sequence[TokenConfig], current: int, *, so_pin_file: Path | None, transcript: Transcript) -> int:
    """Make the root KEK after `current` on the first token and bring it to the others; its version.

    Goes on where an earlier call was stopped. CeremonyRefused, HsmUnavailable or SelfTestFailed with the reason.
    """
    first, version = tokens[0], current + 1
    with one_ceremony(first.lock_dir):
        station = Station.at(first)
        try:
            roots = station.roots()
            if current not in roots:
                raise CeremonyRefused(f"token {first.token_label!r} does not hold root KEK version {current}")
            made = [] if version in roots else [f"{ROOT}/{version}"]
            if made:
                make_root(station, version)
            note_keys(station, transcript, made)
        except CkError as error:
            raise CeremonyRefused(f"token {first.token_label!r}: {error}") from error
        finally:
            station.sessions.close()
    for other in tokens[1:]:
        join(first, other, so_pin_file=so_pin_file, transcript=transcript)
    return version


@dataclass(frozen=True, slots=True)
class Rewrapper:
    """Wraps keys of an old root KEK under a newer one, inside the token."""

    station: Station
    opener: int  # the old root as a session object that unwraps only
    new: int
    old_id: uuid.UUID
    new_id: uuid.UUID

    def rewrap(self, key: StoredKey) -> Wrapped:
        """The key under the new root KEK. The caller has checked its row; HsmFault or HsmUnavailable if it fails."""
        session, vendor = self.station.session, self.station.vendor
        kwp = mechanism(vendor.kwp)
        template = on_arrival(key.material, key.object_id, vendor, key.public)
        template.pop(A.MODIFIABLE, None)
        try:
            opened = session.unwrap(kwp, self.opener, key.blob, template)
            try:
                blob = session.wrap(kwp, self.new, opened)
            finally:
                session.destroy(opened)
            # What the new root opens is what was wrapped: AES-KWP checks its own integrity (RFC 5649, 3).
            session.destroy(session.unwrap(kwp, self.new, blob, in_use(key.material, vendor, key.public)))
        except CkError as error:
            raise HsmFault(error.name) from error
        return Wrapped(blob, KWP_NAME, self.new_id, key.public)


@contextlib.contextmanager
def rewrapper(
    config: TokenConfig, *, old: int, new: int, so_pin_file: Path | None, transcript: Transcript
) -> Iterator[Rewrapper]:
    """What wraps keys anew for the block; the opening copy of the old root is destroyed after it."""
    station = Station.at(config)
    try:
        roots = station.roots()
        if not {old, new} <= roots.keys():
            raise CeremonyRefused(f"token {config.token_label!r} does not hold root KEK versions {old} and {new}")
        if not station.flag(roots[old], A.EXTRACTABLE):
            raise CeremonyRefused(
                f"the root KEK on token {config.token_label!r} is sealed: nothing can be wrapped anew"
            )
        wanted = {**root_kek(config.object_id(ROOT, old), "skms/rewrap"), A.TOKEN: False, A.EXTRACTABLE: False}
        for number in (A.UNWRAP_TEMPLATE, A.WRAP_WITH_TRUSTED):
            wanted.pop(number, None)
        wanted[A.WRAP] = False
        with transport(station, station, so_pin_file, transcript) as way:
            opener = unwrapped(station.session, way.private, way.how, way.wrapped(roots[old]), wanted)
        transcript.add("opener", hsm=config.name, old=old, new=new)
        try:
            yield Rewrapper(station, opener, roots[new], config.object_id(ROOT, old), config.object_id(ROOT, new))
        finally:
            with contextlib.suppress(CkError):
                station.session.destroy(opener)
            transcript.add("opener-destroyed", hsm=config.name)
    except CkError as error:
        raise CeremonyRefused(f"token {config.token_label!r}: {error}") from error
    finally:
        station.sessions.close()


def destroy_root(config: TokenConfig, version: int, *, transcript: Transcript) -> None:
    """Destroy a version of the region's root KEK on one token. The caller has seen that no row needs it."""
    with one_ceremony(config.lock_dir):
        station = Station.at(config)
        try:
            roots = station.roots()
            if len(roots) < 2 or max(roots) == version:
                raise CeremonyRefused(f"root KEK version {version} is the newest on token {config.token_label!r}")
            if version not in roots:
                return
            transcript.add("destroyed", hsm=config.name, **station.shown(ROOT, roots[version], version))
            station.session.destroy(roots[version])
        except CkError as error:
            raise HsmUnavailable(f"token {config.token_label!r}: {error}", ckr=error.name) from error
        finally:
            station.sessions.close()
