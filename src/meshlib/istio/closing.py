"""What is refused while a security object can't be read? The strictest that it can have meant, for whom it can select.

An AuthorizationPolicy that is passed over lets everybody in, so in its place stands one that lets in nobody; in a
PeerAuthentication's, one that takes nothing but mutual TLS. Such a stand-in is an Object like any other, and `unusable`
says why. It selects what the object selects as far as that can be read: without a selector that is whole, its
namespace; without a namespace, everybody. An object that never refuses (AUDIT, dry-run) has none.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.checks.security import check_selector
from meshlib.istio.documents import Document
from meshlib.istio.problems import Refused
from meshlib.state import forks

KINDS = frozenset({"AuthorizationPolicy", "RequestAuthentication", "PeerAuthentication"})
_POLICY, _TLS = "AuthorizationPolicy", "PeerAuthentication"
_MENTIONED = re.compile(rf"^[^#\n]*?\bkind[\"']?[ \t]*:[ \t]*[\"']?({'|'.join(sorted(KINDS))})\b", re.MULTILINE)
_GROUP_MENTIONED = re.compile(rf"^[^#\n]*{re.escape(r.SECURITY)}/", re.MULTILINE)
_TARGETS = ("Gateway", "Service")


def of_value(value: Any, problem: ConfigurationError, namespace: str, *, is_whole: bool = True) -> tuple[r.Object, ...]:
    """What stands for an object that `problem` is about, if it is one of these kinds. namespace: of what names none.
    is_whole: whether nothing of `value` is missing."""
    if not isinstance(value, dict):
        return ()
    kind, version = value.get("kind"), value.get("apiVersion")
    group = version.rpartition("/")[0] if isinstance(version, str) else ""
    if group != r.SECURITY and not (kind in KINDS and (not group or group.endswith("istio.io"))):
        return ()
    given, spec = value.get("metadata"), value.get("spec")
    metadata: dict[str, Any] = given if isinstance(given, dict) else {}
    content: dict[str, Any] = spec if isinstance(spec, dict) else {}
    kind = kind if isinstance(kind, str) and kind else _POLICY
    if kind == _POLICY and _never_refuses(metadata, content):
        return ()
    home = _namespace(given, namespace) if is_whole or isinstance(given, dict) else ""
    name = metadata.get("name")
    selector = _selector(content)
    targets = [] if kind == _TLS or not home else _target_refs(content, home)
    if content.get("selector") is not None and (content.get("targetRefs") or content.get("targetRef")):
        selector, targets = None, []  # only one of them can be meant, and nobody can say which
    return (
        _stand_in(
            kind,
            home,
            name if isinstance(name, str) and r.NAME.match(name) else problem.source,
            problem,
            selector,
            targets,
            {**value, "metadata": metadata},
        ),
    )


def of_document(document: Document, problem: ConfigurationError, namespace: str) -> tuple[r.Object, ...]:
    """What stands for the objects of a text that is no YAML: of what came before it broke, and what it mentions."""
    found = of_value(document.partial(), problem, namespace, is_whole=False)
    return (*found, *of_text(document.text, problem, found))


def of_text(text: str, problem: ConfigurationError, known: Iterable[r.Object] = ()) -> tuple[r.Object, ...]:
    """For everybody, by each kind that a text mentions outside comments; `known` have theirs already."""
    mentioned: list[str] = _MENTIONED.findall(text)
    for each in known:
        if each.kind in mentioned:
            mentioned.remove(each.kind)
    if not mentioned and not tuple(known) and _GROUP_MENTIONED.search(text):
        mentioned = [_POLICY]
    return tuple(_stand_in(kind, "", problem.source, problem) for kind in sorted(set(mentioned)))


def of_the_unknown(problem: ConfigurationError) -> tuple[r.Object, ...]:
    """For a file of which nothing can be read: there may be rules in it for anybody."""
    return (_stand_in(_POLICY, "", problem.source, problem),)


def missing(usable: Container[tuple[str, ...]], closed: Iterable[r.Object]) -> tuple[r.Object, ...]:
    """Those of `closed` of which there is no usable form, no two of one name. usable: the identities of those forms."""
    taken: dict[tuple[str, ...], r.Object] = {}
    for each in closed:
        if identity(each) not in usable:
            own = replace(each, name=each.source) if identity(each) in taken else each
            taken.setdefault(identity(own), own)
    return tuple(taken.values())


def told(problems: Iterable[ConfigurationError], closed: Iterable[r.Object]) -> tuple[ConfigurationError, ...]:
    """The problems, with what is refused because of each."""
    refused: dict[ConfigurationError, list[str]] = {}
    for each in closed:
        if each.unusable is not None:
            refused.setdefault(each.unusable, []).append(consequence(each))
    return tuple(
        ConfigurationError(each.source, each.object, each.field, "; ".join((each.reason, *refused[each])))
        if each in refused
        else each
        for each in problems
    )


def consequence(given: r.Object) -> str:
    """`until it is mended or removed, every call to namespace shop with app=reviews is refused`"""
    spec = given.spec
    whom = f"namespace {given.namespace}" if given.namespace not in ("", r.MESH_CONFIG_KEY[1]) else "everybody"
    labels = spec.selector.match_labels if isinstance(spec, _SPECS) and spec.selector is not None else {}
    targets = spec.target_refs if isinstance(spec, r.AuthorizationPolicy | r.RequestAuthentication) else []
    by = [f"{key}={value}" for key, value in labels.items()] or [f"{each.kind} {each.name}" for each in targets]
    if by:
        whom += f" with {', '.join(by)}" if labels else f", {', '.join(by)},"
    what = f"{whom} is called by mutual TLS only" if given.kind == _TLS else f"every call to {whom} is refused"
    return f"until it is mended or removed, {what}"


def identity(given: r.Object) -> tuple[str, ...]:
    """What tells two objects apart. (`Object.key` lacks the group: Istio and the Gateway API both have a Gateway.)"""
    return (given.api_version.rpartition("/")[0], *given.key)


_SPECS = (r.AuthorizationPolicy, r.RequestAuthentication, r.PeerAuthentication)


def _stand_in(
    kind: str,
    namespace: str,
    name: str,
    problem: ConfigurationError,
    selector: r.WorkloadSelector | None = None,
    targets: Sequence[r.TargetRef] = (),
    raw: Mapping[str, Any] | None = None,
) -> r.Object:
    spec: r.Spec
    if kind == _TLS:
        spec = r.PeerAuthentication(selector, r.MutualTls("STRICT"))
    elif kind == "RequestAuthentication":
        spec = r.RequestAuthentication(selector, target_refs=list(targets))
    else:
        spec = r.AuthorizationPolicy(selector, target_refs=list(targets), rules=[r.AccessRule()], action="DENY")
    version = f"{r.SECURITY}/v1"
    if raw is None:
        raw = {"apiVersion": version, "kind": kind, "metadata": {"name": name}}
    return r.Object(version, kind, namespace, name, problem.source, spec, raw, unusable=problem)


def _never_refuses(metadata: Mapping[str, Any], spec: Mapping[str, Any]) -> bool:
    annotations = metadata.get("annotations")
    dry_run = annotations.get("istio.io/dry-run", "") if isinstance(annotations, dict) else ""
    return spec.get("action") == "AUDIT" or str(dry_run).lower() == "true"


def _namespace(metadata: Any, default: str) -> str:
    """ "" where it can't be read; a field of another name may be a misspelled one."""
    if metadata is None:
        return default
    if not isinstance(metadata, dict):
        return ""
    found = metadata.get("namespace")
    if not found:
        return default if r.METADATA_FIELDS.issuperset(metadata) else ""
    return found if isinstance(found, str) and r.NAMESPACE.match(found) else ""


def _selector(spec: Mapping[str, Any]) -> r.WorkloadSelector | None:
    """None where there is none that is whole: then it is the whole namespace that is meant."""
    if spec.get("selector") is None:
        return None
    try:
        with forks.whole:
            found = msgspec.convert(spec["selector"], r.WorkloadSelector)
        check_selector(found)
    except (msgspec.ValidationError, Refused):
        return None
    return found if found.match_labels else None


def _target_refs(spec: Mapping[str, Any], namespace: str) -> list[r.TargetRef]:
    given = spec.get("targetRefs") or ([spec["targetRef"]] if spec.get("targetRef") is not None else [])
    try:
        with forks.whole:
            found = msgspec.convert(given, list[r.TargetRef])
    except msgspec.ValidationError:
        return []
    is_known = all(each.kind in _TARGETS and each.name and each.namespace in ("", namespace) for each in found)
    return found if is_known and not (spec.get("targetRefs") and spec.get("targetRef")) else []
