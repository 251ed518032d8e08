"""kill -9 between every two steps of a writer and of a notary, on both databases (R1).

Each child is killed at its n-th write or wait and is the recovery of the one before: with small n it dies in the middle
of that. `make crash` takes each of KILL_STEPS steps, the suite every third of the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from audit_lab import ORIGIN, Lab, now
from killed import nursery

from audit.notary import Notary

STEPS = int(os.environ.get("KILL_STEPS", "10"))
STRIDE = 3 if STEPS < 100 else 1
KILLED = 9

pytestmark = pytest.mark.anyio


@pytest.fixture
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").fresh("kills")
    made = Lab(tmp_path, url=url)
    yield made
    made.engine.dispose()


@pytest.mark.parametrize(
    ("lab", "kind"), [("sqlite", "writer"), ("sqlite", "notary"), ("postgresql", "notary")], indirect=["lab"]
)
async def test_R1_a_kill_between_any_two_steps_loses_no_receipt_and_forks_no_checkpoint(lab: Lab, kind: str) -> None:
    receipts: list[str] = []
    with nursery(lab.url, lab.directory, lab.signer.private()) as children:
        for number in (*range(1, STEPS * STRIDE + 1, STRIDE), 150):  # the last comes far, on either database
            status, given = children.kill_one(kind, number)
            assert status == KILLED, f"call {number}: the child ended by itself, {status}"
            receipts += given
    heir = lab.writer()
    await heir.start()
    await heir.close()
    lab.check(receipts)
    assert lab.verify() == []
    assert receipts, "no child came as far as a receipt"
    notary = Notary(lab.engine, origin=ORIGIN, signer=lab.signer, clock=now)
    assert notary.round(1, lambda _: None) is not None  # which re-reads everything, its own checkpoints included
    if kind == "notary":
        with lab.engine.connect() as connection:
            entries, signed = (
                connection.execute(sa.text(f"SELECT count(*) FROM audit_{table}")).scalar_one()
                for table in ("root", "checkpoint")
            )
        assert 1 < signed <= entries
