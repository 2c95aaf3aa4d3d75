"""Which objects does a YAML text hold, and which of them can't be used? A bad object hides no good one.

Shapes are checked by resources.* structs; what a shape can't say (exactly one of, sums, names that must be unique)
is checked by checks.*, as Istio's webhook does (istio/istio pkg/config/validation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from meshlib.errors import ConfigurationError
from meshlib.istio import closing, envoy_filters
from meshlib.istio import resources as r
from meshlib.istio.checks.destinations import check_backend_policy, check_destination_rule
from meshlib.istio.checks.envoy_filters import check_envoy_filter
from meshlib.istio.checks.limits import check_rate_limit
from meshlib.istio.checks.routes import check_virtual_service
from meshlib.istio.checks.security import check_security
from meshlib.istio.checks.services import (
    check_addresses,
    check_gateway,
    check_service_entry,
)
from meshlib.istio.checks.sidecars import check_sidecar
from meshlib.istio.checks.telemetry import check_telemetry
from meshlib.istio.checks.workloads import check_proxy_config, check_workload_entry, check_workload_group
from meshlib.istio.decoding import converted, explained, steps, told, with_key, without_nulls
from meshlib.istio.documents import Document, InvalidYaml, Path, split
from meshlib.istio.effects import effects_of
from meshlib.istio.mesh_config import mesh_config
from meshlib.istio.problems import ConfigurationWarning, Refused
from meshlib.model.values import dataclass

MAX_TEXT = 16 * 1024 * 1024
"""Characters. Far above any real file; a text beyond it is a mistake."""
_OBJECT_FIELDS = frozenset({"apiVersion", "kind", "metadata", "spec", "status"})


@dataclass(frozen=True, slots=True)
class Parsed:
    """objects: usable, in the text's order. problems: one for each object that is not, and for YAML that is none.
    warnings: what usable objects ask for and do not get. closed: what stands for security objects that can't be used,
    where there is no other form of them: whoever passes them over lets in whom they may have kept out."""

    objects: tuple[r.Object, ...]
    problems: tuple[ConfigurationError, ...]
    warnings: tuple[ConfigurationWarning, ...] = ()
    closed: tuple[r.Object, ...] = ()


def parse_text(text: str, source: str, *, namespace: str = "default") -> Parsed:
    """Every object of a YAML text. source: a file's name, for messages; objects get the line with it. namespace: of
    objects that name none. Raises nothing."""
    objects: list[r.Object] = []
    problems: list[ConfigurationError] = []
    warnings: list[ConfigurationWarning] = []
    closed: list[r.Object] = []
    seen: set[tuple[str, ...]] = set()
    if len(text) > MAX_TEXT:
        problem = ConfigurationError(source, "", "", f"more than {MAX_TEXT} characters")
        return Parsed((), (problem,), (), closing.of_text(text, problem))
    for document in split(text):

        def place(path: Path, document: Document = document) -> str:
            return f"{source}:{document.line(path)}"

        try:
            value = document.value()
        except InvalidYaml as error:
            problem = ConfigurationError(f"{source}:{error.line}", "", "", error.reason)
            problems.append(problem)
            closed += closing.of_document(document, problem, namespace)
            continue
        for item, path in _items(value):
            try:
                found = _object(item, place, path, namespace)
            except ConfigurationError as error:
                problems.append(error)
                stand_ins = closing.of_value(item, error, namespace)
                closed += stand_ins or (closing.of_text(document.text, error) if _may_hold_others(item) else ())
                continue
            identity = closing.identity(found)
            if identity in seen:
                problems.append(ConfigurationError(found.source, found.title, "", "stands in this file twice"))
                continue
            seen.add(identity)
            objects.append(found)
            warnings.extend(effects_of(found))
    return Parsed(tuple(objects), tuple(problems), tuple(warnings), tuple(closed))


def parse_value(value: Any, source: str, *, namespace: str = "default") -> Parsed:
    """One object that was decoded already, as an API server sends it, or the items of a List. source: where from, for
    messages; there are no lines. Raises nothing."""
    objects: list[r.Object] = []
    problems: list[ConfigurationError] = []
    closed: list[r.Object] = []
    for item, path in _items(value):
        try:
            objects.append(_object(item, lambda _: source, path, namespace))
        except ConfigurationError as error:
            problems.append(error)
            closed += closing.of_value(item, error, namespace)
    warnings = tuple(warning for each in objects for warning in effects_of(each))
    return Parsed(tuple(objects), tuple(problems), warnings, tuple(closed))


def _may_hold_others(item: Any) -> bool:
    """Whether there may be objects in what is none: a list without a kind, a List of something else."""
    if isinstance(item, dict) and isinstance(kind := item.get("kind"), str):
        return kind.endswith("List")
    return isinstance(item, dict | list)


def _items(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, tuple[str | int, ...]]]:
    """The object itself, or the items of a List."""
    if value is None:
        return
    if isinstance(value, dict) and str(value.get("kind", "")).endswith("List") and "items" in value:
        items = value["items"]
        if items is None or isinstance(items, list):
            for index, item in enumerate(items or ()):
                yield from _items(item, (*path, "items", index))
            return
    yield value, path


def _object(value: Any, place: Callable[[Path], str], path: Path, default_namespace: str) -> r.Object:
    """place: where what a path names stands, for messages."""
    where = place(path)
    if not isinstance(value, dict):
        raise ConfigurationError(where, "", "", f"an object is a mapping with apiVersion and kind, not {told(value)}")
    kind, version = value.get("kind"), value.get("apiVersion")
    for required, found in (("kind", kind), ("apiVersion", version)):
        if not isinstance(found, str) or not found:
            raise ConfigurationError(where, "", required, "is missing" if found is None else f"must be text: {found!r}")
    kind, version = str(kind), str(version)
    given = value.get("metadata")
    metadata: dict[str, Any] = given if isinstance(given, dict) else {}
    name: Any = metadata.get("name")
    namespace: Any = metadata.get("namespace") or default_namespace
    title = f"{kind} {namespace}/{name or metadata.get('generateName', '')}"

    def refuse(field: str, reason: str) -> ConfigurationError:
        return ConfigurationError(place((*path, *steps(field))), title, field, reason)

    if given is not None and not isinstance(given, dict):
        raise refuse("metadata", f"must be a mapping, not {told(given)}")
    if kind.endswith("List") and "items" in value:
        raise refuse("items", f"must be a list, not {told(value['items'])}")
    if not isinstance(name, str) or not r.NAME.match(name):
        raise refuse("metadata.name", "is missing" if name is None else f"is no name of Kubernetes: {name!r}")
    if not isinstance(namespace, str) or not r.NAMESPACE.match(namespace):
        raise refuse("metadata.namespace", f"is no namespace: {namespace!r}")
    labels: Any = metadata.get("labels") or {}
    if not isinstance(labels, dict) or not all(isinstance(each, str) for each in labels.values()):
        raise refuse("metadata.labels", "must be text, each")
    group, _, short = version.rpartition("/")
    shape = r.shape_of(kind, group)
    own = {known for known, each in r.SHAPES.items() if each.group == r.OWN}
    if (group == r.NETWORKING and kind not in r.NETWORKING_KINDS) or (group == r.OWN and kind not in own):
        raise refuse("kind", f"{group} has no kind {kind!r}")
    if group == r.SECURITY and kind not in closing.KINDS:
        raise refuse("kind", f"{group} has no kind {kind!r}; it has {', '.join(sorted(closing.KINDS))}")
    if kind in closing.KINDS and group != r.SECURITY and (not group or group.endswith("istio.io")):
        raise refuse("apiVersion", f"{version!r} has no kind {kind}; {r.SECURITY}/v1 has")
    if shape is not None and shape.group == r.NETWORKING and group != r.NETWORKING:
        raise refuse("apiVersion", f"{version!r} has no kind {kind}; {r.NETWORKING}/v1 has")
    spec: Any = None
    if shape is not None and shape.group == group:
        if short not in shape.versions:
            wanted = ", ".join(f"{group}/{known}" if group else known for known in shape.versions)
            raise refuse("apiVersion", f"{version!r} is not known; there are {wanted}")
        if group in r.STRICT_GROUPS:
            for at, table, known in (("", value, _OBJECT_FIELDS), ("metadata.", metadata, r.METADATA_FIELDS)):
                for field in table:
                    if field not in known:
                        raise refuse(f"{at}{field}", "there is no such field")
        content = value if shape.whole else value.get("spec")
        if content is None and not shape.whole:
            content = {}
        try:
            content = without_nulls(content)
            spec = converted(content, shape.spec)
            _check((kind, namespace, name), spec)
        except msgspec.ValidationError as error:
            field, reason = explained(with_key(str(error), content, shape.spec), "" if shape.whole else "spec")
            raise refuse(field, reason) from None
        except Refused as error:
            prefix = "" if shape.whole else "spec"
            raise refuse(".".join(part for part in (prefix, error.field) if part), error.reason) from None
    created = metadata.get("creationTimestamp")
    rules: tuple[str, ...] = ()
    if isinstance(spec, r.AuthorizationPolicy):
        rules = tuple(place((*path, "spec", "rules", index)) for index in range(len(spec.rules)))
    age = str(created) if created else ""
    return r.Object(
        version, kind, namespace, name, where, spec, value, labels, age, rules, lambda at: place((*path, *at))
    )


def _check(key: tuple[str, str, str], spec: Any) -> None:
    kind = key[0]
    if kind == "VirtualService":
        check_virtual_service(spec)
    elif kind == "DestinationRule":
        check_destination_rule(spec, key[1])
    elif kind == "ServiceEntry":
        check_service_entry(spec)
    elif kind == "WorkloadEntry":
        check_workload_entry(spec)
    elif isinstance(spec, r.WorkloadGroup):
        check_workload_group(spec)
    elif isinstance(spec, r.ProxyConfigOfWorkloads):
        check_proxy_config(spec)
    elif kind == "Sidecar":
        check_sidecar(spec)
    elif isinstance(spec, r.Gateway):
        check_gateway(spec)
    elif kind == "BackendTrafficPolicy":
        check_backend_policy(spec)
    elif kind == "EnvoyFilter":
        check_envoy_filter(spec)
        envoy_filters.patches(spec)
    elif kind == "RateLimit":
        check_rate_limit(spec)
    elif key == r.MESH_CONFIG_KEY:
        mesh_config(spec)
    elif kind in ("Pod", "Endpoints", "EndpointSlice"):
        check_addresses(spec)
    elif isinstance(spec, r.PeerAuthentication | r.AuthorizationPolicy | r.RequestAuthentication):
        check_security(spec)
    elif isinstance(spec, r.Telemetry):
        check_telemetry(spec)
