"""An approval counts for one exact request, and an officer counts once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from harness import officer
from service.approvals import ApprovalRefused, Approver, GroupRule, approve, load_approval, load_approver, quorum

KIND, DIGEST = "audit-recover", "ab" * 32


@pytest.fixture
def officers(tmp_path: Path) -> list[Approver]:
    return [load_approver(name, officer(tmp_path, name)[1]) for name in ("alice", "bob", "carol")]


def test_two_officers_agree_through_files(officers: list[Approver], tmp_path: Path) -> None:
    given = []
    for name in ("alice", "carol"):
        path = tmp_path / f"{name}.json"
        path.write_text(approve(KIND, DIGEST, name=name, key_file=tmp_path / f"{name}.key").to_json())
        given.append(load_approval(path))
    assert [a.approver for a in quorum(given, officers, kind=KIND, digest=DIGEST, needed=2)] == ["alice", "carol"]


def test_A_20_whatever_is_not_two_officers_right_approvals_is_refused(officers: list[Approver], tmp_path: Path) -> None:
    alice, bob = (approve(KIND, DIGEST, name=n, key_file=tmp_path / f"{n}.key") for n in ("alice", "bob"))
    as_bob = approve(KIND, DIGEST, name="bob", key_file=tmp_path / "alice.key")
    twice = [*officers, Approver("alias", officers[0].key)]
    linked = [replace(o, identities=(f"mtls:x:/{o.name}", "mtls:x:/shared")) for o in officers]
    as_alias = replace(alice, approver="alias")
    other = approve(KIND, "cd" * 32, name="bob", key_file=tmp_path / "bob.key")
    for given, known, why in (
        ([], officers, "0 of 2"),
        ([alice], officers, "1 of 2"),
        ([alice, alice], officers, "one officer"),
        ([alice, as_alias], twice, "one officer"),
        ([alice, bob], linked, "one officer"),
        ([alice, as_bob], officers, "false"),
        ([alice, other], officers, "another request"),
        ([alice, replace(bob, kind="key-destroy")], officers, "another request"),
        ([alice, replace(bob, digest="cd" * 32)], officers, "another request"),
        ([alice, replace(other, digest=DIGEST)], officers, "false"),
        ([alice, replace(bob, approver="dave")], officers, "no approver"),
    ):
        with pytest.raises(ApprovalRefused, match=why):
            quorum(given, known, kind=KIND, digest=DIGEST, needed=2)


def test_a_rule_of_groups_holds_offline_too(officers: list[Approver], tmp_path: Path) -> None:
    nations = {"alice": "nation:DE", "bob": "nation:DE", "carol": "nation:FR"}
    known = [replace(one, groups=(nations[one.name],)) for one in officers]
    given = {n: approve(KIND, DIGEST, name=n, key_file=tmp_path / f"{n}.key") for n in nations}
    rules = [
        GroupRule(("nation:DE", "nation:FR"), (KIND,)),
        GroupRule(("nation:FR", "nation:FR"), ("policy",)),
        GroupRule(("nation:FR", "nation:FR"), (), ("health",)),  # a recovery is the installation's
    ]
    with pytest.raises(ApprovalRefused, match="an officer of nation:FR must approve"):
        quorum([given["alice"], given["bob"]], known, kind=KIND, digest=DIGEST, needed=2, rules=rules)
    agreed = quorum([given["bob"], given["carol"]], known, kind=KIND, digest=DIGEST, needed=2, rules=rules)
    assert [a.approver for a in agreed] == ["bob", "carol"]


def test_keys_and_files_of_another_kind_are_named(tmp_path: Path) -> None:
    private, public = officer(tmp_path, "alice")
    ec = tmp_path / "ec.key"
    key = generate_private_key(SECP256R1())
    ec.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for path in (ec, public, tmp_path / "none"):
        with pytest.raises(ApprovalRefused, match=str(path)):
            approve(KIND, DIGEST, name="alice", key_file=path)
    for path in (private, tmp_path / "none"):
        with pytest.raises(ApprovalRefused, match=str(path)):
            load_approver("alice", path)
    bad = tmp_path / "bad.json"
    for text in ("", "[]", "{}", '{"approver": 1, "digest": "", "kind": "", "signature": ""}', "[" * 100_000):
        bad.write_text(text)
        with pytest.raises(ApprovalRefused, match="not an approval"):
            load_approval(bad)
