"""Log lines: one JSON object each, on standard error. docs/logs.md has every event and field.

Control characters cannot forge a second line, because each line is one JSON object (CVE-2020-7694).
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any


class JsonLines(logging.Formatter):
    """One JSON object a line; a record's `facts` are its fields. Exceptions show type and place, never their text."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = where(record.exc_info[1])
        return json.dumps(line, default=str)


def where(error: BaseException) -> list[str]:
    """Type and code lines of an exception and its causes: its text may hold a caller's data (L-03), its place cannot."""
    found: list[str] = []
    current: BaseException | None = error
    while current is not None and len(found) < 40:
        found.append(type(current).__qualname__)
        found += [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(current.__traceback__)[-8:]]
        current = current.__cause__ or current.__context__
    return found


def configure_logging(level: str) -> None:
    """Send every logger of this process to standard error as JSON lines, UTC."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonLines()
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.root.handlers = [handler]
    logging.root.setLevel(level.upper())
    # Third parties may log what they handle; what they have to say below a warning is not worth that.
    for noisy in ("uvicorn", "httpx", "httpcore", "sqlalchemy", "asyncio", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
