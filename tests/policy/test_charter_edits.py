"""Every small wrong edit of the shipped charter is caught: refused at load by a case, or refuted by a proof.

An edit that changes no decision of any request there can be (shown by `difference`) is not wrong and does not count.
CI tries a part of them, spread over the charter; `make charter-edits` tries all.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from policy import Policy
from policy.bundle import SHIPPED, BundleRefused, read
from policy.proofs import difference, prove

CHARTER: Final = "charter/00-charter.cedar"
EVERY: Final = int(os.environ.get("CHARTER_EDITS_EVERY", "10"))  # 1: all of them
SETS: Final = ("residency", "execution", "reach", "egress", "failover")
PLACES: Final = ("via", "caller", "dest", "target", "waivedReach", "waivedEgress")

# What somebody may type instead: (a pattern, what it becomes).
SLIPS: Final = (
    (r"&&", "||"),
    (r"\|\|", "&&"),
    (r"!(?=\(|context)", ""),
    (r"\bunless\b", "when"),
    (r"\bwhen\b", "unless"),
    (r"containsAll", "containsAny"),
    (r"==", "!="),
    (r"<=", "<"),
    (r"(?<=\d) *(?<![<>])>(?!=) *", ">="),
    (r" > ", " >= "),
    (r" > ", " < "),
    (r" >= ", " > "),
    (r" < ", " <= "),
    (r" < ", " > "),
    (r"\bprincipal\.tenant", "resource.tenant"),
    (r"context\.hsm", 'Place::"eu-de-1"'),
    (r"!context\.failover", "context.failover"),
    (r"context\.attest\.tcbOk", "true"),
    (r"resource is Key", "resource is Tenant"),
    (r"resource is Tenant", "resource is Key"),
)


def edits(text: str) -> Iterator[tuple[str, str]]:
    """(what was done, the edited charter) for each place where a slip fits."""

    def put(found: re.Match[str], new: str) -> tuple[str, str]:
        line = text.count("\n", 0, found.start()) + 1
        return f"line {line}: {found.group()!r} becomes {new!r}", text[: found.start()] + new + text[found.end() :]

    for rule in re.finditer(r"^@id\(.*?;\n", text, re.MULTILINE | re.DOTALL):
        yield put(rule, "")
    for pattern, new in SLIPS:
        for found in re.finditer(pattern, text):
            yield put(found, new)
    for found in re.finditer(r"(?<=[<>=] )\d+", text):
        yield put(found, str(int(found.group()) + 1))
        yield put(found, str(int(found.group()) - 1))
    for names, head in ((SETS, r"resource\."), (PLACES, r"context\.")):
        for name, other in itertools.permutations(names, 2):
            for found in re.finditer(rf"(?<={head}){name}\b", text):
                yield put(found, other)
    for listed in re.finditer(r"\[(?P<inside>[^\]]*)\]", text):
        for item in re.finditer(r'(?:Action::)?"[\w-]+",? ?', listed["inside"]):
            at = listed.start("inside")
            whole = text[: at + item.start()] + text[at + item.end() :]
            if not re.search(r"\[\s*\]|, *\]", whole):
                line = text.count("\n", 0, at) + 1
                yield f"line {line}: {item.group()!r} is missing", whole


def caught(directory: Path, text: str) -> str:
    """What notices this charter: nothing is the empty string."""
    made = directory / "bundle"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(SHIPPED, made)
    (made / CHARTER).write_text(text)
    try:
        policy = Policy.load(made)
    except BundleRefused as refused:
        return f"refused: {refused}"
    refuted = [p.promise.name for p in prove(policy.bundle) if not p.holds]
    if refuted:
        return f"refuted: {refuted[0]}"
    return "" if difference(read(SHIPPED), policy.bundle) else "same"


def test_a_small_wrong_edit_of_the_charter_is_caught_by_a_case_or_a_proof(tmp_path: Path) -> None:
    tried = [e for n, e in enumerate(sorted(set(edits((SHIPPED / CHARTER).read_text())))) if n % EVERY == 0]
    found = {what: caught(tmp_path, text) for what, text in tried}
    wrong = {what: how for what, how in found.items() if how != "same"}
    missed = [what for what, how in wrong.items() if not how]
    print(f"{len(tried)} edits, {len(wrong)} of them wrong, {len(missed)} missed")
    assert len(wrong) > 100 / EVERY
    assert not missed, "\n".join(missed)
