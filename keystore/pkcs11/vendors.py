"""Vendor profiles: what differs between PKCS#11 modules, as data. Exit from a vendor starts here.

One TOML file describes one module: `profiles/*.toml` are shipped, `vendor = "/path/of/yours.toml"` in [[hsm]] names one
of the operator's own. A profile says how a module wants to be used, never that it may be trusted: that is the self-test's
to say. One that waives rules of the self-test must call itself a test profile, and serves under a development charter
only.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

PROFILES: Final = Path(__file__).parent / "profiles"

Mechanism = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
Seconds = Annotated[float, Meta(gt=0, le=600)]
Count = Annotated[int, Meta(ge=1)]


class ProfileInvalid(Exception):
    """A vendor profile cannot be used: file and reason."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"vendor profile {file}: {reason}")
        self.file, self.reason = file, reason


class CallLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds after which a call counts as hung, and the watchdog ends the process."""

    default: Seconds = 10.0
    generate_key_pair: Seconds = 60.0  # an RSA-4096 pair took 4.8 s at worst in SoftHSM; devices are slower
    login: Seconds = 30.0  # C_Initialize, C_Login and C_Finalize wait for other processes


@dataclass(frozen=True, slots=True)
class Vendor:
    """How one module wants to be used. Rows store mechanism names; this maps them to the module's numbers."""

    name: str
    title: str
    tested: Literal["device", "module", "documentation"]  # the last: nobody ran this against the device
    sources: tuple[str, ...]  # where the facts are from
    notes: str
    modules: tuple[Path, ...]  # where the vendor's client puts its module
    kwp: int  # AES-KWP (RFC 5649): CKM_AES_KEY_WRAP_KWP is 0x210B, and not all follow
    gcm: int
    gcm_iv: Literal["caller", "zero", "append", "prepend"]  # who makes the IV, and where a token's own is found
    max_gcm_bytes: int  # longest plaintext of one AES-GCM call
    oaep_hashes: tuple[Literal["sha1", "sha256"], ...]  # of CKM_RSA_PKCS_OAEP, best first
    reserved: str  # pReserved of C_Initialize; `{token_dir}` is the token's directory
    environment: Mapping[str, str]  # set before the module is loaded, unless configuration says otherwise
    locking: Literal["os"]  # CKF_OS_LOCKING_OK: a module without it cannot be used from threads
    in_process: bool  # no wire between us and the keys: a quick call may run on the event loop
    serialised_calls: bool  # one call at a time: the client loses answers when threads share its connection
    serialised_start: bool  # C_Initialize and C_Login of several processes must not overlap
    user_type: int  # of C_Login: CKU_USER is 1
    read_only_sessions: bool
    can_close_session: bool
    max_sessions: int
    find_limit: int  # most handles one C_FindObjects returns
    value_len_on_unwrap: bool
    unwrap_extras: Mapping[int, Literal["ec_point"]]  # attributes that the template of an EC private key must carry
    ec_point: Literal["der", "raw"]
    edwards_params: Literal["oid", "string"]
    trusted_wrap: Literal["enforced", "ignored", "unsupported"]  # CKA_WRAP_WITH_TRUSTED
    seals_by: Literal[
        "unwrap", "copy"
    ]  # what takes CKA_MODIFIABLE=False for a key that came in: C_UnwrapKey or C_CopyObject
    bad_input_codes: frozenset[
        int
    ]  # CK_RV of C_Decrypt and C_UnwrapKey that mean bad input here and a sick device elsewhere
    call_limits: CallLimits
    test: bool
    waivers: tuple[str, ...]  # self-test rules not asked of this module

    def call_limit(self, function: str) -> float:
        """Seconds after which a call to C_<function> counts as hung."""
        limits = self.call_limits
        slow = {"Login": limits.login, "Initialize": limits.login, "Finalize": limits.login}
        return {"GenerateKeyPair": limits.generate_key_pair, **slow}.get(function, limits.default)


class _Profile(Struct, frozen=True, forbid_unknown_fields=True):
    """A profile as it stands in its file; what a file does not say is as PKCS#11 2.40 has it."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    title: Annotated[str, Meta(min_length=1)]
    tested: Literal["device", "module", "documentation"]
    kwp: Mechanism
    sources: tuple[str, ...] = ()
    notes: str = ""
    modules: tuple[str, ...] = ()
    gcm: Mechanism = 0x1087
    gcm_iv: Literal["caller", "zero", "append", "prepend"] = "caller"
    max_gcm_bytes: Count = 1 << 20
    oaep_hashes: tuple[Literal["sha1", "sha256"], ...] = ("sha256", "sha1")
    reserved: str = ""
    environment: dict[str, str] = {}
    locking: Literal["os"] = "os"
    in_process: bool = False
    serialised_calls: bool = False
    serialised_start: bool = False
    user_type: Mechanism = 1
    read_only_sessions: bool = True
    can_close_session: bool = True
    max_sessions: Count = 64
    find_limit: Count = 64
    value_len_on_unwrap: bool = False
    unwrap_extras: dict[str, Literal["ec_point"]] = {}
    ec_point: Literal["der", "raw"] = "der"
    edwards_params: Literal["oid", "string"] = "oid"
    trusted_wrap: Literal["enforced", "ignored", "unsupported"] = "unsupported"
    seals_by: Literal["unwrap", "copy"] = "unwrap"
    bad_input_codes: tuple[Mechanism, ...] = ()
    call_limits: CallLimits = CallLimits()
    test: bool = False
    waivers: tuple[str, ...] = ()


@functools.cache
def load_profile(file: Path) -> Vendor:
    """The profile in a file, read once by a process; ProfileInvalid names file and reason."""
    try:
        raw = tomllib.loads(file.read_text())
        found = msgspec.convert(raw, _Profile, strict=True)
        extras = {int(number, 0): source for number, source in found.unwrap_extras.items()}
    except OSError as error:
        raise ProfileInvalid(file, f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileInvalid(file, f"not TOML: {error}") from None
    except (msgspec.ValidationError, ValueError) as error:
        raise ProfileInvalid(file, str(error)) from None
    if found.waivers and not found.test:
        raise ProfileInvalid(file, "waives rules of the self-test: only a profile with `test = true` may")
    if found.tested == "documentation" and not found.sources:
        raise ProfileInvalid(file, "tested against documentation only: `sources` must say which")
    facts: dict[str, Any] = msgspec.structs.asdict(found) | {
        "modules": tuple(map(Path, found.modules)),
        "environment": MappingProxyType(found.environment),
        "unwrap_extras": MappingProxyType(extras),
        "bad_input_codes": frozenset(found.bad_input_codes),
    }
    return Vendor(**facts)


def profile(vendor: str) -> Vendor:
    """The profile that `vendor` of an [[hsm]] names: a shipped one, or the absolute path of a file.

    ProfileInvalid if that cannot be used, KeyError if there is no such name.
    """
    return load_profile(Path(vendor)) if vendor.startswith("/") else VENDORS[vendor]


def _shipped() -> Mapping[str, Vendor]:
    made = {}
    for file in sorted(PROFILES.glob("*.toml")):
        made[file.stem] = load_profile(file)
        if made[file.stem].name != file.stem:
            raise ProfileInvalid(file, f"its name is {made[file.stem].name!r}")
    return MappingProxyType(made)


VENDORS: Final = _shipped()
