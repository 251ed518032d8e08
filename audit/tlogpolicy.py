"""Which witnesses must have seen a checkpoint: C2SP tlog-policy files. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from audit.checkpoint import COSIGNATURE, NoteKey, parse_vkey


class BadPolicy(ValueError):
    """Not a policy of this format; the message names the line."""


@dataclass(frozen=True, slots=True)
class Group:
    """Satisfied when `threshold` of its members are: names of witnesses or of other groups."""

    threshold: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WitnessPolicy:
    """Witnesses by name, groups over them, and the name whose satisfaction is the quorum; None asks for nobody."""

    witnesses: Mapping[str, NoteKey] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    quorum: str | None = None
    urls: Mapping[str, str] = field(default_factory=dict)
    logs: tuple[NoteKey, ...] = ()
    cosigners: tuple[NoteKey, ...] = ()  # of a trust file, ML-DSA-44: all of them beside the quorum

    @property
    def known(self) -> tuple[NoteKey, ...]:
        """Every key whose cosignature is checked."""
        return (*self.witnesses.values(), *self.cosigners)

    @property
    def asks(self) -> bool:
        """Whether a checkpoint without any cosignature is not enough."""
        return self.quorum is not None or bool(self.cosigners)

    def missing(self, signed: Collection[NoteKey]) -> str:
        """What the keys that cosigned lack of the cosigners and the quorum; empty if nothing."""
        for key in self.cosigners:
            if key not in signed:
                return f"the cosignature of {key.name} (ML-DSA-44)"
        return "" if self.quorum is None or self._has(self.quorum, signed) else "its quorum of witnesses"

    def satisfied(self, signed: Collection[NoteKey]) -> bool:
        """Whether the keys that cosigned make up the quorum, and every cosigner is among them."""
        return not self.missing(signed)

    def _has(self, name: str, signed: Collection[NoteKey]) -> bool:
        if name in self.witnesses:
            return self.witnesses[name] in signed
        group = self.groups[name]
        return sum(self._has(member, signed) for member in group.members) >= group.threshold


def any_of(witnesses: Mapping[str, NoteKey], threshold: int) -> WitnessPolicy:
    """So many of these witnesses; BadPolicy if there are not as many."""
    if not 1 <= threshold <= len(witnesses):
        raise BadPolicy(f"a quorum of {threshold} among {len(witnesses)} witnesses")
    return WitnessPolicy(witnesses, {"quorum": Group(threshold, tuple(witnesses))}, "quorum")


def parse_policy(text: str) -> WitnessPolicy:
    """Read a policy file; BadPolicy names the line. Names are defined before their use, so groups form no circle."""
    made = _Policy()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            made.line([] if line.lstrip().startswith("#") else line.split())
        except ValueError as error:
            raise BadPolicy(f"line {number}: {error}") from None
    if not made.decided:
        raise BadPolicy("no line `quorum`")
    return WitnessPolicy(made.witnesses, made.groups, made.quorum, made.urls, tuple(made.logs))


class _Policy:
    """A policy while it is read."""

    def __init__(self) -> None:
        self.witnesses: dict[str, NoteKey] = {}
        self.groups: dict[str, Group] = {}
        self.urls: dict[str, str] = {}
        self.logs: list[NoteKey] = []
        self.quorum: str | None = None
        self.decided = False
        self._used: set[str] = set()

    def line(self, words: list[str]) -> None:
        match words:
            case []:
                return
            case ["log", vkey, *urls] if len(urls) < 2:
                self.logs.append(parse_vkey(vkey))
            case ["witness", name, vkey, *urls] if len(urls) < 2:
                self._witness(name, parse_vkey(vkey), urls)
            case ["group", name, threshold, *members] if members:
                self._group(name, threshold, members)
            case ["quorum", name] if not self.decided:
                if name != "none":
                    self._known([name])
                    self.quorum = name
                self.decided = True
            case _:
                raise ValueError("expected `log`, `witness`, `group` or one `quorum`")

    def _new(self, name: str) -> None:
        if name == "none" or name in self.witnesses or name in self.groups:
            raise ValueError(f"the name {name} is taken")

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.witnesses and name not in self.groups:
                raise ValueError(f"{name} is not defined above")

    def _witness(self, name: str, key: NoteKey, urls: list[str]) -> None:
        self._new(name)
        if key.type != COSIGNATURE:
            raise ValueError("a witness signs with a cosignature key (type 04)")
        if key in self.witnesses.values():  # one witness under two names would count twice
            raise ValueError("this key is another witness's")
        self.witnesses[name] = key
        self.urls |= dict.fromkeys([name], urls[0]) if urls else {}

    def _group(self, name: str, threshold: str, members: list[str]) -> None:
        self._new(name)
        self._known(members)
        if len(set(members)) != len(members) or self._used & set(members):
            raise ValueError("a member stands in one group, once")
        count = {"any": 1, "all": len(members)}.get(threshold)
        if count is None:
            if not threshold.isascii() or not threshold.isdigit() or not 1 <= int(threshold[:4]) <= len(members):
                raise ValueError(f"a threshold is any, all or 1 to {len(members)}")
            count = int(threshold)
        self._used |= set(members)
        self.groups[name] = Group(count, tuple(members))
