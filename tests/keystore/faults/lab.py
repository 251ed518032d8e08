"""One token in this process with a table of C functions that a test can spoil; keys whose values the test knows."""

from __future__ import annotations

import ctypes
import os
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import softhsm
from keystore.hsm import Material, StoredKey
from keystore.pkcs11 import Pkcs11Hsm, TokenConfig, initialise, open_token, recovery
from keystore.pkcs11.binding import Module, mechanism
from keystore.pkcs11.mechanisms import KINDS, KWP_NAME, A, at_birth
from softhsm import nss

CODES = {
    "DEVICE_ERROR": 0x30,
    "DEVICE_REMOVED": 0x32,
    "SESSION_HANDLE_INVALID": 0xB3,
    "OBJECT_HANDLE_INVALID": 0x82,
    "USER_NOT_LOGGED_IN": 0x101,
    "OPERATION_ACTIVE": 0x90,
    "SESSION_COUNT": 0xB1,
    "GENERAL_ERROR": 0x5,
}
SPOILED = ("EncryptInit", "Encrypt", "DecryptInit", "Decrypt", "UnwrapKey", "SignInit", "Sign", "OpenSession")

FINALIZE, CLOSE_ALL_SESSIONS, LOGOUT = 1, 14, 19  # positions in CK_FUNCTION_LIST


@dataclass
class Faults:
    """Which share of C calls answers an error without being made, and how often that happened."""

    rate: float = 0.0
    made: Counter[str] = field(default_factory=Counter)
    hooks: dict[str, Callable[[], None]] = field(default_factory=dict)  # run before a function: to hang it

    def wrap(self, functions: Mapping[str, Callable[..., int]]) -> Mapping[str, Callable[..., int]]:
        return {name: self._spoiled(name, function) for name, function in functions.items()}

    def _spoiled(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            hook = self.hooks.get(name)
            if hook is not None:
                hook()
            if self.rate and name in SPOILED and random.random() < self.rate:
                told = random.choice(list(CODES))
                self.made[told] += 1
                return CODES[told]
            return real(*arguments)

        return call


@dataclass
class Known:
    """A key whose value the test knows, as the keystore would hand it to the HSM."""

    value: bytes
    stored: StoredKey


@dataclass
class Lab:
    """A token of one vendor, in a directory of its own."""

    hsm: Pkcs11Hsm
    module: Module
    faults: Faults
    files: Path  # what "the token is removed" means: this moves away

    def known(self, material: Material) -> Known:
        """A key of a known value: made outside, put into the token as a session object and wrapped at once."""
        value = os.urandom(KINDS[material].length)
        home = self.hsm._sessions.home
        template = {**at_birth(material, uuid.uuid4()), A.VALUE: value}
        del template[A.VALUE_LEN]
        born = home.create(template)
        blob = home.wrap(mechanism(self.hsm._kwp), self.hsm._root(home), born)
        home.destroy(born)
        name = uuid.uuid4()
        binding = name.bytes + blob
        mac = self.hsm.row_mac(binding)
        return Known(value, StoredKey(name, material, blob, KWP_NAME, self.hsm.root_kek, b"", binding, mac))

    def log_out(self) -> None:
        """What a vendor's tool beside us, or an HSM that restarts, does: every session loses its login."""
        with self.hsm._sessions.recovery.exclusive():
            self._raw(LOGOUT, self.hsm._sessions.home.handle)

    def close_all_sessions(self) -> None:
        with self.hsm._sessions.recovery.exclusive():
            self._raw(CLOSE_ALL_SESSIONS, self.hsm._sessions.slot)

    def _raw(self, position: int, argument: int) -> None:
        """Call a function of one number that the product itself never calls."""
        ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)(self.module.lib.table[position])(argument)

    def finalize(self) -> None:
        """The module forgets everything, as after a restart of the vendor's daemon."""
        with self.hsm._sessions.recovery.exclusive():
            self._raw(FINALIZE, 0)

    def remove_token(self) -> None:
        """The token's files are gone, and the module has to look for them."""
        self.files.rename(self.files.with_name(self.files.name + ".away"))
        self.finalize()

    def restore_token(self) -> None:
        self.files.with_name(self.files.name + ".away").rename(self.files)


def open_lab(
    vendor: str,
    directory: Path,
    *,
    cache: int = 20,
    faults: Faults | None = None,
    call_limit: Callable[[str], float] | None = None,
) -> Lab:
    """Bring up and initialise a token and open it with a spoilable module. Once per process."""
    faults = faults or Faults()
    if vendor == "softhsm2":
        tokens = softhsm.bring_up(directory / "softhsm", ["skms-faults"])
        place: dict[str, Any] = {
            "module": tokens.module,
            "token_label": "skms-faults",
            "pin_file": tokens.pin_file("skms-faults"),
            "environment": tokens.environment,
        }
        files, reserved = directory / "softhsm" / "tokens", None
    else:
        database = nss.bring_up(directory / "nss")
        place = {
            "module": database.module,
            "token_label": database.label,
            "pin_file": database.pin_file,
            "environment": database.environment,
            "token_dir": database.directory,
        }
        files, reserved = directory / "nss" / "key4.db", database.reserved.encode()
    config = TokenConfig(
        name="faulty",
        region="eu-de-1",
        vendor=vendor,
        lock_dir=directory / "locks",
        installation=uuid.UUID(int=11),
        **place,
    )
    os.environ.update(config.environment)
    module = Module(str(config.module), reserved=reserved, wrap=faults.wrap)
    if call_limit is not None:  # the first who asks for a module's recoverer says its limits
        recovery.recovery_of(module, call_limit=call_limit or config.profile().call_limit, lock=None)
    initialise(config, module)
    hsm = open_token(config, module)
    hsm._sessions._cache_size = cache
    return Lab(hsm, module, faults, files)


def together(workers: list[Callable[[], None]]) -> None:
    """Run them in threads until all have ended."""
    threads = [threading.Thread(target=w) for w in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
