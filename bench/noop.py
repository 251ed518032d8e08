"""An empty FastAPI route behind our TLS server: what users of the framework have before they do anything.

`python -m bench.noop CERTIFICATE KEY AUTHORITIES` serves it and prints the port.
"""

from __future__ import annotations

import asyncio
import socket
import sys

import uvloop
from fastapi import FastAPI
from pydantic import BaseModel

from service.server import server_of, tls_context

app = FastAPI()


class Asked(BaseModel):
    """As encrypt takes it."""

    plaintext: str
    context: dict[str, str]


class Answered(BaseModel):
    """As encrypt answers."""

    ciphertext: str
    key_id: str
    key_version: int
    alg: str


@app.post("/v1/keys/{key}/encrypt")
async def noop(key: str, body: Asked) -> Answered:
    """Nothing."""
    return Answered(ciphertext=body.plaintext, key_id=key, key_version=1, alg="none")


def main() -> None:
    """Serve until killed."""
    certificate, key, authorities = sys.argv[1:]
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    server = server_of(app, host="127.0.0.1", port=0, context=tls_context(certificate, key, authorities))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve([listening]))


if __name__ == "__main__":
    main()
