"""CK_RV: its names, its classes, and what ours they become. The only place where CKR_* is translated."""

from __future__ import annotations

import enum
from typing import Final

NAMES: Final[dict[int, str]] = {
    0x2: "HOST_MEMORY",
    0x5: "GENERAL_ERROR",
    0x6: "FUNCTION_FAILED",
    0x7: "ARGUMENTS_BAD",
    0x10: "ATTRIBUTE_READ_ONLY",
    0x11: "ATTRIBUTE_SENSITIVE",
    0x12: "ATTRIBUTE_TYPE_INVALID",
    0x13: "ATTRIBUTE_VALUE_INVALID",
    0x1B: "ACTION_PROHIBITED",
    0x20: "DATA_INVALID",
    0x21: "DATA_LEN_RANGE",
    0x30: "DEVICE_ERROR",
    0x31: "DEVICE_MEMORY",
    0x32: "DEVICE_REMOVED",
    0x40: "ENCRYPTED_DATA_INVALID",
    0x41: "ENCRYPTED_DATA_LEN_RANGE",
    0x42: "AEAD_DECRYPT_FAILED",
    0x50: "FUNCTION_CANCELED",
    0x54: "FUNCTION_NOT_SUPPORTED",
    0x60: "KEY_HANDLE_INVALID",
    0x62: "KEY_SIZE_RANGE",
    0x63: "KEY_TYPE_INCONSISTENT",
    0x68: "KEY_FUNCTION_NOT_PERMITTED",
    0x69: "KEY_NOT_WRAPPABLE",
    0x6A: "KEY_UNEXTRACTABLE",
    0x70: "MECHANISM_INVALID",
    0x71: "MECHANISM_PARAM_INVALID",
    0x82: "OBJECT_HANDLE_INVALID",
    0x90: "OPERATION_ACTIVE",
    0x91: "OPERATION_NOT_INITIALIZED",
    0xA0: "PIN_INCORRECT",
    0xA1: "PIN_INVALID",
    0xA2: "PIN_LEN_RANGE",
    0xA3: "PIN_EXPIRED",
    0xA4: "PIN_LOCKED",
    0xB0: "SESSION_CLOSED",
    0xB1: "SESSION_COUNT",
    0xB3: "SESSION_HANDLE_INVALID",
    0xC0: "SIGNATURE_INVALID",
    0xC1: "SIGNATURE_LEN_RANGE",
    0xD0: "TEMPLATE_INCOMPLETE",
    0xD1: "TEMPLATE_INCONSISTENT",
    0xE0: "TOKEN_NOT_PRESENT",
    0xF0: "UNWRAPPING_KEY_HANDLE_INVALID",
    0x100: "USER_ALREADY_LOGGED_IN",
    0x101: "USER_NOT_LOGGED_IN",
    0x102: "USER_PIN_NOT_INITIALIZED",
    0x110: "WRAPPED_KEY_INVALID",
    0x112: "WRAPPED_KEY_LEN_RANGE",
    0x113: "WRAPPING_KEY_HANDLE_INVALID",
    0x150: "BUFFER_TOO_SMALL",
    0x190: "CRYPTOKI_NOT_INITIALIZED",
    0x191: "CRYPTOKI_ALREADY_INITIALIZED",
}


class CkError(Exception):
    """A PKCS#11 function's answer other than CKR_OK. Decisions use the number, messages the name."""

    def __init__(self, rv: int, function: str, *, session: int | None = None) -> None:
        self.rv, self.function = rv, function
        self.session = session  # the session it was called with, if it takes one
        self.name = "CKR_" + NAMES.get(rv, f"0x{rv:x}")
        super().__init__(f"{function}: {self.name}")


class Fault(enum.Enum):
    """What an error means for the session, the login and the module."""

    CALLER = "caller"
    AMBIGUOUS = "ambiguous"  # bad input and a sick token answer alike: ask the token
    STALE = "stale"
    SESSION = "session"
    LOGIN = "login"
    BUSY = "busy"
    PIN = "pin"
    DEVICE = "device"


_CLASSES: Final[dict[Fault, frozenset[int]]] = {
    Fault.STALE: frozenset({0x82, 0x60, 0x113, 0xF0}),
    Fault.SESSION: frozenset({0xB0, 0xB3, 0x90, 0x91, 0x150}),
    Fault.LOGIN: frozenset({0x101}),
    Fault.BUSY: frozenset({0xB1, 0x2, 0x31, 0x50}),
    Fault.PIN: frozenset({0xA0, 0xA1, 0xA2, 0xA3, 0xA4, 0x102}),
    Fault.CALLER: frozenset(
        {
            *(0x10, 0x11, 0x12, 0x13, 0x1B, 0x20, 0x21, 0x40, 0x41, 0x42, 0x62, 0x63, 0x68, 0x69, 0x6A),
            *(0x70, 0x71, 0xC0, 0xC1, 0xD0, 0xD1, 0x110, 0x112),
        }
    ),
}
_AMBIGUOUS: Final = frozenset({0x5, 0x6, 0x7})
_JUDGES_INPUT: Final = frozenset({"C_Decrypt", "C_UnwrapKey", "C_Verify"})


def classify(error: CkError, bad_input: frozenset[int] = frozenset()) -> Fault:
    """The class of an error, by the stage of the operation and not only by its number.

    `bad_input` are numbers that this vendor has for bad input where others mean a sick device.

    SoftHSM answers a bad tag with GENERAL_ERROR, as it would a device fault: a breaker fed by the number alone would be
    an attacker's off switch (A-09).
    """
    if error.rv in _AMBIGUOUS | bad_input and error.function in _JUDGES_INPUT:
        return Fault.AMBIGUOUS
    return next((fault for fault, values in _CLASSES.items() if error.rv in values), Fault.DEVICE)
