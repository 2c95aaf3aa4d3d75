"""A cluster's objects are in force as they are there, whatever becomes of the API server, of CRDs and of rights."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kube.api_server import ApiServer, crd
from meshlib.controlplane.gathered import Update
from meshlib.controlplane.in_force import key_of
from meshlib.controlplane.kubernetes import CRDS, WATCHED, KubernetesSource
from meshlib.controlplane.sources import ObjectStore
from meshlib.istio.folder import Contents
from meshlib.istio.parse import parse_text, parse_value
from meshlib.istio.services import Registry
from meshlib.istio.translate import translate
from meshlib.kube.client import KubeClient
from meshlib.kube.settings import KubeSettings
from meshlib.model import Action, Health, Node, Workload

PATIENCE = 30.0
VIRTUAL_SERVICES = crd("VirtualService", "virtualservices", "networking.istio.io", "v1", "v1beta1")
CORE = """
apiVersion: v1
kind: Node
metadata:
  name: node-1
  labels: {topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: eu-1}
---
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec:
  selector: {app: reviews}
  ports: [{name: http, port: 9080, targetPort: 9080}]
---
apiVersion: v1
kind: Pod
metadata: {name: reviews-1, labels: {app: reviews, version: v1}}
spec:
  nodeName: node-1
  serviceAccountName: bookinfo-reviews
  containers: [{name: app, image: reviews, ports: [{containerPort: 9080}]}]
status:
  podIP: 10.0.0.1
  phase: Running
  conditions: [{type: Ready, status: "True", lastProbeTime: null}]
"""


def virtual_service(name: str = "reviews", **spec: Any) -> dict[str, Any]:
    route = [{"route": [{"destination": {"host": name}}]}]
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": name},
        "spec": {"hosts": [name], "http": route, **spec},
    }


def endpoint(address: str, **more: Any) -> dict[str, Any]:
    return {"addresses": [address], **more}


def endpoint_slice(name: str, *endpoints: dict[str, Any], family: str = "IPv4") -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "reviews"}},
        "addressType": family,
        "ports": [{"name": "http", "port": 9080}],
        "endpoints": list(endpoints),
    }


class Following:
    """A store that follows an API server."""

    def __init__(self, api: ApiServer, client: KubeClient) -> None:
        self.api = api
        self.store = ObjectStore()
        self.published = 0
        self._changed = asyncio.Event()
        self.source = KubernetesSource(client, self._publish, first_pause=0.01, absent=PATIENCE)

    def _publish(self, update: Update) -> None:
        self.store.update_kubernetes(update)
        self.published += 1
        self._changed.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not is_so():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 0.05)

    async def watching(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.api.watched("services", "endpointslices", "pods", "nodes")

    def names(self, kind: str) -> list[str]:
        return sorted(each.name for each in self.store.objects() if each.kind == kind)

    def endpoints(self, *workloads: Workload) -> dict[str, Any]:
        """What a translation makes of it: endpoints of reviews:9080 by address."""
        service = Registry(self.store.objects(), workloads).services["reviews.default.svc.cluster.local"]
        return {each.endpoint.address: each for each in service.instances[9080]}


@pytest.fixture
async def api(any_api: ApiServer) -> AsyncIterator[ApiServer]:
    async with any_api as server:
        yield server


@contextlib.asynccontextmanager
async def following(api: ApiServer) -> AsyncIterator[Following]:
    async with KubeClient(KubeSettings(api.url)) as client:
        found = Following(api, client)
        task = asyncio.create_task(found.source.run())
        try:
            yield found
        finally:
            task.cancel()
            await asyncio.wait((task,))


async def test_the_cluster_is_told_whole_once_all_kinds_were_listed(api: ApiServer) -> None:
    """A first word without the rules would be a mesh without rules."""
    api.put_all(CORE)
    api.put(VIRTUAL_SERVICES)
    api.put(virtual_service())
    api.list_gate.clear()
    async with following(api) as found:
        async with asyncio.timeout(PATIENCE):
            await api.asked(len(WATCHED))
        assert found.published == 0
        api.list_gate.set()
        await found.until(lambda: found.published > 0)
        assert found.published == 1
        assert found.names("Pod") == ["reviews-1"]
        assert found.names("VirtualService") == ["reviews"]
        assert {each.origin for each in found.store.stored()} == {"kubernetes"}


async def test_what_may_not_be_listed_is_waited_for(api: ApiServer) -> None:
    """Taken for absent, AuthorizationPolicies that a role forgot would let everybody in."""
    api.put(crd("AuthorizationPolicy", "authorizationpolicies", "security.istio.io", "v1"))
    api.forbidden.add("authorizationpolicies")
    async with following(api) as found:
        await found.watching()
        await found.until(lambda: bool(found.source.troubles()))
        assert found.published == 0
        assert "authorizationpolicies.security.istio.io" in str(found.source.troubles()[0])
        api.forbidden.clear()
        await found.until(lambda: found.published > 0)
        assert not found.source.troubles()


async def test_a_policy_that_was_never_usable_is_one_that_refuses(api: ApiServer) -> None:
    """Until it is mended; then its last good form stays, as every object's."""
    api.put(crd("AuthorizationPolicy", "authorizationpolicies", "security.istio.io", "v1"))
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "reviews"},
        "spec": {"selector": {"matchLabels": {"app": "reviews"}}, "actoin": "DENY"},
    }
    api.put(policy)
    node = Node("n", Workload("reviews-1", "default", "reviews", "reviews", labels=(("app", "reviews"),)))

    def rules() -> list[Action]:
        return [each.action for each in translate(found.store.objects(), (), node).snapshot.inbound[0].access.rules]

    async with following(api) as found:
        await found.until(lambda: rules() == [Action.DENY])
        assert "spec.actoin: there is no such field; until it is mended or removed, every call" in str(
            found.store.problems()[0]
        )
        api.put({**policy, "spec": {"action": "ALLOW"}})
        await found.until(lambda: rules() == [Action.ALLOW])
        api.put(policy)
        await found.until(lambda: bool(found.store.problems()))
        assert rules() == [Action.ALLOW]


async def test_a_right_that_is_taken_away_empties_nothing(api: ApiServer) -> None:
    """A role edited wrongly is a trouble that problems tell of; the rules stay."""
    api.put(VIRTUAL_SERVICES)
    api.put(virtual_service())
    async with following(api) as found:
        await found.until(lambda: found.names("VirtualService") == ["reviews"])
        async with asyncio.timeout(PATIENCE):
            await api.watched("virtualservices")
        api.forbidden.add("virtualservices")
        api.compact()
        api.reset_watches()
        await found.until(lambda: any("403" in str(each) for each in found.source.troubles()))
        assert found.names("VirtualService") == ["reviews"]


async def test_a_crd_that_is_installed_later_is_followed_at_once(api: ApiServer) -> None:
    """Not at the next look half a minute later: the CRDs themselves are watched. With the CRD goes what it held."""
    async with following(api) as found:
        await found.until(lambda: found.published > 0)
        assert not found.source.troubles()
        async with asyncio.timeout(PATIENCE):
            await api.watched("customresourcedefinitions")
        api.put(VIRTUAL_SERVICES)
        api.put(virtual_service())
        await found.until(lambda: found.names("VirtualService") == ["reviews"])
        async with asyncio.timeout(PATIENCE):
            await api.watched("virtualservices")
        api.remove("customresourcedefinitions", "virtualservices.networking.istio.io")
        await found.until(lambda: found.names("VirtualService") == [])


async def test_an_older_version_of_a_crd_is_read_too(api: ApiServer) -> None:
    """A cluster with an old Istio serves v1beta1 and v1alpha3 only."""
    api.put(crd("DestinationRule", "destinationrules", "networking.istio.io", "v1beta1"))
    rule = {"apiVersion": "networking.istio.io/v1beta1", "kind": "DestinationRule", "metadata": {"name": "reviews"}}
    api.put({**rule, "spec": {"host": "reviews"}})
    async with following(api) as found:
        await found.until(lambda: found.names("DestinationRule") == ["reviews"])


async def test_a_bad_edit_is_a_problem_and_the_last_good_form_stays(api: ApiServer) -> None:
    """kubectl takes what the CRD's schema lets through; nobody's calls may depend on that."""
    api.put(VIRTUAL_SERVICES)
    api.put(virtual_service(exportTo=["."]))
    async with following(api) as found:
        await found.until(lambda: found.names("VirtualService") == ["reviews"])
        async with asyncio.timeout(PATIENCE):
            await api.watched("virtualservices")
        api.put(virtual_service(http=[{"rout": []}]))
        await found.until(lambda: bool(found.store.problems()))
        (problem,) = found.store.problems()
        assert str(problem).startswith(
            "kubernetes: VirtualService default/reviews: spec.http[0].rout: there is no such"
        )
        (kept,) = [each for each in found.store.objects() if each.kind == "VirtualService"]
        assert kept.raw["spec"]["exportTo"] == ["."]
        api.put(virtual_service(exportTo=["*"]))
        await found.until(lambda: not found.store.problems())


@pytest.mark.parametrize("how", ["reset", "end", "gone", "restart"])
async def test_nothing_is_missed_while_the_connection_is_away(api: ApiServer, how: str) -> None:
    """Watches break, end, expire with 410, and the server restarts: what changed meanwhile is in force afterwards."""
    api.put_all(CORE)
    async with following(api) as found:
        await found.until(lambda: found.names("Pod") == ["reviews-1"])
        await found.watching()
        if how == "restart":
            await api.stop()
        api.put(endpoint_slice("reviews-a", endpoint("10.0.0.1")))
        api.remove("pods", "reviews-1")
        if how == "gone":
            api.compact()
        if how == "end":
            api.end_watches()
        elif how == "restart":
            await api.start()
        else:
            api.reset_watches()
        await found.until(lambda: found.names("Pod") == [] and found.names("EndpointSlice") == ["reviews-a"])


async def test_what_a_mesh_does_not_look_at_wakes_nobody(api: ApiServer) -> None:
    """A node tells its memory, a pod its probes' times, ourselves a status: thousands of times a day."""
    api.put_all(CORE)
    api.put(VIRTUAL_SERVICES)
    api.put(virtual_service())
    async with following(api) as found:
        await found.until(lambda: found.published > 0)
        await found.watching()
        async with asyncio.timeout(PATIENCE):
            await api.watched("virtualservices")
        pod = api.find("pods", "reviews-1")
        assert pod is not None
        pod["status"]["conditions"][0]["lastProbeTime"] = "2026-01-01T00:00:00Z"
        api.put(pod)
        api.put({**virtual_service(), "status": {"validationMessages": []}})
        node = api.find("nodes", "node-1")
        assert node is not None
        api.put({**node, "status": {"allocatable": {"memory": "1Gi"}}})
        before = found.published
        api.put(virtual_service("ratings"))  # what comes last on the same watch says that the others have come
        await found.until(lambda: "ratings" in found.names("VirtualService"))
        assert found.published == before + 1


async def test_endpoint_slices_say_who_gets_calls(api: ApiServer) -> None:
    """Ready, unknown, not ready, and serving while it terminates: several slices of one service together."""
    api.put_all(CORE)
    ready, leaving = {"ready": True}, {"ready": False, "serving": True, "terminating": True}
    one = endpoint_slice(
        "reviews-a",
        endpoint("10.0.0.1", conditions=ready, targetRef={"kind": "Pod", "name": "reviews-1"}),
        endpoint("10.0.0.2", conditions={"ready": False}),
        endpoint("10.0.0.3", conditions=leaving),
    )
    api.put(one)
    api.put(endpoint_slice("reviews-b", endpoint("10.0.1.1", nodeName="node-1"), endpoint("10.0.1.2", zone="eu-9")))
    async with following(api) as found:
        await found.until(lambda: found.published > 0)
        endpoints = found.endpoints()
        assert sorted(endpoints) == ["10.0.0.1", "10.0.0.3", "10.0.1.1", "10.0.1.2"]
        assert endpoints["10.0.0.3"].endpoint.health is Health.DRAINING
        assert str(endpoints["10.0.0.1"].endpoint.locality) == "eu/eu-1"
        assert str(endpoints["10.0.1.1"].endpoint.locality) == "eu/eu-1"
        assert endpoints["10.0.1.2"].endpoint.locality.zone == "eu-9"
        assert endpoints["10.0.0.1"].labels["version"] == "v1"
        assert endpoints["10.0.0.1"].account == ("default", "bookinfo-reviews")
        await found.watching()
        one["endpoints"][1]["conditions"] = ready
        api.put(one)
        await found.until(lambda: "10.0.0.2" in found.endpoints())


async def test_a_dual_stack_pod_counts_once(api: ApiServer) -> None:
    """It stands in a slice of each family; the service's first family is the one that is called."""
    api.put_all(CORE)
    api.put(endpoint_slice("reviews-4", endpoint("10.0.0.1")))
    api.put(endpoint_slice("reviews-6", endpoint("fd00::1"), family="IPv6"))
    async with following(api) as found:
        await found.until(lambda: found.published > 0)
        assert sorted(found.endpoints()) == ["10.0.0.1"]
        await found.watching()
        service = api.find("services", "reviews")
        assert service is not None
        service["spec"] |= {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6", "IPv4"]}
        api.put(service)
        await found.until(lambda: sorted(found.endpoints()) == ["fd00::1"])


async def test_a_pod_that_runs_and_is_not_ready_gets_no_calls(api: ApiServer) -> None:
    """Its process has an open stream, and its probe fails: Kubernetes' word counts, ours only says that it has mTLS."""
    api.put_all(CORE)
    api.put(endpoint_slice("reviews-a", endpoint("10.0.0.1", conditions={"ready": False})))
    labels = (("app", "reviews"), ("security.istio.io/tlsMode", "istio"))
    running = Workload("reviews-1", labels=labels, address="10.0.0.1", port=9080)
    elsewhere = Workload("reviews-vm", service="reviews", labels=labels, address="192.0.2.7", port=9080)
    async with following(api) as found:
        await found.until(lambda: found.published > 0)
        assert sorted(found.endpoints(running, elsewhere)) == ["192.0.2.7"]
        await found.watching()
        api.put(endpoint_slice("reviews-a", endpoint("10.0.0.1", conditions={"ready": True})))
        await found.until(lambda: "10.0.0.1" in found.endpoints(running))
        assert found.endpoints(running)["10.0.0.1"].endpoint.is_meshed
        assert not found.endpoints()["10.0.0.1"].endpoint.is_meshed


async def test_services_without_pods_of_their_own(api: ApiServer) -> None:
    """ExternalName is a name to look up; a headless service is its pods."""
    api.put_all(CORE)
    api.put_all("""
apiVersion: v1
kind: Service
metadata: {name: books}
spec: {type: ExternalName, externalName: books.example.com, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {clusterIP: None, selector: {app: reviews}, ports: [{name: http, port: 9080}]}
""")
    api.put(endpoint_slice("reviews-a", endpoint("10.0.0.1"), endpoint("10.0.0.2")))
    async with following(api) as found:
        await found.until(lambda: found.published > 0)
        services = Registry(found.store.objects(), ()).services
        (books,) = services["books.default.svc.cluster.local"].instances[80]
        assert books.endpoint.authority == "books.example.com:80"
        assert sorted(found.endpoints()) == ["10.0.0.1", "10.0.0.2"]


async def test_the_mesh_config_is_read_and_no_other_config_map(api: ApiServer) -> None:
    """They are everybody's, and may hold anything."""
    maps = [("istio-system", "istio"), ("istio-system", "other"), ("default", "istio")]
    for namespace, name in maps:
        metadata = {"name": name, "namespace": namespace}
        api.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"mesh": "connectTimeout: 3s"}})
    async with following(api) as found:
        await found.until(lambda: found.published > 0)
        told = [(each.namespace, each.name) for each in found.store.objects() if each.kind == "ConfigMap"]
        assert told == [("istio-system", "istio")]


def test_the_role_on_the_page_allows_all_that_is_watched() -> None:
    """And nothing else: no Secret, and no verb that changes anything."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "kubernetes.md").read_text()
    text = page.partition("## What it may do")[2].partition("```yaml")[2].partition("```")[0]
    cluster_role, role = yaml.safe_load_all(text)
    rules = [*cluster_role["rules"], *role["rules"]]
    for resource, namespace, _ in (*WATCHED, (CRDS, "", {})):
        allowed = [
            rule
            for rule in (role if namespace else cluster_role)["rules"]
            if resource.group in rule["apiGroups"] and {resource.plural, "*"} & set(rule["resources"])
        ]
        assert [each["verbs"] for each in allowed] == [["list", "watch"]], resource.title
    assert {verb for rule in rules for verb in rule["verbs"]} == {"list", "watch", "create"}
    assert [rule["resources"] for rule in rules if rule["verbs"] == ["create"]] == [["tokenreviews"]]
    assert not [rule for rule in rules if "secrets" in rule["resources"]]


def test_kubernetes_wins_over_folders_and_what_is_applied_over_both() -> None:
    """And it is deleted where it is."""
    store = ObjectStore()
    text = "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: a}, spec: {host: %s}}"
    in_folder = parse_text(text % "folder", "a.yaml")
    store.set_folder(in_folder.objects)
    cluster = parse_value(parse_text(text % "cluster", "").objects[0].raw, "kubernetes")
    store.update_kubernetes(Update.of_all(Contents(cluster.objects)))
    assert [each.spec.host for each in store.objects() if hasattr(each.spec, "host")] == ["cluster"]
    store.apply(text % "applied", "b.yaml")
    assert [each.origin for each in store.stored()] == ["applied"]
    (gone,) = store.delete_named("dr", "default", "a").results
    assert (gone.outcome, gone.note) == ("deleted", "Kubernetes has it, and there it can be deleted")
    assert [each.origin for each in store.stored()] == ["kubernetes"]
    (there,) = store.delete_named("dr", "default", "a").results
    assert there.note == "Kubernetes has it, and there it can be deleted"
    store.update_kubernetes(Update({key_of(each): None for each in cluster.objects}))
    assert [each.origin for each in store.stored()] in ([], ["folder"])
