"""The auditor's report of a period: what an export proves, what happened, and the command that gives each number again.

Made offline from an export and a trust file, with no trust in the operator. Only records that verify are counted: in a
damaged chain those before the first bad one. The same export gives the same report, byte for byte. Pure, but for
reading the export.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import html
import json
import shlex
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from audit.chain import Bad
from audit.checkpoint import BadNote, Checkpoint
from audit.commitments import open_note
from audit.segments import exported_segment
from audit.verify import Finding, Trust, batches, load_receipts, verify_export

GAP_S: Final = 10.0  # how long a record may stand without a checkpoint before that is worth a line
# What shows that records are missing; every other code says that one of those that are there is not right.
COMPLETENESS: Final = frozenset(
    {"E_TRUNC", "E_MISSING", "E_RECEIPT", "E_FORK", "E_ANCHOR", "E_WITNESS", "U_NOANCHOR", "U_PRUNED"}
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the evidence lies: an export and what the auditor trusts, as files for the commands and as values."""

    directory: Path
    trust_file: Path
    trust: Trust
    receipts: Path | None = None  # `Audit-Receipt` values, one a line
    policy: Path | None = None  # tlog-policy that `trust` was read with


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records are meant: those with all of these. Times are of the entry (us), both ends included."""

    tenant: str | None = None
    since: int | None = None
    until: int | None = None
    chain: str | None = None
    kind: str | None = None
    op: str | None = None
    out: str | None = None
    region: str | None = None
    why: str | None = None
    rule: str | None = None

    def matches(self, log: str, t: int, record: Mapping[str, Any]) -> bool:
        """Whether a record is one of them."""
        if self.chain not in {None, log}:
            return False
        if (self.since is not None and t < self.since) or (self.until is not None and t > self.until):
            return False
        if self.rule is not None and self.rule not in record.get("rule", ()):
            return False
        facts = {"tenant": self.tenant, "kind": self.kind, "op": self.op, "out": self.out}
        facts |= {"region": self.region, "why": self.why}
        return all(record.get(name) == value for name, value in facts.items() if value is not None)

    def options(self) -> list[str]:
        """The same as options of `skms audit count`."""
        given = {"tenant": self.tenant, "from": moment(self.since), "to": moment(self.until), "chain": self.chain}
        given |= {"kind": self.kind, "op": self.op, "out": self.out, "region": self.region}
        given |= {"why": self.why, "rule": self.rule}
        return [f"--{name}={value}" for name, value in given.items() if value is not None]


@dataclass(frozen=True, slots=True)
class Number:
    """A number of the report: what it is of, and the command that prints it again."""

    of: str
    value: int
    command: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint of the export whose signature is one of the log's: when its notary began to read, and who saw it."""

    checkpoint: Checkpoint
    at: int
    witnesses: int
    quorum: bool


@dataclass(frozen=True, slots=True)
class Gap:
    """From when to when (us) a record stood without what should have covered it; `open` if nothing ever did."""

    since: int
    until: int
    open: bool

    @property
    def seconds(self) -> float:
        """How long."""
        return (self.until - self.since) / 1e6


@dataclass(slots=True)
class AuditReport:
    """All of it, as values; `as_json` and `as_html` write it down."""

    source: Source
    wanted: Wanted
    integrity: str = ""  # intact, tampered, cannot tell
    completeness: str = ""  # shown, violated, not shown
    findings: list[Finding] = field(default_factory=list)
    total: Number = Number("", 0, "")
    counts: dict[str, list[Number]] = field(default_factory=dict)
    chains: list[Number] = field(default_factory=list)
    roots: dict[str, str] = field(default_factory=dict)  # of the installation's report only
    newest: Stored | None = None
    checkpoints: Number | None = None
    gaps: list[Gap] = field(default_factory=list)
    witness_gaps: list[Gap] | None = None  # None: the auditor asks for no witness
    gaps_command: str = ""


# ---- reading an export -----------------------------------------------------------------------------------------------


class Evidence:
    """A verified export: what its verifier says, and the records it vouches for. Unusable if the receipts are none."""

    def __init__(self, source: Source) -> None:
        self.source = source
        receipts = None if source.receipts is None else load_receipts(source.receipts)
        self.report, _ = verify_export(source.directory, source.trust, receipts=receipts)
        self.checkpoints, bad = _checkpoints(source)
        self.findings = list(dict.fromkeys([*self.report.findings, *bad]))

    def records(self, wanted: Wanted) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """(chain, time, record) of every verified record that is wanted, chain by chain and in order."""
        for log in sorted(self.report.logs):
            good = self._good(log)
            for n, entry in self._entries(log):
                if n >= good:
                    break
                parsed = json.loads(entry)
                if wanted.matches(log, parsed["c"]["t"], parsed["r"]):
                    yield log, parsed["c"]["t"], parsed["r"]

    def count(self, wanted: Wanted) -> int:
        """How many there are."""
        return sum(1 for _ in self.records(wanted))

    def gaps(self, wanted: Wanted, *, witnessed: bool = False) -> list[Gap]:
        """When a wanted record stood for more than `GAP_S` without a checkpoint, or without one that a quorum saw."""
        covering = [c.at for c in self.checkpoints if c.quorum or not witnessed]
        return gaps([t for _, t, _ in self.records(wanted)], covering)

    def _good(self, log: str) -> int:
        """How many records of a chain stand before the first bad one: a bad seal or column condemns its whole group."""
        wrong = [f for f in self.report.findings if f.code.startswith("E_") and f.code not in COMPLETENESS]
        if any(f.code == "E_ROOT" and f.where.startswith(f"{log}/") for f in wrong):
            return 0  # its writers' keys sealed another history than the one that was committed
        named = [f.where.removeprefix(f"{log}/") for f in wrong]
        return min([self.report.logs[log], *(int(n) for n in named if n.isdecimal())])

    def _entries(self, log: str) -> Iterator[tuple[int, bytes]]:
        try:
            directory = self.source.directory / log
            for batch in batches(directory, log, exported_segment(directory, log)):
                yield from enumerate(batch.unpacked(), batch.first)
        except Bad:
            return  # the verifier has named it; what it vouches for stands before


def gaps(times: Sequence[int], covered_at: Sequence[int]) -> list[Gap]:
    """Gaps longer than `GAP_S`. What a checkpoint began to read at a time covers the records up to then."""
    ats = sorted(covered_at)
    oldest: dict[int, int] = {}
    for t in times:
        at = bisect_left(ats, t)
        oldest[at] = min(t, oldest.get(at, t))
    newest = max(times, default=0)
    found = []
    for at, since in sorted(oldest.items()):
        last = at == len(ats)
        until = newest if last else ats[at]
        if until - since > GAP_S * 1e6:
            found.append(Gap(since, until, last))
    return found


def _checkpoints(source: Source) -> tuple[list[Stored], list[Finding]]:
    """The signed checkpoints of an export, and what is wrong with the others; no checkpoint in an export without a root log."""
    path = source.directory / source.trust.origin / "checkpoints.jsonl"
    found: list[Stored] = []
    bad: list[Finding] = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return found, bad
    trust = source.trust
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            opened = open_note(row["note"].encode(), trust.origin, trust.note_keys(), trust.policy)
            if type(row["at"]) is not int:
                raise BadNote("its time is no number")
            quorum = trust.policy.satisfied(opened.signers)
            found.append(Stored(opened.checkpoint, row["at"], len(opened.witnesses), quorum))
        except BadNote as error:
            bad.append(Finding("E_SIG", f"{source.trust.origin}/checkpoint {number}", str(error)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            bad.append(Finding("E_PARSE", f"{source.trust.origin}/checkpoint {number}", "not a stored checkpoint"))
    return found, bad


# ---- the report ------------------------------------------------------------------------------------------------------


def make(evidence: Evidence, wanted: Wanted) -> AuditReport:
    """The report of a period, of one tenant or of the installation."""
    source = evidence.source
    made = AuditReport(source, wanted)
    made.integrity, made.completeness = _verdicts(evidence)
    # To a tenant only where: a reason may repeat what stands in another tenant's record.
    made.findings = [f if wanted.tenant is None else Finding(f.code, f.where, "") for f in evidence.findings]
    tallies: dict[str, Counter[str]] = {name: Counter() for name in _TALLIES}
    chains: Counter[str] = Counter()
    for log, _, record in evidence.records(wanted):
        chains[log] += 1
        for name, values in _values(record).items():
            tallies[name].update(values)

    def number(of: str, value: int, **more: str) -> Number:
        return Number(of, value, count_command(source, _with(wanted, more)))

    made.total = number("records", sum(chains.values()))
    for name, tally in _TALLIES.items():
        denied = {"out": "denied"} if name.startswith("denials") else {}
        made.counts[name] = [number(v, n, **denied, **{tally.option: v}) for v, n in _ranked(tallies[name])]
    made.chains = [number(log, n, chain=log) for log, n in sorted(chains.items())]
    if wanted.tenant is None:
        made.roots = dict(sorted(evidence.report.roots.items()))
    _add_checkpoints(made, evidence)
    return made


@dataclass(frozen=True, slots=True)
class _Tally:
    """A table of counts: the option of `skms audit count` that picks one of its rows, its caption and first column."""

    option: str
    said: tuple[str, str]


_TALLIES: Final = {
    "operations": _Tally("op", ("Records by operation", "operation")),
    "outcomes": _Tally("out", ("Records by outcome", "outcome")),
    "regions": _Tally("region", ("Records by the region that executed them", "region")),
    "denials by rule": _Tally("rule", ("Denied records by each rule they name", "rule")),
    "denials by reason": _Tally("why", ("Denied records by reason", "reason")),
    "kinds": _Tally("kind", ("Records by kind", "kind")),
}


def _values(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a record counts for in each table."""
    denied = record.get("out") == "denied"
    plain = ("operations", "outcomes", "regions", "kinds")
    found = {name: [str(record[f])] for name in plain if (f := _TALLIES[name].option) in record}
    if denied:
        found["denials by rule"] = list(dict.fromkeys(record.get("rule", ())))
        found["denials by reason"] = [str(record["why"])] if "why" in record else []
    return found


def _ranked(tally: Counter[str]) -> list[tuple[str, int]]:
    return sorted(tally.items(), key=lambda pair: (-pair[1], pair[0]))


def _with(wanted: Wanted, more: Mapping[str, str]) -> Wanted:
    facts = {name: getattr(wanted, name) for name in Wanted.__slots__}
    return Wanted(**(facts | dict(more)))


def _verdicts(evidence: Evidence) -> tuple[str, str]:
    codes = {f.code for f in evidence.findings}
    wrong = {c for c in codes if c.startswith("E_")}
    integrity = "tampered" if wrong - COMPLETENESS else "intact"
    if integrity == "intact" and any(c.startswith("U_") for c in codes - COMPLETENESS):
        integrity = "cannot tell"
    unproven = {"U_NOANCHOR", "U_PRUNED", "E_WITNESS"}  # what the auditor asked for as proof is not there
    if wrong & COMPLETENESS - unproven:
        return integrity, "violated"
    return integrity, "shown" if integrity == "intact" and not codes & unproven else "not shown"


def _add_checkpoints(made: AuditReport, evidence: Evidence) -> None:
    source, wanted = evidence.source, made.wanted
    policy = [] if source.policy is None else [f"--policy={source.policy}"]
    made.gaps_command = _command("gaps", source, [*policy, *wanted.options()])
    made.gaps = evidence.gaps(wanted)
    if source.trust.policy.quorum is not None:
        made.witness_gaps = evidence.gaps(wanted, witnessed=True)
    if evidence.checkpoints:
        made.newest = evidence.checkpoints[-1]
        path = source.directory / source.trust.origin / "checkpoints.jsonl"
        if len(evidence.checkpoints) == len(path.read_bytes().splitlines()):
            made.checkpoints = Number("checkpoints", len(evidence.checkpoints), shlex.join(["wc", "-l", str(path)]))


def count_command(source: Source, wanted: Wanted) -> str:
    """The command that prints how many records are wanted."""
    return _command("count", source, wanted.options())


def _command(name: str, source: Source, options: Sequence[str]) -> str:
    where = [f"--export={source.directory}", f"--trust={source.trust_file}"]
    return shlex.join(["skms", "audit", name, *where, *options])


def moment(us: int | None) -> str | None:
    """RFC 3339 with microseconds: nothing of the period may get lost in a command."""
    if us is None:
        return None
    return (dt.datetime.fromtimestamp(0, dt.UTC) + dt.timedelta(microseconds=us)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ---- writing it down -------------------------------------------------------------------------------------------------


def as_json(report: AuditReport) -> str:
    """For machines."""
    newest = report.newest
    shown = {
        "origin": report.source.trust.origin,
        "tenant": report.wanted.tenant,
        "from": moment(report.wanted.since),
        "to": moment(report.wanted.until),
        "verdict": {"integrity": report.integrity, "completeness": report.completeness, "command": _verify(report)},
        "findings": [{"code": f.code, "where": f.where} | ({"why": f.why} if f.why else {}) for f in report.findings],
        "total": _plain(report.total),
        "counts": {name: [_plain(n) for n in numbers] for name, numbers in report.counts.items()},
        "chains": [_plain(n) for n in report.chains],
        "roots": report.roots,
        "checkpoints": None if report.checkpoints is None else _plain(report.checkpoints),
        "newest_checkpoint": None
        if newest is None
        else {
            "size": newest.checkpoint.size,
            "root": newest.checkpoint.root.hex(),
            "at": moment(newest.at),
            "witnesses": newest.witnesses,
        },
        "gaps": {
            "command": report.gaps_command,
            "longer_than_s": GAP_S,
            "checkpoint": [_gap(g) for g in report.gaps],
            "witness": None if report.witness_gaps is None else [_gap(g) for g in report.witness_gaps],
        },
    }
    return json.dumps(shown, indent=2) + "\n"


def _plain(number: Number) -> dict[str, object]:
    return {"of": number.of, "count": number.value, "command": number.command}


def _gap(gap: Gap) -> dict[str, object]:
    return {"from": moment(gap.since), "to": moment(gap.until), "seconds": round(gap.seconds, 3), "open": gap.open}


def _verify(report: AuditReport) -> str:
    source = report.source
    receipts = [] if source.receipts is None else ["--receipts", str(source.receipts)]
    policy = [] if source.policy is None else ["--policy", str(source.policy)]
    return shlex.join(["skms-verify", str(source.directory), "--trust", str(source.trust_file), *policy, *receipts])


_STYLE: Final = """
:root{color-scheme:light dark;--ink:#16202a;--soft:#51606e;--line:#c9d2da;--page:#fff;
--good:#0b6b3a;--bad:#a81c1c;--open:#8a5a00}
@media (prefers-color-scheme:dark){:root{--ink:#e7edf2;--soft:#a9b6c2;--line:#3a4651;--page:#11171c;
--good:#5fd39a;--bad:#ff8f8f;--open:#f0c060}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:72rem;margin:0 auto;padding:1.5rem}
h1{font-size:1.6rem;margin:0 0 .5rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.verdict{border:2px solid;border-radius:.4rem;padding:.6rem 1rem;margin:.6rem 0}.verdict strong{font-size:1.15rem}
.good{color:var(--good)}.bad{color:var(--bad)}.open{color:var(--open)}.verdict span{color:var(--ink);display:block}
table{border-collapse:collapse;width:100%;table-layout:fixed}caption{text-align:left;color:var(--soft);padding-bottom:.25rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .6rem .3rem 0;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
th.n,td.n{text-align:right;font-variant-numeric:tabular-nums;width:8rem;padding-right:1.2rem}
code{font:.8rem/1.4 ui-monospace,monospace;overflow-wrap:anywhere}code span{display:inline-block;max-width:100%}
th.c{width:50%}
@media print{:root{--ink:#000;--soft:#333;--line:#999;--page:#fff;--good:#000;--bad:#000;--open:#000}
body{max-width:none;padding:0;font-size:10pt}code{font-size:7pt}tr,.verdict{break-inside:avoid}thead{display:table-header-group}}
"""

_MEANING: Final = {
    "intact": ("good", "No record that this report counts was changed."),
    "tampered": ("bad", "Something was changed. The findings name the first bad record of each chain."),
    "cannot tell": ("open", "The verifier could not judge every record."),
    "shown": ("good", "No record is missing up to the newest anchor: a checkpoint, a receipt or an earlier state."),
    "violated": ("bad", "Records are missing, or there is a second history."),
    "not shown": ("open", "Nothing in hand that you trust tells whether the end of the log was cut."),
}


def as_html(report: AuditReport) -> str:
    """One self-contained page, also well-formed XML: no script, nothing loaded from anywhere, every value escaped."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"Audit report of {report.wanted.tenant or report.source.trust.origin}"
    parts = [
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}"/>',
        '<meta name="viewport" content="width=device-width,initial-scale=1"/>',
        '<meta name="referrer" content="no-referrer"/>',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1>",
        _facts(report),
        "<h2>Verdict</h2>",
        _verdict("Integrity", report.integrity),
        _verdict("Completeness", report.completeness),
        f"<p>{_code(_verify(report))}</p>",
        _findings(report),
        _numbers("Records", "Records in the period that verify", "what", [report.total]),
        *(_numbers(name.capitalize(), *_TALLIES[name].said, found) for name, found in report.counts.items()),
        _numbers("Chains", "Records in the period, chain by chain", "chain", report.chains),
        _checkpoint_part(report),
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _facts(report: AuditReport) -> str:
    facts = {
        "Log": report.source.trust.origin,
        "Tenant": report.wanted.tenant or "all",
        "From": moment(report.wanted.since) or "the beginning",
        "To": moment(report.wanted.until) or "the end",
        "Export": str(report.source.directory),
        "Trust": str(report.source.trust_file),
    }
    rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{rows}</dl>"


def _verdict(name: str, verdict: str) -> str:
    kind, meaning = _MEANING[verdict]
    mark = {"good": "✓", "bad": "✗", "open": "?"}[kind]
    return (
        f'<div class="verdict {kind}"><strong>{mark} {html.escape(name)}: {html.escape(verdict)}</strong>'
        f"<span>{html.escape(meaning)}</span></div>"
    )


def _findings(report: AuditReport) -> str:
    rows = [[html.escape(f.code), html.escape(f.where), html.escape(f.why)] for f in report.findings]
    return _table("Findings", "What the verifier found", ["code", "where", "why"], rows) if rows else ""


def _numbers(heading: str, caption: str, column: str, numbers: Sequence[Number]) -> str:
    rows = [[html.escape(n.of), str(n.value), _code(n.command)] for n in numbers]
    return _table(heading, caption, [column, "count", "command"], rows)


def _checkpoint_part(report: AuditReport) -> str:
    origin = report.source.directory / report.source.trust.origin
    newest = report.newest
    found = [] if report.checkpoints is None else [report.checkpoints]
    if newest is not None:
        size = shlex.join(["sed", "-n", "2p", str(origin / "checkpoint")])
        found.append(Number("size of the newest", newest.checkpoint.size, size))
    text = _numbers("Checkpoints", "Signed by the log's key", "what", found)
    if newest is not None:
        root, at = newest.checkpoint.root.hex(), moment(newest.at)
        text += f"<p>The newest is of {at}, root {_code(root)}, seen by {newest.witnesses} trusted witnesses.</p>"
    if report.roots:
        rows = [[html.escape(log), _code(root)] for log, root in report.roots.items()]
        text += _table("Roots", "RFC 6962 root of each whole chain", ["chain", "root"], rows)
    text += _gap_part("Gaps in checkpoints", "a checkpoint", report.gaps)
    if report.witness_gaps is None:
        text += "<h2>Gaps in witnesses</h2><p>Not judged: neither trust file nor policy asks for a witness.</p>"
    else:
        text += _gap_part("Gaps in witnesses", "a checkpoint that a quorum saw", report.witness_gaps)
    return text + f"<p>{_code(report.gaps_command)}</p>"


def _gap_part(heading: str, lacked: str, found: Sequence[Gap]) -> str:
    rows = [
        [str(moment(g.since)), str(moment(g.until)), f"{g.seconds:.1f}", "never covered" if g.open else "covered then"]
        for g in found
    ]
    caption = f"{len(found)} times a record stood longer than {GAP_S:.0f} s without {lacked}"
    return _table(heading, caption, ["from", "to", "seconds", "end"], rows)


def _table(heading: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are markup already. The first cell of a row is its header."""
    kinds = {"count": ' class="n"', "seconds": ' class="n"', "command": ' class="c"'}
    if not rows:
        return f"<h2>{html.escape(heading)}</h2><p>None.</p>"
    head = "".join(f'<th scope="col"{kinds.get(c, "")}>{html.escape(c)}</th>' for c in columns)
    body = ""
    for first, *rest in rows:
        cells = "".join(
            f"<td{kinds.get(c, '') if c != 'command' else ''}>{cell}</td>"
            for c, cell in zip(columns[1:], rest, strict=True)
        )
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>\n'
    return (
        f"<h2>{html.escape(heading)}</h2><table><caption>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    )


def _code(text: str) -> str:
    """Words that a line break does not tear: a command is read and typed."""
    words = " ".join(f"<span>{html.escape(word)}</span>" for word in text.split(" "))
    return f"<code>{words}</code>"
