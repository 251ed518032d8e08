"""Hop tokens over real TLS: what they widen, and every way in which one can lie (policy.md, 4)."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import ssl
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from joserfc import jws, jwt
from joserfc.jwk import ECKey, KeySet, OctKey, OKPKey, RSAKey

from harness import Files, Lab, lab_of, new_key, with_database
from policy import BundleRefused, Policy
from service.config import OidcSection
from service.dev import domain
from service.devpki import Authority
from service.identity.hops import Forwarded, add_hop
from service.server import server_of, tls_context

pytestmark = pytest.mark.anyio
B64 = base64.b64encode(b"hello").decode()
ISSUER, AUDIENCE = "https://idp.example", "skms"
GATES = {"gate-de": "eu-de-1", "gate-fr": "eu-fr-1", "gate-us": "us-mkt-1"}
KEYS: dict[str, OKPKey | ECKey] = {
    "gate-de": OKPKey.generate_key("Ed25519"),
    "gate-fr": ECKey.generate_key("P-256"),
    "gate-us": OKPKey.generate_key("Ed25519"),
}
OIDC_KEY = RSAKey.generate_key(2048, {"kid": "k1", "alg": "RS256", "use": "sig"})


def identity(gate: str) -> str:
    return f"mtls:{domain(GATES[gate])}:/health/gateway/{gate}"


def registered(gate: str) -> dict[str, Any]:
    pem = KEYS[gate].as_pem(private=False).decode()
    return {
        "identity": identity(gate),
        "places": [GATES[gate]],
        "public_key": "".join(line for line in pem.splitlines() if "-----" not in line),
    }


@dataclass
class Gated:
    """A node behind real TLS that knows three forwarders, and what each of them needs."""

    lab: Lab
    url: str
    pki: Path
    _contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    @property
    def audience(self) -> str:
        return str(self.lab.files.config.node.installation)

    def seconds(self) -> int:
        return self.lab.clock() // 1_000_000

    def hop(self, gate: str, request: Forwarded, **changed: Any) -> str:
        """The header as an honest forwarder makes it, but for what a test changes."""
        options: dict[str, Any] = {
            "name": gate,
            "key": KEYS[gate],
            "audience": self.audience,
            "places": [GATES[gate]],
            "now": self.seconds(),
        }
        return add_hop(request, **{**options, **changed})

    async def send(
        self, certificate: str | None, request: Forwarded, hops: str | None = None, **headers: str
    ) -> httpx.Response:
        """Send a request over a new TLS connection with the certificate of a forwarder or a workload."""
        context = ssl.create_default_context(cafile=self.lab.files.environment["ca_file"])
        if certificate is not None:
            files = self.pki / f"{certificate}.pem", self.pki / f"{certificate}.key"
            context.load_cert_chain(*files)
        sent = {"content-type": "application/json"} if request.body else {}
        if request.bearer is not None:
            sent["authorization"] = f"Bearer {request.bearer}"
        if hops is not None:
            sent["skms-hops"] = hops
        async with httpx.AsyncClient(base_url=self.url, verify=context, timeout=30) as client:
            return await client.request(
                request.method, request.target, content=request.body or None, headers={**sent, **headers}
            )

    def newest(self, answer: httpx.Response) -> dict[str, Any]:
        """The record that an answer names."""
        request = answer.headers["x-request-id"]
        found = self.lab.node.kms.search.records(limit=50)
        return next(dict(f.record) for f in found if f.record.get("req") == request)


@pytest.fixture(scope="module")
async def gated(dev_files: Files, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gated]:
    directory = tmp_path_factory.mktemp("gated")
    (directory / "jwks.json").write_text(json.dumps(KeySet([OIDC_KEY]).as_dict(private=False)))
    issuers = tuple(
        OidcSection(issuer, AUDIENCE, ("RS256",), tenant, "eu-de-1", jwks_file=directory / "jwks.json")
        for issuer, tenant in ((ISSUER, "health"), (f"{ISSUER}/defence", "defence"))
    )
    shutil.copytree(dev_files.config.policy.bundle, directory / "policy")
    charter = directory / "policy/charter.yaml"
    charter.write_text(
        yaml.safe_dump(yaml.safe_load(charter.read_text()) | {"forwarders": {g: registered(g) for g in GATES}})
    )
    pki = dev_files.directory / "pki"
    for gate, place in GATES.items():
        authority = Authority.load(place, pki / f"{place}-ca.pem", pki / f"{place}-ca.key")
        pem, key = authority.issue(gate, uris=(f"spiffe://{domain(place)}/health/gateway/{gate}",))
        (pki / f"{gate}.pem").write_bytes(pem)
        (pki / f"{gate}.key").write_bytes(key)
    files = with_database(dev_files, directory, oidc=issuers)
    listen = files.config.listen
    context = tls_context(str(listen.certificate), str(listen.private_key), str(listen.client_ca))
    async with lab_of(files) as lab:
        server = server_of(lab.node.app, host="127.0.0.1", port=0, context=context)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Gated(lab, f"https://127.0.0.1:{port}", pki)
        server.should_exit = True
        await serving


@pytest.fixture
async def wide(gated: Gated) -> str:
    """A key whose plaintext may pass, and whose callers may be, in DE and FR."""
    places = {"execution": ["DE", "FR"], "reach": ["DE", "FR"], "egress": ["DE", "FR"]}
    return await new_key(gated.lab, "AES_256", **places)


def encrypting(key: str, **changed: Any) -> Forwarded:
    given = {"method": "POST", "target": f"/v1/keys/{key}/encrypt", "body": json.dumps({"plaintext": B64}).encode()}
    return Forwarded(**{**given, **changed})


def token(now: int, *, issuer: str = ISSUER) -> str:
    claims = {"iss": issuer, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 300}
    return jwt.encode({"alg": "RS256", "kid": "k1"}, claims, OIDC_KEY, algorithms=["RS256"])


async def test_the_places_of_every_hop_join_via_and_stand_in_the_record(gated: Gated, wide: str) -> None:
    request = encrypting(wide, bearer=token(gated.seconds()))
    first = gated.hop("gate-fr", request)
    both = gated.hop("gate-de", request, before=first, came_from=identity("gate-fr"))
    answer = await gated.send("gate-de", request, both)
    assert answer.status_code == 200, answer.text
    record = gated.newest(answer)
    assert record["hops"] == ["gate-fr", "gate-de"]
    assert record["via"] == ["eu-de-1", "eu-fr-1"]
    assert record["actor"] == f"oidc:{ISSUER}:alice"  # who the caller is, its own credential says, and no forwarder
    explained = gated.lab.node.kms.decisions.explained(record)
    assert explained.request.via == {"eu-de-1", "eu-fr-1"}


async def test_one_hop_outside_execution_denies_and_leaving_it_out_denies_too(gated: Gated) -> None:
    key = await new_key(gated.lab, "AES_256", execution=["DE"], reach=["DE", "FR"])
    request = encrypting(key, bearer=token(gated.seconds()))
    first = gated.hop("gate-fr", request)
    both = gated.hop("gate-de", request, before=first, came_from=identity("gate-fr"))
    answer = await gated.send("gate-de", request, both)
    assert (answer.status_code, answer.json()["code"]) == (403, "region_not_allowed")
    assert gated.newest(answer)["rule"] == ["charter.execution"]
    shorter = both.rpartition(",")[2]
    answer = await gated.send("gate-de", request, shorter)
    assert (answer.status_code, answer.json()["detail"]) == (403, "hop: chain_broken")
    allowed = await gated.send("gate-de", request, gated.hop("gate-de", request))
    assert allowed.status_code == 200, allowed.text


async def test_without_a_credential_of_the_caller_the_forwarder_is_the_caller(gated: Gated, wide: str) -> None:
    request = encrypting(wide)
    behind = f"mtls:{domain('eu-fr-1')}:/health/workload/health-eu-fr-1"
    answer = await gated.send("gate-de", request, gated.hop("gate-de", request, came_from=behind))
    assert answer.status_code == 200, answer.text
    record = gated.newest(answer)
    assert record["actor"] == identity("gate-de")
    assert record["orig"] == ["eu-fr-1"]
    assert gated.lab.node.kms.decisions.explained(record).request.caller.places == {"eu-de-1", "eu-fr-1"}


async def test_a_forwarder_lends_its_place_to_nobody_behind_it(gated: Gated) -> None:
    key = await new_key(gated.lab, "AES_256", execution=["DE"], reach=["DE"])
    request = encrypting(key)
    far = f"mtls:{domain('us-mkt-1')}:/health/workload/health-us-mkt-1"
    answer = await gated.send("gate-de", request, gated.hop("gate-de", request, came_from=far))
    assert (answer.status_code, answer.json()["code"]) == (403, "region_not_allowed")
    assert gated.newest(answer)["rule"] == ["charter.caller"]
    nowhere = gated.hop("gate-de", request, came_from="mtls:elsewhere.example:/health/x")
    answer = await gated.send("gate-de", request, nowhere)
    assert answer.json()["detail"] == "hop: origin_unknown"


async def test_a_caller_of_no_place_gains_none_by_a_hop(gated: Gated) -> None:
    made = await gated.lab.client("health-operator").post(
        "/v1/tokens", json={"scopes": ["listKeys"]}, headers={"Idempotency-Key": uuid.uuid4().hex}
    )
    secret = made.json()["token"]
    request = Forwarded("GET", "/v1/whoami", b"", secret)
    near = f"mtls:{domain('eu-de-1')}:/health/workload/health-eu-de-1"
    answer = await gated.send("gate-de", request, gated.hop("gate-de", request, came_from=near))
    assert answer.status_code == 200, answer.text
    assert answer.json()["places"] == []


async def test_a_freeze_of_a_hops_place_stops_what_comes_through_it(gated: Gated) -> None:
    places = {"execution": ["DE", "FR"], "reach": ["DE", "FR"], "egress": ["DE", "FR"]}
    key = await new_key(gated.lab, "AES_256", tenant="defence", **places)  # a tenant of its own: the freeze stays
    request = encrypting(key, bearer=token(gated.seconds(), issuer=f"{ISSUER}/defence"))
    officer = gated.lab.client("defence-officer")
    body = {"scope": {"kind": "region", "value": "eu-fr-1"}, "reason": {"code": "incident"}}
    frozen = await officer.post("/v1/freezes", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
    assert frozen.status_code in {200, 201}, frozen.text
    past_it = await gated.send("gate-de", request, gated.hop("gate-de", request))
    assert past_it.status_code == 200, past_it.text
    through = await gated.send("gate-de", request, chain(gated, request))
    assert (through.status_code, through.json()["code"]) == (423, "frozen")


Lie = Callable[[Gated, Forwarded], str]


def unsigned(gated: Gated, request: Forwarded) -> str:
    head, claims, _ = gated.hop("gate-de", request).split(".")
    header = json.loads(base64.urlsafe_b64decode(head + "=="))
    return f"{coded({**header, 'alg': 'none'})}.{claims}."


def keyed(gated: Gated, request: Forwarded) -> str:
    """HS256 with the public key as the secret, as CVE-2015-9235 has it."""
    _, claims, _ = gated.hop("gate-de", request).split(".")
    header = {"alg": "HS256", "kid": "gate-de", "typ": "skms-hop+jwt"}
    secret = OctKey.import_key(KEYS["gate-de"].as_pem(private=False).replace(b"-----", b""))
    payload = base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4))
    return jws.serialize_compact(header, payload, secret, algorithms=["HS256"])


def coded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def forged(gated: Gated, request: Forwarded) -> str:
    head, claims, signature = gated.hop("gate-de", request).split(".")
    read = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    return f"{head}.{coded({**read, 'jti': uuid.uuid4().hex})}.{signature}"


LIES: dict[str, tuple[str, Lie]] = {
    "another place": ("place_not_its_own", lambda g, r: g.hop("gate-de", r, places=["eu-de-2"])),
    "a place too many": ("place_not_its_own", lambda g, r: g.hop("gate-de", r, places=["eu-de-1", "us-mkt-1"])),
    "no place": ("malformed", lambda g, r: g.hop("gate-de", r, places=[])),
    "unknown signer": ("signer_unknown", lambda g, r: g.hop("gate-de", r, name="gate-xx")),
    "another's key": ("signature", lambda g, r: g.hop("gate-de", r, key=OKPKey.generate_key("Ed25519"))),
    "claims changed": ("signature", forged),
    "no algorithm": ("malformed", unsigned),
    "HMAC of the public key": ("algorithm", keyed),
    "expired": ("stale", lambda g, r: g.hop("gate-de", r, now=g.seconds() - 31)),
    "of the future": ("stale", lambda g, r: g.hop("gate-de", r, now=g.seconds() + 10)),
    "lives too long": ("stale", lambda g, r: g.hop("gate-de", r, lifetime_s=61)),
    "never lives": ("stale", lambda g, r: g.hop("gate-de", r, lifetime_s=0)),
    "another installation": ("audience", lambda g, r: g.hop("gate-de", r, audience=str(uuid.uuid4()))),
    "another body": ("another_request", lambda g, r: g.hop("gate-de", Forwarded(r.method, r.target, b"{}", r.bearer))),
    "another path": (
        "another_request",
        lambda g, r: g.hop("gate-de", Forwarded(r.method, "/v1/decrypt", r.body, r.bearer)),
    ),
    "another query": (
        "another_request",
        lambda g, r: g.hop("gate-de", Forwarded(r.method, r.target + "?dry_run=true", r.body, r.bearer)),
    ),
    "another method": ("another_request", lambda g, r: g.hop("gate-de", Forwarded("PUT", r.target, r.body, r.bearer))),
    "another caller": ("another_request", lambda g, r: g.hop("gate-de", Forwarded(r.method, r.target, r.body, "eyJ"))),
    "no caller": ("another_request", lambda g, r: g.hop("gate-de", Forwarded(r.method, r.target, r.body))),
    "signed by another forwarder": ("peer_is_another", lambda g, r: g.hop("gate-fr", r)),
    "last hop removed": ("peer_is_another", lambda g, r: chain(g, r).rpartition(",")[0]),
    "first hop removed": ("chain_broken", lambda g, r: chain(g, r).rpartition(",")[2]),
    "hops exchanged": ("chain_broken", lambda g, r: ",".join(reversed(chain(g, r).split(",")))),
    "first hop exchanged": ("chain_broken", lambda g, r: f"{g.hop('gate-fr', r)},{chain(g, r).rpartition(',')[2]}"),
    "middle hop removed": ("chain_broken", lambda g, r: ",".join(three(g, r).split(",")[::2])),
    "came from somebody else": (
        "chain_broken",
        lambda g, r: g.hop("gate-de", r, before=g.hop("gate-fr", r), came_from=identity("gate-us")),
    ),
    "a hop dropped by the one after it": (
        "chain_broken",
        lambda g, r: g.hop("gate-de", r, came_from=identity("gate-fr")),
    ),
    "twice the same": (
        "loop",
        lambda g, r: g.hop("gate-de", r, before=g.hop("gate-de", r), came_from=identity("gate-de")),
    ),
    "no token": ("malformed", lambda g, r: "x"),
    "empty": ("malformed", lambda g, r: ","),
    "too many": ("malformed", lambda g, r: ",".join([g.hop("gate-de", r)] * 5)),
}


def chain(gated: Gated, request: Forwarded) -> str:
    return gated.hop("gate-de", request, before=gated.hop("gate-fr", request), came_from=identity("gate-fr"))


def three(gated: Gated, request: Forwarded) -> str:
    two = gated.hop("gate-fr", request, before=gated.hop("gate-us", request), came_from=identity("gate-us"))
    return gated.hop("gate-de", request, before=two, came_from=identity("gate-fr"))


@pytest.mark.parametrize("lie", sorted(LIES))
async def test_a_lie_is_denied_and_recorded_and_never_passed_over(gated: Gated, wide: str, lie: str) -> None:
    request = encrypting(wide, bearer=token(gated.seconds()))
    reason, told = LIES[lie]
    answer = await gated.send("gate-de", request, told(gated, request))
    assert (answer.status_code, answer.json()["code"]) == (403, "region_conflict"), answer.text
    assert answer.json()["detail"] == f"hop: {reason}"
    record = gated.newest(answer)
    assert (record["out"], record["why"], record["rule"]) == ("denied", "region_conflict", [f"HOP:{reason}"])
    assert record["op"] == "encrypt"


async def test_a_token_is_good_once_also_on_another_worker_and_after_a_restart(gated: Gated, wide: str) -> None:
    request = encrypting(wide, bearer=token(gated.seconds()))
    hops = gated.hop("gate-de", request)
    at_once = await asyncio.gather(*(gated.send("gate-de", request, hops) for _ in range(4)))
    assert sorted(a.status_code for a in at_once) == [200, 403, 403, 403]
    again = await gated.send("gate-de", request, hops)
    assert again.json()["detail"] == "hop: replayed"
    async with lab_of(gated.lab.files) as other:  # another worker, with nothing in its memory
        transport = other.client(None)._transport
        transport._certificate = (gated.pki / "gate-de.pem").read_text()  # type: ignore[attr-defined]  # the harness's own
        async with httpx.AsyncClient(transport=transport, base_url="https://127.0.0.1") as client:
            headers = {"skms-hops": hops, "authorization": f"Bearer {request.bearer}"}
            headers["content-type"] = "application/json"
            answer = await client.post(request.target, content=request.body, headers=headers)
    assert answer.json()["detail"] == "hop: replayed"


async def test_a_first_hops_token_is_no_good_for_a_second_request(gated: Gated, wide: str) -> None:
    request = encrypting(wide, bearer=token(gated.seconds()))
    first = gated.hop("gate-fr", request)
    codes = []
    for _ in range(2):
        both = gated.hop("gate-de", request, before=first, came_from=identity("gate-fr"))
        codes.append((await gated.send("gate-de", request, both)).status_code)
    assert codes == [200, 403]


@pytest.mark.parametrize("bearer", [True, False])
async def test_a_forwarder_without_a_token_is_denied(gated: Gated, wide: str, *, bearer: bool) -> None:
    request = encrypting(wide, bearer=token(gated.seconds()) if bearer else None)
    answer = await gated.send("gate-de", request)
    assert answer.json()["detail"] == "hop: missing"
    assert gated.newest(answer)["rule"] == ["HOP:missing"]


@pytest.mark.parametrize("certificate", ["health-eu-de-1", None])
async def test_a_token_from_who_is_no_forwarder_is_denied(gated: Gated, wide: str, certificate: str | None) -> None:
    request = encrypting(wide, bearer=token(gated.seconds()))
    answer = await gated.send(certificate, request, gated.hop("gate-de", request))
    assert answer.json()["detail"] == "hop: peer_is_no_forwarder"


async def test_two_headers_are_one_too_many(gated: Gated, wide: str) -> None:
    request = encrypting(wide, bearer=token(gated.seconds()))
    answer = await gated.send("gate-de", request, gated.hop("gate-de", request), **{"Skms-Hops": "x"})
    assert answer.json()["detail"] == "hop: malformed"


async def test_conflicts_are_counted(gated: Gated, wide: str) -> None:
    await gated.send("gate-de", encrypting(wide))
    metrics = gated.lab.client("platform")
    text = (await metrics.get("/metrics")).text
    assert 'skms_region_conflicts_total{reason="missing"}' in text


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "a place of another authority": ("authority", {"places": ["eu-fr-1"]}),
    "an unknown trust domain": ("authority", {"identity": "mtls:elsewhere.example:/health/g"}),
    "no key": ("openssl pkey", {"public_key": "AAAA"}),
    "a weak curve": (
        "P-256",
        {"public_key": "".join(ECKey.generate_key("P-384").as_pem(private=False).decode().splitlines()[1:-1])},
    ),
    "no place": ("places", {"places": []}),
    "a person": ("listed person", {"identity": f"mtls:{domain('eu-de-1')}:/health/operator/health-operator"}),
}


@pytest.mark.parametrize("mistake", sorted(WRONG))
def test_a_charter_registers_no_such_forwarder(dev_files: Files, tmp_path: Path, mistake: str) -> None:
    reason, changed = WRONG[mistake]
    bundle = shutil.copytree(dev_files.config.policy.bundle, tmp_path / "bundle")
    charter = yaml.safe_load((bundle / "charter.yaml").read_text())
    charter["forwarders"] = {"gate-de": {**registered("gate-de"), **changed}}
    (bundle / "charter.yaml").write_text(yaml.safe_dump(charter))
    with pytest.raises(BundleRefused, match=reason):
        Policy.load(bundle, sample=0)
