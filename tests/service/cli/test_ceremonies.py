"""Ceremonies as an operator runs them."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import softhsm
from harness import Files, skms


def test_an_operator_makes_one_token_joins_another_and_checks_the_transcripts(dev_files: Files, tmp_path: Path) -> None:
    tokens = softhsm.bring_up(tmp_path / "softhsm", ["a", "b", "c"])
    head = dev_files.config_file.read_text().split("[[hsm]]")[0]
    old = f'installation = "{dev_files.config.node.installation}"'
    assert old in head
    head = head.replace(old, f'installation = "{uuid.uuid4()}"').replace(
        str(dev_files.config.node.state_dir), str(tmp_path / "state")
    )
    trust = dev_files.config_file.read_text()
    trust = trust[trust.index("[[trust]]") :]

    def section(name: str) -> str:
        return (
            f'[[hsm]]\nname = "{name}"\nregion = "eu-de-1"\nvendor = "softhsm2"\nmodule = "{tokens.module}"\n'
            f'token_label = "{name}"\npin_file = "{tokens.pin_file(name)}"\n'
            f'environment = {{SOFTHSM2_CONF = "{tokens.directory}/softhsm2.conf"}}\n'
        )

    one, both = tmp_path / "one.toml", tmp_path / "both.toml"
    one.write_text(head + section("a") + trust)
    both.write_text(head + section("a") + section("b") + trust)

    made = skms("-o", "json", "hsm", "init", "--config", str(one))
    assert made.returncode == 0, made.stderr
    so_pin = str(tmp_path / "softhsm" / "a.so-pin")
    joining = ("-o", "json", "hsm", "join", "--config", str(both), "--from", "a", "--to")
    joined = skms(*joining, "b", "--so-pin-file", so_pin)
    assert joined.returncode == 0, joined.stderr
    report = json.loads(joined.stdout)
    assert report["moved"] == ["root-kek/1", "row-mac/1", "audit"]
    kept = Path(report["transcript"])
    checked = skms("-o", "json", "hsm", "transcript", "verify", str(kept))
    assert json.loads(checked.stdout)["sha256"] == report["transcript_sha256"]
    assert report["transcript_sha256"] in kept.with_suffix(".txt").read_text()
    pins = [(tmp_path / "softhsm" / name).read_bytes() for name in ("a.pin", "b.pin", "a.so-pin")]
    assert not [pin for pin in pins if pin in kept.read_bytes()]
    kept.write_bytes(kept.read_bytes().replace(b'"SENSITIVE":true', b'"SENSITIVE":false', 1))
    assert skms("hsm", "transcript", "verify", str(kept)).returncode == 8
    both.write_text(head + section("b") + section("c") + trust)
    made = skms("-o", "json", "hsm", "init", "--config", str(both))  # one object: `c` gets no root of its own
    assert (json.loads(made.stdout)["hsm"], json.loads(made.stdout)["created"]) == ("b", [])
    assert b"--from b --to c" in made.stderr
    both.write_text(head + section("c") + section("b") + trust)
    assert b"--from b --to c" in skms("hsm", "init", "--config", str(both)).stderr, "the first of the list is empty"
    both.write_text(head + section("c") + section("b").replace("b.pin", "gone.pin") + trust)
    refused = skms("hsm", "init", "--config", str(both))
    assert (refused.returncode, b"gone.pin" in refused.stderr) == (1, True), "who cannot be asked may hold the root"
    both.write_text(head + section("a") + section("b") + trust)
    unknown = skms(*joining, "c")
    assert (unknown.returncode, b"there are: a, b" in unknown.stderr) == (2, True)
