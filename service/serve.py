"""Run one worker: wire a node, serve it over TLS, drain it when told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from typing import Final

import uvicorn
import uvloop

from service.config import Config
from service.loglines import configure_logging
from service.server import protocol_of, server_of
from service.wiring import wire

log: Final = logging.getLogger("skms.serve")
FENCED: Final = 71  # EX_OSERR of sysexits.h: start again


async def _tell(server: uvicorn.Server, ready_fd: int) -> None:
    """Tell the supervisor that this worker serves, and from then on each second that its event loop turns.

    Without one the worker leaves: whoever starts the node again needs its port, and nobody would replace it.
    """
    while not server.started:  # noqa: ASYNC110 - uvicorn has a flag, not an event
        await asyncio.sleep(0.02)
    os.set_blocking(ready_fd, False)
    while True:
        try:
            os.write(ready_fd, b"1")
        except BlockingIOError:
            pass  # it is slow to hear
        except OSError:
            if not server.should_exit:  # else it lets this worker go
                log.warning("the supervisor has ended: this worker leaves")
            server.should_exit = True
            return
        await asyncio.sleep(1)


async def _leave_when_fenced(server: uvicorn.Server, fenced: asyncio.Event) -> None:
    """End a worker whose chain another writer owns: it can record nothing more, and the supervisor starts another."""
    await fenced.wait()
    server.should_exit = True


def _stop_on_signals(server: uvicorn.Server) -> None:
    """Take signals before uvicorn does, and after.

    Once it has drained it raises the signal again, for the handler that was there before. The default would end the process
    then and there: without `stop` and `close` in the log, and with its leases held.
    """

    def stop(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


async def _run(config: Config, sockets: list[socket.socket] | None, ready_fd: int | None, workers: int) -> int:
    async with wire(config, workers=workers) as node:
        listen = config.listen
        protocol = protocol_of(config.limits.connections)
        server = server_of(node.app, host=listen.host, port=listen.port, context=node.tls.context, protocol=protocol)
        # What lives now lives until the end: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.enable()  # off since the imports began (service.cli.serving)
        if node.kms.policy.development:
            log.warning("development charter in force: K6 and K7 are lowered; never use this node for real keys")
        log.info("serving", extra={"facts": {"node": node.kms.node, "region": node.kms.region, "port": listen.port}})
        telling = None if ready_fd is None else asyncio.create_task(_tell(server, ready_fd))
        leaving = asyncio.create_task(_leave_when_fenced(server, node.kms.log.fenced))
        _stop_on_signals(server)
        await server.serve(sockets)
        leaving.cancel()
        if telling is not None:
            telling.cancel()
        return FENCED if node.kms.log.fenced.is_set() else 0


def run(config: Config, *, fd: int | None = None, ready_fd: int | None = None, workers: int = 1) -> int:
    """Serve until SIGTERM or SIGINT. Exit status 0, or FENCED if another writer took this worker's audit chain.

    Inherited from the supervisor: `fd`, a listening socket, and `ready_fd`, a pipe that hears when this worker serves.
    It is one of `workers`.
    """
    configure_logging(config.log.level)
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(config, sockets, ready_fd, workers))
