"""Cards of people: SoftHSM tokens of their own, in processes of their own, as a card is on its owner's machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import softhsm
from harness import ROOT

_MAKE = """
import json, sys, uuid
from pathlib import Path
from keystore.hsm import Material
from keystore.pkcs11.binding import module
from keystore.pkcs11.mechanisms import A, KINDS, pair_at_birth, spki
from keystore.pkcs11.binding import mechanism
from keystore.pkcs11.vendors import VENDORS
path, label, pin, keys = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
loaded = module(path)
session = loaded.open(loaded.find_slot(label, None)[0], write=True)
session.login(Path(pin).read_bytes().strip())
found = {}
for name, (kind, each_time) in keys.items():
    material, vendor = Material(kind), VENDORS["softhsm2"]
    public, private = pair_at_birth(material, uuid.uuid4(), vendor, token=True, label=name.partition("#")[0])
    private |= {A.ALWAYS_AUTHENTICATE: True} if each_time else {}
    made, _ = session.generate_pair(mechanism(KINDS[material].generate), public, private)
    found[name] = "" if kind.startswith("RSA") else spki(material, {A.EC_POINT: session.get(made, A.EC_POINT)}, vendor).hex()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Card:
    """A card with keys; `public` are their public halves (DER, hex) by label."""

    tokens: softhsm.SoftHsm
    label: str
    public: dict[str, str]

    @property
    def pin_file(self) -> Path:
        return self.tokens.pin_file(self.label)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.tokens.environment, "PYTHONPATH": str(ROOT)}

    def options(self, key: str, *, pin: Path | None = None, label: str = "") -> list[str]:
        """What names a key on the card at the command line."""
        place = ["--pkcs11-module", str(self.tokens.module), "--token-label", label or self.label, "--key-label", key]
        return [*place, "--pin-file", str(pin or self.pin_file)]

    def skms(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """The command line on the machine with the card."""
        return subprocess.run(
            [sys.executable, "-m", "service.cli.main", "-o", "json", *arguments],
            capture_output=True,
            text=True,
            env=how.pop("env", self.environment),
            **how,
        )


def card(directory: Path, label: str, keys: dict[str, tuple[str, bool]]) -> Card:
    """A card with keys: label -> (material, whether it wants its PIN for each signature)."""
    tokens = softhsm.bring_up(directory, [label])
    done = subprocess.run(
        [sys.executable, "-c", _MAKE, str(tokens.module), label, str(tokens.pin_file(label)), json.dumps(keys)],
        capture_output=True,
        text=True,
        env={**os.environ, **tokens.environment, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return Card(tokens, label, json.loads(done.stdout))
