"""schemathesis against the committed document, with two tenants' credentials: no 5xx, every answer as described."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness import ROOT, Served
from service.protocols.openapi import document

CASES = os.environ.get("SCHEMATHESIS_EXAMPLES", "15")  # per operation; a night run takes hundreds


def test_P4_the_committed_document_is_what_is_served(node: Served) -> None:
    committed = yaml.safe_load((ROOT / "openapi.yaml").read_text())
    with node.client(None) as client:
        served = client.get("/openapi.json").json()
    assert committed == served == document()


@pytest.mark.parametrize("name", ["health-eu-de-1", "defence-operator"])
def test_P4_schemathesis_finds_no_fault(node: Served, name: str, tmp_path: Path) -> None:
    who = node.identities[name]
    # The certificate is the credential here; with the bearer scheme in the document most cases would carry a made-up token.
    described = {k: v for k, v in document().items() if k != "security"}
    described["components"] = {k: v for k, v in described["components"].items() if k != "securitySchemes"}
    (tmp_path / "openapi.json").write_text(json.dumps(described))
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(tmp_path / "openapi.json"), "--url", node.url),
            *("--checks", "not_a_server_error,status_code_conformance,content_type_conformance"),
            *("--checks", "response_schema_conformance,response_headers_conformance"),
            *("--max-examples", CASES, "--phases", "examples,coverage,fuzzing,stateful", "--seed", "20261124"),
            *("--request-cert", str(who.cert_file), "--request-cert-key", str(who.key_file)),
            *("--tls-verify", str(node.environment["ca_file"]), "--no-color", "--generation-database", "none"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-6_000:] + run.stderr[-2_000:]
    assert "Test Phases" in run.stdout or "test cases" in run.stdout, run.stdout[-2_000:]
