"""Does docs/reference/istio.md say of every field what the code does with it?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml

from meshlib.istio import resources
from meshlib.istio.parse import Parsed, parse_text

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "istio.md").read_text()
KINDS = ("VirtualService", "DestinationRule", "ServiceEntry", "WorkloadEntry", "Sidecar", "Gateway")
LEVELS = {"yes", "partly", "no effect", "silent", "refused"}

# What the page explains once stands for itself: `subsets.trafficPolicy` has the fields of `trafficPolicy`.
SAID_ELSEWHERE = ("DestinationRule subsets.trafficPolicy", "DestinationRule trafficPolicy.portLevelSettings")
VALID: dict[str, dict[str, Any]] = {
    "VirtualService": {
        "hosts": ["reviews"],
        "http": [
            {
                "route": [{"destination": {"host": "reviews"}}],
                "fault": {
                    "delay": {"fixedDelay": "1s", "percentage": {"value": 1}},
                    "abort": {"httpStatus": 500, "percentage": {"value": 1}},
                },
            }
        ],
    },
    "DestinationRule": {
        "host": "reviews",
        "trafficPolicy": {
            "tls": {"mode": "SIMPLE"},
            "loadBalancer": {"consistentHash": {"httpCookie": {"name": "user"}}},
        },
    },
    "WorkloadEntry": {"address": "192.0.2.1"},
    "Sidecar": {"egress": [{"hosts": ["./*"], "port": {"number": 80}}], "outboundTrafficPolicy": {"mode": "ALLOW_ANY"}},
    "ServiceEntry": {
        "hosts": ["example.com"],
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
        "resolution": "STATIC",
        "endpoints": [{"address": "192.0.2.1"}],
    },
    "Gateway": {
        "servers": [
            {
                "hosts": ["*"],
                "port": {"number": 443, "name": "https", "protocol": "HTTPS"},
                "tls": {"mode": "SIMPLE", "serverCertificate": "/c.pem", "privateKey": "/k.pem"},
            }
        ]
    },
}
# What the page's list of refusals means, in YAML: path and value, set in the object above.
REFUSED: dict[str, tuple[str, Any]] = {
    "DestinationRule: `tls.caCrl`": ("trafficPolicy.tls.caCrl", "/crl.pem"),
    "DestinationRule: `tls.credentialName`": ("trafficPolicy.tls.credentialName", "secret"),
    "Gateway: `tls.credentialNames`": ("servers.tls.credentialNames", ["secret"]),
    "Gateway: `tls.subjectAltNames`": ("servers.tls.subjectAltNames", ["spiffe://x"]),
    "Gateway: `tls.verifyCertificateSpki`": ("servers.tls.verifyCertificateSpki", ["x"]),
    "Gateway: `tls.verifyCertificateHash`": ("servers.tls.verifyCertificateHash", ["x"]),
    "Gateway: `tls.caCrl`": ("servers.tls.caCrl", "/crl.pem"),
    "Gateway: `tls.mode: PASSTHROUGH`": ("servers.tls.mode", "PASSTHROUGH"),
    "Gateway: `port.protocol: TCP`": ("servers.port.protocol", "TCP"),
    "Gateway: `port.targetPort`": ("servers.port.targetPort", 8080),
    "Sidecar: `egress.port.targetPort`": ("egress.port.targetPort", 8080),
}


class Row(NamedTuple):
    level: str
    note: str


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(kind: str) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for line in section(kind).splitlines():
        if line.startswith("| `"):
            names, level, note = (cell.strip() for cell in line.strip("|").split("|"))
            for name in re.findall(r"`([^`]+)`", names):
                assert name not in found, f"{kind} {name} stands there twice"
                found[name] = Row(level, note)
    return found


def fields(shape: type[msgspec.Struct], path: str = "") -> Iterator[tuple[str, bool]]:
    """Every field's path below a kind's spec, and whether it is `Unsupported`. Holders come before what they hold."""
    hints = {
        name: hint for each in reversed(shape.__mro__) for name, hint in vars(each).get("__annotations__", {}).items()
    }
    for field in msgspec.inspect.type_info(shape).fields:  # type: ignore[attr-defined]
        name = f"{path}.{field.encode_name}" if path else field.encode_name
        yield name, hints[field.name] == "Unsupported"
        for inner in structs(field.type):
            yield from fields(inner, name)


def structs(given: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(given, msgspec.inspect.StructType):
        yield given.cls
    for each in getattr(given, "types", ()):
        yield from structs(each)
    for part in ("item_type", "value_type"):
        if hasattr(given, part):
            yield from structs(getattr(given, part))


def all_fields(kind: str) -> dict[str, bool]:
    return {
        name: unsupported
        for name, unsupported in fields(resources.SHAPES[kind].spec)
        if not any(f"{kind} {name}".startswith(f"{known}.") for known in SAID_ELSEWHERE)
    }


def parsed(kind: str, path: str, value: Any) -> Parsed:
    """What parse_text says of a valid object in which `path` is set to `value`."""
    whole = {
        "apiVersion": "networking.istio.io/v1",
        "kind": kind,
        "metadata": {"name": "x"},
        "spec": yaml.safe_load(yaml.safe_dump(VALID[kind])),
    }
    here: Any = whole["spec"]
    *steps, last = path.split(".")
    for step in steps:
        here = here.setdefault(step, [{}] if step == "match" else {})
        here = here[0] if isinstance(here, list) else here
    here[last] = value
    return parse_text(yaml.safe_dump(whole), "page.yaml")


_TO = [{"destination": {"host": "reviews"}}]
CHECKED: dict[str, Any] = {
    "tls": [{"match": [{"sniHosts": ["reviews"]}], "route": _TO}],
    "tcp": [{"route": _TO}],
    "trafficPolicy.tunnel": {"targetHost": "example.com", "targetPort": 443},
    "trafficPolicy.connectionPool.http.http2KeepAlive": {"interval": "1s", "timeout": "1s"},
    "trafficPolicy.loadBalancer.consistentHash.httpCookie.attributes": [{"name": "SameSite", "value": "Lax"}],
    "ingress": [{"port": {"number": 80, "protocol": "HTTP"}}],
}
"""What has no effect and is read all the same: it must be right."""


def an_unsupported_value(path: str) -> Any:
    return "x" if path.endswith("statPrefix") else CHECKED.get(path, {"any": "value"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_objects_of_this_test_are_valid(kind: str) -> None:
    """Or else every refusal below would prove nothing."""
    (name, value), *_ = VALID[kind].items()
    result = parsed(kind, name, value)
    assert result.objects
    assert not (result.problems or result.warnings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_one_row(kind: str) -> None:
    """By itself, or in the row of what holds it; and no row is about a field that does not exist."""
    said, known = rows(kind), all_fields(kind)
    assert set(said) <= set(known)
    assert {row.level for row in said.values()} <= LEVELS

    def is_said(name: str) -> bool:
        parts = name.split(".")
        above = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        below = any(other.startswith(f"{name}.") for other in said)
        return bool(above & set(said)) or below

    assert [name for name in known if not is_said(name)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_fields_without_effect_are_named_as_such(kind: str) -> None:
    """Each `Unsupported` field of resources has a row of its own that says `no effect`, `silent` or `refused`, and
    no other field says `no effect`."""
    said, known = rows(kind), all_fields(kind)
    unsupported = {name for name, is_unsupported in known.items() if is_unsupported}
    assert {name for name in unsupported if name not in said} == set()
    assert {said[name].level for name in unsupported} <= {"no effect", "silent", "refused"}
    assert {name for name, row in said.items() if row.level == "no effect"} <= unsupported


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name, unsupported in all_fields(kind).items() if unsupported],
    ids=str,
)
def test_the_parser_does_what_the_row_says(kind: str, name: str) -> None:
    """`no effect` is a warning that names the field, `refused` a problem that does, `silent` neither."""
    result = parsed(kind, name, an_unsupported_value(name))
    named = re.compile(r"\[\d+\]")
    warned = {named.sub("", warning.field) for warning in result.warnings}
    refused = {named.sub("", problem.field) for problem in result.problems}
    level = rows(kind)[name].level
    if level == "refused":
        assert refused == {f"spec.{name}"}
    else:
        assert refused == set()
        assert warned == ({f"spec.{name}"} if level == "no effect" else set())


def test_every_refusal_of_the_page_is_one() -> None:
    """The list under "Refused" is the list above, and each is refused with the field's name."""
    said = re.findall(r"^\| (\S+: `[^|]+`) \|", section("Refused"), re.MULTILINE)
    assert said == list(REFUSED)
    for title, (path, value) in REFUSED.items():
        kind = title.partition(":")[0]
        result = parsed(kind, path, value)
        assert not result.objects, title
        assert re.sub(r"\[\d+\]", "", result.problems[0].field) == f"spec.{path}", title


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_refuse_are_explained(kind: str) -> None:
    """Whoever meets the refusal finds its reason in the list."""
    reasons = {(title.partition(":")[0], path) for title, (path, _) in REFUSED.items()}
    for name, row in rows(kind).items():
        if row.level == "refused":
            assert any((kind, name.removesuffix(plural)) in reasons for plural in ("", "s")), name


def test_every_kind_of_the_page_is_known() -> None:
    """And every kind that is known is on the page."""
    table = [
        name
        for line in section("Kubernetes' kinds").splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([A-Z]\w+)`", line.split("|")[1])
    ]
    own = (resources.OWN, resources.SECURITY, resources.TELEMETRY)
    assert section("EnvoyFilter")  # of which only patches are read that limit rates
    without = set(re.findall(r"`([A-Z]\w+)`", section("Kinds that are checked and have no effect")))
    assert {*KINDS, *table, *without, "EnvoyFilter"} == {
        kind for kind, shape in resources.SHAPES.items() if shape.group not in own
    }
    for kind in (kind for kind, shape in resources.SHAPES.items() if shape.group == resources.OWN):
        assert f"`{kind}`" in section("Other kinds")


@pytest.mark.parametrize("kind", ["AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"])
def test_what_is_enforced_is_taken_without_a_warning(kind: str) -> None:
    """And the reference names it."""
    result = parse_text(
        f"{{apiVersion: security.istio.io/v1, kind: {kind}, metadata: {{name: x}}, spec: {{}}}}", "p.yaml"
    )
    assert not result.warnings
    assert f"`{kind}`" in section("Other kinds")


@pytest.mark.parametrize("version", ["v1", "v1beta1", "v1alpha3"])
def test_all_versions_are_read(version: str) -> None:
    """As the page says."""
    text = (
        f"{{apiVersion: networking.istio.io/{version}, kind: Gateway, metadata: {{name: x}}, spec: {VALID['Gateway']}}}"
    )
    assert not parse_text(text, "p.yaml").problems
