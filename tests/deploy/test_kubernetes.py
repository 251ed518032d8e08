"""deploy/kubernetes: manifests that Kubernetes' own schemas take, and that fit each other and the service."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from commands import parses
from harness import ROOT
from keystore.pkcs11 import VENDORS
from service.config import load
from service.protocols.native import ROUTES

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("base", "eu-de-1", "ceremony")
OLDEST = "1.30"  # of the versions of Kubernetes whose schemas the manifests must fit; the newest is the package's


def documents(overlay: str) -> list[dict[str, Any]]:
    """What the files of a directory declare."""
    kustomization = yaml.safe_load((KUBERNETES / overlay / "kustomization.yaml").read_text())
    files = [KUBERNETES / overlay / name for name in kustomization["resources"] if name.endswith(".yaml")]
    return [d for file in files for d in yaml.safe_load_all(file.read_text())]


def one(kind: str, name: str = "skms") -> dict[str, Any]:
    (found,) = [d for o in OVERLAYS for d in documents(o) if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


POD: dict[str, Any] = one("StatefulSet")["spec"]["template"]
NODE: dict[str, Any] = POD["spec"]["containers"][0]


def fits(document: dict[str, Any]) -> None:
    """Raise unless the schemas of Kubernetes have every field of it. Those of CloudNativePG are not at hand."""
    if document["apiVersion"].startswith("postgresql.cnpg.io/"):
        return
    for version in (OLDEST, kubernetes_validate.latest_version()):
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_knows_every_field(overlay: str) -> None:
    kustomization = yaml.safe_load((KUBERNETES / overlay / "kustomization.yaml").read_text())
    assert all((KUBERNETES / overlay / name).exists() for name in kustomization["resources"])
    for document in documents(overlay):
        fits(document)


def test_a_field_that_kubernetes_does_not_know_is_noticed() -> None:
    wrong = one("PodDisruptionBudget") | {"spec": {"maxUnavailabel": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        fits(wrong)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here; every file is checked by itself")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_it(overlay: str) -> None:
    built = subprocess.run(["kubectl", "kustomize", str(KUBERNETES / overlay)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    made = list(yaml.safe_load_all(built.stdout))
    for document in made:
        fits(document)
    names = [(d["kind"], d["metadata"]["name"]) for d in made]
    assert len(set(names)) == len(names)
    (stateful,) = (d for d in made if d["kind"] == "StatefulSet")
    (node,) = stateful["spec"]["template"]["spec"]["containers"]
    assert ("livenessProbe" in node) == (overlay != "ceremony")
    assert stateful["spec"]["replicas"] == (1 if overlay == "ceremony" else 3)
    if overlay != "base":
        assert "registry.example" in node["image"]


def test_probes_ask_routes_that_need_no_credential() -> None:
    public = {route.path for route in ROUTES if route.public}
    ports = {port["name"]: port["containerPort"] for port in NODE["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = NODE[probe]["httpGet"]
        assert asked["path"] in public
        assert asked["scheme"] == "HTTPS"
        assert asked["port"] in ports
    assert NODE["livenessProbe"]["httpGet"]["path"] == "/livez"  # a node that is not ready must not be killed
    assert NODE["readinessProbe"]["httpGet"]["path"] == "/readyz"


def mounted(container: dict[str, Any]) -> dict[str, str]:
    return {m["mountPath"]: m["name"] for m in container["volumeMounts"]}


def test_the_configuration_loads_with_the_pods_environment_and_names_files_that_are_mounted() -> None:
    parses(NODE["args"])
    file = KUBERNETES / "eu-de-1" / "skms.toml"
    given = {v["name"]: v.get("value", "skms-0") for v in NODE["env"]}  # a name from metadata.name
    config = load(file, environment=given)
    assert config.node.name == "skms-0"
    assert str(config.node.state_dir) == "/var/lib/skms"
    assert config.listen.port == NODE["ports"][0]["containerPort"]
    assert {h.vendor for h in config.hsm} <= set(VENDORS)
    image = {"/etc/skms/policy", *(str(h.module) for h in config.hsm)}  # of the image that is derived
    named = set(re.findall(r'[="](/[^"?&\s]+)', file.read_text())) | {given["PGPASSFILE"]}
    for path in named - image:
        assert any(Path(path).is_relative_to(at) for at in mounted(NODE)), path
    secrets = {path for path in named if path.startswith("/etc/skms/secrets/")}
    (first,) = POD["spec"]["initContainers"]
    assert {f"/etc/skms/secrets/{Path(source).name}" for source in first["args"]} == secrets
    assert "password" not in config.database.url
    assert ":" not in config.database.url.split("@")[0].removeprefix("postgresql+psycopg://")


def test_secrets_are_copied_from_what_is_projected() -> None:
    (first,) = POD["spec"]["initContainers"]
    (sources,) = (v["projected"]["sources"] for v in POD["spec"]["volumes"] if v["name"] == "sources")
    projected = {f"/secrets/{item['path']}" for s in sources for item in s["secret"]["items"]}
    assert projected == set(first["args"])
    volumes = {v["name"] for v in POD["spec"]["volumes"]} | {"state"}
    for container in (first, NODE):
        assert set(mounted(container).values()) <= volumes


def test_pods_are_restricted() -> None:
    spec = POD["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == 10001  # the image's
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    for container in (*spec["initContainers"], *spec["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
    writable = {m["mountPath"] for m in NODE["volumeMounts"] if not m.get("readOnly")}
    assert writable == {"/var/lib/skms", "/tmp"}


def test_selectors_select_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    assert one("StatefulSet")["spec"]["selector"]["matchLabels"] == labels
    assert one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    for service in ("skms", "skms-nodes"):
        assert one("Service", service)["spec"]["selector"] == labels
        assert one("Service", service)["spec"]["ports"][0]["targetPort"] == NODE["ports"][0]["name"]
    assert one("StatefulSet")["spec"]["serviceName"] == "skms-nodes"
    policy = one("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    cluster = one("Cluster", "skms-db")
    assert {"cnpg.io/cluster": cluster["metadata"]["name"]} in [
        peer["podSelector"]["matchLabels"] for rule in policy["egress"] for peer in rule["to"] if "podSelector" in peer
    ]


def test_the_database_keeps_what_the_audit_log_demands() -> None:
    spec = one("Cluster", "skms-db")["spec"]
    assert spec["instances"] >= 3
    assert spec["postgresql"]["synchronous"] == {"method": "any", "number": 1, "dataDurability": "required"}
    assert not {"fsync", "full_page_writes", "synchronous_commit"} & set(spec["postgresql"]["parameters"])
    url = tomllib.loads((KUBERNETES / "eu-de-1" / "skms.toml").read_text())["database"]["url"]
    assert url.startswith(f"postgresql+psycopg://{spec['bootstrap']['initdb']['owner']}@skms-db-rw/")
    assert "sslmode=verify-full" in url
