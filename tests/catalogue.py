"""docs/metrics.md, read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness import ROOT

PAGE = (ROOT / "docs" / "metrics.md").read_text()


@dataclass(frozen=True)
class Row:
    """What the page says of a metric."""

    kind: str
    labels: tuple[str, ...]
    workers: str
    meaning: str


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _rows() -> list[list[str]]:
    return [_cells(line) for line in PAGE.splitlines() if line.startswith("| `skms_")]


def documented() -> dict[str, Row]:
    """Each metric of the page's tables."""
    rows = _rows()
    found = {row[0].strip("`"): Row(row[1], tuple(re.findall(r"\w+", row[2])), row[3], row[4]) for row in rows}
    assert len(found) == len(rows), "a metric has two rows"
    return found


def alerts_of_page() -> dict[str, set[str]]:
    """The alerts that the page names for each metric."""
    return {row[0].strip("`"): set(re.findall(r"\w+", row[5])) for row in _rows()}


def labels_of_page() -> dict[str, set[str]]:
    """Each label and the values that the page lists for it."""
    rows = [_cells(line) for line in PAGE.splitlines() if re.match(r"\| `[a-z]+` \|", line)]
    return {row[0].strip("`"): set(re.findall(r"`([^`]+)`", row[1])) for row in rows}


def buckets_of_page() -> dict[str, tuple[float, ...]]:
    """The buckets of each histogram."""
    rows = re.findall(r"^- `(skms_\w+)`: ([\d., ]+)$", PAGE, re.MULTILINE)
    return {name: tuple(float(bucket) for bucket in text.split(",")) for name, text in rows}


def shown_later() -> set[str]:
    """The metrics that a fresh node need not show."""
    return set(re.findall(r"`(skms_\w+)`", PAGE.partition("## Shown later")[2].partition("\n## ")[0]))
