"""Suppliers of HSMs: what others certified of them and until when, and what a tier demands of those who hold its keys.

Labels are a closed set. SOV-1 to SOV-8 carry the SEAL level (0 to 4) that was assessed for that objective of the EU Cloud
Sovereignty Framework, C5 the type of the attestation (1 or 2), SecNumCloud 1. A higher level includes the lower ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from types import MappingProxyType
from typing import Annotated, Final, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

HIGHEST: Final[Mapping[str, int]] = MappingProxyType(
    {**{f"SOV-{n}": 4 for n in range(1, 9)}, "C5": 2, "SecNumCloud": 1}
)
FOREVER: Final = 1 << 62  # microseconds: no moment comes after it
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_US: Final = 86_400_000_000


def wrong(reason: str, *at: str) -> PydanticCustomError:
    """A mistake in the charter; `at` is where, below what is being validated."""
    return PydanticCustomError("charter", "{reason}", {"reason": reason.translate(_BRACES), "at": at})


_BRACES: Final = str.maketrans("{}", "()")


def _known(label: str) -> str:
    if label not in HIGHEST:
        raise ValueError(f"no such label: there are {', '.join(HIGHEST)}")
    return label


def _day(text: str) -> str:
    if _DATE.fullmatch(text) is None:
        raise ValueError('a date as "YYYY-MM-DD"')
    date.fromisoformat(text)
    return text


Label = Annotated[StrictStr, AfterValidator(_known)]


class LabelEntry(BaseModel):
    """One label of a supplier: how high, by which evidence, and the last day (UTC) it is good for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: Annotated[StrictInt, Field(ge=0)]
    evidence: Annotated[StrictStr, Field(min_length=1, max_length=512)]
    valid_until: Annotated[StrictStr, AfterValidator(_day)]

    @property
    def ends(self) -> int:
        """The first microsecond at which it is good for nothing."""
        return (datetime.fromisoformat(self.valid_until + "T00:00:00Z") - _EPOCH) // timedelta(microseconds=1) + _DAY_US


class SupplierEntry(BaseModel):
    """Who makes or runs HSMs: whose law reaches it, and what was certified of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    jurisdiction: Annotated[StrictStr, Field(pattern=r"^[A-Z][A-Z0-9-]{0,31}$")]
    labels: dict[Label, LabelEntry] = {}

    @model_validator(mode="after")
    def _levels(self) -> SupplierEntry:
        for label, entry in self.labels.items():
            if entry.level > HIGHEST[label]:
                raise wrong(f"{label} goes up to {HIGHEST[label]}", "labels", label, "level")
        return self


class Bar(BaseModel):
    """The part of a tier that is about suppliers: the least level of each label; none is demanded that is not named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: dict[Label, Annotated[StrictInt, Field(ge=1)]] = {}

    @field_validator("labels")
    @classmethod
    def _reachable(cls, labels: dict[str, int]) -> dict[str, int]:
        for label, level in labels.items():
            if level > HIGHEST[label]:
                raise wrong(f"{label} goes up to {HIGHEST[label]}: nobody could meet this", label)
        return labels


class Gap(NamedTuple):
    """One condition of a tier that a key does not meet."""

    what: str  # the condition, as people read it
    supplier: str | None = None
    label: str | None = None
    level: int | None = None  # that the supplier has
    wanted: int | None = None
    evidence: str | None = None
    valid_until: str | None = None
    since: int | None = None  # microseconds: when the label ended
    charter: bool = True  # whether the charter says so, and not what serves on this node


NO_HSM: Final = Gap("an HSM of the key's region serves on this node", charter=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is missing, and between which moments (microseconds) that is so while bundle and HSMs stay the same."""

    gaps: tuple[Gap, ...]
    since: int = -FOREVER
    until: int = FOREVER


def judge(
    bar: Mapping[str, int], suppliers: Mapping[str, SupplierEntry], used: Iterable[str | None], now: int
) -> Verdict:
    """Whether each of these suppliers has every label of a bar now. Nobody, and one without a name, have none."""
    if not bar:
        return Verdict(())
    names = sorted(set(used), key=lambda n: n or "")
    if not names:
        return Verdict((NO_HSM,))
    gaps: list[Gap] = []
    since, until = -FOREVER, FOREVER
    for name in names:
        about = None if name is None else suppliers.get(name)
        if name is None or about is None:
            named = "every HSM of the key's region names its supplier"
            gaps.append(
                Gap(named, charter=False) if name is None else Gap(f"supplier {name} is in the charter", supplier=name)
            )
            continue
        for label, wanted in bar.items():
            entry = about.labels.get(label)
            if entry is not None and entry.ends <= now:
                since = max(since, entry.ends)
            elif entry is not None:
                until = min(until, entry.ends)
            gap = _gap(name, label, wanted, entry, now)
            if gap is not None:
                gaps.append(gap)
    return Verdict(tuple(gaps), since, until)


def _gap(name: str, label: str, wanted: int, entry: LabelEntry | None, now: int) -> Gap | None:
    what = f"{name} has {label} at level {wanted}"
    if entry is None:
        return Gap(what, name, label, None, wanted)
    told = name, label, entry.level, wanted, entry.evidence, entry.valid_until
    if entry.ends <= now:
        return Gap(f"{what} (ended on {entry.valid_until})", *told, entry.ends)
    return None if entry.level >= wanted else Gap(f"{what} (has {entry.level})", *told)
