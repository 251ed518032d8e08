"""Secrets are compared in constant time only (I-19): a look at the syntax tree of everything that ships."""

from __future__ import annotations

import ast
from pathlib import Path

from harness import ROOT

WORDS = {"secret", "mac", "macs", "token", "commitment", "pin", "password", "digest", "signature", "tag"}
# Comparisons of things that have such a name and are no secret: where, and why.
PUBLIC = {
    ("policy/engine.py", "digest"): "the hash of a policy bundle is public",
    ("service/kms.py", "digest"): "the hash of a policy bundle is public",
    ("service/policychanges.py", "digest"): "the hash of a policy bundle is public",
    ("service/decisions.py", "digest"): "the hashes of a policy bundle and of a decision's facts stand in its record",
    ("service/protocols/native.py", "_token_for"): "a page token is bound, not secret: the tenant is the caller's own",
}


def secretive(node: ast.expr) -> str | None:
    """The suspicious name in one side of a comparison."""
    name = {ast.Name: lambda n: n.id, ast.Attribute: lambda n: n.attr, ast.Call: lambda n: secretive(n.func) or ""}.get(
        type(node), lambda n: ""
    )(node)
    if str(name).isupper() or str(name).endswith(("_id", "_size")):  # constants of the protocol, public identifiers
        return None
    parts = set(str(name).lower().strip("_").split("_"))
    return str(name) if parts & WORDS else None


def test_I_19_no_secret_is_compared_with_equals() -> None:
    found = []
    for package in ("service", "keystore", "policy", "audit", "softhsm"):
        for path in sorted((ROOT / package).rglob("*.py")):
            relative = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Compare) or not any(isinstance(o, ast.Eq | ast.NotEq) for o in node.ops):
                    continue
                for side in (node.left, *node.comparators):
                    name = secretive(side)
                    if name is not None and (relative, name) not in PUBLIC:
                        found.append(f"{relative}:{node.lineno} {name}")
    assert not found, found


def test_the_look_finds_what_it_looks_for() -> None:
    compare = ast.parse("row.mac == given").body[0].value
    assert secretive(compare.left) == "mac"
    assert Path(ROOT / "service").is_dir()
