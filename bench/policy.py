"""Decisions as the service asks for them, beside cedarpy in the same run, and what a reload takes.

Run it on a quiet machine: `make bench-policy`. A decision here begins with a `policy.Request` and ends with a `Decision`.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import yaml

from policy import Caller, KeyFacts, Policy, Request
from policy import bundle as bundles
from policy.bundle import SHIPPED
from policy.proofs import difference, prove

HOME = frozenset({"eu-de-1"})
SIZES = (10, 100, 1_000, 10_000)


def bundle(directory: Path, count: int) -> Path:
    """The shipped charter with `count` further policies in 20 tenants' files, every tenth of them a forbid."""
    shutil.copytree(SHIPPED, directory)
    add_tenants(directory, 20, rules=max(1, count // 20))
    return directory


def add_tenants(directory: Path, count: int, *, rules: int) -> None:
    """Put further tenants into a bundle, each with so many policies."""
    about = yaml.safe_load((directory / "charter.yaml").read_text())
    for tenant in (f"t{n}" for n in range(count)):
        about["tenants"][tenant] = {"home": "DE", "default_reason": "customer-initiated"}
        folder = directory / "tenants" / tenant
        folder.mkdir()
        (folder / "00-roles.cedar").write_text("".join(rule(tenant, n) for n in range(rules)))
    (directory / "charter.yaml").write_text(yaml.safe_dump(about))


def rule(tenant: str, number: int) -> str:
    """One policy of a tenant, with a role of its own."""
    effect, code = ("forbid", '@code("BENCH-RULE")') if number % 10 == 9 else ("permit", "")
    return (
        f'@id("{tenant}.r{number}") @layer("tenant") {code} {effect} (principal in Role::"{tenant}/role-{number}", '
        f'action in [Action::"use", Action::"describe"], resource in Tenant::"{tenant}") when {{ '
        f'principal.tenant == Tenant::"{tenant}" && context.purpose == "purpose-{number}" && context.now > {number} }};\n'
    )


def requests(count: int) -> list[Request]:
    """Requests as a service makes them: fresh objects, 50 callers, 200 keys, four actions."""
    made = []
    for n in range(count):
        tenant, role = f"t{n % 20}", "role-0"
        caller = Caller(f"mtls:a:/{tenant}/{n % 50}", "workload", tenant, frozenset({role}), frozenset(HOME), 4, "mtls")
        key = KeyFacts(
            *(f"key-{n % 200}", tenant, 2, HOME, HOME, HOME, HOME, frozenset(), frozenset(), ("purpose-0",), "active")
        )
        action = ("encrypt", "decrypt", "sign", "describe")[n % 4]
        dest = HOME if action == "decrypt" else frozenset[str]()
        facts = {"hsm": "eu-de-1", "via": frozenset(HOME), "dest": dest, "purpose": "purpose-0"}
        made.append(Request(caller, action, key, 1_800_000_000 + n, reason="customer-initiated", **facts))
    return made


def spread(policy: Policy, asked: list[Request]) -> tuple[float, float]:
    """p50 and p99 of a decision in microseconds: of the best of 100 short rounds, since others use this machine too."""
    rounds = []
    for number in range(100):
        took = []
        for request in asked[number % 10 * 400 :][:400]:
            begun = time.perf_counter_ns()
            policy.decide(request)
            took.append(time.perf_counter_ns() - begun)
        took.sort()
        rounds.append((took[len(took) // 2] / 1e3, took[int(len(took) * 0.99)] / 1e3))
    return min(p50 for p50, _ in rounds), min(p99 for _, p99 in rounds)


def oracle(policy: Policy, asked: list[Request]) -> float:
    """Microseconds of a decision by cedarpy: the median of the best of ten rounds."""
    rounds = []
    for number in range(10):
        took = []
        for request in asked[number * 20 :][:20]:
            begun = time.perf_counter_ns()
            policy.agrees(request, policy.decide(request))
            took.append((time.perf_counter_ns() - begun) / 1e3)
        rounds.append(sorted(took)[len(took) // 2])
    return min(rounds)


def reload(directory: Path, known: Policy) -> tuple[float, ...]:
    """Milliseconds: read and compile anew; a whole load anew; with one tenant's file changed; the longest stall meanwhile.

    The third is the best of five, since others use this machine too.
    """
    begun = time.perf_counter()
    bundles.read(directory)
    compiled = time.perf_counter() - begun
    stop, longest = threading.Event(), [0.0]

    def watch() -> None:
        while not stop.is_set():
            at = time.perf_counter()
            time.sleep(0.001)  # as a loop that waits for the next request
            longest[0] = max(longest[0], time.perf_counter() - at - 0.001)

    gc.collect()
    gc.freeze()  # as a node does once it has started
    watching = threading.Thread(target=watch)
    watching.start()
    begun = time.perf_counter()
    Policy.load(directory)
    whole = time.perf_counter() - begun
    known = Policy.load(directory, known=known)
    rules, charter, again = directory / "tenants/t3/00-roles.cedar", directory / "charter.yaml", 60.0
    for number in range(5):
        rules.write_text(rules.read_text() + rule("t3", 10_000 + number))
        charter.write_text(
            charter.read_text().replace(f"version: {known.version}\n", f"version: {known.version + 1}\n")
        )
        begun = time.perf_counter()
        known = Policy.load(directory, after=known)
        again = min(again, time.perf_counter() - begun)
    stop.set()
    watching.join()
    return compiled * 1e3, whole * 1e3, again * 1e3, longest[0] * 1e3


def proved(directory: Path) -> str:
    """How long the proofs take, and the comparison with the same bundle without its last policy."""
    whole = bundles.read(directory)
    begun = time.perf_counter()
    proofs = prove(whole)
    took = time.perf_counter() - begun
    rules = directory / "tenants/t3/00-roles.cedar"
    rules.write_text(rules.read_text().rpartition("@id(")[0])
    begun = time.perf_counter()
    changes = difference(whole, bundles.read(directory, known=whole))
    compared = time.perf_counter() - begun
    kept = sum(p.holds for p in proofs)
    return (
        f"{kept} of {len(proofs)} promises proved in {took:.1f} s; {len(changes)} change(s) found in {compared:.1f} s"
    )


def main() -> int:
    """Print the table."""
    asked = requests(4_000)
    print(f"{'policies':>9} {'p50 us':>8} {'p99 us':>8} {'of 10':>7} {'cedarpy us':>11} {'ratio':>7}")
    first = None
    for size in SIZES:
        with tempfile.TemporaryDirectory() as made:
            directory = bundle(Path(made) / "bundle", size)
            policy = Policy(bundles.read(directory))
            if not all(policy.decide(r).allowed for r in asked):
                raise SystemExit("a request of the bench is denied")
            p50, p99 = spread(policy, asked)
            first = first or p50
            by_cedar = oracle(policy, asked[:200])
            print(
                f"{size:9,} {p50:8.1f} {p99:8.1f} {p50 / first:6.2f}x {by_cedar:11.0f} {by_cedar / p50:6.0f}x",
                flush=True,
            )
            if size == 1_000:
                found = reload(directory, policy)
                by_proof = proved(directory)
    names = ("read and compile", "load with self-test", "load, one file changed", "longest stall")
    print("1,000 policies: " + "; ".join(f"{n} {ms:.0f} ms" for n, ms in zip(names, found, strict=True)))
    print(f"1,000 policies: {by_proof}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
