"""Names of requests and decisions. They must not repeat and need not be secret: a block of random bytes makes many.

The system call for sixteen bytes costs more than what is done with them.
"""

from __future__ import annotations

import os
from typing import Final

_BLOCK: Final = 256  # numbers
_left: Final[list[int]] = []
os.register_at_fork(after_in_child=_left.clear)  # or parent and child would give the same names


def _random() -> int:
    """128 bits, to one caller alone: `pop` hands each number to one thread."""
    while True:
        try:
            return _left.pop()
        except IndexError:
            block = os.urandom(16 * _BLOCK)
            _left.extend(int.from_bytes(block[at : at + 16]) for at in range(0, len(block), 16))


def _written(value: int) -> str:
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def uuid4() -> str:
    """A UUIDv4 (RFC 9562, 5.4) as text: random bits."""
    value = _random()
    return _written(value & ~(0xF << 76 | 0b11 << 62) | 0x4 << 76 | 0b10 << 62)


def uuid7(now_us: int) -> str:
    """A UUIDv7 (RFC 9562, 5.7) as text: milliseconds, then random bits. Says when, and nothing else."""
    random = _random() >> 48
    value = (now_us // 1_000 & (1 << 48) - 1) << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62
    return _written(value | random & (1 << 62) - 1)
