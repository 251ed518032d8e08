"""The application: one ASGI application per protocol, mounted under FastAPI. No decision is taken here."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI
from starlette.routing import Mount
from starlette.types import ASGIApp


def create_app(fronts: Mapping[str, ASGIApp]) -> FastAPI:
    """Mount every front at its prefix; interactive documentation, redirects and error pages of the framework are off."""
    app = FastAPI(title="Sovereign KMS", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.routes.clear()
    for prefix, front in sorted(fronts.items(), key=lambda item: -len(item[0])):
        if prefix:
            app.router.routes.append(Mount(prefix, app=front))
        else:  # the native front answers for every other path. No mount: a mount's path ends at the first newline
            app.router.default = front
    return app
