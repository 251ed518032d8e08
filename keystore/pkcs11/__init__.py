"""HSMs by PKCS#11: binding, sessions and recovery, templates, self-test, vendor profiles."""

from keystore.pkcs11.binding import total_calls
from keystore.pkcs11.card import CardKey, CardRefused, sign_on_card
from keystore.pkcs11.ceremony import CeremonyReport, held, initialise
from keystore.pkcs11.officer import CeremonyRefused
from keystore.pkcs11.probe import ProbeReport, probe
from keystore.pkcs11.rotation import Rewrapper, destroy_root, next_root, rewrapper
from keystore.pkcs11.token import Pkcs11Hsm, TokenConfig, open_token
from keystore.pkcs11.transcript import Step, Transcript, TranscriptDamaged
from keystore.pkcs11.transcript import verify as verify_transcript
from keystore.pkcs11.transfer import JoinReport, join
from keystore.pkcs11.vendors import VENDORS, ProfileInvalid, Vendor

__all__ = [
    "VENDORS",
    "CardKey",
    "CardRefused",
    "CeremonyRefused",
    "CeremonyReport",
    "JoinReport",
    "Pkcs11Hsm",
    "ProbeReport",
    "ProfileInvalid",
    "Rewrapper",
    "Step",
    "TokenConfig",
    "Transcript",
    "TranscriptDamaged",
    "Vendor",
    "destroy_root",
    "held",
    "initialise",
    "join",
    "next_root",
    "open_token",
    "probe",
    "rewrapper",
    "sign_on_card",
    "total_calls",
    "verify_transcript",
]
