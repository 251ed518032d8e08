"""The product at work, step by step, on a real file with a real PKCS#11 token. Non-zero exit if any step is not as it should be.

Starts a development node in a throw-away directory and uses it as its users do: by the command line and REST.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from pathlib import Path

import httpx
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
out = Console(highlight=False, soft_wrap=True)


class NotAsItShouldBe(Exception):
    """A step of the demo went wrong."""


def expect(condition: bool, what: str) -> None:
    """Stop the demo unless this holds."""
    if not condition:
        raise NotAsItShouldBe(what)


class Demo:
    """One run."""

    def __init__(self, directory: Path, file: Path) -> None:
        self.directory, self.file = directory, file
        self.node = directory / "node"
        self.number = 0
        self.receipts: list[str] = []

    def step(self, title: str) -> None:
        self.number += 1
        out.print(f"\n[bold cyan]{self.number}. {title}[/]")

    def note(self, text: str) -> None:
        out.print(f"   {text}")

    def skms(self, *arguments: str, identity: str | None = None, status: int = 0) -> str:
        """Run the command line; its output. The exit status must be the one expected."""
        command = [sys.executable, "-m", "service.cli.main"]
        if identity is not None:
            command += ["--dev-dir", str(self.node), "--identity", identity, "--output", "json"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
        expect(
            done.returncode == status,
            f"skms {' '.join(arguments)}: exit {done.returncode}, expected {status}\n{done.stdout}{done.stderr}",
        )
        return done.stdout if status == 0 else done.stderr

    def client(self, name: str) -> httpx.Client:
        """REST with an identity's certificate; receipts are kept for the auditor."""
        environment = json.loads((self.node / "env.json").read_text())
        who = next(i for i in environment["identities"] if i["name"] == name)
        trust = ssl.create_default_context(cafile=environment["ca_file"])
        trust.load_cert_chain(who["cert_file"], who["key_file"])

        def keep(answer: httpx.Response) -> None:
            if "audit-receipt" in answer.headers:
                self.receipts.append(answer.headers["audit-receipt"])

        return httpx.Client(
            base_url=environment["base_url"], verify=trust, timeout=30, event_hooks={"response": [keep]}
        )

    # ---- steps -------------------------------------------------------------------------------------------------

    def start(self) -> subprocess.Popen[bytes]:
        self.step("Start a development node: SoftHSM2 token, SQLite, certificates, policy")
        begun = time.monotonic()
        log = (self.directory / "node.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "dev", "up", "--dir", str(self.node), "--port", "0"],
            stdout=log,
            stderr=log,
            cwd=ROOT,
        )
        while time.monotonic() - begun < 60 and process.poll() is None:
            command = [sys.executable, "-m", "service.cli.main", "dev", "env", "--dir", str(self.node)]
            if subprocess.run(command, capture_output=True, check=False, cwd=ROOT).returncode == 0:
                url = json.loads((self.node / "env.json").read_text())["base_url"]
                self.note(f"ready on {url} after {time.monotonic() - begun:.1f} s")
                self.note(
                    "[yellow]development charter: proof 3 is enough for tier 1, no TEE asked; not for real keys[/]"
                )
                return process
            time.sleep(0.1)
        raise NotAsItShouldBe("the node did not start:\n" + (self.directory / "node.log").read_text()[-2_000:])

    def keys(self) -> None:
        self.step("An operator creates two keys: tier 1 (must control) and tier 2 (allied)")
        for tier, alias, more in ((1, "records", []), (2, "partners", ["--reach", "DE", "--reach", "FR"])):
            created = json.loads(
                self.skms(
                    *("key", "create", "--spec", "AES_256", "--tier", str(tier), "--home", "eu-de-1"),
                    *("--alias", alias, *more),
                    identity="health-operator",
                )
            )
            self.note(
                f"alias/{alias}: tier {created['tier']}, callers from {', '.join(created['reach'])}, {created['id']}"
            )

    def protect(self) -> None:
        self.step(f"A workload of tenant health in eu-de-1 protects {self.file}")
        self.protected, self.restored = self.directory / "file.skf", self.directory / "file"
        begun = time.monotonic()
        self.skms(
            *("file", "encrypt", str(self.file), str(self.protected), "--key", "alias/records", "-c", "case=2026-0042"),
            identity="health-eu-de-1",
        )
        took = time.monotonic() - begun
        self.note(
            f"{self.file.stat().st_size:,} bytes -> {self.protected.stat().st_size:,} in {took:.1f} s, context bound"
        )

    def restore(self) -> None:
        self.step("… and restores it, bit for bit")
        self.skms(
            *("file", "decrypt", str(self.protected), str(self.restored), "-c", "case=2026-0042", "--force"),
            identity="health-eu-de-1",
        )
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (self.file, self.restored)]
        expect(digests[0] == digests[1], "the restored file differs")
        self.note(f"sha256 {digests[1]} both times")
        self.skms(
            *("file", "decrypt", str(self.protected), str(self.directory / "no"), "-c", "case=other"),
            identity="health-eu-de-1",
            status=8,
        )
        expect(not (self.directory / "no").exists(), "a refused decryption left a file")
        self.note("with another context: refused, and no file is left behind")

    def denials(self) -> None:
        self.step("The same workload in another region, and another tenant at home: both denied")
        told = self.skms(
            *("file", "decrypt", str(self.protected), str(self.directory / "no"), "-c", "case=2026-0042"),
            identity="health-us-mkt-1",
            status=3,
        )
        expect("SOV-CALLER-PLACE" in told, f"the rule is not named: {told}")
        self.note("from us-mkt-1: 403 region_not_allowed, decided by rule SOV-CALLER-PLACE")
        with self.client("defence-eu-de-1") as other:
            answer = other.post("/v1/keys/alias/records/encrypt", json={"plaintext": "aGk="})
        expect(answer.status_code == 404, f"another tenant got {answer.status_code}")
        self.note("tenant defence: 404, exactly as for a key that does not exist")
        with self.client("health-auditor") as auditor:
            found = auditor.get("/v1/audit/records?out=denied&page_size=1").json()["items"][0]["record"]
        expect("charter.caller" in found["rule"], f"the record names {found.get('rule')}")
        self.note(
            f"the auditor of health sees: {found['op']} {found['out']} by {', '.join(found['rule'])}, decision {found['id']}"
        )

    def rotate(self) -> None:
        self.step("The key rotates under load; the old file still opens")
        stop, errors, done = threading.Event(), [], [0]

        def load() -> None:
            with self.client("health-eu-de-1") as workload:
                while not stop.is_set():
                    answer = workload.post("/v1/keys/alias/records/encrypt", json={"plaintext": "aGVsbG8="})
                    if answer.status_code != 200:
                        errors.append(answer.text)
                    done[0] += 1

        threads = [threading.Thread(target=load) for _ in range(4)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        with self.client("health-operator") as operator:
            for _ in range(5):
                time.sleep(0.3)
                answer = operator.post("/v1/keys/alias/records/rotate", headers={"Idempotency-Key": str(uuid.uuid4())})
                expect(answer.status_code == 200, answer.text)
        stop.set()
        for thread in threads:
            thread.join()
        expect(not errors, f"errors under rotation: {errors[:2]}")
        version = answer.json()["latest_version"]
        rate = done[0] / (time.monotonic() - begun)
        self.note(f"5 rotations, {done[0]} encryptions meanwhile ({rate:.0f}/s), 0 errors; newest version {version}")
        self.skms(
            *("file", "decrypt", str(self.protected), str(self.restored), "-c", "case=2026-0042", "--force"),
            identity="health-eu-de-1",
        )
        self.note("the file protected by version 1 opens")

    def disable(self) -> None:
        self.step("An officer stops the key; every use is refused at once")
        self.skms("key", "disable", "alias/records", identity="health-officer")
        told = self.skms(
            *("file", "decrypt", str(self.protected), str(self.directory / "no"), "-c", "case=2026-0042"),
            identity="health-eu-de-1",
            status=5,
        )
        expect("key_state_invalid" in told, told)
        self.note("decrypt: 409 key_state_invalid, state disabled")
        self.skms("key", "enable", "alias/records", identity="health-operator")

    def verify(self) -> None:
        self.step("An auditor verifies the log offline, against the receipts that clients were given")
        config = str(self.node / "skms.toml")
        self.export = self.directory / "export"
        self.skms("audit", "verify", "--config", config)
        self.skms("audit", "export", "--config", config, "--to", str(self.export))
        (self.directory / "receipts.txt").write_text("".join(f"{r}\n" for r in self.receipts))
        verdict = self.verifier(self.export)
        expect(verdict.returncode == 0, verdict.stdout + verdict.stderr)
        self.note(f"skms-verify: {verdict.stdout.strip()}")
        self.note(f"{len(self.receipts)} receipts, each found where it says")

    def verifier(self, directory: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "audit.verify", str(directory), "--trust", str(self.node / "trust.txt")]
        command += ["--receipts", str(self.directory / "receipts.txt")]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    def tamper(self) -> None:
        self.step("Somebody edits one record of a copy: the verifier names it")
        copy = self.directory / "tampered"
        shutil.copytree(self.export, copy)
        for path in sorted(p for p in copy.rglob("entries/**/*") if p.is_file()):
            data = path.read_bytes()
            at = data.find(b'"out":"denied"')
            if at >= 0:
                number = int(re.findall(rb'"n":([0-9]+)', data[:at])[-1])
                path.write_bytes(data.replace(b'"out":"denied"', b'"out":"failed"', 1))
                break
        verdict = self.verifier(copy)
        first = (verdict.stdout + verdict.stderr).splitlines()[0]
        # The chain breaks at the record itself or where the next one names it.
        named = any(f"/{n}:" in first for n in (number, number + 1))
        expect(verdict.returncode == 1 and first.startswith("E_") and named, verdict.stdout + verdict.stderr)
        self.note(f"record {number}: denied -> failed")
        self.note(f"skms-verify: [red]{first}[/]")


def default_file() -> Path:
    """A file of some megabytes that every machine with this service has."""
    library = Path(sysconfig.get_config_var("LIBDIR") or "/") / (sysconfig.get_config_var("LDLIBRARY") or "none")
    rust = list(Path(sysconfig.get_path("platlib")).glob("cryptography/hazmat/bindings/_rust*.so"))
    for candidate in (library, Path(os.path.realpath(sys.executable)), *rust):
        if candidate.is_file() and candidate.stat().st_size > 2_000_000:
            return candidate
    raise NotAsItShouldBe("no file of some megabytes found: give one with FILE=path")


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Watch Sovereign KMS do its job on a file.")
    parser.add_argument("--file", type=Path, default=None)
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="skms-demo-") as directory:
        process = None
        try:
            file = (arguments.file or default_file()).resolve()
            expect(file.is_file(), f"{file}: no such file")
            demo = Demo(Path(directory), file)
            process = demo.start()
            for step in (
                *(demo.keys, demo.protect, demo.restore, demo.denials, demo.rotate, demo.disable),
                *(demo.verify, demo.tamper),
            ):
                step()
        except NotAsItShouldBe as error:
            out.print(f"\n[bold red]not as it should be:[/] {error}", markup=True)
            return 1
        finally:
            if process is not None:
                process.terminate()
                process.wait(30)
    out.print(f"\n[bold green]All as it should be[/], in {time.monotonic() - begun:.0f} s.")
    out.print('Next: `make serve`, then README.md, "First calls".')
    return 0


if __name__ == "__main__":
    sys.exit(main())
