"""Ceremonies on throw-away tokens. A process loads a module once and for all its tokens, so each scenario has its own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import softhsm
from keystore.hsm import Material, SignScheme, StoredKey
from keystore.pkcs11 import (
    CeremonyRefused,
    Pkcs11Hsm,
    Step,
    TokenConfig,
    Transcript,
    binding,
    initialise,
    join,
    officer,
    open_token,
)
from keystore.pkcs11.ceremony import Station
from keystore.pkcs11.errors import CkError
from keystore.pkcs11.mechanisms import OAEP, A, transport_public
from keystore.pkcs11.token import ROOT
from softhsm import nss

INSTALLATION = uuid.UUID(int=11)
RSA_3072 = (2**3072 - 1942289).to_bytes(384, "big")  # any odd number of 3,072 bits will do for a public key


def in_process(scenario: Callable[..., Any], *arguments: Any) -> Any:
    """What a scenario returns, run in a process of its own; its exit status if it died."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, scenario, arguments))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = None
    process.join(60)
    return process.exitcode if answer is None else answer


def _run(to: Connection, scenario: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    to.send(scenario(*arguments))


@dataclass(frozen=True)
class Tokens:
    """Two SoftHSM tokens and one of NSS in a directory, all of one installation and region."""

    directory: Path
    region: str = "eu-de-1"

    def config(self, name: str) -> TokenConfig:
        common: dict[str, Any] = {
            "name": name,
            "region": self.region,
            "lock_dir": self.directory / "locks",
            "installation": INSTALLATION,
        }
        if name == "nss":
            made = nss.bring_up(self.directory / "nss")
            return TokenConfig(
                vendor="nss-test",
                module=made.module,
                token_label=made.label,
                pin_file=made.pin_file,
                token_dir=made.directory,
                environment=made.environment,
                **common,
            )
        soft = softhsm.bring_up(self.directory / "softhsm", [name])
        return TokenConfig(
            vendor="softhsm2",
            module=soft.module,
            token_label=name,
            pin_file=soft.pin_file(name),
            environment=soft.environment,
            **common,
        )

    def so_pin(self, name: str) -> Path:
        return self.directory / "softhsm" / f"{name}.so-pin"

    def transcript(self, told: Callable[[Step], None] = lambda _: None) -> Transcript:
        return Transcript("join", {"installation": str(INSTALLATION)}, lambda: time.time_ns() // 1_000, told)


@contextmanager
def opened(config: TokenConfig) -> Iterator[Pkcs11Hsm]:
    made = open_token(config)
    try:
        yield made
    finally:
        made.close()


def row(hsm: Pkcs11Hsm, material: Material) -> StoredKey:
    """A key as its row stores it."""
    made, binding_of = hsm.generate(material, uuid.uuid4()), b"row of a key"
    mac = hsm.row_mac(binding_of)
    return StoredKey(uuid.uuid4(), material, made.blob, made.mechanism, made.kek, made.public, binding_of, mac)


@dataclass(frozen=True)
class Used:
    """Rows of every kind, and what was done with them."""

    rows: dict[Material, StoredKey]
    sealed: tuple[bytes, bytes]
    macs: dict[Material, bytes]
    public: dict[Material, bytes]

    @classmethod
    def on(cls, hsm: Pkcs11Hsm) -> Used:
        kinds = (Material.AES_256, Material.KDK_512, Material.HMAC_256, Material.EC_P256, Material.RSA_3072)
        rows = {kind: row(hsm, kind) for kind in kinds}
        return cls(
            rows,
            hsm.gcm_seal(rows[Material.AES_256], b"aad", b"a secret"),
            {kind: hsm.hmac(rows[kind], "sha256", b"x") for kind in (Material.KDK_512, Material.HMAC_256)},
            {kind: rows[kind].public for kind in (Material.EC_P256, Material.RSA_3072)},
        )

    def again(self, hsm: Pkcs11Hsm) -> dict[str, bool]:
        """Whether the same rows do the same on another token."""
        from keystore.key import KeySpec
        from keystore.store import verify_signature

        iv, sealed = self.sealed
        done = {"AES_256": hsm.gcm_open(self.rows[Material.AES_256], iv, b"aad", sealed) == b"a secret"}
        for kind, mac in self.macs.items():
            done[kind] = hsm.hmac(self.rows[kind], "sha256", b"x") == mac
        for kind, scheme, form in (
            (Material.EC_P256, SignScheme.ECDSA_SHA_256, "raw"),
            (Material.RSA_3072, SignScheme.RSA_PSS_SHA_256, "der"),
        ):
            made = hsm.sign(self.rows[kind], scheme, bytes(32))
            done[kind] = verify_signature(KeySpec(kind), self.public[kind], scheme, bytes(32), made, form)
        return done


def left_over(*configs: TokenConfig) -> int:
    """Transport keys that stand on the tokens."""
    return sum(len(Station.at(c).all_with(c.object_id("transport"))) for c in configs)


# ---- scenarios -------------------------------------------------------------------------------------------------------


def move(directory: Path, source: str, target: str) -> tuple[Any, dict[str, bool], int]:
    """Use keys on one token, join another, use the rows as they are there: (report, what is equal, left over)."""
    tokens = Tokens(directory)
    one, two = tokens.config(source), tokens.config(target)
    initialise(one)
    with opened(one) as hsm:
        used = Used.on(hsm)
    so_pin = None if source == "nss" else tokens.so_pin(source)
    report = join(one, two, so_pin_file=so_pin, transcript=tokens.transcript())
    with opened(two) as hsm:
        return report, used.again(hsm), left_over(one, two)


def take_away_with_the_user_pin(directory: Path) -> dict[str, str]:
    """What the token answers whoever has only the user PIN and a key pair of his own."""
    config = Tokens(directory).config("one")
    initialise(config)
    station = Station.at(config)
    (root,) = station.roots().values()
    mine = {
        **transport_public(uuid.uuid4(), "mine"),
        A.TOKEN: True,
        A.MODULUS: RSA_3072,
        A.PUBLIC_EXPONENT: b"\1\0\1",
    }
    session, answers = station.session, {}
    imported = session.create(mine)
    for name, act in {
        "wrap": lambda: session.wrap(binding.oaep(0x9, *OAEP["sha1"]), imported, root),
        "import as trusted": lambda: session.create({**mine, A.TRUSTED: True}),
        "declare trusted": lambda: session.set(imported, {A.TRUSTED: True}),
        "drop the rule": lambda: session.set(root, {A.WRAP_WITH_TRUSTED: False}),
        "copy without the rule": lambda: session.copy(root, {A.WRAP_WITH_TRUSTED: False}),
    }.items():
        try:
            act()
        except CkError as error:
            answers[name] = error.name
        else:
            answers[name] = "CKR_OK"
    return answers


def wrong_officer(directory: Path) -> tuple[str, int, int]:
    """(refusal, C_Login calls of the officer's process, left over) with a wrong PIN of the security officer."""
    tokens = Tokens(directory)
    one, two = tokens.config("one"), tokens.config("two")
    initialise(one)
    wrong = directory / "wrong.so-pin"
    wrong.write_bytes(b"not-the-pin")
    logins: list[int] = []

    def counted(functions: binding.Functions) -> binding.Functions:
        real = functions["Login"]
        return {**functions, "Login": lambda *given: (logins.append(1), real(*given))[1]}

    order = officer.Order(
        module=str(one.module),
        reserved="",
        label="one",
        serial="",
        pin_file=str(wrong),
        lock="",
        object_id=uuid.uuid4().hex,
        object_label="x",
        modulus=RSA_3072.hex(),
        exponent="010001",
    )
    try:
        join(one, two, so_pin_file=wrong, transcript=tokens.transcript())
    except CeremonyRefused as error:
        refusal = str(error)
    else:
        refusal = ""
    remaining = left_over(one, two)
    loaded = binding.module(str(one.module))
    loaded.functions = counted(loaded.functions)
    officer.carry_out(order)
    return refusal, len(logins), remaining


def die_at(directory: Path, step: str) -> None:
    """Join, and die right after the first step of this name."""
    tokens = Tokens(directory)
    one, two = tokens.config("one"), tokens.config("two")
    initialise(one)

    def told(done: Step) -> None:
        if done.name == step:
            os._exit(9)

    join(one, two, so_pin_file=tokens.so_pin("one"), transcript=tokens.transcript(told))


def join_again(directory: Path) -> tuple[Any, int, int]:
    """(report, transport keys found before, left over after)."""
    tokens = Tokens(directory)
    one, two = tokens.config("one"), tokens.config("two")
    before = left_over(one, two)
    report = join(one, two, so_pin_file=tokens.so_pin("one"), transcript=tokens.transcript())
    return report, before, left_over(one, two)


def refused_joins(directory: Path) -> dict[str, str]:
    """Why some joins cannot be."""
    tokens = Tokens(directory)
    one, two, foreign, empty = (tokens.config(name) for name in ("one", "two", "foreign", "empty"))
    sealed = dataclasses.replace(one, installation=uuid.UUID(int=12))
    initialise(one)
    initialise(foreign)
    initialise(sealed, sealed=True)
    cases = {
        "sealed": (sealed, dataclasses.replace(two, installation=sealed.installation)),
        "foreign": (one, foreign),
        "same": (one, one),
        "region": (one, dataclasses.replace(two, region="eu-fr-1")),
        "empty": (empty, one),
        "no officer": (one, two),
    }
    answers = {}
    for name, (source, target) in cases.items():
        try:
            join(source, target, so_pin_file=None, transcript=tokens.transcript())
        except CeremonyRefused as error:
            answers[name] = str(error)
    answers["left"] = str(left_over(one, two, foreign))
    return answers


def root_flags(directory: Path, name: str) -> dict[str, Any]:
    """The root KEK's flags as read back."""
    station = Station.at(Tokens(directory).config(name))
    found = station.find(ROOT)
    return {} if found is None else dict(station.attributes(found))
