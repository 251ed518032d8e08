"""What the audit log says of ceremonies on the node's host."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from databases import address
from harness import Files, lab_of
from keystore.pkcs11 import Transcript
from service.ceremonies import keep


@pytest.mark.anyio
async def test_each_ceremony_is_recorded_once_and_a_changed_transcript_raises_the_alarm(
    dev_files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    config = structs.replace(
        dev_files.config,
        node=structs.replace(dev_files.config.node, state_dir=state),
        database=structs.replace(dev_files.config.database, url=address(tmp_path)),
    )
    made = Transcript("join", {"region": "eu-de-1"}, lambda: 1)
    keep(made, config)
    (state / "ceremonies" / "forged.json").write_bytes(made.to_json().replace(b"eu-de-1", b"eu-fr-1"))
    for _ in range(2):
        async with lab_of(Files(dev_files.directory, config, dev_files.config_file, {}, {})) as lab:
            found = [
                f.record for f in lab.node.kms.search.scan(since=0, until=2**62) if f.record.get("op") == "ceremony"
            ]
            assert [(r["rh"], r["why"], r["out"]) for r in found] == [(made.sha256, "join", "ok")]
    assert "the transcript of a ceremony was changed" in caplog.text
