"""Receivers of the log: how each protocol carries a record. `KINDS` is all there are; only configuration chooses one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from audit.forward import Sink, Target
from audit.sinks.https_json import HttpsJson
from audit.sinks.otlp import Otlp
from audit.sinks.syslog import Syslog

KINDS: Final[dict[str, Callable[[Target], Sink]]] = {"https-json": HttpsJson, "syslog": Syslog, "otlp": Otlp}
