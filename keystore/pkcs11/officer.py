"""The security officer's one act: to make a public key a trusted wrapping key of a token.

Login belongs to the application, so this runs in a process of its own, started by `trust` and ended at once:
`python -m keystore.pkcs11.officer`, which reads its order from standard input. The PIN comes from a file, never from an
argument or the environment, and is tried once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keystore.pkcs11.binding import CKU_SO, Session, module
from keystore.pkcs11.errors import CkError, Fault, classify
from keystore.pkcs11.mechanisms import CKO, A, transport_public
from keystore.pkcs11.recovery import start_lock

TIMEOUT_S: Final = 120


class CeremonyRefused(Exception):
    """A ceremony cannot go on; the message names the thing, the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the officer is asked to do, on which token."""

    module: str
    reserved: str
    label: str
    serial: str
    pin_file: str
    lock: str  # "" where starts need no lock
    object_id: str  # hex
    object_label: str
    modulus: str  # hex
    exponent: str  # hex


def trust(order: Order) -> None:
    """Have the security officer create the trusted public key; CeremonyRefused with the reason if that fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "keystore.pkcs11.officer"],
            input=json.dumps({name: getattr(order, name) for name in Order.__slots__}),
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise CeremonyRefused(f"token {order.label!r}: the security officer's call hung for {TIMEOUT_S} s") from None
    except ValueError:
        raise CeremonyRefused(
            f"token {order.label!r}: the security officer's process failed: {done.stderr[-200:]}"
        ) from None
    if answer["refused"]:
        raise CeremonyRefused(answer["refused"])


def carry_out(order: Order) -> str:
    """Log in as the security officer and create the key; why not, or nothing."""
    try:
        pin = Path(order.pin_file).read_bytes().rstrip(b"\r\n")
    except OSError as error:
        return f"security officer's PIN file {order.pin_file}: {error.strerror}"
    try:
        with start_lock(Path(order.lock) if order.lock else None):
            loaded = module(order.module, order.reserved.encode() or None)
            slot, _ = loaded.find_slot(order.label, order.serial or None)
            session = loaded.open(slot, write=True)
            session.login(pin, CKU_SO)
        _replace(session, order)
    except CkError as error:
        if classify(error) is Fault.PIN:
            return (
                f"token {order.label!r} refused the security officer's PIN ({error.name}); it was tried once: "
                f"check {order.pin_file} before you try again, a few more wrong ones lock the officer out"
            )
        return f"token {order.label!r}: the security officer cannot create the trusted key: {error}"
    return ""


def _replace(session: Session, order: Order) -> None:
    identity = bytes.fromhex(order.object_id)
    for left in session.find({A.CLASS: CKO.PUBLIC_KEY, A.ID: identity, A.TOKEN: True}, 16):
        session.destroy(left)
    wanted: dict[int, Any] = {
        **transport_public(uuid.UUID(bytes=identity), order.object_label),
        A.TOKEN: True,
        A.TRUSTED: True,
        A.MODULUS: bytes.fromhex(order.modulus),
        A.PUBLIC_EXPONENT: bytes.fromhex(order.exponent),
    }
    session.create(wanted)


def main() -> None:
    """Carry out the order on standard input, answer on standard output, end without unloading the module."""
    refused = carry_out(Order(**json.load(sys.stdin)))
    sys.stdout.write(json.dumps({"refused": refused}))
    sys.stdout.flush()
    os._exit(0)  # the process has one purpose; its login ends with it


if __name__ == "__main__":
    main()
