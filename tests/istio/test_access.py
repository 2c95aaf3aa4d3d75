"""Which rules hold for a workload: who selects it, what is composed of several objects, what MeshConfig adds."""

from __future__ import annotations

import pytest
from views import node, objects, service, view

from meshlib.istio.parse import parse_text
from meshlib.istio.translate import translate, view_key
from meshlib.model import (
    Access,
    Headers,
    Inbound,
    Node,
    NodeKind,
    Peer,
    Request,
    SpiffeId,
    TlsMode,
    Workload,
)
from meshlib.policy.admission import Allow
from meshlib.policy.guard import Guard

WORKLOAD = Node("n", Workload("reviews-v1", "shop", "reviews", "reviews", labels=(("app", "reviews"),)))


def security(kind: str, spec: str, name: str = "p", namespace: str = "shop", more: str = "") -> str:
    return (
        f"apiVersion: security.istio.io/v1\nkind: {kind}\n"
        f"metadata: {{name: {name}, namespace: {namespace}{more}}}\nspec: {spec}\n"
    )


def mesh_config(text: str) -> str:
    named = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
    return f"{named}data: {{mesh: '{text}'}}\n"


def inbound(*texts: str, given: Node = WORKLOAD) -> Inbound:
    return translate(objects(*texts), (), given).snapshot.inbound[0]


def admits(
    *texts: str, peer: Peer | None = None, host: str = "reviews", path: str = "/", xff: str = "", given: Node = WORKLOAD
) -> bool:
    raw = [(b"x-forwarded-for", xff.encode())] if xff else []
    request = Request("GET", "http", host, path, Headers(raw))
    who = peer or Peer(SpiffeId.of("cluster.local", "foo", "sleep"), True, "10.0.0.9", 8080)
    return isinstance(Guard([inbound(*texts, given=given)]).admit(request, who, 0.0), Allow)


# PeerAuthentication


def peers(mode: str, namespace: str, selector: str = "", name: str = "p", more: str = "", ports: str = "") -> str:
    chosen = f"selector: {{matchLabels: {{{selector}}}}}, " if selector else ""
    by_port = f", portLevelMtls: {{{ports}}}" if ports else ""
    return security("PeerAuthentication", f"{{{chosen}mtls: {{mode: {mode}}}{by_port}}}", name, namespace, more)


MESH, NAMESPACE = peers("STRICT", "istio-system"), peers("DISABLE", "shop")
OWN = peers("STRICT", "shop", "app: reviews", "own")


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ((), "PERMISSIVE"),
        ((MESH,), "STRICT"),
        ((MESH, NAMESPACE), "DISABLE"),
        ((MESH, NAMESPACE, OWN), "STRICT"),
        ((MESH, NAMESPACE, peers("UNSET", "shop", "app: reviews", "own")), "DISABLE"),
        ((MESH, peers("UNSET", "shop")), "STRICT"),
        ((MESH, peers("DISABLE", "other")), "STRICT"),
        ((MESH, peers("DISABLE", "shop", "app: ratings")), "STRICT"),
        # of the root namespace, and with a selector: for that namespace's own workloads alone
        ((peers("STRICT", "istio-system", "app: reviews"),), "PERMISSIVE"),
        # the oldest of a level
        (
            (
                peers("STRICT", "shop", name="a", more=", creationTimestamp: '2026-02-01T00:00:00Z'"),
                peers("DISABLE", "shop", name="b", more=", creationTimestamp: '2026-01-01T00:00:00Z'"),
            ),
            "DISABLE",
        ),
    ],
)
def test_a_workload_goes_before_its_namespace_and_that_before_the_mesh(texts: tuple[str, ...], wanted: str) -> None:
    """UNSET inherits; nothing at all is PERMISSIVE."""
    assert inbound(*texts).tls_mode(8080) is TlsMode(wanted)


def test_a_port_has_its_own_mode() -> None:
    """By the container's port; UNSET there inherits the workload's."""
    own = peers("STRICT", "shop", "app: reviews", "own", ports="'8080': {mode: DISABLE}, '9090': {mode: UNSET}")
    found = inbound(MESH, NAMESPACE, own)
    assert [found.tls_mode(port) for port in (8080, 9090, 7070)] == ["DISABLE", "STRICT", "STRICT"]


def test_strict_refuses_plaintext_before_any_rule() -> None:
    """An ALLOW for everybody is none for who has not proven anything."""
    allow = security("AuthorizationPolicy", "{rules: [{}]}")
    assert admits(MESH, allow)
    assert not admits(MESH, allow, peer=Peer(None, False, "10.0.0.9", 8080))
    assert not admits(MESH, allow, peer=Peer(None, True, "10.0.0.9", 8080))


# Who is selected


def test_policies_come_from_the_root_and_the_workloads_own_namespace() -> None:
    """With or without a selector; another namespace's policy is nobody's here."""
    deny = "{action: DENY, rules: [{}]}"
    chosen = "{selector: {matchLabels: {app: reviews}}, action: DENY, rules: [{}]}"
    for namespace, spec, is_admitted in (
        ("shop", deny, False),
        ("istio-system", deny, False),
        ("other", deny, True),
        ("shop", chosen, False),
        ("istio-system", chosen, False),
        ("shop", chosen.replace("reviews", "ratings"), True),
    ):
        assert admits(security("AuthorizationPolicy", spec, namespace=namespace)) is is_admitted, (namespace, spec)


def target(name: str, action: str = "DENY", kind: str = "Service", rules: str = "[{}]") -> str:
    return security(
        "AuthorizationPolicy",
        f"{{targetRefs: [{{kind: {kind}, group: '', name: {name}}}], action: {action}, rules: {rules}}}",
    )


def test_a_policy_for_a_service_holds_in_the_processes_that_serve_it() -> None:
    """By the service's selector or the name that the process gives; a service of another namespace is another."""
    assert not admits(service("reviews", "shop"), target("reviews"))
    assert admits(service("reviews", "shop"), service("ratings", "shop"), target("ratings"))
    by_name = Node("n", Workload("w", "shop", "reviews"))
    assert not admits(target("reviews"), given=by_name)
    abroad = Node("n", Workload("w", "other", "reviews", labels=(("app", "reviews"),)))
    assert admits(service("reviews", "shop"), service("reviews", "other"), target("reviews"), given=abroad)


def test_where_a_process_serves_several_services_an_allow_rule_is_for_calls_by_the_targets_names() -> None:
    """Its ALLOW rule must not let in calls to the other; its DENY rule holds for all, whatever Host a caller writes."""
    both = service("reviews", "shop") + "---\n" + service("front", "shop").replace("app: front", "app: reviews")
    assert admits(both, target("front", "ALLOW"), host="front.shop:9080")
    assert not admits(both, target("front", "ALLOW"), host="reviews")
    assert not admits(both, target("front", "DENY"), host="reviews")
    assert admits(both, target("front", "ALLOW") + "---\n" + target("reviews", "ALLOW").replace("name: p,", "name: q,"))


def test_a_target_that_nobody_is_gets_reported() -> None:
    """Never silently: what was meant to protect protects nobody."""
    made = view(service("a", "shop"), target("a"), target("b").replace("name: p,", "name: q,"))
    assert [(each.object, each.field) for each in made.problems] == [
        ("AuthorizationPolicy shop/q", "spec.targetRefs[0].name")
    ]
    other = target("c", kind="ServiceEntry").replace("group: ''", "group: networking.istio.io")
    assert "ServiceEntry can't be a target here" in view(other).problems[0].reason
    far = target("a").replace("name: a}", "name: a, namespace: far}")
    assert parse_text(far, "x").problems[0].field == "spec.targetRefs[0].namespace"


def test_nodes_that_serve_other_services_are_told_other_rules() -> None:
    """What decides about a target is part of the key by which views are shared."""
    given = objects(service("reviews", "shop"), target("reviews"))
    one, two = (Node("n", Workload("w", "shop", name)) for name in ("reviews", "ratings"))
    three = Node("n", Workload("w", "shop", labels=(("app", "reviews"),)))
    assert len({view_key(given, each) for each in (one, two, three)}) == 3


# MeshConfig


def principals(value: str, *domains: str, aliases: str = "[old]", domain: str = "new") -> list[bool]:
    config = mesh_config(f"{{trustDomain: {domain}, trustDomainAliases: {aliases}}}")
    policy = security("AuthorizationPolicy", f"{{rules: [{{from: [{{source: {{principals: ['{value}']}}}}]}}]}}")
    return [admits(config, policy, peer=Peer(SpiffeId.of(each, "foo", "sleep"), True)) for each in domains]


def test_a_principal_of_one_of_our_trust_domains_is_one_of_each() -> None:
    """Istio's aliases: an identity of before a migration is the same; `cluster.local` is the mesh's own domain."""
    domains = ("new", "old", "cluster.local", "evil")
    assert principals("new/ns/foo/sa/sleep", *domains) == [True, True, False, False]
    assert principals("old/ns/foo/sa/sleep", *domains) == [True, True, False, False]
    assert principals("cluster.local/ns/foo/sa/sleep", *domains) == [True, True, False, False]
    assert principals("*ld/ns/foo/sa/sleep", *domains) == [True, True, False, False]
    assert principals("evil/ns/foo/sa/sleep", *domains) == [False, False, False, True]
    assert principals("*/ns/foo/sa/sleep", *domains) == [True, True, True, True]
    # what is no whole principal is compared as it stands
    assert principals("new/ns/foo/*", *domains) == [True, False, False, False]


def test_trust_domains_have_their_aliases() -> None:
    """So does source.trustDomain."""
    config = mesh_config("{trustDomain: new, trustDomainAliases: [old]}")
    policy = security("AuthorizationPolicy", "{rules: [{from: [{source: {trustDomains: [old]}}]}]}")
    found = [admits(config, policy, peer=Peer(SpiffeId.of(each, "f", "s"), True)) for each in ("new", "old", "evil")]
    assert found == [True, True, False]


REMOTE = security("AuthorizationPolicy", "{rules: [{from: [{source: {remoteIpBlocks: ['1.2.3.0/24']}}]}]}")


def test_a_workload_believes_the_last_entry_of_x_forwarded_for() -> None:
    """As a sidecar does: the gateway has written it. What is no address there is nobody's; then the peer counts."""
    near = Peer(None, False, "1.2.3.4", 8080)
    assert admits(REMOTE, xff="6.6.6.6, 1.2.3.9")
    assert not admits(REMOTE, xff="1.2.3.9, 6.6.6.6")
    assert not admits(REMOTE)
    assert admits(REMOTE, peer=near) and admits(REMOTE, peer=near, xff="unknown")
    assert not admits(REMOTE, peer=near, xff="6.6.6.6")


def test_a_gateway_is_told_how_many_proxies_stand_before_it() -> None:
    """gatewayTopology.numTrustedProxies, for gateways alone; and what paths are before rules see them."""
    config = mesh_config(
        "{defaultConfig: {gatewayTopology: {numTrustedProxies: 2}}, pathNormalization: {normalization: MERGE_SLASHES}}"
    )
    gateway = (
        "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: g}\n"
        "spec: {servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}\n"
    )
    made = translate(objects(config, gateway), (), node(kind=NodeKind.ROUTER)).snapshot
    assert [each.access for each in made.listeners] == [Access(trusted_hops=2, normalization="MERGE_SLASHES")]
    assert inbound(config).access == Access(normalization="MERGE_SLASHES")


@pytest.mark.parametrize(
    ("how", "path", "is_denied"),
    [
        ("BASE", "/x/../admin", True),
        ("BASE", "//admin", True),  # an application may see it so, and stricter than Istio is what we are there
        ("NONE", "/x/../admin", False),
        ("NONE", "/admin", True),
        ("MERGE_SLASHES", "//admin", True),
        ("DECODE_AND_MERGE_SLASHES", "/x%2f..%2fadmin", True),
        ("DEFAULT", "/%61dmin", True),
    ],
)
def test_paths_are_normalized_as_the_mesh_says(how: str, path: str, is_denied: bool) -> None:
    """MeshConfig.pathNormalization; NONE compares what was sent."""
    config = mesh_config(f"{{pathNormalization: {{normalization: {how}}}}}")
    deny = security("AuthorizationPolicy", "{action: DENY, rules: [{to: [{operation: {paths: ['/admin']}}]}]}")
    assert admits(config, deny, path=path) is not is_denied


def test_auto_mtls_can_be_switched_off() -> None:
    """enableAutoMtls: false leaves plaintext what no DestinationRule secures."""
    served = Workload("b", labels=(("app", "a"), ("security.istio.io/tlsMode", "istio")), address="10.0.0.1", port=80)
    secured = view(service(), workloads=(served,)).snapshot.clusters
    plain = view(service(), mesh_config("{enableAutoMtls: false}"), workloads=(served,)).snapshot.clusters
    assert [each.tls is not None for each in (*secured, *plain) if each.service] == [True, False]


def test_servers_are_expected_under_the_meshs_own_trust_domain_and_its_aliases() -> None:
    """A caller of a mesh that is not cluster.local must not wait for identities that nobody has."""
    served = Workload("b", labels=(("app", "a"), ("security.istio.io/tlsMode", "istio")), address="10.0.0.1", port=80)
    for config, wanted in (
        ("{}", ("spiffe://cluster.local/ns/default/sa/default",)),
        ("{trustDomain: new}", ("spiffe://new/ns/default/sa/default",)),
        (
            "{trustDomain: new, trustDomainAliases: [old]}",
            ("spiffe://new/ns/default/sa/default", "spiffe://old/ns/default/sa/default"),
        ),
    ):
        clusters = view(service(), mesh_config(config), workloads=(served,)).snapshot.clusters
        assert [each.tls.subject_alt_names for each in clusters if each.tls is not None] == [wanted]


@pytest.mark.parametrize(
    "text",
    [
        "{pathNormalization: {normalization: SOMETIMES}}",
        "{defaultConfig: {gatewayTopology: {numTrustedProxies: -1}}}",
        "{enableAutoMtls: perhaps}",
    ],
)
def test_what_can_not_be_meant_is_refused(text: str) -> None:
    """Naming the field; nothing is guessed."""
    assert parse_text(mesh_config(text), "mesh.yaml").problems[0].field.startswith("data.mesh.")
