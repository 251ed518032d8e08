"""Calls into a PKCS#11 module.

python-pkcs11 loads the module and describes its slots and tokens, in a subclass that initialises with
CKF_OS_LOCKING_OK: as shipped it passes NULL ("one thread") and then releases the GIL round every call, and two threads
crash SoftHSM. Sessions and objects are used through a thin ctypes layer over the same module, because every attribute
must be said (python-pkcs11 adds and omits some), the number of CK_RV decides what is done, and each step must cost the
fewest calls.

LP64 Linux only; structure packing is ours. Every buffer whose address goes to C is owned by an object that outlives the
call: a temporary gave silent wrong answers.
"""

from __future__ import annotations

import contextlib
import ctypes as C  # noqa: N812 - the usual name, and C is what it speaks
import os
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pkcs11 import _pkcs11
from pkcs11.exceptions import PKCS11Error

from keystore.pkcs11.errors import CkError

if C.sizeof(C.c_ulong) != 8 or C.sizeof(C.c_void_p) != 8:
    raise ImportError("the PKCS#11 binding supports 64-bit Linux (LP64) only")

UL, PTR = C.c_ulong, C.c_void_p

CKF_OS_LOCKING_OK: Final = 2
CKF_RW_SESSION: Final = 2
CKF_SERIAL_SESSION: Final = 4
CKU_SO, CKU_USER, CKU_CONTEXT_SPECIFIC = 0, 1, 2
USER_STATES: Final = (1, 3)  # CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS

# Position in CK_FUNCTION_LIST (PKCS#11 2.40, 5.4 and following) and number of arguments of the functions in use.
FUNCTIONS: Final[Mapping[str, tuple[int, int]]] = {
    "GetTokenInfo": (6, 2),
    "OpenSession": (12, 5),
    "CloseSession": (13, 1),
    "GetSessionInfo": (15, 2),
    "Login": (18, 4),
    "CreateObject": (20, 4),
    "CopyObject": (21, 5),
    "DestroyObject": (22, 2),
    "GetAttributeValue": (24, 4),
    "SetAttributeValue": (25, 4),
    "FindObjectsInit": (26, 3),
    "FindObjects": (27, 4),
    "FindObjectsFinal": (28, 1),
    "EncryptInit": (29, 3),
    "Encrypt": (30, 5),
    "DecryptInit": (33, 3),
    "Decrypt": (34, 5),
    "SignInit": (42, 3),
    "Sign": (43, 5),
    "GenerateKey": (58, 5),
    "GenerateKeyPair": (59, 8),
    "WrapKey": (60, 6),
    "UnwrapKey": (61, 8),
    "GenerateRandom": (64, 3),
}

_BY_SLOT: Final = frozenset({"GetTokenInfo", "OpenSession"})  # these take a slot first; all others a session

Attributes = Mapping[int, Any]


class _InitArgs(C.Structure):
    """CK_C_INITIALIZE_ARGS."""

    _fields_ = [("mutex", PTR * 4), ("flags", UL), ("reserved", PTR)]


class _Triple(C.Structure):
    """CK_ATTRIBUTE and CK_MECHANISM have one layout."""

    _fields_ = [("type", UL), ("p", PTR), ("n", UL)]
    keep: Any  # the buffers that `p` points into


class _Gcm(C.Structure):
    """CK_GCM_PARAMS."""

    _fields_ = [
        ("p_iv", PTR),
        ("iv_len", UL),
        ("iv_bits", UL),
        ("p_aad", PTR),
        ("aad_len", UL),
        ("tag_bits", UL),
    ]
    keep: Any
    iv: Any


class _Pss(C.Structure):
    """CK_RSA_PKCS_PSS_PARAMS."""

    _fields_ = [("hash", UL), ("mgf", UL), ("salt", UL)]


class _Oaep(C.Structure):
    """CK_RSA_PKCS_OAEP_PARAMS."""

    _fields_ = [("hash", UL), ("mgf", UL), ("source", UL), ("p_label", PTR), ("label_len", UL)]


class LockingLib(_pkcs11.lib):
    """python-pkcs11's library object, initialised for threads. One per process and module, made after fork or spawn."""

    def __new__(cls, path: str, reserved: bytes | None = None) -> LockingLib:
        made: LockingLib = super().__new__(cls, path)  # type: ignore[call-arg]  # a C type: its stub has no arguments
        return made

    def __init__(self, path: str, reserved: bytes | None = None) -> None:
        self._ready = self._twins = False
        self.table: Any = None  # CK_FUNCTION_LIST
        self._args = _InitArgs(flags=CKF_OS_LOCKING_OK)
        self._reserved = C.create_string_buffer(reserved) if reserved else None
        if self._reserved is not None:
            self._args.reserved = C.addressof(self._reserved)
        super().__init__(path)  # calls initialize() below

    def initialize(self) -> None:
        """C_Initialize with OS locking. CRYPTOKI_ALREADY_INITIALIZED is an error: somebody did it, perhaps without."""
        if self._ready:
            return
        if self.table is None:
            dll = C.CDLL(self.so)
            self.table = function_list(dll)
            # p11-kit-client hands every caller of C_GetFunctionList an instance of its own; python-pkcs11 has called it too.
            self._twins = C.addressof(self.table.contents) != C.addressof(function_list(dll).contents)
        prototype = C.CFUNCTYPE(UL, PTR)
        if rv := prototype(self.table[0])(C.addressof(self._args)):
            raise CkError(rv, "C_Initialize")
        self._ready = True
        if self._twins:
            super().initialize()  # used for slots and tokens only, by one thread at a time

    def finalize(self) -> None:
        """C_Finalize; whatever it answers, C_Initialize may follow."""
        if self._ready:
            self._ready = False
            assert self.table is not None
            C.CFUNCTYPE(UL, PTR)(self.table[1])(None)
            if self._twins:
                with contextlib.suppress(PKCS11Error):
                    super().finalize()


def function_list(dll: C.CDLL) -> Any:
    """The module's CK_FUNCTION_LIST as an array of pointers; CK_VERSION before it is padded to eight bytes."""
    dll.C_GetFunctionList.restype = UL
    pointer = PTR()
    if rv := dll.C_GetFunctionList(C.byref(pointer)):
        raise CkError(rv, "C_GetFunctionList")
    assert pointer.value is not None
    return C.cast(pointer.value + 8, C.POINTER(PTR))


def pack(value: Any) -> bytes:
    """An attribute's value in C: CK_BBOOL, CK_ULONG, a list of CK_ULONG, text, or bytes as they are."""
    match value:
        case bool():
            return b"\1" if value else b"\0"
        case int():
            return struct.pack("@L", value)
        case list() | tuple():
            return struct.pack(f"@{len(value)}L", *value)
        case str():
            return value.encode()
    return bytes(value)


def template(attributes: Attributes) -> Any:
    """A CK_ATTRIBUTE array that owns its buffers; a mapping as value is a nested template (CKA_UNWRAP_TEMPLATE)."""
    array: Any = (_Triple * len(attributes))()
    keep: list[Any] = []
    for at, (number, value) in enumerate(attributes.items()):
        if isinstance(value, Mapping):
            buffer, size = template(value), C.sizeof(_Triple) * len(value)
        else:
            raw = pack(value)
            buffer, size = C.create_string_buffer(raw, max(1, len(raw))), len(raw)
        keep.append(buffer)
        array[at] = _Triple(number, C.addressof(buffer), size)
    array.keep = keep
    return array


def mechanism(number: int, parameter: Any = None) -> _Triple:
    """A CK_MECHANISM; `parameter` is a ctypes object or None."""
    if parameter is None:
        return _Triple(number, None, 0)
    made = _Triple(number, C.addressof(parameter), C.sizeof(parameter))
    made.keep = parameter
    return made


def gcm(number: int, iv: bytes, aad: bytes) -> _Triple:
    """CKM_AES_GCM with a 128-bit tag. The caller owns the IV buffer, so that a token may write into it."""
    iv_buffer, aad_buffer = C.create_string_buffer(iv, len(iv)), C.create_string_buffer(aad, max(1, len(aad)))
    parameter = _Gcm(
        *(C.addressof(iv_buffer) if iv else None, len(iv), len(iv) * 8),
        *(C.addressof(aad_buffer) if aad else None, len(aad), 128),
    )
    parameter.keep, parameter.iv = (iv_buffer, aad_buffer), iv_buffer
    return mechanism(number, parameter)


def pss(number: int, hash_mechanism: int, mgf: int, salt: int) -> _Triple:
    """CKM_RSA_PKCS_PSS over a digest."""
    return mechanism(number, _Pss(hash_mechanism, mgf, salt))


def oaep(number: int, hash_mechanism: int, mgf: int) -> _Triple:
    """CKM_RSA_PKCS_OAEP with an empty label (CKZ_DATA_SPECIFIED)."""
    return mechanism(number, _Oaep(hash_mechanism, mgf, 1, None, 0))


Functions = Mapping[str, Callable[..., int]]


class Module:
    """One initialised module of this process.

    `wrap` may put another function table in front of the module's own: a counter, or faults for a test.
    """

    def __init__(
        self,
        path: str,
        *,
        reserved: bytes | None = None,
        wrap: Callable[[Functions], Functions] = lambda functions: functions,
    ) -> None:
        self.path, self.reserved, self._pid = path, reserved, os.getpid()
        self._calls: dict[int, int] = {}  # PKCS#11 functions called so far, by thread
        self.can_close_session, self.find_limit = True, 64  # a vendor's profile may say otherwise
        self.serialised = False  # so it may of this: one call at a time
        self._turn = threading.Lock()
        self._inside: dict[int, tuple[str, float]] = {}  # by thread: the function it is in, and since when
        with self._watched("Initialize"):
            try:
                self.lib = LockingLib(path, reserved)
            except PKCS11Error as error:
                raise CkError(0x190, f"C_GetInfo ({type(error).__name__})") from error
        table = self.lib.table
        raw = {name: C.CFUNCTYPE(UL, *[PTR] * count)(table[at]) for name, (at, count) in FUNCTIONS.items()}
        self.functions = wrap(raw)

    def call(self, name: str, *arguments: Any) -> None:
        """Call C_<name>; CkError with the number of its answer unless that is CKR_OK."""
        if rv := self.quietly(name, *arguments):
            raise CkError(rv, "C_" + name, session=None if name in _BY_SLOT else arguments[0])

    def quietly(self, name: str, *arguments: Any) -> int:
        """Call C_<name> where any answer will do."""
        if self.serialised:
            with self._turn:  # before the watchdog counts: who waits here is not inside
                return self._enter(name, arguments)
        return self._enter(name, arguments)

    def _enter(self, name: str, arguments: tuple[Any, ...]) -> int:
        me = threading.get_ident()
        self._calls[me] = self._calls.get(me, 0) + 1
        self._inside[me] = (name, time.monotonic())
        try:
            return int(self.functions[name](*arguments))
        finally:
            del self._inside[me]

    @contextlib.contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """Let the watchdog see a call that python-pkcs11 makes."""
        me = threading.get_ident()
        self._inside[me] = (name, time.monotonic())
        try:
            yield
        finally:
            del self._inside[me]

    def calls(self, *, but: Collection[int] = ()) -> int:
        """PKCS#11 functions called through this module so far, those of some threads left out."""
        return sum(count for thread, count in list(self._calls.items()) if thread not in but)

    def calls_inside(self) -> list[tuple[str, float]]:
        """The functions that threads are in just now, and since when (monotonic seconds)."""
        return list(self._inside.values())

    def check_process(self) -> None:
        """A forked child shares login and sessions with its parent without either knowing: refuse loudly."""
        if os.getpid() != self._pid:
            raise RuntimeError("the PKCS#11 module was loaded before fork; start workers as fresh processes")

    def reinitialize(self) -> None:
        """C_Finalize and C_Initialize. Only with no thread inside the module."""
        with self._watched("Finalize"):
            self.lib.finalize()
        with self._watched("Initialize"):
            self.lib.initialize()

    def find_slot(self, label: str, serial: str | None) -> tuple[int, Any]:
        """(slot id, token) of the one token with this label, and serial if given; CkError otherwise."""
        try:
            with self._watched("GetSlotList"):
                slots = self.lib.get_slots(token_present=True)
                tokens = [(s.slot_id, s.get_token()) for s in slots]
        except PKCS11Error as error:
            raise CkError(0xE0, f"C_GetTokenInfo ({type(error).__name__})") from error
        found = [
            (slot, t)
            for slot, t in tokens
            if t.label.strip() == label and (not serial or t.serial.decode("ascii", "replace").strip() == serial)
        ]
        if len(found) != 1:
            raise CkError(0xE0, f"find token {label!r}: {len(found)} present")
        return int(found[0][0]), found[0][1]

    def open(self, slot: int, *, write: bool) -> Session:
        """A session without a login of its own: login belongs to the application."""
        handle = UL()
        flags = CKF_SERIAL_SESSION | (CKF_RW_SESSION if write else 0)
        self.call("OpenSession", slot, flags, None, None, C.addressof(handle))
        return Session(self, handle.value)


_modules: dict[str, Module] = {}
_modules_lock = threading.Lock()


def module(path: str, reserved: bytes | None = None) -> Module:
    """This process's module at a path: several tokens of one vendor are slots of one module."""
    with _modules_lock:
        if path not in _modules:
            _modules[path] = Module(path, reserved=reserved)
        found = _modules[path]
    if found.reserved != reserved:
        raise CkError(0x191, f"C_Initialize ({path} runs in this process with another pReserved)")
    found.check_process()
    return found


def total_calls(*, but: Collection[int] = ()) -> int:
    """PKCS#11 functions called by this process so far, those of some threads left out."""
    return sum(m.calls(but=but) for m in _modules.values())


@dataclass(slots=True)
class Session:
    """One session, used by one thread at a time. Single-part operations only."""

    module: Module
    handle: int

    def login(self, pin: bytes | None, user_type: int = CKU_USER) -> None:
        """C_Login, as the user unless the vendor has a type of its own; already logged in is success.

        Without a PIN the token asks for it at its own keypad.
        """
        if pin is None:
            rv = self.module.quietly("Login", self.handle, user_type, None, 0)
        else:
            buffer = C.create_string_buffer(pin, len(pin))
            rv = self.module.quietly("Login", self.handle, user_type, C.addressof(buffer), len(pin))
            C.memset(C.addressof(buffer), 0, len(pin))
        if rv not in (0, 0x100):
            raise CkError(rv, "C_Login")

    def close(self) -> None:
        """C_CloseSession without C_Logout, which would log out every session of the process."""
        if self.module.can_close_session:
            self.module.quietly("CloseSession", self.handle)

    def close_if_of(self, slot: int) -> None:
        """Close the session if its number still stands for one of this slot."""
        with contextlib.suppress(CkError):
            if self.info()[0] == slot:
                self.close()

    def info(self) -> tuple[int, int]:
        """(slot, state) of CK_SESSION_INFO."""
        info = (UL * 4)()
        self.module.call("GetSessionInfo", self.handle, C.addressof(info))
        return int(info[0]), int(info[1])

    def state(self) -> int:
        """CK_SESSION_INFO.state."""
        return self.info()[1]

    def find(self, attributes: Attributes, limit: int = 2) -> list[int]:
        """Up to `limit` object handles."""
        wanted, found, count = template(attributes), (UL * limit)(), UL()
        handles: list[int] = []
        self.module.call("FindObjectsInit", self.handle, C.addressof(wanted), len(wanted))
        try:
            while len(handles) < limit:
                most = min(limit - len(handles), self.module.find_limit)
                self.module.call("FindObjects", self.handle, C.addressof(found), most, C.addressof(count))
                handles += found[: count.value]
                if count.value < most:
                    break
        finally:
            self.module.quietly("FindObjectsFinal", self.handle)
        return handles

    def get(self, handle: int, number: int, size: int = 4_096) -> bytes:
        """One attribute's value; CkError if the token does not show it."""
        buffer = C.create_string_buffer(size)
        wanted = _Triple(number, C.addressof(buffer), size)
        self.module.call("GetAttributeValue", self.handle, handle, C.addressof(wanted), 1)
        if wanted.n > size:
            raise CkError(0x5, "C_GetAttributeValue (a length beyond the buffer)")
        return buffer.raw[: wanted.n]

    def set(self, handle: int, attributes: Attributes) -> None:
        """C_SetAttributeValue: the self-test asks for it to be refused."""
        wanted = template(attributes)
        self.module.call("SetAttributeValue", self.handle, handle, C.addressof(wanted), len(wanted))

    def _out(self, name: str, size: int, *before: Any) -> bytes:
        """Call with an output buffer sized beforehand. BUFFER_TOO_SMALL is not retried: the operation stays active."""
        buffer, length = C.create_string_buffer(size), UL(size)
        self.module.call(name, self.handle, *before, C.addressof(buffer), C.addressof(length))
        if length.value > size:
            raise CkError(0x5, f"C_{name} (a length beyond the buffer)")
        return buffer.raw[: length.value]

    def _operation(
        self,
        name: str,
        key: int,
        how: _Triple,
        data: bytes,
        size: int,
        again: Callable[[], None] | None = None,
    ) -> bytes:
        self.module.call(name + "Init", self.handle, C.addressof(how), key)
        if again is not None:
            again()
        given = C.create_string_buffer(data, max(1, len(data)))
        return self._out(name, size, C.addressof(given), len(data))

    def encrypt(self, key: int, how: _Triple, data: bytes) -> bytes:
        return self._operation("Encrypt", key, how, data, len(data) + 64)

    def decrypt(self, key: int, how: _Triple, data: bytes) -> bytes:
        return self._operation("Decrypt", key, how, data, len(data) + 64)

    def sign(
        self, key: int, how: _Triple, data: bytes, size: int = 1_024, *, again: Callable[[], None] | None = None
    ) -> bytes:
        """`again` logs in once more, for a key that wants it for each signature (CKA_ALWAYS_AUTHENTICATE)."""
        return self._operation("Sign", key, how, data, size, again)

    def _new(self, name: str, *arguments: Any) -> int:
        handle = UL()
        self.module.call(name, self.handle, *arguments, C.addressof(handle))
        return int(handle.value)

    def generate(self, how: _Triple, attributes: Attributes) -> int:
        """C_GenerateKey; the handle it returned is used, never one found afterwards."""
        wanted = template(attributes)
        return self._new("GenerateKey", C.addressof(how), C.addressof(wanted), len(wanted))

    def generate_pair(self, how: _Triple, public: Attributes, private: Attributes) -> tuple[int, int]:
        """C_GenerateKeyPair: (public, private)."""
        a, b, pub, priv = template(public), template(private), UL(), UL()
        self.module.call(
            "GenerateKeyPair",
            *(self.handle, C.addressof(how), C.addressof(a), len(a), C.addressof(b), len(b)),
            *(C.addressof(pub), C.addressof(priv)),
        )
        return int(pub.value), int(priv.value)

    def create(self, attributes: Attributes) -> int:
        """C_CreateObject: known values of the self-test, public keys, and imported keys that were opened outside the token."""
        wanted = template(attributes)
        return self._new("CreateObject", C.addressof(wanted), len(wanted))

    def copy(self, handle: int, attributes: Attributes) -> int:
        """C_CopyObject: the self-test asks for it to be refused."""
        wanted = template(attributes)
        return self._new("CopyObject", handle, C.addressof(wanted), len(wanted))

    def wrap(self, how: _Triple, kek: int, key: int, size: int = 8_192) -> bytes:
        return self._out("WrapKey", size, C.addressof(how), kek, key)

    def unwrap(self, how: _Triple, kek: int, blob: bytes, attributes: Attributes) -> int:
        wanted, given = template(attributes), C.create_string_buffer(blob, len(blob))
        return self._new(
            "UnwrapKey",
            *(C.addressof(how), kek, C.addressof(given), len(blob), C.addressof(wanted), len(wanted)),
        )

    def destroy(self, handle: int) -> None:
        self.module.call("DestroyObject", self.handle, handle)

    def random(self, length: int) -> bytes:
        buffer = C.create_string_buffer(length)
        self.module.call("GenerateRandom", self.handle, C.addressof(buffer), length)
        return buffer.raw
