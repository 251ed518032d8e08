"""`skms-verify tenant` and `skms-verify check-proof`: one file that somebody took away, one verdict, no network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from audit.chain import Bad
from audit.evidence import Proven, check_growth, check_record_proof
from audit.tenantbundle import Verdict, check_bundle
from audit.verify import INTACT, USAGE, Report, Unusable, load_receipts, load_trust, parse_receipt

_EPOCH: Final = datetime.fromtimestamp(0, UTC)


def moment(microseconds: int) -> str:
    """RFC 3339 in UTC."""
    return datetime.fromtimestamp(microseconds // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def instant(text: str) -> int:
    """Microseconds of an RFC 3339 time; ValueError for another spelling."""
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError("a time without zone")
    return (at - _EPOCH) // timedelta(microseconds=1)  # not by `timestamp`: a float has no room for microseconds


def bundle_as_json(verdict: Verdict) -> str:
    """The report for machines, with what it speaks of: whose records, of which period (us), under which checkpoint."""
    shown = json.loads(verdict.report.as_json())
    if verdict.header is not None and verdict.checkpoint is not None:
        checkpoint = verdict.checkpoint
        shown |= {
            "tenant": verdict.header.tenant,
            "period": {"from": verdict.header.since, "to": verdict.until},
            "checkpoint": {"origin": checkpoint.origin, "size": checkpoint.size, "root": checkpoint.root.hex()},
            "in_period": verdict.in_period,
        }
    return json.dumps(shown, indent=2, sort_keys=True)


def shown_bundle(verdict: Verdict) -> str:
    """What a tenant reads: what is wrong, or what is complete and until when."""
    report, header, checkpoint = verdict.report, verdict.header, verdict.checkpoint
    if report.findings or header is None or checkpoint is None:
        return "\n".join(map(str, report.findings))
    since = moment(header.since) if header.since else "the first record"
    covered = f"{moment(verdict.until)}, checkpoint {checkpoint.size} of {checkpoint.origin}"
    lines = [f"complete {header.tenant}: {verdict.in_period} records from {since} to {covered}"]
    lines += [f"complete {log}: {count} of them read" for log, count in report.logs.items()]
    return "\n".join(lines)


def shown_proof(proven: Proven) -> str:
    """What an auditor reads of a record's proof."""
    return (
        f"proven {proven.frame.log}/{proven.frame.n} of {moment(proven.frame.t)}: leaf {proven.leaf.hex()}, "
        f"checkpoint {proven.checkpoint.size} of {proven.checkpoint.origin}\n{proven.frame.body.decode()}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skms-verify", description="Exit: 0 proven, 1 not, 3 usage.")
    commands = parser.add_subparsers(dest="command", required=True)
    tenant = commands.add_parser("tenant", help="a tenant's bundle: are its records whole, and all of them here?")
    tenant.add_argument("file", type=Path, metavar="FILE", help="of `skms audit tenant-bundle`")
    tenant.add_argument("--receipts", type=Path, help="Audit-Receipt values, one a line")
    tenant.add_argument("--tenant", help="whose bundle it must be")
    tenant.add_argument(
        "--from", dest="since", type=instant, metavar="TIME", help="it must reach back to here: RFC 3339"
    )
    tenant.add_argument("--to", dest="until", type=instant, metavar="TIME", help="and be complete until here: RFC 3339")
    proof = commands.add_parser("check-proof", help="a .tlog-proof of a record, or that a checkpoint extends yours")
    proof.add_argument("file", type=Path, metavar="FILE", help="of `skms audit proof` or `skms audit consistency`")
    proof.add_argument("--receipt", help="the Audit-Receipt of the record that you ask about")
    proof.add_argument("--checkpoint", type=Path, help="your older checkpoint, for a consistency proof")
    for command in (tenant, proof):
        command.add_argument("--trust", type=Path, required=True, help="origin and audit keys: from the ceremony")
        command.add_argument("--json", action="store_true", help="verdict as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        return INTACT if stop.code in {0, None} else USAGE
    try:
        return _tenant(arguments) if arguments.command == "tenant" else _proof(arguments)
    except Unusable as error:
        print(f"skms-verify: {error}", file=sys.stderr)
    except OSError as error:
        print(f"skms-verify: {error.filename}: {error.strerror}", file=sys.stderr)
    return USAGE


def _tenant(arguments: argparse.Namespace) -> int:
    trust = load_trust(arguments.trust)
    receipts = None if arguments.receipts is None else load_receipts(arguments.receipts)
    with arguments.file.open("rb") as lines:
        verdict = check_bundle(
            lines, trust, tenant=arguments.tenant, since=arguments.since, until=arguments.until, receipts=receipts
        )
    print(bundle_as_json(verdict) if arguments.json else shown_bundle(verdict))
    return verdict.report.exit_status


def _proof(arguments: argparse.Namespace) -> int:
    trust, data = load_trust(arguments.trust), arguments.file.read_bytes()
    report = Report(anchored=True)
    text = ""
    try:
        if arguments.checkpoint is not None:
            before, after = check_growth(data, arguments.checkpoint.read_bytes(), trust)
            text = f"checkpoint {after.size} of {after.origin} extends checkpoint {before.size}"
        else:
            asked = None if arguments.receipt is None else parse_receipt(arguments.receipt)
            text, report.records = shown_proof(check_record_proof(data, trust, asked=asked)), 1
    except Bad as bad:
        report.add(bad.code, bad.where, bad.why)
        text = str(bad)
    print(report.as_json() if arguments.json else text)
    return report.exit_status if report.findings else INTACT
