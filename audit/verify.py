"""`skms-verify`: check an exported log offline, with no trust in the operator.

Imports nothing but the chain, the record format and `cryptography`: no database, no web library. Exit status: 0 intact,
1 tampered (E_ codes), 2 cannot tell (U_ codes), 3 usage. Integrity and completeness are two verdicts: without a receipt
or a state from an earlier run nobody can tell whether the end of the log was cut.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from audit.chain import BUNDLE, Bad, Batch, Chain, Verifier, chain_of, pack, snapshot_of, unpack
from audit.event import VERSION, encode_plain

INTACT, TAMPERED, CANNOT_TELL, USAGE = 0, 1, 2, 3
_RECEIPT: Final = re.compile(r'log="([a-z0-9._/-]{1,128})", seq=(0|[1-9][0-9]{0,15}), leaf=:([A-Za-z0-9+/]{43}=):')
_SEAL_FIELDS: Final = {"day", "epoch", "first", "head", "n", "seal", "t"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a verifier has to say: code, where, why."""

    code: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.code} {self.where}: {self.why}"


@dataclass(slots=True)
class Report:
    """What was checked and what was found. The first bad record of each chain ends that chain's check."""

    findings: list[Finding] = field(default_factory=list)
    records: int = 0
    logs: dict[str, int] = field(default_factory=dict)  # chain -> records
    roots: dict[str, str] = field(default_factory=dict)  # chain -> RFC 6962 root
    anchored: bool = False

    def add(self, code: str, where: str, why: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(code, where, why))

    @property
    def exit_status(self) -> int:
        """1 if anything is tampered, else 2 if anything cannot be told, else 0."""
        if any(f.code.startswith("E_") for f in self.findings):
            return TAMPERED
        return CANNOT_TELL if any(f.code.startswith("U_") for f in self.findings) else INTACT

    def as_json(self) -> str:
        """The report for machines."""
        verdict = {INTACT: "intact", TAMPERED: "tampered", CANNOT_TELL: "cannot tell"}[self.exit_status]
        shown = {
            "verdict": verdict,
            "records": self.records,
            "logs": {name: {"records": n, "root": self.roots.get(name)} for name, n in self.logs.items()},
            "anchored": self.anchored,
            "findings": [{"code": f.code, "where": f.where, "why": f.why} for f in self.findings],
        }
        return json.dumps(shown, indent=2, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Trust:
    """What the auditor trusts: the log's origin and its audit keys (SubjectPublicKeyInfo)."""

    origin: str
    keys: tuple[bytes, ...]


class Unusable(Exception):
    """A file the verifier was given cannot be used: usage, not tampering."""


def load_trust(path: Path) -> Trust:
    """Read a trust file: a line `origin <name>` and lines `key <base64 SPKI>`; `#` begins a comment."""
    origin, keys = "", []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise Unusable(f"trust file {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        match line.split("#")[0].split():
            case []:
                continue
            case ["origin", name] if not origin:
                origin = name
            case ["key", text]:
                try:
                    keys.append(base64.b64decode(text, validate=True))
                except ValueError:
                    raise Unusable(f"trust file {path}, line {number}: not base64") from None
            case _:
                raise Unusable(f"trust file {path}, line {number}: expected `origin NAME` or `key BASE64`")
    if not origin or not keys:
        raise Unusable(f"trust file {path}: needs one origin and at least one key")
    return Trust(origin, tuple(keys))


# ---- an export on disk -----------------------------------------------------------------------------------------------


def tile_path(number: int, width: int) -> str:
    """C2SP tlog-tiles path of an entry bundle: `x001/x234/067`, `.p/W` if it is not full."""
    digits = f"{number:03d}"
    digits = digits.zfill((len(digits) + 2) // 3 * 3)
    groups = [digits[i : i + 3] for i in range(0, len(digits), 3)]
    path = "/".join(["x" + g for g in groups[:-1]] + [groups[-1]])
    return f"tile/entries/{path}" + ("" if width == BUNDLE else f".p/{width}")


def _entries(directory: Path, count: int, log: str) -> Iterator[bytes]:
    for number in range((count + BUNDLE - 1) // BUNDLE):
        width = min(BUNDLE, count - number * BUNDLE)
        path = directory / tile_path(number, width)
        where = f"{log}/{number * BUNDLE}"
        try:
            found = unpack(path.read_bytes())
        except OSError:
            raise Bad("E_TRUNC", where, f"entry bundle {tile_path(number, width)} is missing") from None
        except ValueError as error:
            raise Bad("E_PARSE", where, str(error)) from None
        if len(found) != width:
            raise Bad("E_TRUNC", where, f"entry bundle holds {len(found)} entries, not {width}")
        yield from found


def _seals(directory: Path, log: str) -> list[Mapping[str, Any]]:
    found = []
    try:
        lines = (directory / "seals.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        raise Bad("E_MISSING", f"{log}/0", "seals.jsonl is missing") from None
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            good = (
                isinstance(row, dict)
                and set(row) == _SEAL_FIELDS
                and all(type(row[k]) is int and 0 <= row[k] < 2**53 for k in ("day", "epoch", "first", "n", "t"))
                and all(re.fullmatch(r"(?:[0-9a-f]{2})+", row[k]) for k in ("head", "seal"))
                and encode_plain(row) + b"\n" == line
            )
        except (ValueError, TypeError, RecursionError):
            good = False
        if not good:
            raise Bad("E_CANON", f"{log}/seal {number}", "a line of seals.jsonl is not one of ours")
        found.append(row)
    return found


def batches(directory: Path, log: str) -> Iterator[Batch]:
    """The commit groups of one exported chain."""
    seals = _seals(directory, log)
    entries = _entries(directory, sum(row["n"] for row in seals), log)
    for row in seals:
        group = [entry for _, entry in zip(range(row["n"]), entries, strict=False)]
        yield Batch(
            log=log,
            first=row["first"],
            n=row["n"],
            epoch=row["epoch"],
            t=row["t"],
            entries=pack(group),
            head=bytes.fromhex(row["head"]),
            seal=bytes.fromhex(row["seal"]),
            day=row["day"],
        )


def exported_logs(directory: Path, origin: str) -> list[str]:
    """Chains of this origin in an export."""
    base = directory / origin
    return sorted(f"{origin}/{p.name}" for p in base.iterdir() if p.is_dir()) if base.is_dir() else []


# ---- checking --------------------------------------------------------------------------------------------------------


def check_chain(
    log: str,
    groups: Iterator[Batch],
    trust: Trust,
    report: Report,
    *,
    level: str = "full",
    wanted: Mapping[int, str] | None = None,
    known: Mapping[str, Any] | None = None,
    after: Callable[[Chain], None] = lambda _: None,
) -> Verifier | None:
    """Check one chain and note the first thing that is wrong with it; the verifier's state if nothing is.

    `after` sees the chain's state after each commit group.
    """
    verifier = Verifier(log, trust.keys[0])
    anchor = None if known is None else int(known["n"])
    verifier.wanted = frozenset(wanted or ()) | ({anchor - 1} if anchor else frozenset())
    try:
        for group in groups:
            verifier.batch(group, full=level == "full")
            after(verifier.chain)
    except Bad as bad:
        report.add(bad.code, bad.where, bad.why)
        report.logs[log] = verifier.chain.n
        report.records += verifier.chain.n
        return None
    report.logs[log] = verifier.chain.n
    report.roots[log] = verifier.chain.frontier.root().hex()
    report.records += verifier.chain.n
    if verifier.unknown:
        report.add("U_VERSION", log, f"{verifier.unknown} records of a later version than {VERSION}")
    if known is not None and anchor is not None:
        report.anchored = True
        if verifier.chain.n < anchor:
            report.add("E_TRUNC", f"{log}/{verifier.chain.n}", f"an earlier run saw {anchor} records")
        elif anchor and verifier.leaves_of.get(anchor - 1) != known["p"]:
            report.add("E_FORK", f"{log}/{anchor - 1}", "an earlier run saw another record here")
    for number, leaf in (wanted or {}).items():
        report.anchored = True
        if number >= verifier.chain.n:
            report.add("E_TRUNC", f"{log}/{verifier.chain.n}", f"a receipt names record {number}")
        elif verifier.leaves_of.get(number) != leaf:
            report.add("E_RECEIPT", f"{log}/{number}", "the record is not the one the receipt was given for")
    return verifier


def load_receipts(path: Path) -> dict[str, dict[int, str]]:
    """Receipts, one `Audit-Receipt` value a line: chain -> number -> leaf (hex)."""
    found: dict[str, dict[int, str]] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise Unusable(f"receipts {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _RECEIPT.fullmatch(line.strip().removeprefix("Audit-Receipt:").strip())
        if match is None:
            raise Unusable(f"receipts {path}, line {number}: not an Audit-Receipt value")
        log, seq, leaf = match.groups()
        found.setdefault(log, {})[int(seq)] = base64.b64decode(leaf).hex()
    return found


def _load_state(path: Path, origin: str) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
        chains = {name: chain_of(s) for name, s in state["logs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Unusable(f"state {path}: not a state of this program") from None
    if state.get("origin") != origin:
        raise Unusable(f"state {path} belongs to {state.get('origin')!r}, not {origin!r}")
    return {name: {"n": c.n, "p": c.previous} for name, c in chains.items()}


def _save_state(path: Path, origin: str, chains: Mapping[str, Chain]) -> None:
    state = {"origin": origin, "logs": {name: snapshot_of(c) for name, c in chains.items()}}
    path.write_text(json.dumps(state, sort_keys=True) + "\n")


def verify_export(
    directory: Path,
    trust: Trust,
    *,
    level: str = "full",
    receipts: Mapping[str, Mapping[int, str]] | None = None,
    state: Mapping[str, Any] | None = None,
) -> tuple[Report, dict[str, Chain]]:
    """Check every chain of an export; the report and the chains' states."""
    report, chains = Report(), {}
    receipts, state = receipts or {}, state or {}
    logs = exported_logs(directory, trust.origin)
    for log in sorted({*state, *receipts} - set(logs)):
        report.add("E_MISSING", log, "a receipt or an earlier run knows this chain; the export lacks it")
    if not logs and not report.findings:
        report.add("E_MISSING", trust.origin, "the export holds no chain of this origin")
    for log in logs:
        verifier = check_chain(
            log,
            batches(directory / log, log),
            trust,
            report,
            level=level,
            wanted=receipts.get(log),
            known=state.get(log),
        )
        if verifier is not None:
            chains[log] = verifier.chain
    if not report.anchored:
        report.add(
            "U_NOANCHOR",
            trust.origin,
            "no receipt and no earlier state: whether the end was cut cannot be told (--accept-unanchored)",
        )
    return report, chains


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skms-verify",
        description="Check an exported audit log offline. Exit: 0 intact, 1 tampered, 2 cannot tell.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="an export of `skms audit export`")
    parser.add_argument(
        "--trust",
        type=Path,
        required=True,
        help="origin and audit key you trust: get it from the ceremony, not the export",
    )
    parser.add_argument("--level", choices=["hash", "link", "full"], default="full")
    parser.add_argument("--receipts", type=Path, help="Audit-Receipt values, one a line")
    parser.add_argument("--since", type=Path, metavar="STATE", help="state saved by an earlier run")
    parser.add_argument("--save", type=Path, metavar="STATE", help="save the state if nothing is wrong")
    parser.add_argument("--accept-unanchored", action="store_true", help="be content with integrity alone")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        return INTACT if stop.code in {0, None} else USAGE
    try:
        if not arguments.directory.is_dir():
            raise Unusable(f"{arguments.directory} is not a directory")
        trust = load_trust(arguments.trust)
        receipts = None if arguments.receipts is None else load_receipts(arguments.receipts)
        state = None if arguments.since is None else _load_state(arguments.since, trust.origin)
    except Unusable as error:
        print(f"skms-verify: {error}", file=sys.stderr)
        return USAGE
    report, chains = verify_export(arguments.directory, trust, level=arguments.level, receipts=receipts, state=state)
    if arguments.accept_unanchored:
        report.findings = [f for f in report.findings if f.code != "U_NOANCHOR"]
    if arguments.json:
        print(report.as_json())
    else:
        for finding in report.findings:
            print(finding)
        if report.exit_status == INTACT:
            for log, count in report.logs.items():
                print(f"intact {log}: {count} records, root {report.roots[log]}")
    if arguments.save is not None and report.exit_status == INTACT:
        _save_state(arguments.save, trust.origin, chains)
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())
