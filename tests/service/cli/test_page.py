"""The page on which an approver signs with WebAuthn: what it shows, whom it answers, and that a real browser signs there."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from browser import CHROMIUM, Browser, chromium
from harness import ROOT
from service.approvals import Approval, ApprovalRefused, Approver, Asked, challenge, check, load_approval, revocation
from service.cli.client import Failed
from service.cli.commands import Hand, _facts
from service.cli.page import HEADERS, Page, PageUnanswered, answered, origin
from service.keyfiles import public_key
from service.webauthn import Credential, decoded

HOSTILE = """"><script>alert(1)</script><img src=x onerror='alert("&amp;")'>\u2028</dd>"""
ASKED = Asked(
    *("6f1f1f0e-0000-4000-8000-000000000001", "inst", "set_key_policy", "health"),
    {"key": "k1", "version": 3, "from": {"tier": 1}, "to": {"tier": 2, "reach": ["fr"]}, "reason": HOSTILE},
    *("mtls:eu-de-1:/health/operator/olga", 1_790_000_000_000_000, 1_790_003_600_000_000),
)


class Seen(HTMLParser):
    """Every element of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_shows_all_that_is_signed_and_nothing_of_it_becomes_markup() -> None:
    facts = _facts(ASKED)
    page = Page(f"Title {HOSTILE}", [*facts, (HOSTILE, HOSTILE)], HOSTILE, "get", {"rpId": HOSTILE})
    seen = Seen(page.html().decode())
    known = {"html", "head", "meta", "title", "link", "script", "body", "main", "h1", "dl", "dt", "dd", "button", "p"}
    assert set(seen.elements) <= known
    assert seen.elements.count("script") == 1
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert json.loads(seen.attributes["data-options"] or "")["publicKey"] == {"rpId": HOSTILE}
    for said in (ASKED.id, ASKED.requester, ASKED.installation, "health", "k1", '{"tier": 1}', HOSTILE, "2026-09-21"):
        assert said in seen.text, said
    for name in dataclasses.asdict(ASKED)["parameters"]:
        assert name in [shown for shown, _ in facts]
    assert "'unsafe" not in HEADERS["Content-Security-Policy"]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serving(port: int, page: Page, wait_s: float = 20) -> Iterator[tuple[str, list[Any]]]:
    """(the page's address, what came of it once the block has ended)."""
    told, came, ready = [], [], threading.Event()

    def tell(url: str) -> None:
        told.append(url)
        ready.set()

    def serve() -> None:
        try:
            came.append(answered(page, port, tell, wait_s=wait_s))
        except PageUnanswered as error:
            came.append(error)
            ready.set()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(10)
    try:
        yield (told or [""])[0], came
    finally:
        thread.join(30)


def test_a_page_answers_this_machines_browser_and_takes_one_answer_of_its_own_script(port: int) -> None:
    page = Page("t", [("a", "b")], "go", "get", {})
    with serving(port, page) as (url, came), httpx.Client() as client:
        path = url.removeprefix(origin(port))
        right = {"Origin": origin(port), "Content-Type": "application/json"}
        for method, at, headers, content, status in (
            ("GET", "/", {}, b"", 404),
            ("GET", f"{path}../page.js", {}, b"", 404),
            ("GET", path, {"Host": f"evil.example:{port}"}, b"", 404),
            ("GET", path, {"Host": f"127.0.0.1:{port}"}, b"", 404),
            ("POST", "/answer", right, b"{}", 404),
            ("POST", f"{path}answer", {**right, "Host": f"evil.example:{port}"}, b"{}", 404),
            ("POST", f"{path}answer", {**right, "Origin": "http://evil.example"}, b"{}", 403),
            ("POST", f"{path}answer", {**right, "Origin": "null"}, b"{}", 403),
            ("POST", f"{path}answer", {"Content-Type": "application/json"}, b"{}", 403),
            ("POST", f"{path}answer", {**right, "Content-Type": "text/plain"}, b"{}", 403),
            ("POST", f"{path}answer", {**right, "Content-Length": "99999999"}, b"", 413),
            ("POST", f"{path}answer", {**right, "Content-Length": "-1"}, b"", 413),
            ("POST", f"{path}answer", right, b"[]", 400),
            ("POST", f"{path}answer", right, b'{"a": 1}', 400),
            ("POST", f"{path}answer", right, b"\xff", 400),
        ):
            plain = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            plain.request(method, at, content, {"Host": f"localhost:{port}", **headers})
            assert plain.getresponse().status == status, (method, at, headers)
            plain.close()
            assert not came
        shown = client.get(url)
        assert shown.status_code == 200
        assert {name: shown.headers[name] for name in HEADERS} == dict(HEADERS)
        answer = client.post(f"{url}answer", headers=right, content=b'{"a": "b"}')
        assert answer.status_code == 204
    assert came == [{"a": "b"}]


def test_a_page_that_nobody_answers_or_whose_port_is_taken_ends_with_a_reason(port: int) -> None:
    page = Page("t", [], "go", "get", {})
    with serving(port, page, 0.3) as (_, came):
        pass
    assert "nobody signed" in str(came[0])
    with socket.create_server(("127.0.0.1", port)), serving(port, page) as (_, came):
        pass
    assert f"port {port}" in str(came[0])


def test_a_credential_stands_alone_and_its_file_is_one_of_enrol(tmp_path: Path) -> None:
    file = tmp_path / "carol.json"
    for text, key, says in (
        ("{}", tmp_path / "a.key", "stands alone"),
        ("{}", None, "approval enrol"),
        ("[", None, "approval enrol"),
        ('{"credential": "x"}', None, "approval enrol"),
    ):
        file.write_text(text)
        hand = Hand(key, None, None, "", "", None, file)
        with pytest.raises(Failed, match=says):
            hand.approves("policy", "ab" * 32, name="carol", facts=[])


# ---- a real browser ----------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: `apt-get install chromium` brings one")


@contextlib.contextmanager
def skms(directory: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address of its page, the command that waits for the answer)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli.main", "-o", "json", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    try:
        assert "http://localhost:" in line, line + process.stderr.read()
        yield line.split()[-1], process
    finally:
        process.kill()
        process.communicate()


def clicked(browser: Browser, url: str, seconds: float = 15) -> str:
    """What the page says once its button was pressed and the authenticator has answered or not."""
    browser.open(url)
    browser.evaluate("document.getElementById('go').click()")
    return str(browser.until("/^(Done|Not|Nothing)/.exec(document.getElementById('said').textContent)?.input", seconds))


def ended(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    return json.loads(out)


@real
def test_a_real_browser_enrols_approves_and_takes_back_on_the_page(tmp_path: Path, port: int) -> None:
    (tmp_path / "request.json").write_text(json.dumps(dataclasses.asdict(ASKED)))
    by_page = ("--name", "carol", "--webauthn", "carol.json", "--to", "given.json")
    with chromium(tmp_path) as browser:
        authenticator = browser.authenticator()
        enrol = ("approval", "enrol", "--name", "carol", "--to", "carol.json", "--public-key", "carol.pem")
        with skms(tmp_path, *enrol, "--port", str(port)) as (url, process):
            assert clicked(browser, url).startswith("Done"), browser.log
            entry = ended(process)
        (stored,) = browser.call("WebAuthn.getCredentials", authenticatorId=authenticator)["credentials"]
        assert stored["rpId"] == "localhost"
        section = entry["webauthn"]
        credential = Credential(decoded(section["credential"]), section["rp"], tuple(section["origins"]))
        carol = Approver("carol", public_key(tmp_path / "carol.pem", entry["algorithm"]), credential=credential)

        counters = []
        for command, kind in (("sign", ASKED.kind), ("revoke", revocation(ASKED.kind))):
            with skms(tmp_path, "approval", command, "request.json", *by_page) as (url, process):
                said = clicked(browser, url)
                assert said.startswith("Done"), (said, browser.log)
                shown = browser.evaluate("document.body.innerText")
                for text in (ASKED.digest(), ASKED.requester, "k1", '{"reach": ["fr"], "tier": 2}', "<script>alert(1)"):
                    assert text in shown, text
                assert browser.evaluate("document.scripts.length") == 1
                ended(process)
            given = load_approval(tmp_path / "given.json")
            assert check(given, [carol], kind=kind, digest=ASKED.digest()) == carol
            with pytest.raises(ApprovalRefused):
                check(
                    Approval("carol", "policy", ASKED.digest(), given.signature),
                    [dataclasses.replace(carol, credential=dataclasses.replace(credential, rp="example"))],
                    kind="policy",
                    digest=ASKED.digest(),
                )
            counters.append(int.from_bytes(decoded(json.loads(given.signature)["authenticatorData"])[33:37], "big"))
        assert counters[0] < counters[1]
        assert challenge(ASKED.kind, ASKED.digest()) != challenge(revocation(ASKED.kind), ASKED.digest())

        # A person who is not verified signs nothing, and neither does an authenticator without the credential.
        browser.call("WebAuthn.setUserVerified", authenticatorId=authenticator, isUserVerified=False)
        (tmp_path / "given.json").unlink()
        with skms(tmp_path, "approval", "sign", "request.json", *by_page) as (url, process):
            assert clicked(browser, url).startswith("Nothing was signed"), browser.log
            assert process.poll() is None
        assert not (tmp_path / "given.json").exists()
        assert not [entry for entry in browser.log if "Content Security" in entry or "exceptionThrown" in entry]
