"""The file format, the configuration and the exit statuses of the command line."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from harness import ROOT
from service.cli import filecrypt
from service.cli.client import EXIT
from service.config import ConfigInvalid, load
from service.protocols.problems import ERRORS

KEY, ENVELOPE = b"k" * 32, b"SK" + b"e" * 147


def protect(data: bytes) -> bytes:
    target = io.BytesIO()
    filecrypt.encrypt(io.BytesIO(data), target, key=KEY, envelope=ENVELOPE, progress=lambda _: None)
    return target.getvalue()


def restore(protected: bytes, key: bytes = KEY) -> bytes:
    source, target = io.BytesIO(protected), io.BytesIO()
    envelope = filecrypt.read_envelope(source)
    filecrypt.decrypt(source, target, key=key, envelope=envelope, progress=lambda _: None)
    return target.getvalue()


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 16_385, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_files_of_every_size_come_back(size: int) -> None:
    data = os.urandom(size)
    protected = protect(data)
    assert restore(protected) == data
    assert protected.startswith(b"SKF1\x00\x00\x00\x95" + ENVELOPE)


def test_every_changed_byte_and_every_cut_is_noticed() -> None:
    protected = protect(os.urandom(40_000))
    for at in [*range(400), *range(400, len(protected), 997)]:
        changed = bytearray(protected)
        changed[at] ^= 1
        with pytest.raises(filecrypt.NotProtected):
            restore(bytes(changed))
    for cut in [*range(0, 300, 7), *range(300, len(protected), 1_999), len(protected) - 1]:
        with pytest.raises(filecrypt.NotProtected):
            restore(protected[:cut])
    with pytest.raises(filecrypt.NotProtected):
        restore(protected + b"\0")
    with pytest.raises(filecrypt.NotProtected):
        restore(protected, key=b"x" * 32)


def test_output_is_atomic_and_never_overwritten_unasked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError, match="midway"), filecrypt.atomic(target, force=False) as file:
        file.write(b"half")
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []
    with filecrypt.atomic(target, force=False) as file:
        file.write(b"whole")
    assert target.read_bytes() == b"whole"
    with pytest.raises(FileExistsError), filecrypt.atomic(target, force=False):
        pass
    with filecrypt.atomic(target, force=True) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"


def test_every_exit_status_belongs_to_a_code_of_the_api() -> None:
    assert set(EXIT) <= set(ERRORS)
    assert set(EXIT.values()) <= set(range(9))


def test_the_example_configuration_shows_every_option_and_loads() -> None:
    config = load(ROOT / "deploy" / "skms.example.toml", environment={})
    text = (ROOT / "deploy" / "skms.example.toml").read_text()
    for section in (
        config.node,
        config.listen,
        config.database,
        config.hsm[0],
        config.hsm_group[0],
        config.policy,
        config.trust[0],
        config.oidc[0],
        config.audit,
        config.audit.sink[0],
        config.limits,
        config.log,
    ):
        for option in section.__struct_fields__:
            assert option in text, option


@pytest.mark.parametrize(
    ("change", "line", "reason"),
    [
        (("port = 8443", "prot = 8443"), True, "prot"),
        (("port = 8443", "port = 99999"), True, "port"),
        (("[audit]", "[aduit]"), True, "aduit"),
        (('region = "eu-de-1"', 'region = "EU"'), True, "region"),
        (("port = 8443", "port = "), True, "TOML"),
        (('level = "info"', 'level = "loud"'), True, "level"),
        (("retention_days = 400", "retention_days = -1"), True, "retention_days"),
    ],
)
def test_a_wrong_option_is_named_with_its_line(
    tmp_path: Path, change: tuple[str, str], line: bool, reason: str
) -> None:
    text = (ROOT / "deploy" / "skms.example.toml").read_text()
    assert change[0] in text
    path = tmp_path / "skms.toml"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(ConfigInvalid) as caught:
        load(path, environment={})
    assert reason in str(caught.value)
    assert (caught.value.line > 0) is line
    wrong = path.read_text().splitlines()[caught.value.line - 1]
    assert change[1] in wrong or reason == "TOML"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("https://siem.gov.example/skms", "http://siem.gov.example/skms"), "expected https://"),
        (("https://siem.gov.example/skms", "https://:443/skms"), "expected https://"),
        (("https://siem.gov.example/skms", "https://user:pass@siem.gov.example/"), "token_file"),
        (("https://siem.gov.example/skms", "https://siem.gov.example:99999/"), "url: "),
        (('kind = "https-json" ', 'kind = "syslog" '), "expected tls://HOST[:PORT] or tcp://"),
        (('kind = "https-json" ', 'kind = "stdout" '), "stdout"),
        (("https://siem.gov.example/skms", "udp://siem.gov.example"), "UDP loses messages"),
        (('private_key = "/etc/skms/siem-client.key"', ""), "come together"),
        (('kind = "https-json"', 'kind = "syslog"\nurl = "tls://siem.gov.example"\n#'), "carries no token"),
        (("kinds = []", 'kinds = ["ops"]'), "no record is of kind 'ops'"),
        (
            ("[limits]", '[[audit.sink]]\nname = "siem"\nkind = "otlp"\nurl = "https://b"\n[limits]'),
            "two have this name",
        ),
    ],
)
def test_a_sink_that_would_lose_records_or_hold_a_secret_is_refused(
    tmp_path: Path, change: tuple[str, str], reason: str
) -> None:
    text = (ROOT / "deploy" / "skms.example.toml").read_text()
    assert change[0] in text
    path = tmp_path / "skms.toml"
    text = text.replace(*change, 1)
    if "tls://" in change[1]:
        text = text.replace('url = "https://siem', '# url = "https://siem', 1)
    path.write_text(text)
    with pytest.raises(ConfigInvalid) as caught:
        load(path, environment={})
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (('part = "bundle"', 'part = "tenants/defence"'), "nobody signs `bundle`"),
        (('part = "tenants/health"', 'part = "tenants/../x"'), "neither `bundle` nor `tenants/NAME`"),
        (('part = "tenants/health"', 'part = "charter"'), "'charter' is neither"),
    ],
)
def test_signers_of_parts_that_there_are_not_are_refused(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    text = (ROOT / "deploy" / "skms.example.toml").read_text()
    assert change[0] in text
    path = tmp_path / "skms.toml"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(ConfigInvalid, match=reason):
        load(path, environment={})


def test_a_collector_on_this_machine_may_be_asked_without_tls(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "skms.example.toml").read_text()
    path = tmp_path / "skms.toml"
    path.write_text(text.replace("https://siem.gov.example/skms", "http://127.0.0.1:4318/v1/logs"))
    assert load(path, environment={}).audit.sink[0].url == "http://127.0.0.1:4318/v1/logs"


def test_a_tenant_cannot_ask_for_a_shorter_retention_than_all_have(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "skms.example.toml").read_text()
    path = tmp_path / "skms.toml"
    path.write_text(text.replace("bank = 3650", "bank = 30"))
    with pytest.raises(ConfigInvalid, match="every record stays for retention_days = 400"):
        load(path, environment={})


def test_environment_overrides_an_option() -> None:
    config = load(
        ROOT / "deploy" / "skms.example.toml", environment={"SKMS_LISTEN_PORT": "9443", "SKMS_LOG_LEVEL": "debug"}
    )
    assert (config.listen.port, config.log.level) == (9443, "debug")
