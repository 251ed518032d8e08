"""`skms serve`: one worker, or several under a supervisor."""

from __future__ import annotations

import argparse
import gc
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ALTERED: Final = 8  # verification failed, as everywhere on the command line


def serve(argv: Sequence[str]) -> int:
    """Serve until told to stop. Exit status 0, 1 for a failure, 2 for wrong usage or configuration, 8 for altered files."""
    parser = argparse.ArgumentParser(prog="skms serve", description="Serve the API.")
    parser.add_argument("--config", type=Path, required=True, help="configuration file (TOML)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes")
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--among", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--metrics", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seat", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # plaintexts and keys of messages are in memory: workers inherit it
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection is one, and 1,024 is a usual soft limit
    from service.integrity import Altered, check

    try:
        check()
    except Altered as altered:
        print(f"skms serve: {altered}", file=sys.stderr)
        return ALTERED
    from service.config import ConfigInvalid, load

    try:
        config = load(arguments.config)
    except ConfigInvalid as error:
        print(f"skms serve: {error}", file=sys.stderr)
        return 2
    if arguments.workers > 1:
        from service.supervisor import supervise

        return supervise(arguments.config, config, workers=arguments.workers)
    gc.disable()  # imports make much and drop little: a tenth of the time to be ready
    if arguments.seat is not None:
        from service.seats import sit

        sit(arguments.metrics, arguments.seat)
    from audit.anchors import AnchorUnusable
    from audit.chain import Bad
    from audit.log import Unavailable
    from keystore import HsmUnavailable, SelfTestFailed
    from policy import BundleRefused
    from service.database import DatabaseUnusable
    from service.serve import run
    from service.tlsfiles import TlsFilesRefused
    from service.tracing import TracingUnavailable

    try:
        return run(config, fd=arguments.fd, ready_fd=arguments.ready_fd, workers=arguments.among)
    except ConfigInvalid as error:
        print(f"skms serve: {error}", file=sys.stderr)
        return 2
    except (
        HsmUnavailable,
        SelfTestFailed,
        BundleRefused,
        DatabaseUnusable,
        Bad,
        AnchorUnusable,
        Unavailable,
        TlsFilesRefused,
        TracingUnavailable,
    ) as error:
        print(f"skms serve: {error}", file=sys.stderr)
        return 1
