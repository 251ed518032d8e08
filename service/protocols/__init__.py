"""The protocols the service speaks: each an ASGI application over the same `Kms`, with no decision of its own."""
