"""Whether a command line that a file shows is one that `skms` has: its own parser says so, nothing is run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer.main

from service.cli.commands import app
from service.cli.serving import serve

NOWHERE = Path("/nonexistent/skms.toml")


def parses(arguments: Sequence[str]) -> None:
    """Raise what the command line would answer to wrong usage."""
    if arguments[:1] == ["serve"]:
        # `serve` has a parser of its own, which ends the process; with a file that is not there nothing starts.
        given = list(arguments[1:])
        given[given.index("--config") + 1] = str(NOWHERE)
        assert serve(given) == 2
        return
    command: Any = typer.main.get_command(app)
    rest, parent = list(arguments), None
    while True:
        context = command.make_context(command.name or "skms", rest, parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parent = context


def words_of(line: str) -> list[str]:
    """The arguments after `skms` in a line of shell: up to a pipe, a redirection or a comment, `VARIABLE=…` before it."""
    words = shlex.split(line, comments=True)
    start = max(n for n, word in enumerate(words) if word == "skms" or word.endswith("/skms"))  # `runuser -u skms -- …`
    ends = (n for n, word in enumerate(words) if n > start and word in {"|", ">", "&&", "||", ";"})
    return words[start + 1 : next(ends, len(words))]
