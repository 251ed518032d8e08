"""A worker that forwards until it is killed: python forwarding_node.py DATABASE_URL TARGET_URL CA OWNER."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from audit.forward import Forwarder, Target
from audit.sinks import KINDS
from service.database import open_engine
from service.jobs import Forwarding
from service.rows import Lease

url, target, ca, owner = sys.argv[1:]


def now() -> int:
    return time.time_ns() // 1_000


engine = open_engine(url)
sink = KINDS["https-json"](Target(target, ca=Path(ca), timeout_s=2))
forwarder = Forwarder("siem", sink, engine, clock=now, skipped=lambda _: None)
# A dead worker's lease is taken after its time; this one's clock is far ahead, so that the test need not wait for it.
ahead = int(owner) * 60_000_000
Forwarding(forwarder, Lease(engine, clock=lambda: now() + ahead), owner=owner).start()
print("forwarding", flush=True)
time.sleep(120)
