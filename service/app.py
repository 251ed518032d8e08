"""The application: one ASGI application per protocol, mounted under FastAPI. No decision is taken here."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send


class Application(FastAPI):
    """FastAPI whose root front gets its requests first hand.

    The framework's middleware (error pages, body limit, exit stack, telemetry) took 20 us of each request, for nothing: a
    front answers every request and every error itself.
    """

    front: ASGIApp | None = None  # for what no prefix is mounted
    prefixes: tuple[str, ...] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or an event that is not one."""
        if self.front is None or scope["type"] != "http" or scope["path"].startswith(self.prefixes):
            await super().__call__(scope, receive, send)
        else:
            await self.front(scope, receive, send)


def create_app(fronts: Mapping[str, ASGIApp]) -> Application:
    """Mount every front at its prefix; interactive documentation, redirects and error pages of the framework are off."""
    app = Application(title="Sovereign KMS", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.routes.clear()
    app.front = fronts.get("")  # no mount: a mount's path ends at the first newline
    app.prefixes = tuple(prefix for prefix in fronts if prefix)
    for prefix in sorted(app.prefixes, key=len, reverse=True):
        app.router.routes.append(Mount(prefix, app=fronts[prefix]))
    return app
