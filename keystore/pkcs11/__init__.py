"""HSMs by PKCS#11: binding, sessions and recovery, templates, self-test, vendor profiles."""

from keystore.pkcs11.binding import total_calls
from keystore.pkcs11.ceremony import CeremonyReport, initialise
from keystore.pkcs11.token import Pkcs11Hsm, TokenConfig, open_token
from keystore.pkcs11.vendors import VENDORS, Vendor

__all__ = [
    "VENDORS",
    "CeremonyReport",
    "Pkcs11Hsm",
    "TokenConfig",
    "Vendor",
    "initialise",
    "open_token",
    "total_calls",
]
