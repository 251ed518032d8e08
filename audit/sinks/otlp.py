"""OTLP logs over HTTP, in its JSON encoding (OTLP 1.x: numbers of 64 bits are strings, field names lowerCamelCase)."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any, Final

from audit.forward import Group, Item, Refused, Target, Undelivered
from audit.sinks.posting import Poster

# SeverityNumber of the log data model, by what became of the operation.
_SEVERITY: Final = {"ok": (9, "INFO"), "failed": (10, "INFO2"), "denied": (13, "WARN"), "error": (17, "ERROR")}
_ATTRIBUTES: Final = ("kind", "op", "out", "why", "tenant", "actor", "src", "key", "region", "id", "req")


class Otlp:
    """A 200 without rejected records means that the receiver has the group.

    The protocol says that a partly rejected request must not be repeated, and does not say which records were rejected.
    Here nothing may get lost: the group is refused, and its records come again in smaller requests until the one is
    found. `skms.log` and `skms.seq` tell a receiver what it has already.
    """

    def __init__(self, target: Target) -> None:
        self._poster = Poster(target)
        self._version = importlib.metadata.version("sovereign-kms")

    def deliver(self, group: Group) -> None:
        """See `Sink`."""
        body = json.dumps(request(group, self._version), separators=(",", ":")).encode()
        rejected = rejected_records(self._poster.post(body, {"content-type": "application/json"}))
        if rejected:
            raise Refused(f"partial success: {rejected} of {len(group.items)} records rejected")

    def close(self) -> None:
        """See `Sink`."""
        self._poster.close()


def request(group: Group, version: str) -> dict[str, Any]:
    """ExportLogsServiceRequest: one resource, one scope, one log record a record."""
    resource = {"attributes": [_attribute("service.name", "skms"), _attribute("service.version", version)]}
    scope = {"name": "skms.audit", "version": version}
    records = [_log_record(group.log, item) for item in group.items]
    return {"resourceLogs": [{"resource": resource, "scopeLogs": [{"scope": scope, "logRecords": records}]}]}


def _log_record(log: str, item: Item) -> dict[str, Any]:
    number, text = _SEVERITY.get(str(item.record.get("out")), _SEVERITY["ok"])
    said = [_attribute(f"skms.{f}", str(item.record[f])) for f in _ATTRIBUTES if f in item.record]
    made: dict[str, Any] = {
        "timeUnixNano": str(item.t * 1_000),
        "observedTimeUnixNano": str(item.t * 1_000),
        "severityNumber": number,
        "severityText": text,
        "body": {"stringValue": item.entry.decode()},
        "attributes": [
            _attribute("skms.log", log),
            {"key": "skms.seq", "value": {"intValue": str(item.n)}},
            _attribute("skms.leaf", item.leaf.hex()),
            *said,
        ],
    }
    if "trace" in item.record and int(item.record["trace"], 16):  # all zeros is no trace id
        made["traceId"] = item.record["trace"]
    return made


def _attribute(key: str, value: str) -> dict[str, Any]:
    return {"key": key, "value": {"stringValue": value}}


def rejected_records(answer: bytes) -> int:
    """How many records an ExportLogsServiceResponse says were rejected; Undelivered if it is not one."""
    if not answer.strip():
        return 0  # every field left out, as its default
    try:
        partial = json.loads(answer).get("partialSuccess") or {}
        return int(partial.get("rejectedLogRecords", 0))  # int64: a string, or a number from lenient encoders
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise Undelivered("200, but the answer is not an ExportLogsServiceResponse in JSON") from None
