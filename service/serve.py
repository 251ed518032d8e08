"""Run one worker: wire a node, serve it over TLS, drain it when told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from typing import Final

from service.config import Config
from service.requests import configure_logging
from service.server import serve
from service.wiring import wire

log: Final = logging.getLogger("skms.serve")


async def _run(config: Config, sockets: list[socket.socket] | None) -> None:
    async with wire(config) as node:
        # What lives now lives until the end: the collector need not look at it again (performance.md 5).
        gc.collect()
        gc.freeze()
        if node.kms.policy.development:
            log.warning("development charter in force: K6 and K7 are lowered; never use this node for real keys")
        log.info("serving", extra={"facts": {"node": node.kms.node, "region": node.kms.region}})
        await serve(node.app, config=config, sockets=sockets)
        node.kms.draining = True


def run(config: Config, *, fd: int | None = None) -> int:
    """Serve until SIGTERM or SIGINT; `fd` is a listening socket inherited from the supervisor. Exit status 0."""
    configure_logging(config.log.level)
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    asyncio.run(_run(config, sockets))
    return 0
