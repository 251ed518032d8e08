"""The comparison with OpenBao runs: both servers answer every operation. How fast is for `make bench-openbao` to say."""

from __future__ import annotations

import pytest

from bench.openbao import NoOpenBao, binary, compare


def test_both_servers_answer_every_operation_of_the_comparison() -> None:
    try:
        binary()
    except NoOpenBao as missing:
        pytest.skip(str(missing))
    found = compare(rounds=1, connections=2, seconds=0.05)
    assert list(found) == [
        "encrypt 256 B",
        "decrypt 256 B",
        "data key",
        "sign, P-256",
        "MAC, SHA-256",
        "encrypt, batches of 500",
    ]
    for ours, theirs in found.values():
        assert len(ours) == len(theirs) == 1
        assert ours[0].rate > 0
        assert theirs[0].rate > 0
