"""Notes, checkpoints, proofs and the tenants' map: published vectors, every small tree, every malformed spelling."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from audit import checkpoint as cp
from audit.chain import leaf_hash, node_hash, tree_hash
from audit.proof import (
    EMPTY,
    BadProof,
    TenantMap,
    check_consistency,
    check_inclusion,
    check_map,
    consistency_proof,
    inclusion_proof,
    map_leaf,
    subtree_of,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "rfc6962.json").read_text())

# ---- RFC 6962 --------------------------------------------------------------------------------------------------------


def raw(text: str) -> bytes:
    return base64.b64decode(text)


def corrupted(path: list[bytes], *roots: bytes) -> list[list[bytes]]:
    """The corruptions of transparency-dev/merkle's vectors: cut, garbage, repeated, foreign and flipped nodes."""
    wrong = [[], [*path, b""], [b"", *path], [*path, bytes(32)], [bytes(32), *path], path[:-1]]
    wrong += [[*path, r] for r in roots] + [[r, *path] for r in roots] + [[path[0], *path]]
    for i, node in enumerate(path):
        wrong.append([*path[:i], bytes([node[0] ^ 16]) + node[1:], *path[i + 1 :]])
    return wrong


@pytest.mark.parametrize("v", VECTORS["inclusion"], ids=lambda v: f"{v['leafIdx']}-of-{v['treeSize']}")
def test_published_inclusion_proofs_hold_and_their_corruptions_do_not(v: dict[str, str]) -> None:
    index, size = int(v["leafIdx"]), int(v["treeSize"])
    leaf, root, path = raw(v["leafHash"]), raw(v["root"]), [raw(p) for p in v["proof"]]
    check_inclusion(index, size, leaf, path, root)
    bad = [(index, size, leaf, p, root) for p in corrupted(path, root, leaf)]
    bad += [(i, size, leaf, path, root) for i in (-1, index - 1, index + 1, index ^ 2, size)]
    bad += [(index, n, leaf, path, root) for n in (0, size * 2, size // 2)]
    bad += [(index, size, bytes(32), path, root), (index, size, leaf, path, bytes(32)), (index, size, root, path, leaf)]
    for case in bad:
        with pytest.raises(BadProof):
            check_inclusion(*case)


@pytest.mark.parametrize("v", VECTORS["consistency"], ids=lambda v: f"{v['size1']}-to-{v['size2']}")
def test_published_consistency_proofs_hold_and_their_corruptions_do_not(v: dict[str, str]) -> None:
    old, size = int(v["size1"]), int(v["size2"])
    root1, root2, path = raw(v["root1"]), raw(v["root2"]), [raw(p) for p in v["proof"]]
    check_consistency(old, size, root1, root2, path)
    bad = [(old, size, root1, root2, p) for p in corrupted(path, root1, root2)]
    bad += [(n, size, root1, root2, path) for n in (0, -1, old + 1, old ^ 2) if n != old]
    bad += [(old, n, root1, root2, path) for n in (0, size * 2, size // 2, old)]
    bad += [(old, size, root2, root1, path), (old, size, bytes(32), root2, path), (old, size, root1, bytes(32), path)]
    for case in bad:
        with pytest.raises(BadProof):
            check_consistency(*case)


def test_every_subtree_proof_up_to_130_leaves_folds_to_the_published_hash() -> None:
    leaves = [leaf_hash(bytes([i])) for i in range(130)]

    @cache
    def subtree(lo: int, hi: int) -> bytes:
        if hi - lo == 1:
            return leaves[lo]
        middle = lo + (1 << ((hi - lo - 1).bit_length() - 1))
        return node_hash(subtree(lo, middle), subtree(middle, hi))

    roots, proofs = hashlib.sha256(), hashlib.sha256()
    for end in range(1, 131):
        for start in range(end):
            if start % (1 << (end - start - 1).bit_length()):
                continue  # not a subtree of any tree
            roots.update(f"[{start}, {end}) {subtree(start, end).hex()}\n".encode())
            for i in range(start, end):
                path = inclusion_proof(i - start, end - start, lambda a, b, s=start: subtree(s + a, s + b))
                proofs.update(f"{i} [{start}, {end}){''.join(' ' + p.hex() for p in path)}\n".encode())
    assert roots.hexdigest() == VECTORS["subtree_hashes"]
    assert proofs.hexdigest() == VECTORS["subtree_inclusion_proofs"]


def test_every_proof_of_every_tree_up_to_64_leaves() -> None:
    leaves = [leaf_hash(b"%d" % i) for i in range(64)]
    roots = [tree_hash(leaves[:n]) for n in range(65)]
    subtree = cache(subtree_of(leaves))
    for n in range(1, 65):
        for i in range(n):
            path = inclusion_proof(i, n, subtree)
            check_inclusion(i, n, leaves[i], path, roots[n])
            with pytest.raises(BadProof):
                check_inclusion(i, n, leaves[(i + 1) % 64], path, roots[n])
            steps = consistency_proof(i + 1, n, subtree)
            check_consistency(i + 1, n, roots[i + 1], roots[n], steps)
            if i + 1 < n:
                with pytest.raises(BadProof):
                    check_consistency(i + 1, n, roots[i], roots[n], steps)


def test_places_outside_the_tree_have_no_proof() -> None:
    nothing = subtree_of([])
    for index, size in ((0, 0), (1, 1), (-1, 4)):
        with pytest.raises(ValueError, match="not in a tree"):
            inclusion_proof(index, size, nothing)
    for old, size in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match="does not extend"):
            consistency_proof(old, size, nothing)


# ---- notes -----------------------------------------------------------------------------------------------------------

GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_NOTE = (
    "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
    "\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
).encode()
C2SP_NOTE = (
    "Ognuno sta solo sul cuor della terra\ntrafitto da un raggio di sole:\n\ned è subito sera.\n\n"
    "\u2014 quasimodo.example/salvatore "
    "NnugSzTjtVAewIS+Z/iJhUPeFDkO/5QQ2i5ddnGITLlC+EhfLW9oJKONrMouFSQU0xMcXxj99ihAQwaqP3ZekRwNtIc=\n"
).encode()
C2SP_CHECKPOINT = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "\u2014 example.com/behind-the-sofa "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "\u2014 witness.example.com/w1 "
    "jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
).encode()


def test_the_note_of_the_go_documentation_verifies_with_its_key() -> None:
    key = cp.parse_vkey(GO_KEY)
    assert cp.format_vkey(key) == GO_KEY
    assert cp.verified(cp.parse_note(GO_NOTE), [key]) == (key,)
    with pytest.raises(cp.BadSignature, match="false"):
        cp.verified(cp.parse_note(GO_NOTE.replace(b"cryptography", b"steganography")), [key])


@pytest.mark.parametrize("data", [GO_NOTE, C2SP_NOTE, C2SP_CHECKPOINT], ids=["go", "signed-note", "checkpoint"])
def test_published_notes_come_back_byte_for_byte(data: bytes) -> None:
    assert cp.parse_note(data).encode() == data


def test_the_published_checkpoint_and_cosignature_are_read_as_published() -> None:
    note = cp.parse_note(C2SP_CHECKPOINT)
    found = cp.parse_checkpoint(note.text)
    assert (found.origin, found.size) == ("example.com/behind-the-sofa", 20_852_163)
    assert found.text() == note.text
    log, witness = note.signatures
    assert (log.name, len(log.value)) == ("example.com/behind-the-sofa", 64)
    assert (witness.name, len(witness.value)) == ("witness.example.com/w1", 72)
    assert cp.cosigned(note.text, int.from_bytes(witness.value[:8], "big")) == (
        b"cosignature/v1\ntime 1679315147\nexample.com/behind-the-sofa\n20852163\n"
        b"CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    )


def ed25519_key(name: str = "kms.example/audit") -> tuple[cp.NoteKey, Ed25519PrivateKey]:
    private = Ed25519PrivateKey.generate()
    return cp.NoteKey(name, cp.ED25519, private.public_key().public_bytes_raw()), private


CHECKPOINT = cp.Checkpoint("kms.example/audit", 7, bytes(range(32)))


def test_ed25519_ecdsa_and_cosignatures_verify_and_only_over_their_own_text() -> None:
    log, private = ed25519_key()
    witness = cp.NoteKey("w.example", cp.COSIGNATURE, log.material)
    curve = ec.generate_private_key(ec.SECP256R1())
    spki = curve.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    other = cp.key_of("kms.example/audit", spki)
    assert other.id == hashlib.sha256(spki).digest()[:4]
    text, seconds = CHECKPOINT.text(), 1_790_000_000
    note = cp.Note(text, ()).signed_by(log, private.sign(text))
    note = note.signed_by(other, curve.sign(text, ec.ECDSA(hashes.SHA256())))
    note = note.signed_by(witness, seconds.to_bytes(8, "big") + private.sign(cp.cosigned(text, seconds)))
    data = note.encode()
    for keys in ([log], [other], [witness], [log, other, witness]):
        assert set(cp.verified(cp.parse_note(data), keys)) == set(keys)
        with pytest.raises(cp.BadSignature):
            cp.verified(cp.Note(b"x" + text, note.signatures), keys)
    assert cp.open_checkpoint(data, CHECKPOINT.origin, [log]) == CHECKPOINT
    with pytest.raises(cp.BadNote, match="not of other"):
        cp.open_checkpoint(data, "other", [log])
    plain = cp.NoteKey("w.example", cp.COSIGNATURE, log.material)
    late = note.signed_by(plain, (2**63).to_bytes(8, "big") + private.sign(cp.cosigned(text, 2**63)))
    with pytest.raises(cp.BadSignature):
        cp.verified(late, [witness])


def test_unknown_signatures_are_ignored_and_one_false_signature_of_a_known_key_rejects_the_note() -> None:
    log, private = ed25519_key()
    stranger, strange = ed25519_key("elsewhere.example")
    text = CHECKPOINT.text()
    good = cp.Note(text, ()).signed_by(log, private.sign(text))
    same_name = cp.Signature(log.name, b"\0\0\0\0", bytes(64))
    same_id = cp.Signature("other", log.id, bytes(64))
    crowd = tuple(cp.Signature(f"w{i}", b"\0\0\0\0", bytes(64)) for i in range(20))
    for note in (
        good.signed_by(stranger, strange.sign(text)),
        cp.Note(text, (same_name, same_id, *crowd, *good.signatures)),
    ):
        assert cp.verified(cp.parse_note(note.encode()), [log]) == (log,)
    with pytest.raises(cp.BadSignature, match="false"):
        cp.verified(good.signed_by(log, bytes(64)), [log])
    with pytest.raises(cp.BadSignature, match="no signature"):
        cp.verified(good, [stranger])


GOOD = C2SP_CHECKPOINT.decode()
MALFORMED = {
    "no signature": GOOD.split("\u2014")[0],
    "no empty line": GOOD.replace("\n\n", "\n"),
    "no last newline": GOOD[:-1],
    "text after the signatures": GOOD + "more\n",
    "carriage return": GOOD.replace("\n", "\r\n"),
    "tab": GOOD.replace("behind", "be\thind"),
    "NUL": GOOD.replace("behind", "be\0hind"),
    "hyphen for the dash": GOOD.replace("\u2014", "-"),
    "two spaces": GOOD.replace("\u2014 ", "\u2014  "),
    "plus in a name": GOOD.replace("\u2014 example", "\u2014 ex+ample"),
    "no-break space in a name": GOOD.replace("\u2014 example", "\u2014 ex\u00a0ample"),
    "no name": GOOD.replace("\u2014 witness.example.com/w1", "\u2014 "),
    "base64 without padding": GOOD.replace("AYQ8=\n", "AYQ8\n"),
    "other trailing bits": GOOD.replace("AYQ8=\n", "AYQ9=\n"),
    "base64url": GOOD.replace("q/5IZ", "q_5IZ"),
    "space in base64": GOOD.replace("q/5IZ", "q/ 5IZ"),
    "signature of four bytes": GOOD.replace(GOOD.split()[5], "AAAAAA=="),
    "65 signatures": GOOD + "\u2014 w AAAAAAA=\n" * 64,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_notes_are_refused(data: str) -> None:
    with pytest.raises(cp.BadNote):
        cp.parse_note(data.encode())


def test_a_note_of_other_than_utf8_or_beyond_its_limit_is_refused() -> None:
    for data in (GOOD.encode("utf-16"), GOOD.encode().replace(b"behind", b"\xff"), b"x" * 1_000_001):
        with pytest.raises(cp.BadNote):
            cp.parse_note(data)


ROOT = "CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I="


@pytest.mark.parametrize(
    "text",
    [
        f"o\n 12\n{ROOT}\n",
        f"o\n+12\n{ROOT}\n",
        f"o\n-1\n{ROOT}\n",
        f"o\n012\n{ROOT}\n",
        f"o\n00\n{ROOT}\n",
        f"o\n1_2\n{ROOT}\n",
        f"o\n\u0661\n{ROOT}\n",
        f"o\n1e3\n{ROOT}\n",
        f"o\n0x1\n{ROOT}\n",
        f"o\n9007199254740992\n{ROOT}\n",
        f"o\n{'9' * 5_000}\n{ROOT}\n",
        f"o\n\n{ROOT}\n",
        f"\n1\n{ROOT}\n",
        f"o\n1\n{ROOT[:-2]}J=\n",
        "o\n1\nAAAA\n",
        "o\n1\n\n",
        f"o\n1\n{ROOT}\nextension\n",
        f"o\n1\n{ROOT}",
        "o\n1\n",
        "",
    ],
)
def test_malformed_checkpoints_are_refused(text: str) -> None:
    with pytest.raises(cp.BadNote):
        cp.parse_checkpoint(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        "PeterNeumann+c74f20a4+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "PeterNeumann+C74F20A3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "Other+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "PeterNeumann+c74f20a3",
        "+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "PeterNeumann+c74f20a3+AA==",
    ],
)
def test_malformed_verifier_keys_are_refused(text: str) -> None:
    with pytest.raises(cp.BadNote):
        cp.parse_vkey(text)


# ---- proof files -----------------------------------------------------------------------------------------------------


def test_a_proof_file_is_spelt_as_published() -> None:
    node = base64.b64decode("gSKyXoYZUgZ6jduWYrkDOARinOMGJveXjgMkBTcdPlQ=")
    proof = cp.LogProof(73_894, (node, bytes(32)), C2SP_CHECKPOINT, b"extra")
    expected = (
        b"c2sp.org/tlog-proof@v1\nextra ZXh0cmE=\nindex 73894\ngSKyXoYZUgZ6jduWYrkDOARinOMGJveXjgMkBTcdPlQ=\n"
        b"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n\n"
    ) + C2SP_CHECKPOINT
    assert proof.encode() == expected
    assert cp.parse_proof(expected) == proof
    bare = cp.LogProof(0, (), C2SP_CHECKPOINT)
    assert cp.parse_proof(bare.encode()) == bare


@pytest.mark.parametrize(
    "old_new",
    [
        ("@v1", "@v2"),
        ("index 5", "index 05"),
        ("index 5", "index -5"),
        ("index 5\n", ""),
        ("extra AA==\n", "extra AB==\n"),
        ("extra AA==\nindex 5", "index 5\nextra AA=="),
        ("AAAAAAAAAAA=\n\n", "AAAAAAA=\n\n"),
        ("\n\n", "\n"),
    ],
)
def test_malformed_proof_files_are_refused(old_new: tuple[str, str]) -> None:
    data = cp.LogProof(5, (bytes(32),), C2SP_CHECKPOINT, b"\0").encode().decode()
    assert old_new[0] in data
    with pytest.raises(cp.BadNote):
        cp.parse_note(cp.parse_proof(data.replace(*old_new, 1 if old_new[0] != "\n\n" else -1).encode()).checkpoint)


# ---- the tenants' heads ------------------------------------------------------------------------------------------------


def heads(n: int) -> dict[str, tuple[int, str]]:
    return {"kms.example/audit/n0-0": (n, f"{n:064x}"), "kms.example/audit/n1-0": (n + 1, f"{n + 1:064x}")}


@given(st.permutations([f"t{i}" for i in range(40)]))
def test_the_map_depends_on_its_tenants_and_not_on_their_order(names: list[str]) -> None:
    one, other = TenantMap(), TenantMap()
    for n, name in enumerate(sorted(names)):
        one.put(name, heads(n))
    for name in names:
        other.put(name, heads(0))
        other.put(name, heads(sorted(names).index(name)))
    assert one.root() == other.root()


def test_the_map_proves_each_tenants_heads_and_no_others() -> None:
    tenants = TenantMap()
    assert tenants.root() == EMPTY
    tenants.put("t0", heads(0))
    assert tenants.root() == map_leaf("t0", heads(0))
    for n in range(1, 300):
        tenants.put(f"t{n}", heads(n))
    for n in range(300):
        path = tenants.proof(f"t{n}")
        check_map(f"t{n}", heads(n), path, tenants.root())
        lowered = {**heads(n), "kms.example/audit/n1-0": (n, f"{n:064x}")}
        hidden = {"kms.example/audit/n0-0": heads(n)["kms.example/audit/n0-0"]}
        for wrong in (lowered, hidden, {}, heads(n + 1)):
            with pytest.raises(BadProof):
                check_map(f"t{n}", wrong, path, tenants.root())
        with pytest.raises(BadProof):
            check_map("stranger", heads(n), path, tenants.root())
        with pytest.raises(BadProof):
            check_map(f"t{n}", heads(n), path[:-1], tenants.root())
    with pytest.raises(KeyError):
        tenants.proof("stranger")
