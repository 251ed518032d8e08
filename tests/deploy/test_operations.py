"""docs/operations.md: what it names is there, and every command in it is one that `skms` has."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import yaml

from commands import parses, words_of
from harness import ROOT
from service.config import Config
from service.protocols.native import ROUTES

HANDBOOK = ROOT / "docs" / "operations.md"
TEXT = HANDBOOK.read_text()
FENCED = [line for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
INLINE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))]
COMMAND = re.compile(r"(?:^|[ /])skms (?=[a-z])")
# Names of commands in running text: `skms audit recover` says which, not how.
NAMED = {"skms hsm join", "skms hsm verify-backup", "skms audit recover", "skms policy check", "skms config check"}
NAMED |= {"skms doctor", "skms key rotate", "skms db migrate", "skms db check", "skms backup restore"}


def shown() -> list[str]:
    fenced = [line for line in FENCED if COMMAND.search(line)]
    return [*fenced, *(code for code in INLINE if code.startswith("skms ") and code not in NAMED)]


@pytest.mark.parametrize("line", shown())
def test_a_command_is_one_of_skms(line: str) -> None:
    parses(words_of(line))


def test_commands_that_are_only_named_exist() -> None:
    for name in NAMED:
        with pytest.raises(Exception, match=r"(?i)no such option"):
            parses([*name.split()[1:], "--no-such-option"])


def anchors() -> set[str]:
    """GitHub's names of the headings."""
    titles = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    return {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        file, _, anchor = target.partition("#")
        assert not file or (HANDBOOK.parent / file).is_file(), target
        assert file or anchor in anchors(), target


def test_every_alert_has_its_playbook() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        file, _, anchor = rule["annotations"]["playbook"].partition("#")
        assert ROOT / file == HANDBOOK
        assert anchor in anchors(), rule["alert"]


def test_files_and_directories_that_it_names_are_there() -> None:
    paths = {word for text in (*FENCED, *INLINE) for word in text.split() if word.startswith("deploy/")}
    assert paths
    for path in paths:
        assert list(ROOT.glob(path.rstrip("/"))), path


def options_of(kind: Any) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(kind)}


def test_options_of_the_configuration_that_it_names_exist() -> None:
    sections = options_of(Config)
    named = re.findall(r"`\[+([a-z_.]+)\]+ ([a-z_]+)`", TEXT)
    assert named
    for section, option in named:
        kind = sections[section]
        arguments = [a for a in getattr(kind, "__args__", ()) if isinstance(a, type) and issubclass(a, msgspec.Struct)]
        annotated = [a for a in getattr(getattr(kind, "__origin__", None), "__args__", ()) if isinstance(a, type)]
        (struct,) = arguments or annotated or [kind]
        assert option in options_of(struct), (section, option)


def test_routes_that_it_names_exist() -> None:
    routes = {route.path for route in ROUTES}
    assert {code for code in INLINE if re.fullmatch(r"/[a-z]+z|/metrics", code)} <= routes


def test_what_the_manifests_expect_is_listed() -> None:
    manifest = (ROOT / "deploy" / "kubernetes" / "base" / "nodes.yaml").read_text()
    (stateful, _) = yaml.safe_load_all(manifest)
    wanted: set[str] = set()
    for volume in stateful["spec"]["template"]["spec"]["volumes"]:
        sources = [volume, *volume.get("projected", {}).get("sources", [])]
        wanted |= {s["secret"].get("secretName") or s["secret"]["name"] for s in sources if "secret" in s}
        wanted |= {volume["configMap"]["name"]} if "configMap" in volume else set()
    assert wanted - {"skms-config"} <= set(INLINE)
