"""Small wrong edits of the policy code, each tried by the tests: `make policy-mutants`.

Each mutant is one change of one expression or statement of `policy/*.py`, chosen by a seed over all places where one
can be made: a comparison turned, `and` for `or`, a condition that always or never holds, a number off by one, a text
that is another, a `not` left out, a statement skipped. A mutant that no test notices is told with its line. Some change
nothing that can be seen (an order that does not matter, a text of an error): they are counted as not noticed too.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
TREES: Final = ("audit", "bench", "deploy", "docs", "keystore", "policy", "service", "softhsm", "tests")
LIMIT_S: Final = 400.0  # a mutant that hangs is noticed
_TURNED: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OTHER: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Mult: ast.FloorDiv,
    ast.Mod: ast.Mult,
}
_OWN: Final[dict[str, tuple[str, ...]]] = {
    "bundle": ("policy/test_bundle.py",),
    "compiler": ("policy/test_compiler.py", "policy/test_differential.py"),
    "engine": ("policy/test_engine.py", "policy/test_bundle.py", "policy/test_grants.py"),
    "exceptions": ("policy/test_exceptions.py", "service/test_exceptions.py"),
    "explain": ("policy/test_explain.py", "service/test_explain.py"),
    "facts": ("policy/test_engine.py", "policy/test_worked.py", "policy/test_differential.py"),
    "freeze": ("policy/test_freeze.py", "service/test_freezes.py"),
    "lockout": ("policy/test_lockout.py",),
    "oracle": ("policy/test_engine.py", "policy/test_worked.py"),
    "graph": ("policy/test_graph.py", "service/test_key_graph.py"),
    "grants": ("policy/test_grants.py", "service/test_grants.py"),
    "hostile": ("policy/test_hostile.py",),
    "places": (
        "policy/test_charter.py",
        "policy/test_bundle.py",
        "policy/test_worked.py",
        "service/test_api_authorisation.py",
    ),
    "plan": ("policy/test_lockout.py", "service/test_policy_changes.py"),
    "proofs": ("policy/test_proofs.py",),
    "request": ("policy/test_engine.py", "policy/test_worked.py"),
    "rows": ("service/test_freezes.py", "service/test_quorum.py", "service/test_grants.py"),
    "signatures": ("policy/test_signatures.py",),
    "signed": ("policy/test_grants.py", "policy/test_exceptions.py", "service/test_exceptions.py"),
    "sovereignty": ("policy/test_sovereignty.py",),
    "suppliers": ("policy/test_suppliers.py", "service/test_compliance.py"),
    "transfers": ("policy/test_transfers.py", "service/test_transfers.py"),
}
# The other tests of the folder that do not take long come after a module's own.
_QUICK: Final = tuple(
    f"policy/test_{name}.py" for name in ("bundle", "compiler", "engine", "explain", "lockout", "transfers", "worked")
)


class _Mutation:
    """One way to change one node: what it is, and the module's text with it."""

    def __init__(self, module: Path, tree: ast.Module, number: int, variant: int) -> None:
        self.module = module
        changed = copy.deepcopy(tree)
        node = list(ast.walk(changed))[number]
        before = ast.unparse(node)
        new = _variants(node)[variant]
        if isinstance(new, ast.AST) and new is not node:
            _replace(changed, node, new)
        self.line = getattr(node, "lineno", 0)
        self.text = ast.unparse(ast.fix_missing_locations(changed))
        self.told = f"{before[:90]}  ->  {ast.unparse(new)[:90]}".replace("\n", " ")


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list) and any(v is old for v in value):
                value[:] = [new if v is old else v for v in value]


def _variants(node: ast.AST) -> list[ast.AST]:
    """What may stand there instead."""
    match node:
        case ast.Compare(left, [op], [right]) if type(op) in _TURNED:
            return [ast.Compare(left, [_TURNED[type(op)]()], [right])]
        case ast.BoolOp(op, values):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            return [ast.BoolOp(other, values), values[0] if len(values) == 2 else ast.BoolOp(op, values[1:])]
        case ast.UnaryOp(ast.Not(), operand):
            return [operand]
        case ast.BinOp(left, op, right) if type(op) in _OTHER:
            return [ast.BinOp(left, _OTHER[type(op)](), right)]
        case ast.IfExp(_, body, orelse):
            return [body, orelse]
        case ast.If(_, body, orelse):
            return [ast.If(ast.Constant(value), body, orelse) for value in (True, False)]
        case ast.Constant(bool() as value):
            return [ast.Constant(not value)]
        case ast.Constant(int() as value):
            return [ast.Constant(value + 1)]
        case ast.Return(value) if value is not None and not isinstance(value, ast.Constant):
            return [ast.Return(ast.Constant(None))]
        case ast.Raise() | ast.Continue() | ast.Expr(ast.Call()) | ast.AugAssign():
            return [ast.Pass()]
        case ast.comprehension(target, iterable, [_, *rest], is_async):
            return [ast.comprehension(target, iterable, rest, is_async)]
    return []


def _places(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """(number of a node, variant) of everything that can be changed: in functions, not in annotations and messages."""
    inside: set[int] = set()
    apart: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for part in node.body:
                inside |= {id(n) for n in ast.walk(part)}
            hints = [a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg)] + [node.returns]
            apart |= {id(n) for hint in hints if hint is not None for n in ast.walk(hint)}
        elif isinstance(node, ast.AnnAssign):
            apart |= {id(n) for n in ast.walk(node.annotation)}
        elif isinstance(node, ast.JoinedStr | ast.Assert):
            apart |= {id(n) for n in ast.walk(node)}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if called.startswith("log."):  # what a log line says is nobody's promise
                apart |= {id(n) for n in ast.walk(node)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in inside and id(node) not in apart:
            for variant in range(len(_variants(node))):
                yield number, variant


def sample(modules: list[Path], count: int, seed: int) -> list[_Mutation]:
    """So many mutants, each module in proportion to what can be changed in it."""
    trees = {module: ast.parse(module.read_text()) for module in modules}
    all_of_them = [(module, *place) for module, tree in trees.items() for place in _places(tree)]
    print(f"{len(all_of_them)} changes can be made in {len(modules)} modules; {count} are tried", flush=True)
    chosen = random.Random(seed).sample(all_of_them, min(count, len(all_of_them)))
    return [_Mutation(module, trees[module], number, variant) for module, number, variant in chosen]


def _tests(module: str) -> list[list[str]]:
    """Groups of test files, the most likely first."""
    own = _OWN.get(module, ())
    return [[f"tests/{t}" for t in group] for group in (own, [t for t in _QUICK if t not in own]) if group]


def noticed(tree: Path, groups: list[list[str]]) -> str:
    """The first test of these files that failed, or "" if all passed."""
    environment = {**os.environ, "POLICY_ORACLE_REQUESTS": "20000", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    for group in groups:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *group]
        try:
            run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return "no end"
        if run.returncode not in {0, 5}:
            tail = (run.stderr + run.stdout).decode(errors="replace").strip().splitlines()
            return next((line for line in reversed(tail) if line.startswith(("FAILED", "ERROR"))), tail[-1])[:110]
    return ""


def main() -> int:
    """Try a sample; exit 1 if fewer than the least share are noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--least", type=float, default=0.85, help="share that the tests must notice")
    parser.add_argument("modules", nargs="*", help="names without .py; all by default")
    given = parser.parse_args()
    chosen = [m for m in sorted((ROOT / "policy").glob("*.py")) if not given.modules or m.stem in given.modules]
    caught = 0
    with tempfile.TemporaryDirectory() as made:
        tree = Path(made) / "skms"
        tree.mkdir()
        for name in TREES:
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".state"))
        for file in ROOT.iterdir():
            if file.is_file() and file.stat().st_size < 1 << 22:
                shutil.copy(file, tree)
        mutations = sample(chosen, given.count, given.seed)
        sound: set[str] = set()
        for at, mutation in enumerate(mutations, 1):
            tests = _tests(mutation.module.stem)
            if new := [file for group in tests for file in group if file not in sound]:
                if failed := noticed(tree, [new]):
                    raise SystemExit(f"the tests fail without any change: {failed}")
                sound.update(new)
            target = tree / "policy" / mutation.module.name
            target.write_text(mutation.text)
            by = noticed(tree, tests)
            shutil.copy(mutation.module, target)
            caught += bool(by)
            mark = "noticed " if by else "SURVIVED"
            print(f"{at:4} {mark} {mutation.module.name}:{mutation.line} {mutation.told}  {by}", flush=True)
    share = caught / len(mutations)
    print(f"{caught} of {len(mutations)} noticed: {share:.1%}")
    return 0 if share >= given.least else 1


if __name__ == "__main__":
    sys.exit(main())
