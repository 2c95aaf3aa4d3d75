"""What does a rule become for a server that can't judge all of it? Pure: rules in, filters out, weighed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from meshlib.model import (
    ALWAYS,
    NEVER,
    Access,
    AccessRule,
    Action,
    AddressIs,
    And,
    ClaimIs,
    ClaimMatch,
    Cluster,
    ClusterType,
    Condition,
    Endpoint,
    Forward,
    HeaderMatch,
    Inbound,
    LoadAssignment,
    Node,
    Not,
    Or,
    PathTemplate,
    PortIs,
    PrincipalIs,
    QueryMatch,
    RateLimit,
    RetryPolicy,
    Route,
    RouteConfiguration,
    RouteMatch,
    ServerNameIs,
    Snapshot,
    StringMatch,
    TlsMode,
    UpstreamTls,
    VirtualHost,
    WeightedCluster,
    Workload,
)
from meshlib.xds import messages as m
from meshlib.xds.encode import encode_resource
from meshlib.xds.encode_inbound import CLOSED, server_listener, sidecar_listener
from meshlib.xds.forms import MAX_ALTERNATIVES, understood, understood_routes
from meshlib.xds.http_filters import http_filters, not_carried_out
from meshlib.xds.rbac import ALLOW, DENY, approximate, rbac
from meshlib.xds.reader import Dialect, Reader, dialect_of, reader_of
from meshlib.xds.resource_types import ROUTE

GRPC, ENVOY = Reader(Dialect.GRPC, True), Reader(Dialect.ENVOY, True)
CLAIM = ClaimIs(("iss",), StringMatch("exact", "me"))
PORT = PortIs(80)


class NoUpstreams:
    def cluster(self, host: str, port: int, *, tls: bool = False, http2: bool = False) -> str:
        return f"{host}:{port}"


@pytest.mark.parametrize(
    ("condition", "wide", "narrow"),
    [
        (CLAIM, ALWAYS, NEVER),
        (Not(CLAIM), Not(NEVER), Not(ALWAYS)),
        (And((PORT, CLAIM)), And((PORT, ALWAYS)), And((PORT, NEVER))),
        (Or((Not(Or((CLAIM,))), PORT)), Or((Not(Or((NEVER,))), PORT)), Or((Not(Or((ALWAYS,))), PORT))),
        (ServerNameIs(StringMatch("exact", "a")), ALWAYS, NEVER),
        (HeaderMatch("grpc-timeout", StringMatch("present")), ALWAYS, NEVER),
        (HeaderMatch("x-user", StringMatch("present")),) * 3,
        (AddressIs("remote", "10.0.0.0/8"), ALWAYS, NEVER),
        (AddressIs("peer", "10.0.0.0/8"),) * 3,
    ],
)
def test_what_grpc_can_not_judge_holds_where_it_denies_and_never_where_it_allows(
    condition: Condition, wide: Condition, narrow: Condition
) -> None:
    """Under a `not` it is the other way round."""
    assert approximate(condition, GRPC, widen=True) == wide
    assert approximate(condition, GRPC, widen=False) == narrow
    assert approximate(condition, ENVOY, widen=False) == condition


def test_a_policy_has_the_form_that_istios_pilot_gives_it() -> None:
    """Permissions of what is asked, principals of who asks; nothing is empty, or Envoy refuses it."""
    rule = AccessRule(
        "ns[default]-policy[a]-rule[0]",
        Action.ALLOW,
        And((Or((And((PORT, PathTemplate("/a/{*}/{**}"))),)),)),
        And((Or((And((PrincipalIs(StringMatch("exact", "spiffe://td/ns/a/sa/b")), Not(PrincipalIs()))), CLAIM)),)),
    )
    message = rbac([rule], ALLOW, ENVOY)
    (policy,) = message.policies.values()
    assert list(message.policies) == [rule.name]
    permission = policy.permissions[0].and_rules.rules
    assert [permission[0].destination_port, permission[1].url_path.path.safe_regex.regex] == [80, "/a/[^/]+/.*"]
    who, claim = policy.principals[0].or_ids.ids
    assert who.and_ids.ids[0].authenticated.principal_name.exact == "spiffe://td/ns/a/sa/b"
    assert who.and_ids.ids[1].not_id.authenticated.principal_name.prefix == "spiffe://"
    assert [each.key for each in claim.or_ids.ids[0].metadata.path] == ["payload", "iss"]
    assert claim.or_ids.ids[1].metadata.value.list_match.one_of.string_match.exact == "me"
    (nobody,) = rbac([AccessRule("n", Action.DENY, NEVER)], DENY, GRPC).policies.values()
    assert (nobody.permissions[0].not_rule.any, nobody.principals[0].any) == (True, True)


@pytest.mark.parametrize(
    ("match", "grpc", "envoy"),
    [
        (StringMatch("exact", "a"), "exact_match", "string_match"),
        (StringMatch("prefix", "a"), "prefix_match", "string_match"),
        (StringMatch("suffix", "a"), "suffix_match", "string_match"),
        (StringMatch("contains", "a"), "contains_match", "string_match"),
        (StringMatch("regex", "a.*"), "safe_regex_match", "string_match"),
        (StringMatch("present"), "present_match", "present_match"),
        (StringMatch("exact", "a", True), "string_match", "string_match"),  # the older fields can't say it
    ],
)
def test_grpc_reads_a_rules_headers_by_their_older_fields(match: StringMatch, grpc: str, envoy: str) -> None:
    """RBAC of grpcio before 1.74 refuses the newer one, and with it the listener."""
    rule = AccessRule("r", Action.ALLOW, HeaderMatch("x-user", match))
    for reader, field in ((GRPC, grpc), (ENVOY, envoy)):
        header = rbac([rule], ALLOW, reader).policies["r"].permissions[0].header
        assert header.WhichOneof("header_match_specifier") == field


def test_each_reader_gets_the_filters_that_it_has() -> None:
    """In Istio's order; gRPC none but RBAC, with names that differ, and no rule that is lost."""
    rules = tuple(
        AccessRule(f"{action}-{dry}", action, dry_run=dry, provider="opa" if action is Action.CUSTOM else "")
        for action in Action
        for dry in (False, True)
    )
    access = Access(rules)
    names = [name.removeprefix("envoy.filters.http.") for name, _ in http_filters(access, ENVOY, NoUpstreams())]
    assert names == ["rbac.custom-0", "rbac.audit", "rbac.deny", "rbac.allow"]
    found: dict[str, Any] = dict(http_filters(access, GRPC, NoUpstreams()))
    assert list(found) == ["envoy.filters.http.rbac.deny", "envoy.filters.http.rbac.allow"]
    assert set(found["envoy.filters.http.rbac.deny"].rules.policies) == {"CUSTOM-False", "DENY-False"}
    assert not any(each.HasField("shadow_rules") for each in found.values())


def test_a_cluster_is_secured_for_grpc_or_has_no_endpoints() -> None:
    """Auto-mTLS calls the endpoints that serve it, by priorities without a gap; what gRPC can't do, nobody serves."""
    mesh = UpstreamTls("ISTIO_MUTUAL", subject_alt_names=("spiffe://td/a",))
    endpoints = (
        Endpoint("10.0.0.1", 1),
        Endpoint("10.0.0.2", 1, priority=1, is_meshed=True),
        Endpoint("10.0.0.3", 1, priority=3, is_meshed=True),
    )
    snapshot = Snapshot(
        clusters=(
            Cluster("auto", tls=UpstreamTls("ISTIO_MUTUAL", auto=True)),
            Cluster("dns", ClusterType.STRICT_DNS, endpoints=(Endpoint("a.example", 80),)),
            Cluster("files", tls=UpstreamTls("SIMPLE", ca_file="/ca")),
            Cluster("mesh", tls=mesh),
            Cluster("static", ClusterType.STATIC, endpoints=endpoints),
        ),
        assignments=tuple(LoadAssignment(name, endpoints) for name in ("auto", "files", "mesh")),
    )
    clusters, assignments = understood(snapshot, GRPC)
    found = {each.name: each for each in clusters}
    served = {each.cluster: [(e.address[-1], e.priority) for e in each.endpoints] for each in assignments}
    assert served == {
        "auto": [("2", 0), ("3", 1)],
        "files": [],
        "mesh": [("1", 0), ("2", 1), ("3", 3)],
        "static": [],
    }
    assert found["dns"].type is ClusterType.LOGICAL_DNS
    bare, nobody = understood(snapshot, Reader(Dialect.GRPC))
    assert {each.cluster: len(each.endpoints) for each in nobody} == {"auto": 3, "files": 0, "mesh": 0, "static": 0}
    assert all(each.tls is None for each in bare)


TO_A = Forward((WeightedCluster("a"),))


def table(*routes: Route) -> RouteConfiguration:
    return RouteConfiguration("r", (VirtualHost("h", ("*",), routes),))


def routes_for_grpc(*routes: Route) -> tuple[Route, ...]:
    return understood_routes(table(*routes), GRPC).virtual_hosts[0].routes


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (RouteMatch(StringMatch("path-prefix", "/a.b/")), RouteMatch(StringMatch("regex", r"/a\.b(/.*)?"))),
        (RouteMatch(StringMatch("path-prefix", "/")), RouteMatch()),
        (RouteMatch(method=StringMatch("exact", "POST"), scheme=StringMatch("prefix", "ht")), RouteMatch()),
        (RouteMatch(method=StringMatch("regex", "P.*")), RouteMatch()),
        (RouteMatch(method=StringMatch("exact", "GET")), None),
        (RouteMatch(query=(QueryMatch("a", StringMatch("present")),)), None),
        (RouteMatch(claims=(ClaimMatch(("a",), StringMatch("present")),)), None),
    ],
)
def test_conditions_of_routes_in_grpcs_words(given: RouteMatch, found: RouteMatch | None) -> None:
    """None: no call of gRPC's can meet it."""
    expected = () if found is None else (Route(found, TO_A),)
    assert routes_for_grpc(Route(given, TO_A)) == expected


def test_a_header_that_must_not_be_so_may_be_missing() -> None:
    """Two routes stand for one condition; not for so many that a table grows without end."""
    unlike = HeaderMatch("x", StringMatch("exact", "a"), invert=True)
    missing = HeaderMatch("x", StringMatch("present"), invert=True)
    found = routes_for_grpc(Route(RouteMatch(headers=(unlike,)), TO_A))
    assert [each.match.headers for each in found] == [(unlike,), (missing,)]
    many = tuple(HeaderMatch(f"x{n}", StringMatch("exact", "a"), invert=True) for n in range(10))
    assert len(routes_for_grpc(Route(RouteMatch(headers=many), TO_A))) == MAX_ALTERNATIVES


def test_what_grpc_understands_stays_the_very_object() -> None:
    """And what it would refuse goes: gRFC A44 knows no policy without a retry."""
    plain = table(Route(RouteMatch(StringMatch("prefix", "/a")), TO_A))
    assert understood_routes(plain, GRPC) is plain
    (found,) = routes_for_grpc(Route(RouteMatch(), Forward(TO_A.clusters, retry=RetryPolicy(0))))
    assert found.action == TO_A


def test_route_timeouts_are_for_whom_keeps_them() -> None:
    """Go's clients end calls when they should; C-core's before it."""
    timed = table(Route(RouteMatch(), Forward(TO_A.clusters, 3.0)))
    for agent, has_it in (("gRPC Go/1.85.0", True), ("gRPC C-core linux/1.85.1", False), ("meshlib/0.1.0", False)):
        reader = reader_of(Node("a", Workload("a"), user_agent=agent))
        message = m.RouteConfiguration.FromString(encode_resource(ROUTE, timed, reader))
        action = message.virtual_hosts[0].routes[0].route
        assert action.timeout.seconds == 3
        assert action.max_stream_duration.max_stream_duration.seconds == (3 if has_it else 0)


def test_user_agents_are_told_apart() -> None:
    """As the clients write themselves."""
    said = ("gRPC C-core linux Python/C-core 58.0.0", "gRPC Go/1.85.0", "envoy/1.40.0", "meshlib/0.1.0", "other")
    assert [*map(dialect_of, said)] == [Dialect.GRPC, Dialect.GRPC, Dialect.ENVOY, Dialect.MESHLIB, Dialect.OTHER]


def chains(listener: Any) -> list[str]:
    """`tls`, `plaintext`, or `closed` where the only rule allows nobody."""
    found = []
    for chain in listener.filter_chains:
        manager = m.HttpConnectionManager.FromString(chain.filters[0].typed_config.value)
        is_closed = any(CLOSED.encode() in each.typed_config.value for each in manager.http_filters)
        found.append("closed" if is_closed else "tls" if chain.HasField("transport_socket") else "plaintext")
    return found


@pytest.mark.parametrize(
    ("mode", "grpc", "envoy", "bare"),
    [
        (TlsMode.STRICT, ["tls"], ["tls"], ["closed"]),
        (TlsMode.PERMISSIVE, ["tls"], ["tls", "plaintext"], ["plaintext"]),
        (TlsMode.DISABLE, ["plaintext"], ["plaintext"], ["plaintext"]),
    ],
)
def test_a_port_takes_what_peer_authentication_says(
    mode: TlsMode, grpc: list[str], envoy: list[str], bare: list[str]
) -> None:
    """And STRICT is never plaintext that lets anybody in, whoever lacks a certificate."""
    inbound = Inbound("i", port_tls=((80, mode),))
    none = NoUpstreams()
    assert chains(server_listener(inbound, GRPC, "10.0.0.1", 80, none)) == grpc
    assert chains(sidecar_listener(inbound, ENVOY, "10.0.0.1", 80, "c", none)) == envoy
    assert chains(server_listener(inbound, Reader(Dialect.GRPC), "10.0.0.1", 80, none)) == bare
    assert chains(sidecar_listener(inbound, Reader(Dialect.ENVOY), "10.0.0.1", 80, "c", none)) == bare


def test_what_a_server_does_otherwise_is_told() -> None:
    """In words that name the rule."""
    rules = (
        AccessRule("fine", Action.ALLOW, PORT),
        AccessRule("token", Action.DENY, ALWAYS, CLAIM),
        AccessRule("asked", Action.CUSTOM, provider="opa"),
    )
    access = Access(rules, rate_limits=(RateLimit("limit", 1, 1, 1.0),))
    assert [each.partition(",")[0] for each in not_carried_out(access, GRPC)] == [
        "rate limits are not carried out",
        "token denies more than it says",
        "asked denies",
    ]
    assert not_carried_out(access, ENVOY) == ["rate limits are not carried out"]
