"""Run one worker: wire a node, serve it over TLS, drain it when told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from typing import Final

import uvloop

from service.config import Config
from service.requests import configure_logging
from service.server import server_of, tls_context
from service.wiring import wire

log: Final = logging.getLogger("skms.serve")


async def _run(config: Config, sockets: list[socket.socket] | None) -> None:
    async with wire(config) as node:
        listen = config.listen
        context = tls_context(str(listen.certificate), str(listen.private_key), str(listen.client_ca))
        server = server_of(node.app, host=listen.host, port=listen.port, context=context)
        # What lives now lives until the end: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        if node.kms.policy.development:
            log.warning("development charter in force: K6 and K7 are lowered; never use this node for real keys")
        log.info("serving", extra={"facts": {"node": node.kms.node, "region": node.kms.region, "port": listen.port}})
        await server.serve(sockets)


def run(config: Config, *, fd: int | None = None) -> int:
    """Serve until SIGTERM or SIGINT; `fd` is a listening socket inherited from the supervisor. Exit status 0."""
    configure_logging(config.log.level)
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(config, sockets))
    return 0
