"""A Kubernetes API server on a real socket, as far as we ask it: the same paths, verbs, versions, errors and watches.

One revision counts all writes, as etcd's does. Lists are pages of one moment; watches go on from a revision, or end
with 410 where the history has been compacted. What a real one does of itself now and then (bookmarks, ended and reset
watches, compaction, slow lists, restarts) tests do here by a method, at the moment they choose.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from aiohttp import web

from kube.front import Front, Refusal

Object = dict[str, Any]
Place = tuple[str, str]
"""(group, plural)"""


@dataclass(eq=False)
class Kind:
    kind: str
    group: str
    plural: str
    versions: tuple[str, ...]
    namespaced: bool = True
    has_status: bool = False


BUILT_IN = (
    Kind("Namespace", "", "namespaces", ("v1",), namespaced=False),
    Kind("Node", "", "nodes", ("v1",), namespaced=False),
    Kind("Service", "", "services", ("v1",), has_status=True),
    Kind("Pod", "", "pods", ("v1",), has_status=True),
    Kind("Secret", "", "secrets", ("v1",)),
    Kind("ConfigMap", "", "configmaps", ("v1",)),
    Kind("ServiceAccount", "", "serviceaccounts", ("v1",)),
    Kind("EndpointSlice", "discovery.k8s.io", "endpointslices", ("v1",)),
    Kind("Lease", "coordination.k8s.io", "leases", ("v1",)),
    Kind("Deployment", "apps", "deployments", ("v1",), has_status=True),
    Kind("NetworkPolicy", "networking.k8s.io", "networkpolicies", ("v1",)),
    Kind("PodDisruptionBudget", "policy", "poddisruptionbudgets", ("v1",)),
    Kind("HorizontalPodAutoscaler", "autoscaling", "horizontalpodautoscalers", ("v2",)),
    Kind("Role", "rbac.authorization.k8s.io", "roles", ("v1",)),
    Kind("RoleBinding", "rbac.authorization.k8s.io", "rolebindings", ("v1",)),
    Kind("ClusterRole", "rbac.authorization.k8s.io", "clusterroles", ("v1",), namespaced=False),
    Kind("ClusterRoleBinding", "rbac.authorization.k8s.io", "clusterrolebindings", ("v1",), namespaced=False),
    Kind(
        "MutatingWebhookConfiguration", "admissionregistration.k8s.io", "mutatingwebhookconfigurations", ("v1",), False
    ),
    Kind(
        "ValidatingWebhookConfiguration",
        "admissionregistration.k8s.io",
        "validatingwebhookconfigurations",
        ("v1",),
        namespaced=False,
    ),
    Kind("CustomResourceDefinition", "apiextensions.k8s.io", "customresourcedefinitions", ("v1",), namespaced=False),
)


def crd(kind: str, plural: str, group: str, *versions: str) -> Object:
    """A CustomResourceDefinition that takes anything, with a status subresource."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    metadata: Object = {"name": f"{plural}.{group}"}
    if group.endswith(".k8s.io"):  # names of Kubernetes itself are given to nobody without it
        metadata["annotations"] = {"api-approved.kubernetes.io": "unapproved, a test's own"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata,
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
            "versions": [
                {
                    "name": each,
                    "served": True,
                    "storage": number == 0,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                }
                for number, each in enumerate(versions)
            ],
        },
    }


class Change(NamedTuple):
    revision: int
    place: Place
    type: str
    object: Object


@dataclass(eq=False)
class Watch:
    place: Place
    version: str
    chosen: Callable[[Object], bool]
    response: web.StreamResponse
    request: web.Request
    queue: asyncio.Queue[Object | None] = field(default_factory=asyncio.Queue)

    @property
    def plural(self) -> str:
        return self.place[1]


class ApiServer(Front[Watch]):
    """`async with ApiServer() as api:` serves on 127.0.0.1 until the end."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(tls)
        self.kinds = {(each.group, each.plural): each for each in BUILT_IN}
        self.contents: dict[Place, dict[Place, Object]] = {place: {} for place in self.kinds}
        self.revision = 100
        self._compacted = 0
        self._history: list[Change] = []
        self._snapshots: dict[tuple[Place, str], list[Object]] = {}
        self._serial = 0
        self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}})

    # What happens to it

    def compact(self) -> None:
        """Forget all history: whoever is behind has to list again. Next pages can't be had any more either."""
        self._compacted = self.revision
        self._history.clear()
        self._snapshots.clear()

    def restore(self, revision: int) -> None:
        """etcd comes back from a backup: versions count on from an earlier one, and what came after is lost."""
        self.revision, self._compacted = revision, 0
        self._history.clear()

    def bookmark(self) -> str:
        """To all who watch. Returns the version that it tells."""
        for watch in self._watches:
            kind = self.kinds[watch.place]
            metadata = {"resourceVersion": str(self.revision)}
            watch.queue.put_nowait(
                {"type": "BOOKMARK", "object": {"kind": kind.kind, "apiVersion": "v1", "metadata": metadata}}
            )
        return str(self.revision)

    def tell(self, plural: str, event: Object) -> None:
        """Send this event to those who watch, whatever it says."""
        for watch in self._watches:
            if watch.place[1] == plural:
                watch.queue.put_nowait(event)

    # Objects, for tests

    def put(self, given: Object) -> Object:
        """Create or replace, with nothing of the conditions that HTTP has. A namespace that lacks is made, too."""
        given = copy.deepcopy(given)
        place = self._place_of(given)
        metadata = given["metadata"]
        if self.kinds[place].namespaced:
            home = metadata.setdefault("namespace", "default")
            if ("", home) not in self.contents["", "namespaces"]:
                self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": home}})
        known = self.contents[place].get((metadata.get("namespace", ""), metadata["name"]))
        return self._store(place, given, known)

    def put_all(self, text: str) -> None:
        for given in yaml.safe_load_all(text):
            if given:
                self.put(given)

    def remove(self, plural: str, name: str, namespace: str = "default") -> None:
        place = next(each for each in self.kinds if each[1] == plural)
        self._remove(place, (namespace if self.kinds[place].namespaced else "", name))

    def find(self, plural: str, name: str, namespace: str = "default") -> Object | None:
        place = next(each for each in self.kinds if each[1] == plural)
        return self.contents[place].get((namespace if self.kinds[place].namespaced else "", name))

    def everything(self) -> dict[tuple[str, str, str], Object]:
        """All objects, by kind, namespace and name."""
        return {
            (self.kinds[place].kind, namespace, name): each
            for place, found in self.contents.items()
            if place in self.kinds
            for (namespace, name), each in found.items()
        }

    def _place_of(self, given: Object) -> Place:
        group = given["apiVersion"].rpartition("/")[0]
        return next(p for p, kind in self.kinds.items() if kind.kind == given["kind"] and p[0] == group)

    def _store(self, place: Place, given: Object, known: Object | None) -> Object:
        self.revision += 1
        self._serial += 1
        metadata = given["metadata"]
        old = known["metadata"] if known else {}
        metadata["uid"] = old.get("uid") or f"00000000-0000-0000-0000-{self._serial:012}"
        metadata["creationTimestamp"] = (
            old.get("creationTimestamp") or metadata.get("creationTimestamp") or "2026-01-01T00:00:00Z"
        )
        changed = known is None or known.get("spec") != given.get("spec")
        metadata["generation"] = int(old.get("generation", 0)) + 1 if changed else old.get("generation", 1)
        metadata["resourceVersion"] = str(self.revision)
        self.contents[place][metadata.get("namespace", ""), metadata["name"]] = given
        if place[1] == "customresourcedefinitions":
            self._define(given)
        self._happened(place, "MODIFIED" if known else "ADDED", given)
        return given

    def _remove(self, place: Place, key: Place) -> Object:
        given = self.contents[place].pop(key)
        self.revision += 1
        last = copy.deepcopy(given)
        last["metadata"]["resourceVersion"] = str(self.revision)
        self._happened(place, "DELETED", last)
        if place[1] == "customresourcedefinitions":
            spec = given["spec"]
            gone = (spec["group"], spec["names"]["plural"])
            for each in list(self.contents.get(gone, ())):
                self._remove(gone, each)
            for watch in [watch for watch in self._watches if watch.place == gone]:
                watch.queue.put_nowait(None)
            self.kinds.pop(gone, None)
        if place[1] == "namespaces":
            for other, found in self.contents.items():
                for each in [each for each in found if each[0] == key[1]]:
                    self._remove(other, each)
        return last

    def _define(self, given: Object) -> None:
        spec, names = given["spec"], given["spec"]["names"]
        if spec["group"].endswith(".k8s.io"):
            # "protected groups must have approval annotation"
            assert "api-approved.kubernetes.io" in (given["metadata"].get("annotations") or {}), spec["group"]
        versions = tuple(each["name"] for each in spec["versions"] if each.get("served"))
        has_status = any("status" in (each.get("subresources") or {}) for each in spec["versions"])
        place = (spec["group"], names["plural"])
        self.kinds[place] = Kind(
            names["kind"], spec["group"], names["plural"], versions, spec["scope"] == "Namespaced", has_status
        )
        self.contents.setdefault(place, {})
        given["status"] = {"conditions": [{"type": "Established", "status": "True"}]}

    def _happened(self, place: Place, kind: str, given: Object) -> None:
        change = Change(self.revision, place, kind, copy.deepcopy(given))
        self._history.append(change)
        for watch in self._watches:
            if watch.place == place and watch.chosen(change.object):
                watch.queue.put_nowait(self._event(change, watch.version))

    def _event(self, change: Change, version: str) -> Object:
        return {"type": change.type, "object": self._shown(change.place, change.object, version)}

    def _shown(self, place: Place, given: Object, version: str) -> Object:
        kind = self.kinds.get(place)
        group = place[0]
        name = kind.kind if kind else given["kind"]
        return {**given, "apiVersion": f"{group}/{version}" if group else version, "kind": name}

    # HTTP

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        return await self._route(request, request.path.strip("/").split("/"))

    async def _route(self, request: web.Request, parts: list[str]) -> web.StreamResponse:
        if parts == ["version"]:
            return web.json_response({"major": "1", "minor": "34", "gitVersion": "v1.34.0"})
        if parts == ["apis"] or (parts[0] == "apis" and len(parts) in (2, 3)):
            return web.json_response(self._discovery(parts[1:]))
        if parts[0] == "api" and len(parts) >= 2:
            group, version, rest = "", parts[1], parts[2:]
        elif parts[0] == "apis" and len(parts) >= 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        namespace = ""
        if rest[:1] == ["namespaces"] and len(rest) >= 3 and rest[2] != "status":
            namespace, rest = rest[1], rest[2:]
        if group == "authentication.k8s.io" and rest == ["tokenreviews"]:
            return await self._review(request)
        place = (group, rest[0] if rest else "")
        kind = self.kinds.get(place)
        if kind is None or version not in kind.versions:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        self._check_right(kind.plural)
        if len(rest) == 1 and request.method == "GET":
            chosen = _selector(request, namespace)
            if request.query.get("watch") in ("true", "1"):
                return await self._watch(request, place, version, chosen)
            return await self._list(request, kind, version, chosen)
        if len(rest) == 1 and request.method == "POST":
            body = await request.json()
            self._check_namespace(namespace)
            return web.json_response(self._create(kind, namespace, body, version), status=201)
        if len(rest) in (2, 3):
            return await self._one(request, kind, namespace, rest[1], rest[2] if len(rest) == 3 else "", version)
        raise Refusal(405, "MethodNotAllowed")

    def _discovery(self, parts: list[str]) -> Object:
        groups: dict[str, list[str]] = {}
        for kind in self.kinds.values():
            if kind.group:
                found = groups.setdefault(kind.group, [])
                found += [each for each in kind.versions if each not in found]
        if not parts:
            return {"kind": "APIGroupList", "groups": [{"name": name} for name in groups]}
        if parts[0] not in groups or (len(parts) == 2 and parts[1] not in groups[parts[0]]):
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        if len(parts) == 1:
            versions = [{"groupVersion": f"{parts[0]}/{each}", "version": each} for each in groups[parts[0]]]
            return {"kind": "APIGroup", "name": parts[0], "versions": versions, "preferredVersion": versions[0]}
        resources = [
            {"name": kind.plural, "kind": kind.kind, "namespaced": kind.namespaced}
            for kind in self.kinds.values()
            if kind.group == parts[0] and parts[1] in kind.versions
        ]
        return {"kind": "APIResourceList", "groupVersion": "/".join(parts), "resources": resources}

    async def _review(self, request: web.Request) -> web.Response:
        body = await request.json()
        user = self.tokens.get(body["spec"].get("token", ""))
        audiences = body["spec"].get("audiences") or []
        known = {"authenticated": True, "user": {"username": user}, "audiences": audiences}
        status = known if user else {"error": "invalid bearer token"}
        return web.json_response({**body, "status": status}, status=201)

    async def _list(
        self, request: web.Request, kind: Kind, version: str, chosen: Callable[[Object], bool]
    ) -> web.Response:
        await self.list_gate.wait()
        token = request.query.get("continue", "")
        place = (kind.group, kind.plural)
        if token:
            at, start = json.loads(base64.b64decode(token))
            if (place, at) not in self._snapshots or self.forgets_pages:
                raise Refusal(410, "Expired", "The provided continue parameter is too old")
            items = self._snapshots[place, at]
        else:
            start, at = 0, str(self.revision)
            items = [copy.deepcopy(each) for _, each in sorted(self.contents[place].items()) if chosen(each)]
        asked = int(request.query.get("limit", 0))
        # A server may give less than a page, but a list without a limit is whole.
        end = start + min(asked, self.page) if asked else len(items)
        metadata: Object = {"resourceVersion": at}
        if end < len(items):
            self._snapshots[place, at] = items
            metadata["continue"] = base64.b64encode(json.dumps([at, end]).encode()).decode()
            metadata["remainingItemCount"] = len(items) - end
        shown = [self._shown(place, each, version) for each in items[start:end]]
        for each in shown:
            each.pop("kind")
            each.pop("apiVersion")
        api_version = f"{kind.group}/{version}" if kind.group else version
        return web.json_response(
            {"kind": f"{kind.kind}List", "apiVersion": api_version, "metadata": metadata, "items": shown}
        )

    async def _watch(
        self, request: web.Request, place: Place, version: str, chosen: Callable[[Object], bool]
    ) -> web.StreamResponse:
        since = int(request.query.get("resourceVersion") or 0)
        if since < self._compacted:
            raise Refusal(410, "Expired", f"too old resource version: {since} ({self._compacted})")
        response = web.StreamResponse(headers={"content-type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        watch = Watch(place, version, chosen, response, request)
        # No await between these: nothing can happen in between.
        for change in self._history:
            if change.place == place and change.revision > since and chosen(change.object):
                watch.queue.put_nowait(self._event(change, version))
        try:
            await self._opened(watch)
            while (event := await watch.queue.get()) is not None:
                await response.write(json.dumps(event).encode() + b"\n")
        except ConnectionError:
            pass
        finally:
            self._watches.discard(watch)
        return response

    def _check_namespace(self, name: str) -> None:
        if name and ("", name) not in self.contents["", "namespaces"]:
            raise Refusal(404, "NotFound", f'namespaces "{name}" not found')

    def _create(self, kind: Kind, namespace: str, body: Object, version: str) -> Object:
        place = (kind.group, kind.plural)
        metadata = body.setdefault("metadata", {})
        if kind.namespaced:
            metadata["namespace"] = namespace
        key = (metadata.get("namespace", ""), metadata["name"])
        if key in self.contents[place]:
            raise Refusal(409, "AlreadyExists", f'{kind.plural} "{key[1]}" already exists')
        return self._shown(place, self._store(place, body, None), version)

    async def _one(
        self, request: web.Request, kind: Kind, namespace: str, name: str, subresource: str, version: str
    ) -> web.Response:
        place, key = (kind.group, kind.plural), (namespace, name)
        known = self.contents[place].get(key)
        applies = request.content_type == "application/apply-patch+yaml"
        if known is None and applies:
            self._check_namespace(namespace)
        if known is None and not applies:
            raise Refusal(404, "NotFound", f'{kind.plural} "{name}" not found')
        if subresource and not (subresource == "status" and kind.has_status):
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        if request.method == "GET":
            assert known is not None
            return web.json_response(self._shown(place, known, version))
        if request.method == "DELETE":
            assert known is not None
            if known["metadata"].get("finalizers"):
                ending = copy.deepcopy(known)
                ending["metadata"].setdefault("deletionTimestamp", "2026-01-01T00:00:00Z")
                return web.json_response(self._shown(place, self._store(place, ending, known), version))
            return web.json_response(self._remove(place, key))
        body = yaml.safe_load(await request.text()) if applies else await request.json()
        if request.method == "PUT":
            assert known is not None
            stated = (body.get("metadata") or {}).get("resourceVersion")
            if stated and stated != known["metadata"]["resourceVersion"]:
                raise Refusal(409, "Conflict", f'Operation cannot be fulfilled on {kind.plural} "{name}"')
            new = body
        elif request.method == "PATCH":
            if applies and not request.query.get("fieldManager"):
                raise Refusal(400, "BadRequest", "fieldManager is required for apply patch")
            base: Object = known or {"metadata": {"name": name, **({"namespace": namespace} if namespace else {})}}
            stated = (body.get("metadata") or {}).get("resourceVersion")
            if stated and known and stated != known["metadata"]["resourceVersion"]:
                raise Refusal(409, "Conflict", f'Operation cannot be fulfilled on {kind.plural} "{name}"')
            new = _merged(copy.deepcopy(base), body)
            if applies:
                new["metadata"]["managedFields"] = _managed(base, body, request.query["fieldManager"])
        else:
            raise Refusal(405, "MethodNotAllowed")
        if known is not None and kind.has_status:
            if subresource:
                new = {**copy.deepcopy(known), "status": new.get("status", {})}
            elif "status" in known:
                new["status"] = known["status"]
            else:
                new.pop("status", None)
        if known is not None and _without_version(new) == _without_version(known):
            return web.json_response(self._shown(place, known, version))  # etcd is not written for nothing
        if known is not None and known["metadata"].get("deletionTimestamp") and not new["metadata"].get("finalizers"):
            return web.json_response(self._shown(place, self._remove(place, key), version))
        created = 200 if known else 201
        return web.json_response(self._shown(place, self._store(place, new, known), version), status=created)


def _without_version(given: Object) -> Object:
    metadata = {key: each for key, each in given["metadata"].items() if key not in ("resourceVersion", "generation")}
    return {**given, "metadata": metadata, "apiVersion": "", "kind": ""}


def _managed(base: Object, body: Object, manager: str) -> list[Object]:
    """Who has said which part of it, as far as its top: others' words stay theirs."""
    others = [each for each in base["metadata"].get("managedFields", ()) if each["manager"] != manager]
    fields = {f"f:{key}": {} for key in body if key not in ("apiVersion", "kind")}
    return [*others, {"manager": manager, "operation": "Apply", "fieldsType": "FieldsV1", "fieldsV1": fields}]


def _merged(base: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    base = base if isinstance(base, dict) else {}
    for key, value in patch.items():
        if value is None:
            base.pop(key, None)
        else:
            base[key] = _merged(base.get(key), value)
    return base


def _selector(request: web.Request, namespace: str) -> Callable[[Object], bool]:
    fields = dict(part.split("=", 1) for part in request.query.get("fieldSelector", "").split(",") if part)
    labels = dict(part.split("=", 1) for part in request.query.get("labelSelector", "").split(",") if part)

    def chosen(given: Object) -> bool:
        metadata = given["metadata"]
        own = metadata.get("labels") or {}
        return (
            namespace in ("", metadata.get("namespace", ""))
            and all(metadata.get(key.removeprefix("metadata.")) == value for key, value in fields.items())
            and all(own.get(key) == value for key, value in labels.items())
        )

    return chosen
