"""The REST client of the command line: connection options, one table of exit statuses, errors as people read them."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx

OK, INTERNAL, USAGE, DENIED, NOT_FOUND, CONFLICT, WAITING, TEMPORARY, FAILED_CHECK = range(9)

# Exit statuses by problem code; codes that are not here go by their HTTP status.
EXIT: Final[Mapping[str, int]] = {
    "unauthenticated": DENIED,
    "policy_denied": DENIED,
    "region_not_allowed": DENIED,
    "region_conflict": DENIED,
    "transfer_not_authorised": DENIED,
    "reason_required": DENIED,
    "attestation_failed": DENIED,
    "version_fenced": DENIED,
    "approval_required": WAITING,
    "approval_refused": DENIED,
    "authenticator_cloned": DENIED,
    "not_found": NOT_FOUND,
    "key_destroyed": NOT_FOUND,
    "key_state_invalid": CONFLICT,
    "hsm_state_invalid": CONFLICT,
    "alias_in_use": CONFLICT,
    "bundle_lost": CONFLICT,
    "facts_lost": CONFLICT,
    "tier_not_met": CONFLICT,
    "policy_would_lock_out": CONFLICT,
    "policy_stale": CONFLICT,
    "policy_by_quorum": CONFLICT,
    "idempotency_in_progress": TEMPORARY,
    "etag_mismatch": CONFLICT,
    "if_match_required": USAGE,
    "deletion_is_scheduled": CONFLICT,
    "frozen": DENIED,
    "invalid_ciphertext": FAILED_CHECK,
    "incorrect_key": FAILED_CHECK,
    "rate_limited": TEMPORARY,
    "quota_exceeded": TEMPORARY,
    "internal": INTERNAL,
    "hsm_error": INTERNAL,
    "hsm_timeout": TEMPORARY,
    "hsm_unavailable": TEMPORARY,
    "audit_unavailable": TEMPORARY,
    "checkpoint_pending": TEMPORARY,
    "record_archived": CONFLICT,
    "audit_damaged": FAILED_CHECK,
    "freeze_unconfirmed": TEMPORARY,
    "database_unavailable": TEMPORARY,
    "draining": TEMPORARY,
}
WHAT_TO_DO: Final[Mapping[str, str]] = {
    "unauthenticated": "give a client certificate (--cert, --key) or a token file (--token-file) of this installation",
    "region_not_allowed": "the rule names the place that is wrong; `skms key show` lists the places of the key",
    "transfer_not_authorised": "no agreement in force lets this data cross the border: `skms policy explain` on the decision id "
    "tells the tenant's security officer which one is missing",
    "policy_denied": "ask the tenant's security officer; the decision id names this decision in the audit log",
    "not_found": "check the name and the tenant of your credential; another tenant's keys look the same as none",
    "key_state_invalid": "`skms key show` tells the state; `skms key enable` puts a disabled key back into use",
    "etag_mismatch": "somebody changed the key meanwhile: look at it, then try again",
    "invalid_ciphertext": "check that ciphertext and context are complete and unchanged",
    "audit_unavailable": "the audit log cannot be written; nothing was done; look at the node's disk and database",
    "audit_damaged": "run `skms audit verify` on the node: it names the first bad record",
    "record_archived": "export with `skms audit export` and verify with `skms-verify EXPORT --archive DIR`",
    "checkpoint_pending": "the notary signs each second: try again",
    "hsm_unavailable": "look at `skms hsm status`",
    "algorithm_not_supported_by_hsm": "`skms hsm status` lists what each HSM can hold",
    "frozen": "a security officer stopped this; `skms freeze show` tells more to the officers and auditors of the tenant",
    "database_unavailable": "the node cannot ask its database: look whether it answers, and try again",
    "freeze_unconfirmed": "the node cannot read its freezes: look at its database, and at the alarms in its log",
    "policy_would_lock_out": "leave each power to somebody: a role in members.yaml, and a rule that permits it",
    "policy_stale": "look at `skms policy show`, bring the draft up to date with a higher version, and plan it anew",
    "policy_by_quorum": "`skms policy apply DIR` asks the approvers; `skms policy rollback` asks them for the one before",
    "approval_refused": "the request is as it was: `skms approval show` tells who counts, [[approvals.approver]] who may approve",
    "authenticator_cloned": "find out where the approver's authenticator is; `skms approval sign` makes a newer assertion",
    "approval_closed": "`skms approval show` tells its state: if it is not executed, ask anew",
    "tier_not_met": "meet each missing condition, or choose another tier; `skms compliance` lists keys below theirs",
}


class Failed(Exception):
    """A command failed: exit status and what to tell."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the service, and as whom."""

    url: str
    ca: Path | None
    cert: Path | None
    key: Path | None
    token_file: Path | None

    @classmethod
    def of_dev(cls, directory: Path, name: str) -> Connection:
        """An identity of a development node."""
        try:
            found = json.loads((directory / "env.json").read_text())
        except (OSError, ValueError):
            raise Failed(
                USAGE, f"{directory}: no development node was made here; run `skms dev up --dir {directory}`"
            ) from None
        for who in found["identities"]:
            if who["name"] == name:
                files = Path(who["cert_file"]), Path(who["key_file"])
                return cls(found["base_url"], Path(found["ca_file"]), *files, None)
        names = ", ".join(w["name"] for w in found["identities"])
        raise Failed(USAGE, f"the development node has no identity {name!r}; it has {names}")


class Client:
    """One connection to the service."""

    def __init__(self, to: Connection, *, dry_run: bool = False) -> None:
        import ssl

        if not to.url:
            raise Failed(USAGE, "no service named: give --url (SKMS_URL), or --dev-dir and --identity")
        try:
            trust = ssl.create_default_context(cafile=None if to.ca is None else str(to.ca))
            if to.cert is not None:
                trust.load_cert_chain(to.cert, to.key)
            headers = {}
            if to.token_file is not None:
                headers["Authorization"] = "Bearer " + to.token_file.read_text().strip()
        except (OSError, ssl.SSLError) as error:
            raise Failed(USAGE, f"certificate, key or token file: {error}") from None
        self._dry_run = dry_run
        self._http = httpx.Client(base_url=to.url, verify=trust, headers=headers, timeout=60, trust_env=False)

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        idempotent: bool = False,
    ) -> httpx.Response:
        """The answer; Failed with the exit status of its problem."""
        sent = dict(headers or {})
        if idempotent:
            sent["Idempotency-Key"] = str(uuid.uuid4())
        params = dict(query or {})
        if self._dry_run and method != "GET":
            params["dry_run"] = "true"
        try:
            answer = self._http.request(method, path, json=body, params=params or None, headers=sent)
        except httpx.TransportError as error:
            raise Failed(
                TEMPORARY, f"{self._http.base_url}: cannot be reached ({type(error).__name__}: {error})"
            ) from None
        if answer.status_code >= 400:
            raise explained(answer)
        return answer

    def get(self, path: str, **options: Any) -> Any:
        """The JSON of a GET."""
        return self.call("GET", path, **options).json()

    def text(self, path: str, **options: Any) -> bytes:
        """The bytes of a GET."""
        return self.call("GET", path, **options).content

    def download(self, path: str, to: BinaryIO, *, query: Mapping[str, str]) -> None:
        """Write the answer of a GET to a file while it arrives; Failed if it ends early."""
        try:
            with self._http.stream("GET", path, params=dict(query) or None) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    raise explained(answer)
                for piece in answer.iter_bytes():
                    to.write(piece)
        except httpx.TransportError as error:
            raise Failed(TEMPORARY, f"{self._http.base_url}: the answer was cut ({type(error).__name__})") from None

    def post(self, path: str, body: Mapping[str, object] | None = None, **options: Any) -> Any:
        """The JSON of a POST."""
        return self.call("POST", path, body, **options).json()

    def change(self, method: str, path: str, key: str, body: Mapping[str, object] | None = None, **options: Any) -> Any:
        """A change of a key that names the state it was seen in (If-Match)."""
        seen = self.call("GET", f"/v1/keys/{key}")
        headers = {"If-Match": seen.headers["etag"]}
        return self.call(method, path, body, headers=headers, **options).json()


def explained(answer: httpx.Response) -> Failed:
    """What an error answer means, what decided it, and what to do."""
    try:
        problem = answer.json()
        code = str(problem["code"])
    except (ValueError, KeyError, TypeError):
        return Failed(INTERNAL, f"the service answered {answer.status_code} without a problem body")
    lines = [f"{problem.get('title', code)} ({code})"]
    for field, text in (
        ("rule", "decided by rule"),
        ("state", "state of the key"),
        ("detail", "because"),
        ("freeze_id", "freeze"),
        ("since", "since"),
        ("missing", "missing"),
        ("names", "locked out"),
        ("file", "file"),
        ("line", "line"),
    ):
        if field in problem:
            value = problem[field]
            lines.append(f"  {text}: {', '.join(value) if isinstance(value, list) else value}")
    lines += [
        f"  {wrong.get('pointer') or 'body'}: {wrong.get('detail', wrong.get('code'))}"
        for wrong in problem.get("errors", [])
    ]
    lines += [f"  {field}: {problem[field]}" for field in ("decision_id", "request_id") if field in problem]
    if code in WHAT_TO_DO:
        lines.append(f"  what to do: {WHAT_TO_DO[code]}")
    by_status = {400: USAGE, 404: NOT_FOUND, 409: CONFLICT, 413: USAGE, 415: USAGE, 422: USAGE}
    status = EXIT.get(code, by_status.get(answer.status_code, INTERNAL))
    return Failed(status, "\n".join(lines))


def read_input(source: str) -> bytes:
    """The bytes of a file, or of standard input for `-`. Secrets come this way, never as an argument."""
    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise Failed(USAGE, f"{source}: {error.strerror}") from None


def open_output(target: str) -> BinaryIO:
    """A new file of mode 0600 to write to piece by piece."""
    try:
        return os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
    except OSError as error:
        raise Failed(USAGE, f"{target}: {error.strerror}") from None


def write_output(target: str, data: bytes) -> None:
    """Bytes to a new file of mode 0600, or to standard output for `-`."""
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        with open_output(target) as file:
            file.write(data)
    except OSError as error:
        raise Failed(USAGE, f"{target}: {error.strerror}") from None
