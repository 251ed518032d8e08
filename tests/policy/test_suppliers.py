"""Suppliers and bars: what a charter may say of them, what is refused where, and when a label is good for something."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from policy import BundleRefused, Policy
from policy.bundle import SHIPPED
from policy.suppliers import FOREVER, LabelEntry, SupplierEntry, judge

EVIDENCE = 'evidence: "x"'


@pytest.fixture
def charter(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED, tmp_path / "bundle")
    return tmp_path / "bundle" / "charter.yaml"


def us(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000


SOV2 = '"SOV-2": {level: 3, evidence: "cert.example/seal/2026-0117", valid_until: "2029-06-30"}'
WRONG = {
    "a label nobody knows": (SOV2, '"SOV-9": {level: 3, evidence: "x", valid_until: "2029-06-30"}', "no such label"),
    "a negative level": ("level: 2", "level: -2", "greater than or equal to 0"),
    "a level above the highest": ("level: 2", "level: 3", "C5 goes up to 2"),
    "a level that is text": ("level: 2", 'level: "2"', "valid integer"),
    "a level that is yes": ("level: 2", "level: yes", "quote"),
    "no evidence": ('evidence: "auditor.example/c5/2026-044", ', "", "Field required"),
    "empty evidence": ('"auditor.example/c5/2026-044"', '""', "at least 1"),
    "an unquoted date": ('"2027-09-30"', "2027-09-30", "quote dates"),
    "a date that is none": ('"2027-09-30"', '"2027-09-31"', "day"),
    "an unquoted date that is none": ('"2027-09-30"', "2027-09-31", "no such value"),
    "a date without dashes": ('"2027-09-30"', '"20270930"', "YYYY-MM-DD"),
    "a moment": ('"2027-09-30"', '"2027-09-30T00:00:00"', "YYYY-MM-DD"),
    "no date": (', valid_until: "2027-09-30"', "", "Field required"),
    "something else": ('valid_until: "2027-09-30"', 'valid_until: "2027-09-30", colour: "red"', "colour"),
    "an unquoted jurisdiction": ('    jurisdiction: "FR"', "    jurisdiction: NO", "quote"),
    "a jurisdiction in lower case": ('    jurisdiction: "FR"', '    jurisdiction: "fr"', "pattern"),
    "an unquoted name": ("  hsm-fr:", "  NO:", "quote"),
    "a name in capitals": ("  hsm-fr:", "  HSM-FR:", "lower-case"),
    "a label twice": ('"SOV-3": {level', '"SOV-2": {level', "stands there twice"),
    "a supplier twice": ("  hsm-fr:", "  hsm-de:", "stands there twice"),
    "a bar with a label nobody knows": ('labels: {"SOV-2": 3', 'labels: {"SOV-0": 3', "no such label"),
    "a bar nobody could meet": ('labels: {"SOV-2": 3', 'labels: {"SOV-2": 5', "SOV-2 goes up to 4"),
    "a bar that demands nothing": ('labels: {"SOV-2": 3', 'labels: {"SOV-2": 0', "greater than or equal to 1"),
    "a negative bar": ('labels: {"SOV-2": 3', 'labels: {"SOV-2": -1', "greater than or equal to 1"),
    "a bar that is a list": ('labels: {"SOV-2": 3, "SOV-3": 3}', 'labels: ["SOV-2"]', "dictionary"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_registry_is_refused_with_file_line_and_reason(charter: Path, name: str) -> None:
    old, new, reason = WRONG[name]
    text = charter.read_text()
    assert text.count(old) >= 1
    at = text.index(old)
    charter.write_text(text[:at] + new + text[at + len(old) :])
    with pytest.raises(BundleRefused) as caught:
        Policy.load(charter.parent)
    assert caught.value.file == "charter.yaml"
    assert caught.value.line == text.count("\n", 0, at) + 1, str(caught.value)
    assert reason in caught.value.reason


def test_the_line_is_found_in_a_charter_of_quotes(charter: Path) -> None:
    text = charter.read_text().replace("suppliers:  ", '"suppliers":').replace("  hsm-fr:", '  "hsm-fr":')
    charter.write_text(text.replace('"SecNumCloud": {level: 1', '"SecNumCloud": {"level": 2'))
    with pytest.raises(BundleRefused, match="SecNumCloud goes up to 1") as caught:
        Policy.load(charter.parent)
    assert caught.value.line == text[: text.index('"SecNumCloud"')].count("\n") + 1


def test_a_bundle_from_before_suppliers_loads_and_demands_none(charter: Path) -> None:
    text = charter.read_text()
    before, after = text[: text.index("suppliers:")], text[text.index("# Data crosses") :]
    old = (before + after).replace(', labels: {"SOV-2": 3, "SOV-3": 3}', "")
    charter.write_text(old)
    registry = Policy.load(charter.parent).registry
    assert [dict(registry.bar(tier)) for tier in (1, 2, 3)] == [{}, {}, {}]
    assert judge(registry.bar(1), registry.suppliers, {None}, 0).gaps == ()


def test_the_shipped_charter_holds_tier_1_to_its_bar() -> None:
    registry = Policy.load(SHIPPED).registry
    now = us("2026-11-26")
    assert dict(registry.bar(1)) == {"SOV-2": 3, "SOV-3": 3}
    assert judge(registry.bar(1), registry.suppliers, {"hsm-de"}, now).gaps == ()
    told = [gap.what for gap in judge(registry.bar(1), registry.suppliers, {"hsm-fr"}, now).gaps]
    assert told == ["hsm-fr has SOV-2 at level 3", "hsm-fr has SOV-3 at level 3"]


LABELLED = {
    "good": SupplierEntry(
        jurisdiction="DE", labels={"SOV-2": LabelEntry(level=3, evidence="e", valid_until="2027-01-31")}
    ),
    "low": SupplierEntry(
        jurisdiction="DE", labels={"SOV-2": LabelEntry(level=2, evidence="e", valid_until="2028-01-31")}
    ),
}


def test_a_label_is_good_to_the_end_of_its_last_day_and_the_verdict_knows_until_when() -> None:
    ends = us("2027-02-01")
    before = judge({"SOV-2": 3}, LABELLED, {"good"}, ends - 1)
    assert (before.gaps, before.since, before.until) == ((), -FOREVER, ends)
    after = judge({"SOV-2": 3}, LABELLED, {"good"}, ends)
    assert (after.since, after.until) == (ends, FOREVER)
    (gap,) = after.gaps
    assert (gap.supplier, gap.label, gap.level, gap.wanted, gap.since) == ("good", "SOV-2", 3, 3, ends)
    assert (gap.evidence, gap.valid_until) == ("e", "2027-01-31")


@pytest.mark.parametrize(
    ("used", "missing"),
    [
        ({"good"}, []),
        ({"low"}, ["low has SOV-2 at level 3 (has 2)"]),
        ({"good", "low"}, ["low has SOV-2 at level 3 (has 2)"]),  # the weakest of a group counts
        ({"good", None}, ["every HSM of the key's region names its supplier"]),
        ({"unheard-of"}, ["supplier unheard-of is in the charter"]),
        (set(), ["an HSM of the key's region serves on this node"]),
    ],
)
def test_what_is_unknown_is_not_met(used: set[str | None], missing: list[str]) -> None:
    assert [gap.what for gap in judge({"SOV-2": 3}, LABELLED, used, us("2026-11-26")).gaps] == missing
    assert judge({}, LABELLED, used, us("2026-11-26")).gaps == ()
