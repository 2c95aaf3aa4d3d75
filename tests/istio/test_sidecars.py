"""What a Sidecar lets its workloads see, and call."""

from __future__ import annotations

from views import PREFIX, decide, destination_rule, node, objects, service, view, virtual_service, weights

from meshlib.istio.translate import Translation, view_key
from meshlib.model import Node, NodeKind

SERVICES = (
    service("a"),
    service("b"),
    service("c", "other"),
    service("d", "third", ports="[{name: http, port: 80}, {name: http-2, port: 81}]"),
)


def sidecar(spec: str, *, name: str = "s", namespace: str = "default") -> str:
    return f"{PREFIX}kind: Sidecar\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"


def seen(made: Translation) -> set[str]:
    """`a`, `d:81`: the services that have a cluster; port 80 is not written."""
    found = set()
    for each in made.snapshot.clusters:
        if each.service is not None:
            port = each.name.split("|")[1]
            found.add(each.service.name if port == "80" else f"{each.service.name}:{port}")
    return found


def imports(*hosts: str, more: tuple[str, ...] = (), given: Node | None = None) -> set[str]:
    wanted = ", ".join(f"'{host}'" for host in hosts)
    return seen(view(*SERVICES, sidecar(f"{{egress: [{{hosts: [{wanted}]}}]}}"), *more, workloads=(), given=given))


def test_without_a_sidecar_everything_that_is_exported_is_seen() -> None:
    """And a Sidecar without egress changes nothing about it."""
    everything = {"a", "b", "c", "d", "d:81"}
    assert seen(view(*SERVICES, workloads=())) == everything
    assert seen(view(*SERVICES, sidecar("{outboundTrafficPolicy: {mode: ALLOW_ANY}}"), workloads=())) == everything


def test_hosts_are_imported_by_namespace_and_name() -> None:
    """`.` the own, `*` any, `~` none; a wildcard covers names below it."""
    assert imports("./*") == {"a", "b"}
    assert imports("~/*") == set()
    assert imports("*/*") == {"a", "b", "c", "d", "d:81"}
    assert imports("other/*") == {"c"}
    assert imports("./a.default.svc.cluster.local", "third/*") == {"a", "d", "d:81"}
    assert imports("*/*.other.svc.cluster.local") == {"c"}
    assert imports("other/a.default.svc.cluster.local") == set()


def test_what_stands_behind_a_tilde_is_left_out() -> None:
    """Of what the other entries import; wherever it stands among them. A namespace that is not named is every one."""
    assert imports("*/*", "~other/*") == {"a", "b", "d", "d:81"}
    assert imports("~./a.default.svc.cluster.local", "./*") == {"b"}
    assert imports("*/*", "~*/*.third.svc.cluster.local") == {"a", "b", "c"}
    assert imports("*/*", "~/a.default.svc.cluster.local") == {"b", "c", "d", "d:81"}
    assert imports("*/*", "~third/a.default.svc.cluster.local") == {"a", "b", "c", "d", "d:81"}


def test_a_socket_imports_its_hosts_for_every_port() -> None:
    """Nothing listens on it: who is meant says the Host, as it would there."""
    listeners = "{bind: 'unix:///a.sock', port: {protocol: HTTP}, hosts: [third/*]}, {hosts: [./*]}"
    made = view(*SERVICES, sidecar(f"{{egress: [{listeners}]}}"), workloads=())
    assert seen(made) == {"a", "b", "d", "d:81"}


def test_a_listener_with_a_port_imports_that_port_alone() -> None:
    """The last one, without a port, is for all ports that have none of their own."""
    made = view(
        *SERVICES,
        sidecar("{egress: [{port: {number: 81, protocol: HTTP, name: h}, hosts: [third/*]}, {hosts: [./*]}]}"),
        workloads=(),
    )
    assert seen(made) == {"a", "b", "d:81"}
    alone = view(
        *SERVICES, sidecar("{egress: [{port: {number: 80, protocol: HTTP, name: h}, hosts: ['*/*']}]}"), workloads=()
    )
    assert seen(alone) == {"a", "b", "c", "d"}


def test_what_an_imported_rule_sends_to_is_imported_with_it() -> None:
    """Or the rule would lead nowhere."""
    to_c = virtual_service("[{route: [{destination: {host: c.other.svc.cluster.local}}]}]")
    assert imports("./a.default.svc.cluster.local", more=(to_c,)) == {"a", "c"}
    assert imports("./b.default.svc.cluster.local", more=(to_c,)) == {"b"}


def test_a_rule_that_is_not_imported_does_not_hold() -> None:
    """Rules are imported by the hosts they are for, and their own namespace."""
    slow = virtual_service(
        "[{route: [{destination: {host: a.default.svc.cluster.local}}], timeout: 1s}]",
        namespace="other",
        hosts="[a.default.svc.cluster.local]",
    )
    both = view(*SERVICES, slow, sidecar("{egress: [{hosts: ['*/*']}]}"), workloads=())
    assert decide(both.snapshot, "http://a:80/").timeout == 1.0
    own = view(*SERVICES, slow, sidecar("{egress: [{hosts: [./*]}]}"), workloads=())
    assert decide(own.snapshot, "http://a:80/").timeout is None
    assert weights(decide(own.snapshot, "http://a:80/")) == {"a.default.svc.cluster.local": 1}


def test_the_one_that_fits_the_workload_is_the_one() -> None:
    """Then the namespace's own, then the root namespace's; never another namespace's, never for a gateway."""
    chosen = sidecar("{workloadSelector: {labels: {app: x}}, egress: [{hosts: [other/*]}]}", name="z-chosen")
    own = sidecar("{egress: [{hosts: [./*]}]}", name="own")
    root = sidecar("{egress: [{hosts: [third/*]}]}", namespace="istio-system")
    texts = (*SERVICES, chosen, own, root)
    assert seen(view(*texts, workloads=(), given=node(app="x"))) == {"c"}
    assert seen(view(*texts, workloads=())) == {"a", "b"}
    assert seen(view(*texts, workloads=(), given=node("other"))) == {"d", "d:81"}
    assert view(*texts, workloads=(), given=node(kind=NodeKind.ROUTER)).problems == ()


def test_two_for_a_whole_namespace_are_one_too_many() -> None:
    """The first counts, and the other is told (IST0111)."""
    made = view(
        *SERVICES,
        sidecar("{egress: [{hosts: [./*]}]}", name="one"),
        sidecar("{egress: [{hosts: ['*/*']}]}", name="two"),
        workloads=(),
    )
    assert seen(made) == {"a", "b"}
    assert [(each.object, each.field) for each in made.problems] == [("Sidecar default/two", "spec.workloadSelector")]


def test_a_sidecar_says_whether_unknown_hosts_may_be_called() -> None:
    """In the mesh's place; without a mode it is REGISTRY_ONLY."""

    def catch_all(spec: str) -> str:
        made = view(sidecar(spec), workloads=()).snapshot
        return made.route_configurations[0].name

    assert catch_all("{egress: [{hosts: [./*]}]}") == "allow_any"
    assert catch_all("{outboundTrafficPolicy: {mode: REGISTRY_ONLY}}") == "block_all"
    assert catch_all("{outboundTrafficPolicy: {}}") == "block_all"
    assert catch_all("{outboundTrafficPolicy: {mode: ALLOW_ANY}}") == "allow_any"


def test_a_service_that_is_not_imported_is_an_unknown_host() -> None:
    """Its name is answered by the catch-all."""
    made = view(*SERVICES, sidecar("{outboundTrafficPolicy: {mode: REGISTRY_ONLY}, egress: [{hosts: [other/*]}]}"))
    assert "a:80" not in {listener.name for listener in made.snapshot.listeners}


def test_policies_hold_for_what_is_imported() -> None:
    """A DestinationRule is found as ever."""
    rule = destination_rule("{host: c.other.svc.cluster.local, trafficPolicy: {loadBalancer: {simple: RANDOM}}}")
    made = view(*SERVICES, rule, sidecar("{egress: [{hosts: [other/*]}]}"), workloads=())
    assert {str(each.load_balancing) for each in made.snapshot.clusters if each.service} == {"RANDOM"}


def test_labels_that_a_sidecar_asks_for_tell_nodes_apart() -> None:
    """Those alone."""
    given = objects(sidecar("{workloadSelector: {labels: {app: x}}, egress: [{hosts: ['*/*']}]}"))
    assert view_key(given, node(app="x")) != view_key(given, node(app="y"))
    assert view_key(given, node(version="x")) == view_key(given, node(version="y"))
