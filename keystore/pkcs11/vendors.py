"""Vendor profiles: what differs between PKCS#11 modules, as data. Exit from a vendor starts here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Vendor:
    """How one module wants to be used. Blobs store mechanism names; this maps them to the module's numbers."""

    name: str
    kwp: int  # AES-KWP (RFC 5649): CKM_AES_KEY_WRAP_KWP is 0x210B, SoftHSM's number is 0x210A
    reserved: bytes | None = None  # pReserved of C_Initialize
    gcm_iv: Literal["caller", "zero", "append", "prepend"] = "caller"
    value_len_on_unwrap: bool = False
    read_only_sessions: bool = True
    ec_point: Literal["der", "raw"] = "der"
    edwards_params: Literal["oid", "string"] = "oid"
    find_limit: int = 64  # most handles one C_FindObjects returns
    max_sessions: int = 64
    serialised_start: bool = False  # C_Initialize and C_Login of several processes must not overlap
    waivers: tuple[str, ...] = ()  # self-test rules not asked of this module; test profiles only


VENDORS: Final[dict[str, Vendor]] = {
    # C_Login truncates and rewrites token.object after unlocking it: workers that start together fail.
    "softhsm2": Vendor("softhsm2", kwp=0x210A, serialised_start=True),
}
