"""The time, and by how much it may be wrong: what has an end closes early by as much."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Final

from policy.signed import Instant

UNKNOWN_US: Final = 16_000_000  # as much as Linux itself says of a clock that nobody synchronises
_TIMEX: Final = 512  # bytes, more than any struct timex has
_MAXERROR: Final = 24  # of its field, behind modes, offset and freq of an LP64 machine


class Timekeeper:
    """The clock of one process, and its greatest possible error.

    The error is the greatest of what the kernel says, of how far the clock was moved against the boot clock since this
    process began, and of how far it is behind the newest time that was recorded: moved back, it opens nothing again, not
    even after a restart. `clock` gives us, `boot` seconds, `recorded` the newest recorded time in us.
    """

    def __init__(
        self,
        clock: Callable[[], int],
        boot: Callable[[], float],
        *,
        recorded: Callable[[], int],
        kernel: Callable[[], int] | None = None,
    ) -> None:
        self._clock, self._boot, self._recorded, self._kernel = clock, boot, recorded, kernel or kernel_error
        self._base, self._base_boot = clock(), boot()

    def __call__(self) -> Instant:
        """Now."""
        now = self._clock()
        moved = abs(now - self._base - int((self._boot() - self._base_boot) * 1e6))
        return Instant(now, max(self._kernel(), moved, self._recorded() - now))


def kernel_error() -> int:
    """The greatest error of the machine's clock (us), by adjtimex(2)."""
    timex = ctypes.create_string_buffer(_TIMEX)
    if _adjtimex()(timex) < 0:
        return UNKNOWN_US
    return int(struct.unpack_from("q", timex.raw, _MAXERROR)[0])


@functools.cache
def _adjtimex() -> Callable[[object], int]:
    found = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    return (lambda _: -1) if found is None else found
