"""Policy bundles: a directory of Cedar text and YAML, read whole, hashed, linted, validated and compiled, or refused.

The digest stands in every record: SHA-256(`skms/policy/v1` || 00 || manifest), the manifest being the canonical JSON of
format, version and every file's SHA-256. Nothing of a refused bundle is ever used.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import cedarpy
import yaml
from pydantic import ValidationError
from yaml.constructor import ConstructorError

from policy import hostile
from policy.compiler import Action, Compiled, Compiler, Unsupported
from policy.grants import RULE as GRANT
from policy.places import NAME, Charter, Member, Registry
from policy.transfers import RULE, AgreementRefused, Agreements

SHIPPED: Final = Path(__file__).parent / "shipped"
SCHEMA: Final = Path(__file__).parent / "schema.cedarschema"
FORMAT: Final = 1
SIGNATURES: Final = "signatures"  # a folder beside the bundle's files, and no part of it
DEVELOPMENT: Final = "development"  # the supplier of a development node's HSMs
MAX_FILE: Final = 1 << 20
OBLIGATIONS: Final = frozenset({"seal-to-recipient", "audit-intent", "no-cache"})
ROLES: Final = frozenset({"operator", "officer", "custodian", "auditor"})
INSTALLATION_ROLES: Final = frozenset({"platform", "auditor", "officer"})
KINDS: Final = ("use", "admin", "read", "meta")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DEVELOPMENT_PURPOSES: Final = ("default", "billing", "inference", "research", "training")
_LAYERS: Final = {"charter": 0, "installation": 0, "tenant": 1, "key": 2, "grant": 3}


class BundleRefused(Exception):
    """The bundle cannot be used: in which file, at which line (0: the file itself), and why."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}")
        self.file, self.line, self.reason = file, line, reason


@dataclass(frozen=True, slots=True)
class Rule:
    """One policy of the bundle, compiled, and what its annotations say."""

    id: str
    file: str
    line: int
    effect: str
    layer: int
    code: str
    disclosed: bool
    obligations: frozenset[str]
    est: Mapping[str, Any]  # as Cedar's JSON form has it
    compiled: Compiled


@dataclass(frozen=True, slots=True)
class Part:
    """One Cedar file, found in order and compiled: what need not be done again while its content is the same."""

    sha256: str
    text: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read, hashed, found in order and compiled."""

    digest: str
    version: int
    development: bool
    files: Mapping[str, str]  # path -> SHA-256
    parts: Mapping[str, Part]  # path -> Cedar file
    rules: Mapping[str, Rule]  # by @id
    actions: Mapping[str, Action]
    groups: Mapping[str, frozenset[str]]  # action -> itself and its groups
    registry: Registry
    agreements: Agreements
    cases: tuple[Mapping[str, Any], ...]
    sources: Mapping[str, bytes]  # path -> content: what it can be made of again

    @property
    def text(self) -> str:
        """All Cedar policies, in the order of their files."""
        return "\n".join(part.text for part in self.parts.values())


def read(directory: Path, *, known: Bundle | None = None) -> Bundle:
    """Read, check and compile a bundle directory; BundleRefused names file, line and reason.

    Cedar files that `known` has with the same content are taken from it. Everything slow is done in pieces of a few
    milliseconds or without the GIL, so that a service may call this on a thread beside its event loop.
    """
    directory = Path(directory)
    if not (directory / "charter.yaml").is_file():
        raise BundleRefused(str(directory / "charter.yaml"), 0, "the bundle has no charter.yaml")
    return made(files_in(directory), known=known)


def made(files: Mapping[str, bytes], *, known: Bundle | None = None) -> Bundle:
    """As `read`, of files at hand: path -> content."""
    if "charter.yaml" not in files:
        raise BundleRefused("charter.yaml", 0, "the bundle has no charter.yaml")
    hashes = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    charter, agreements = _charter(files)
    members: dict[str, Member] = {}
    cases: list[Mapping[str, Any]] = []
    texts: dict[str, str] = {}
    for path, data in files.items():
        _placed(path, charter)
        if path.endswith("members.yaml"):
            _members(path, data, members)
        elif path.startswith("cases/"):
            listed = _list(path, _yaml(path, data), "cases")
            if not all(isinstance(case, dict) for case in listed):
                raise BundleRefused(path, 0, "each case is a mapping")
            cases += listed
        elif path.endswith(".cedar"):
            texts[path] = _text(path, data)
    for name, about in charter.forwarders.items():
        if about.identity in members:
            reason = f"forwarders {name}: a listed person too, and whoever came through it would have that role"
            raise BundleRefused("charter.yaml", 0, reason)
    parts = _parts(texts, hashes, {} if known is None else known.parts)
    hashes["schema.cedarschema"] = hashlib.sha256(SCHEMA.read_bytes()).hexdigest()
    manifest = json.dumps(
        {"files": hashes, "format": FORMAT, "version": charter.version}, sort_keys=True, separators=(",", ":")
    )
    found = schema_actions()
    return Bundle(
        digest=hashlib.sha256(b"skms/policy/v1\0" + manifest.encode()).hexdigest(),
        version=charter.version,
        development=charter.development,
        files=hashes,
        parts=parts,
        rules=_by_id(parts),
        actions=found,
        groups={name: action.groups for name, action in found.items()},
        registry=Registry(charter, members),
        agreements=agreements,
        cases=tuple(cases),
        sources=MappingProxyType(dict(files)),
    )


@functools.cache
def schema() -> cedarpy.Schema:
    """The shipped schema, as Cedar wants it."""
    return cedarpy.Schema.from_str(SCHEMA.read_text())


@functools.cache
def schema_actions() -> Mapping[str, Action]:
    """Every action of the schema; each is of exactly one kind: use, admin, read or meta."""
    text = re.sub(r"//[^\n]*", "", SCHEMA.read_text())
    found: dict[str, Action] = {}
    form = r"action ([\w,\s]+?) in (\[[\w,\s]+\])\s*appliesTo \{ principal: (\[[^\]]*\]), resource: (\[[^\]]*\])"
    for names, *lists in re.findall(form, text):
        parents, principals, resources = (frozenset(re.findall(r"\w+", one)) for one in lists)
        if sum(kind in parents for kind in KINDS) != 1:
            raise BundleRefused("schema.cedarschema", 0, f"actions {names}: exactly one of {', '.join(KINDS)}")
        for name in re.findall(r"\w+", names):
            found[name] = Action(parents | {name}, principals, resources)
    return MappingProxyType(found)


def files_in(directory: Path) -> dict[str, bytes]:
    """The files of a bundle in a directory, without its signatures: path -> content; BundleRefused, OSError."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            raise BundleRefused(name, 0, "links are not followed")
        if name.startswith(f"{SIGNATURES}/") or path.is_dir():
            continue
        try:
            found[name] = hostile.read_file(path, most=MAX_FILE)
        except hostile.Refused as refused:
            raise BundleRefused(name, 0, refused.reason) from None
    return found


def _text(path: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BundleRefused(path, 0, "not UTF-8") from None


class _Loader(yaml.CSafeLoader):  # libyaml's: a charter of 20 tenants in 8 ms instead of 90, and with the same rules
    """YAML that means what it shows: a name that stands twice is refused, and a value that cannot be is no crash."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError):  # 2026-02-30, !!int "x"
            raise ConstructorError(None, None, "no such value", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _yaml(path: str, data: bytes) -> Any:
    try:
        text = _text(path, data)
        hostile.bound_yaml(text)
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except hostile.Refused as refused:
        raise BundleRefused(path, refused.line, refused.reason) from None
    except yaml.MarkedYAMLError as error:
        line = 0 if error.problem_mark is None else error.problem_mark.line + 1
        raise BundleRefused(path, line, f"not YAML: {error.problem}") from None
    except yaml.YAMLError:
        raise BundleRefused(path, 0, "not YAML") from None


def _list(path: str, value: Any, name: str) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list) or (isinstance(value, dict) and set(value) != {name}):
        raise BundleRefused(path, 0, f"must hold a list {name!r} and nothing else")
    return found


def _charter(files: Mapping[str, bytes]) -> tuple[Charter, Agreements]:
    raw = _yaml("charter.yaml", files["charter.yaml"])
    if not isinstance(raw, dict):
        raise BundleRefused("charter.yaml", 0, "must be a mapping")
    try:
        charter = Charter.model_validate(raw)
        return charter, Agreements(charter, schema_actions())
    except AgreementRefused as error:
        line = _yaml_line(_text("charter.yaml", files["charter.yaml"]), error.where)
        raise BundleRefused("charter.yaml", line, str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        at = (*first["loc"], *first.get("ctx", {}).get("at", ()))
        where = ".".join(str(part) for part in at)
        hint = ""
        if any(isinstance(part, bool) for part in at) or isinstance(first.get("input"), bool):
            hint = " (quote names: an unquoted NO is read as false)"
        elif isinstance(first.get("input"), date):
            hint = " (quote dates)"
        line = _yaml_line(_text("charter.yaml", files["charter.yaml"]), at)
        raise BundleRefused("charter.yaml", line, f"{where}: {first['msg']}{hint}") from None


def _yaml_line(text: str, where: Sequence[Any]) -> int:
    """The line of the last part of a location that is there; 0 for none."""
    node = yaml.compose(text, _Loader)
    line = -1
    for part in where:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        elif isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if _named(pair[0], part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
    return line + 1


def _named(key: yaml.Node, part: object) -> bool:
    if key.tag.endswith(":bool"):  # an unquoted NO, of which pydantic tells as 0
        return part == int(str(key.value).lower() in {"yes", "true", "on"})
    return str(key.value) == str(part)


def _placed(path: str, charter: Charter) -> None:
    """Every file has a place in the layout; a file elsewhere is a mistake, not a comment."""
    parts = path.split("/")
    match parts:
        case ["charter.yaml"]:
            return
        case ["charter" | "installation", name] if name.endswith(".cedar"):
            return
        case ["installation", "members.yaml"]:
            return
        case ["tenants", tenant, name] if name.endswith(".cedar") or name == "members.yaml":
            if tenant not in charter.tenants:
                raise BundleRefused(path, 0, f"tenant {tenant!r} is not in charter.yaml")
            return
        case ["keys", name] if name.endswith(".cedar") and _UUID.fullmatch(name.removesuffix(".cedar")):
            return
        case ["cases", name] if name.endswith(".yaml"):
            return
    raise BundleRefused(path, 0, "a bundle has no such file")


def _members(path: str, data: bytes, members: dict[str, Member]) -> None:
    parts = path.split("/")
    tenant = parts[1] if parts[0] == "tenants" else None
    allowed = ROLES if tenant is not None else INSTALLATION_ROLES
    text = _text(path, data)
    for entry in _list(path, _yaml(path, data), "members"):
        good = isinstance(entry, dict) and set(entry) == {"id", "role", "person"}
        if not good or not all(isinstance(v, str) for v in entry.values()):
            raise BundleRefused(path, 0, "each member has id, role and person, all text")
        line = _line_of(text, entry["id"])
        if entry["role"] not in allowed:
            raise BundleRefused(path, line, f"role {entry['role']!r}: one of {', '.join(sorted(allowed))}")
        if not re.fullmatch(r"(mtls|oidc):[\x21-\x7e]{3,500}", entry["id"]) or "*" in entry["id"]:
            raise BundleRefused(path, line, "id: kind:issuer:subject, printable ASCII, no wildcard")
        if tenant is not None and entry["id"].startswith("mtls:"):
            path_part = entry["id"].split(":", 2)[-1]
            if not path_part.startswith(f"/{tenant}/"):
                raise BundleRefused(path, line, f"the identity's path must begin with /{tenant}/")
        if entry["id"] in members:
            raise BundleRefused(path, line, "this identity is listed twice")
        members[entry["id"]] = Member(tenant, entry["role"], entry["person"])


def _line_of(text: str, needle: str) -> int:
    at = text.find(needle)
    return 0 if at < 0 else text.count("\n", 0, at) + 1


# ---- Cedar files -------------------------------------------------------------------------------------------------

_CHUNK: Final = 16  # policies: cedarpy makes the JSON form of so many in 2 to 4 ms, and holds the GIL meanwhile
_TOKEN: Final = re.compile(r'//[^\n]*|"(?:[^"\\]|\\.)*"|;', re.DOTALL)


class _Statement(NamedTuple):
    line: int
    text: str


def _parts(texts: Mapping[str, str], hashes: Mapping[str, str], known: Mapping[str, Part]) -> dict[str, Part]:
    """Every Cedar file parsed, linted, strictly validated and compiled; validation runs beside the rest, without the GIL."""
    if not any(text.strip() for text in texts.values()):
        raise BundleRefused("charter", 0, "the bundle has no policies")
    found: dict[str, Part] = {}
    checks: list[tuple[str, Future[Any]]] = []
    compiler = Compiler()
    with ThreadPoolExecutor(1, thread_name_prefix="policy-validation") as validating:
        for path, text in texts.items():
            old = known.get(path)
            if old is not None and old.sha256 == hashes[path]:
                found[path] = old
                continue
            statements = _bounded(path, text)
            checks.append((path, validating.submit(cedarpy.validate_policies, text, schema(), release_gil=True)))
            found[path] = Part(hashes[path], text, tuple(_rules(path, statements, compiler)))
    for path, check in checks:
        _validated(path, found[path], check.result())
    return found


def _by_id(parts: Mapping[str, Part]) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for rule in (r for part in parts.values() for r in part.rules):
        first = rules.setdefault(rule.id, rule)
        if first is not rule:
            raise BundleRefused(rule.file, rule.line, f"@id {rule.id!r} stands in {first.file}")
    return rules


def _validated(path: str, part: Part, result: Any) -> None:
    """Strict validation against the schema: an unknown attribute or a wrong type is refused, not skipped at run time."""
    if result.validation_passed:
        return
    error = result.errors[0]
    number = re.fullmatch(r"policy(\d+)", str(getattr(error, "policy_id", "")))
    if number is None or int(number[1]) >= len(part.rules):
        raise BundleRefused(path, 0, f"not valid: {error}")
    rule = part.rules[int(number[1])]
    raise BundleRefused(path, rule.line, f"{rule.id}: {error.error}")


def _statements(text: str) -> Iterator[_Statement]:
    """The policies of a file with their lines: each ends at a semicolon that is in no string and no comment."""
    begin = 0
    ends = [m.end() for m in _TOKEN.finditer(text) if m[0] == ";"]
    for end in (*ends, len(text)):
        bare = re.match(r"(?:\s+|//[^\n]*)*", text[begin:end])
        first = begin + (bare.end() if bare else 0)
        if first < end:
            yield _Statement(text.count("\n", 0, first) + 1, text[begin:end])
        begin = end


def _bounded(path: str, text: str) -> list[_Statement]:
    """The policies of a file, none of which is more than Cedar's parser bears."""
    if "\r" in text.replace("\r\n", "\n"):  # for Cedar it may end a comment, for us it does not
        raise BundleRefused(path, 0, "a carriage return that ends no line")
    statements = list(_statements(text))
    for statement in statements:
        try:
            hostile.bound_policy(statement.text)
        except hostile.Refused as refused:
            raise BundleRefused(path, statement.line, refused.reason) from None
    return statements


def _rules(path: str, statements: Sequence[_Statement], compiler: Compiler) -> Iterator[Rule]:
    """The policies of one file, each linted for its layer and compiled."""
    for at in range(0, len(statements), _CHUNK):
        chunk = statements[at : at + _CHUNK]
        for statement, est in zip(chunk, _parsed(path, chunk), strict=True):
            try:
                yield _rule(path, statement.line, est, compiler)
            except RecursionError:
                raise BundleRefused(path, statement.line, "nested too deeply") from None


def _parsed(path: str, chunk: Sequence[_Statement]) -> list[Mapping[str, Any]]:
    try:
        parsed = json.loads(cedarpy.policies_to_json_str("\n".join(s.text for s in chunk)))
    except (ValueError, RecursionError) as error:
        if len(chunk) > 1:
            return [est for statement in chunk for est in _parsed(path, [statement])]
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"not Cedar: {error}"
        raise BundleRefused(path, chunk[0].line, reason) from None
    if parsed.get("templates") or parsed.get("templateLinks"):
        line = next((s.line for s in chunk if re.search(r"\?(principal|resource)", s.text)), 0)
        raise BundleRefused(path, line, "templates are not supported: a forbid among them would be lost")
    policies = parsed["staticPolicies"]
    if set(policies) != {f"policy{n}" for n in range(len(chunk))}:
        raise BundleRefused(path, chunk[0].line, "its policies cannot be told apart")
    return [policies[f"policy{n}"] for n in range(len(chunk))]


def _rule(path: str, line: int, est: Mapping[str, Any], compiler: Compiler) -> Rule:
    def refuse(reason: str) -> BundleRefused:
        return BundleRefused(path, line, reason)

    notes = est.get("annotations", {})
    name = notes.get("id")
    if not name or not re.fullmatch(r"[A-Za-z0-9._:/@-]{1,128}", name):
        raise refuse("every policy needs an @id of letters, digits, . _ : / @ -")
    if name.startswith(RULE):
        raise refuse(f"@id: {RULE} is the name of a check in typed code")
    if name.startswith(f"{GRANT}/"):
        raise refuse(f"@id: {GRANT}/ begins the names of grants")
    layer = _layer_of(path)
    if notes.get("layer") != layer:
        raise refuse(f"@layer must be {layer!r} in this folder")
    disclose = notes.get("disclose", "none")
    if disclose not in {"code", "none"}:
        raise refuse('@disclose is "code" or "none"')
    obligations = frozenset(filter(None, [notes.get("obligation")]))
    if obligations - OBLIGATIONS:
        raise refuse(f"@obligation: one of {', '.join(sorted(OBLIGATIONS))}")
    unknown = set(notes) - {"id", "layer", "code", "disclose", "obligation"}
    if unknown:
        raise refuse(f"unknown annotation @{sorted(unknown)[0]}")
    if est["effect"] == "forbid" and not re.fullmatch(r"[A-Z0-9-]{3,40}", notes.get("code") or ""):
        raise refuse("a forbid needs a @code of capital letters, digits and hyphens")
    _lint(path, layer, est, refuse)
    try:
        compiled = compiler.compile(est)
    except Unsupported as error:
        raise refuse(f"{name}: {error}") from None
    return Rule(
        id=name,
        file=path,
        line=line,
        effect=est["effect"],
        layer=_LAYERS[layer],
        code=notes.get("code") or "",
        disclosed=disclose == "code",
        obligations=obligations,
        est=est,
        compiled=compiled,
    )


def _layer_of(path: str) -> str:
    top = path.split("/", maxsplit=1)[0]
    return {"charter": "charter", "installation": "installation", "tenants": "tenant", "keys": "key"}[top]


def _lint(path: str, layer: str, est: Mapping[str, Any], refuse: Any) -> None:
    resource = est["resource"]
    if layer == "charter":
        if est["effect"] != "forbid":
            raise refuse("the charter only forbids: a permit belongs to a tenant")
        if _contains(est["conditions"], "has"):
            raise refuse("no `has` in the charter: a forbid behind a guard does not fire")
        return
    entity = _pinned(resource)
    if layer == "installation":
        if entity != ("Installation", "installation"):
            raise refuse('resource must be Installation::"installation"')
        return
    if layer == "key":
        wanted = path.split("/")[1].removesuffix(".cedar")
        if resource.get("op") != "==" or entity != ("Key", wanted):
            raise refuse(f'resource must be == Key::"{wanted}"')
        return
    tenant = path.split("/")[1]
    ring = entity is not None and entity[0] == "KeyRing" and entity[1].startswith(f"{tenant}/")
    if entity != ("Tenant", tenant) and not ring:
        raise refuse(
            f'resource must be pinned to Tenant::"{tenant}" or one of its rings: a tenant rule is not for everyone'
        )
    if est["effect"] == "permit" and not _tests_tenant(est["conditions"], tenant):
        raise refuse(f'a permit must test principal.tenant == Tenant::"{tenant}": role names repeat between tenants')


def _pinned(scope: Mapping[str, Any]) -> tuple[str, str] | None:
    """The one entity a scope names by == or in (also `is K in E`)."""
    entity = scope.get("entity") or (scope.get("in") or {}).get("entity")
    if not isinstance(entity, dict):
        return None
    entity = entity.get("__entity", entity)
    return entity["type"], entity["id"]


def _contains(node: Any, operator: str) -> bool:
    if isinstance(node, dict):
        return operator in node or any(_contains(v, operator) for v in node.values())
    return isinstance(node, list) and any(_contains(v, operator) for v in node)


def _tests_tenant(conditions: Sequence[Mapping[str, Any]], tenant: str) -> bool:
    """Whether a `when` has `principal.tenant == Tenant::"t"` among its top-level conjuncts."""

    def conjuncts(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        if "&&" in node:
            yield from conjuncts(node["&&"]["left"])
            yield from conjuncts(node["&&"]["right"])
        else:
            yield node

    attribute = {".": {"left": {"Var": "principal"}, "attr": "tenant"}}
    literal = {"Value": {"__entity": {"type": "Tenant", "id": tenant}}}
    wanted = ({"==": {"left": attribute, "right": literal}}, {"==": {"left": literal, "right": attribute}})
    return any(c in wanted for clause in conditions if clause["kind"] == "when" for c in conjuncts(clause["body"]))


def write_development(
    directory: Path,
    *,
    trust_domains: Mapping[str, str],
    members: Mapping[str, Mapping[str, str]],
    platform_member: str,
    officer_member: str | None = None,
) -> None:
    """Write the development bundle: the shipped one with the two thresholds lowered that no laptop can meet.

    Its one supplier declares itself the labels that the tiers demand; K6 asks proof 3 of every tier, K7 is left out;
    agreements let data cross between the jurisdictions of all places that have a development authority, for a few
    purposes. `trust_domains` maps places to development authorities, `members` tenants to {role: identity}; the
    installation's own are `platform_member` and `officer_member`. `skms dev up` alone calls this.
    """
    if directory.exists():
        shutil.rmtree(directory)
    shutil.copytree(SHIPPED, directory, ignore=shutil.ignore_patterns("cases"))  # they hold the full thresholds
    charter = directory / "charter" / "00-charter.cedar"
    charter.write_text(_lowered(charter.read_text()))
    about = yaml.safe_load((directory / "charter.yaml").read_text())
    about["development"] = True
    about["legal_bases"].append("development")
    for place, domain in trust_domains.items():
        about["places"][place]["trust_domain"] = domain
    about["transfer_agreements"] |= _development_agreements(
        sorted({about["places"][place]["jurisdiction"] for place in trust_domains}), sorted(about["tenants"])
    )
    about["suppliers"] = {DEVELOPMENT: _self_declared(about["tiers"].values())}
    header = (
        "# A development charter: K6 asks proof 3 of every tier, K7 is left out, the supplier's labels are self-declared,\n"
        "# and agreements of nobody (dev-*) let data cross between the development jurisdictions. Not for real keys.\n"
    )
    (directory / "charter.yaml").write_text(header + yaml.safe_dump(about, sort_keys=False, default_style='"'))
    _quote_numbers(directory / "charter.yaml")
    for tenant in about["tenants"]:
        entries = [{"id": i, "role": r, "person": f"{tenant}-{r}"} for r, i in members.get(tenant, {}).items()]
        (directory / "tenants" / tenant / "members.yaml").write_text(yaml.safe_dump({"members": entries}))
    platform = [{"id": platform_member, "role": "platform", "person": "platform"}]
    if officer_member is not None:
        platform.append({"id": officer_member, "role": "officer", "person": "officer"})
    (directory / "installation" / "members.yaml").write_text(yaml.safe_dump({"members": platform}))


def _self_declared(tiers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    demanded: dict[str, int] = {}
    for tier in tiers:
        for label, level in tier.get("labels", {}).items():
            demanded[label] = max(level, demanded.get(label, 0))
    evidence = "declared by nobody but this development charter"
    labels = {n: {"level": level, "evidence": evidence, "valid_until": "9999-12-31"} for n, level in demanded.items()}
    return {"jurisdiction": "DE", "labels": labels}


def _development_agreements(jurisdictions: Sequence[str], tenants: Sequence[str]) -> dict[str, dict[str, object]]:
    return {
        f"dev-{here}-{there}".lower(): {
            "from": here,
            "to": there,
            "tenants": list(tenants),
            "legal_basis": "development",
            "legal_ref": "no agreement at all: test data only",
            "purposes": list(_DEVELOPMENT_PURPOSES),
            "parties": ["this laptop", "this laptop"],
            "not_before": "2020-01-01T00:00:00Z",
            "not_after": "2100-01-01T00:00:00Z",
        }
        for here, there in itertools.permutations(jurisdictions, 2)
    }


def _quote_numbers(path: Path) -> None:
    """Undo the quotes that a quote-everything dump puts round numbers and booleans."""
    text = re.sub(r'!!(?:int|bool) "(\w+)"', r"\1", path.read_text())
    path.write_text(text)


def _lowered(text: str) -> str:
    lowered = text.replace(
        "when { context.callerProof < 3 || (resource.tier == 1 && context.callerProof < 4) };",
        "when { context.callerProof < 3 };",
    )
    start = lowered.index("// K7:")
    end = lowered.index("// K8:")
    if lowered == text or end < start:
        raise BundleRefused("charter/00-charter.cedar", 0, "the shipped charter has no K6 or K7 to lower")
    return lowered[:start] + lowered[end:]


__all__ = ["NAME", "Bundle", "BundleRefused", "Rule", "read", "write_development"]
