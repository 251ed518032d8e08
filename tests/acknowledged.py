"""What clients were told, and whether all of it is true afterwards: it opens, and the log has it."""

from __future__ import annotations

import base64
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from audit.stored import verify_database
from audit.verify import load_trust
from harness import ROOT, Files, skms, tls_of
from service.database import open_engine, reader


@dataclass
class History:
    """Every acknowledged ciphertext with its plaintext, and every receipt."""

    acknowledged: list[tuple[str, bytes]] = field(default_factory=list)
    receipts: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def encrypted(self, answer: httpx.Response, plaintext: bytes) -> None:
        """Note an answer of `encrypt`."""
        with self.lock:
            self.acknowledged.append((answer.json()["ciphertext"], plaintext))
            self.receipts.append(answer.headers["audit-receipt"])


BACK_S = 30.0  # for a worker that has not been asked since its HSM or database was away


def check(files: Files, history: History) -> None:
    """Everything acknowledged opens; everything receipted is in a log that verifies."""
    deadline = time.monotonic() + BACK_S
    with httpx.Client(base_url=files.url, verify=tls_of(files, "health-eu-de-1"), timeout=30) as client:
        for at in range(0, len(history.acknowledged), 500):
            part = history.acknowledged[at : at + 500]
            body = {"items": [{"ciphertext": c} for c, _ in part]}
            while True:
                answer = client.post("/v1/batch/decrypt", json=body)
                assert answer.status_code == 200, answer.text
                results = answer.json()["results"]
                if all(result["status"] != 503 for result in results) or time.monotonic() > deadline:
                    break
                time.sleep(0.5)
            for (_, data), result in zip(part, results, strict=True):
                assert result["status"] == 200, result
                assert base64.b64decode(result["result"]["plaintext"]) == data
    engine = open_engine(files.config.database.url)
    report = verify_database(reader(engine), load_trust(Path(files.environment["trust_file"])))
    engine.dispose()
    assert not report.findings, [str(finding) for finding in report.findings]
    assert report.records > len(history.receipts)


def check_receipts(files: Files, history: History, directory: Path) -> None:
    """The database's own verdict, and every receipt handed out in an export that the offline verifier accepts."""
    assert len(set(history.receipts)) == len(history.receipts), "two answers have the same record"
    verified = skms("audit", "verify", "--config", str(files.config_file))
    assert verified.returncode == 0, verified.stdout.decode() + verified.stderr.decode()
    export = directory / "export"
    exported = skms("audit", "export", "--config", str(files.config_file), "--to", str(export))
    assert exported.returncode == 0, exported.stderr.decode()
    receipts = directory / "receipts.txt"
    receipts.write_text("".join(f"{r}\n" for r in history.receipts))
    verdict = subprocess.run(
        [
            *(sys.executable, "-m", "audit.verify", str(export), "--trust", str(export / "trust.txt")),
            *("--receipts", str(receipts), "--accept-unanchored"),  # a chain without a request may have no receipt
        ],
        capture_output=True,
        cwd=ROOT,
    )
    assert verdict.returncode == 0, verdict.stdout.decode() + verdict.stderr.decode()
