"""`skms`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; `serve` takes a short way, because a worker starts in under three seconds."""
    if len(sys.argv) > 1 and sys.argv[1] == "serve":
        from service.cli.serving import serve

        sys.exit(serve(sys.argv[2:]))
    from service.cli.commands import run

    run()


if __name__ == "__main__":
    main()
