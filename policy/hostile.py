"""What is looked at before a parser sees a bundle's file: whoever may write one file must not end the process that reads it.

Parsers in native code follow nesting by recursion and end the process where their stack ends: Cedar's at 300 to 1,000
brackets or 10,000 `else if`, libyaml's binding at some thousand levels. Aliases of YAML multiply: a few hundred bytes can
stand for gigabytes.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import yaml

MAX_POLICY: Final = 65_536  # characters
MAX_BRACKETS: Final = 256  # opened in one policy, inside one another or not
MAX_DOTS: Final = 1_000  # in one policy: `has a.b.c` grows by the square of them
MAX_LEVELS: Final = 32  # of YAML
MAX_NODES: Final = 200_000  # of one YAML file


class Refused(Exception):
    """A file that no parser is to see. `line` is 0 where there is none."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


def read_file(path: Path, *, most: int) -> bytes:
    """The content of a regular file of at most so many bytes; Refused, FileNotFoundError, OSError.

    It is opened once, without following a link and without waiting for the other end of a pipe, and looked at as opened.
    """
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:  # ELOOP for a link, ENXIO for a socket
        raise Refused(0, f"cannot be opened: {error.strerror}") from None
    with os.fdopen(opened, "rb") as file:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise Refused(0, "not a file")
        data = file.read(most + 1)
    if len(data) > most:
        raise Refused(0, f"larger than {most} bytes")
    return data


def bound_policy(text: str) -> None:
    """Refused if the text of one Cedar policy holds more than people write.

    Counted without regard to strings and comments: what a count leaves out, somebody hides in it.
    """
    if len(text) > MAX_POLICY:
        raise Refused(0, f"a policy of more than {MAX_POLICY:,} characters")
    if text.count("(") + text.count("[") + text.count("{") > MAX_BRACKETS:
        raise Refused(0, f"a policy with more than {MAX_BRACKETS} opening brackets")
    if text.count(".") > MAX_DOTS:
        raise Refused(0, f"a policy with more than {MAX_DOTS:,} dots")


def bound_yaml(text: str) -> None:
    """Refused if YAML is nested too deeply, is too much or holds anchors and aliases; yaml.YAMLError."""
    level = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.CSafeLoader)):
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise Refused(line, "anchors and aliases are not taken: write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1
        if level > MAX_LEVELS:
            raise Refused(line, f"nested deeper than {MAX_LEVELS} levels")
        if count > MAX_NODES:
            raise Refused(line, f"more than {MAX_NODES:,} values")
