"""Is RBAC understood as it is meant, and refused by name where it is not? Listeners as an istiod writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from envoy.config.listener.v3 import listener_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.extensions.filters.http.jwt_authn.v3 import config_pb2 as jwt_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.extensions.path.match.uri_template.v3 import uri_template_match_pb2
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2

from istiod import INBOUND, Rules, inbound_listener, outbound_listener, policy
from meshlib.errors import InvalidResource
from meshlib.model import (
    ALWAYS,
    NEVER,
    AccessRule,
    Action,
    AddressIs,
    And,
    HeaderMatch,
    Headers,
    Inbound,
    Listener,
    Not,
    Or,
    PathTemplate,
    PortIs,
    PrincipalIs,
    Request,
    StringMatch,
    TlsMode,
)
from meshlib.policy.admission import Allow
from meshlib.policy.guard import Guard
from meshlib.xds import rbac
from meshlib.xds.decode import decode_resource
from meshlib.xds.encode_inbound import server_listener
from meshlib.xds.reader import Dialect, Reader
from meshlib.xds.resource_types import LISTENER
from security.decisions import DECISIONS, SLEEP, inbound

NAME = INBOUND + "10.0.0.1:8080"
GRPC = Reader(Dialect.GRPC)


class NoUpstreams:
    def cluster(self, host: str, port: int, *, tls: bool = False, http2: bool = False) -> str:
        raise AssertionError("nobody else is asked")


def decoded(message: Any) -> Inbound:
    found = decode_resource(LISTENER, message.SerializeToString(deterministic=True))
    assert isinstance(found, Inbound)
    return found


def rule(policy: rbac_pb2.Policy, *, deny: bool = False) -> AccessRule:
    kind = "deny" if deny else "allow"
    return decoded(inbound_listener(NAME, Rules(**{kind: {"p": policy}}))).access.rules[0]


def test_what_our_own_encoder_writes_for_grpc_decides_the_same() -> None:
    """The table of decisions by way of the wire; gRPC's form has no words for tokens and authorizers."""
    wrong = []
    for given in DECISIONS:
        rules = inbound(given.spec)
        if any(rbac.is_approximated(each, GRPC) or each.action is Action.CUSTOM for each in rules.access.rules):
            continue
        message = server_listener(Inbound(NAME, access=rules.access), GRPC, "10.0.0.1", 8080, NoUpstreams())
        method, path = given.target.split(" ")
        raw = [(name.encode(), value.encode()) for name, value in given.headers]
        request = Request(method, "http", given.host.lower(), path, Headers(raw))
        verdict = Guard([decoded(message)]).admit(request, given.peer, 0.0)
        if isinstance(verdict, Allow) is not given.is_allowed:
            wrong.append((given, verdict))
    assert not wrong


def test_each_condition_that_istio_writes_is_read() -> None:
    """Permissions and principals of the model's generator, one by one."""
    permissions, principals = rbac_pb2.Policy(), rbac_pb2.Policy()
    permission, principal = permissions.permissions.add(), principals.principals.add()
    permissions.principals.add(any=True)
    principals.permissions.add(any=True)
    every = permission.and_rules.rules
    every.add().destination_port = 8080
    every.add(destination_ip={"address_prefix": "10.0.0.0", "prefix_len": {"value": 8}})
    every.add().not_rule.header.name = ":method"
    every[2].not_rule.header.string_match.exact = "POST"
    template = uri_template_match_pb2.UriTemplateMatchConfig(path_template="/a/*")
    every.add().uri_template.typed_config.Pack(template)
    every.add().header.name = ":authority"
    every[4].header.present_match = True
    assert rule(permissions).permission == And(
        (
            PortIs(8080),
            AddressIs("destination", "10.0.0.0/8"),
            Not(HeaderMatch(":method", StringMatch("exact", "POST"))),
            PathTemplate("/a/{*}"),
            ALWAYS,
        )
    )
    either = principal.or_ids.ids
    either.add().authenticated.SetInParent()
    either.add(direct_remote_ip={"address_prefix": "10.0.0.9", "prefix_len": {"value": 32}})
    either.add(source_ip={"address_prefix": "::1", "prefix_len": {"value": 128}})
    either.add(remote_ip={"address_prefix": "10.1.0.0", "prefix_len": {"value": 16}})
    either.add().header.name = "x-user"
    either[4].header.string_match.prefix = "j"
    assert rule(principals).principal == Or(
        (
            PrincipalIs(),
            AddressIs("peer", "10.0.0.9/32"),
            AddressIs("peer", "::1/128"),
            AddressIs("remote", "10.1.0.0/16"),
            HeaderMatch("x-user", StringMatch("prefix", "j")),
        )
    )


def test_claims_never_allow_and_always_deny() -> None:
    """Nobody verifies tokens here, so a rule of them stands on the safe side, negated too."""
    claims = rbac_pb2.Policy()
    claims.permissions.add(any=True)
    one = claims.principals.add()
    one.metadata.filter = "envoy.filters.http.jwt_authn"
    one.metadata.path.add(key="payload")
    one.metadata.value.string_match.exact = "x"
    assert rule(claims).principal == NEVER
    assert rule(claims, deny=True).principal == ALWAYS
    negated = rbac_pb2.Policy()
    negated.permissions.add(any=True)
    negated.principals.add().not_id.CopyFrom(one)
    assert rule(negated).principal == Not(ALWAYS)
    assert rule(negated, deny=True).principal == Not(NEVER)
    left = rbac_pb2.Policy()  # `experimental.envoy.filters.`: what another filter has found out
    left.permissions.add().metadata.filter = "another"
    left.principals.add(any=True)
    assert rule(left).permission == NEVER
    assert rule(left, deny=True).permission == ALWAYS


def test_an_allow_filter_without_policies_lets_nobody_in() -> None:
    """As Envoy and gRPC read it."""
    found = decoded(changed(add_filter(filter_pb2.RBAC(rules=rbac_pb2.RBAC(action=rbac_pb2.RBAC.ALLOW)))))
    request = Request("GET", "http", "reviews", "/", Headers())
    assert not isinstance(Guard([found]).admit(request, SLEEP, 0.0), Allow)
    empty = decoded(changed(add_filter(filter_pb2.RBAC())))  # "If absent, no enforcing RBAC policy will be applied"
    assert isinstance(Guard([empty]).admit(request, SLEEP, 0.0), Allow)


def test_tls_is_strict_and_plaintext_takes_both() -> None:
    """Istio writes PERMISSIVE for gRPC as it writes DISABLE."""
    assert decoded(inbound_listener(NAME, Rules(strict=True))).tls is TlsMode.STRICT
    assert decoded(inbound_listener(NAME, Rules(strict=False))).tls is TlsMode.PERMISSIVE
    both = inbound_listener(NAME, Rules(strict=True))
    both.filter_chains.append(inbound_listener(NAME, Rules(strict=False)).filter_chains[0])
    assert decoded(both).tls is TlsMode.PERMISSIVE
    found = decode_resource(LISTENER, outbound_listener("reviews:9080", "routes").SerializeToString())
    assert found == Listener("reviews:9080", "routes")


Change = Callable[[Any], None]


def changed(*changes: Change, rules: Rules | None = None) -> Any:
    """A listener, its connection manager or TLS changed."""
    message = inbound_listener(NAME, rules or Rules(strict=True))
    for change in changes:
        change(message)
    return message


def of_manager(change: Change) -> Change:
    def of(message: listener_pb2.Listener) -> None:
        config = message.filter_chains[0].filters[0].typed_config
        manager = http_connection_manager_pb2.HttpConnectionManager()
        config.Unpack(manager)
        change(manager)
        config.Pack(manager)

    return of


def of_tls(change: Change) -> Change:
    def of(message: listener_pb2.Listener) -> None:
        config = message.filter_chains[0].transport_socket.typed_config
        context = tls_pb2.DownstreamTlsContext()
        config.Unpack(context)
        change(context)
        config.Pack(context)

    return of


def add_filter(config: Any) -> Change:
    return of_manager(lambda manager: manager.http_filters.add(name="added").typed_config.Pack(config))


def of_policy(change: Change) -> Change:
    found = policy(path="/")
    change(found)
    return add_filter(filter_pb2.RBAC(rules=rbac_pb2.RBAC(action=rbac_pb2.RBAC.DENY, policies={"p": found})))


NAMED = uri_template_match_pb2.UriTemplateMatchConfig(path_template="/a/{name}")


def nested(found: rbac_pb2.Policy) -> None:
    principal = found.principals.add()
    for _ in range(40):
        principal = principal.not_id
    principal.any = True


def not_exact(context: Any) -> None:
    context.common_tls_context.combined_validation_context.default_validation_context.match_subject_alt_names.add(
        exact="spiffe://cluster.local/ns/default/sa/x"
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (of_policy(lambda p: p.condition.const_expr.SetInParent()), "policies[p]"),
        (of_policy(lambda p: p.ClearField("principals")), "policies[p].principals"),
        (of_policy(lambda p: p.permissions.add()), "permissions[1]"),
        (of_policy(lambda p: p.principals.add().filter_state.SetInParent()), "principals[1]"),
        (of_policy(lambda p: p.principals.add().and_ids.SetInParent()), "principals[1].and_ids"),
        (of_policy(nested), "not_id"),
        (of_policy(lambda p: p.permissions.add().matcher.SetInParent()), "permissions[1]"),
        (of_policy(lambda p: p.permissions.add().uri_template.typed_config.Pack(NAMED)), "path_template"),
        (of_policy(lambda p: p.permissions.add(destination_port=70000)), "destination_port"),
        (of_policy(lambda p: p.principals.add(remote_ip={"address_prefix": "x"})), "remote_ip"),
        (of_policy(lambda p: p.principals.add(header={"name": ":scheme", "present_match": True})), "header.name"),
        (add_filter(filter_pb2.RBAC(matcher={"matcher_tree": {}})), "http_filters[1]"),
        (add_filter(jwt_pb2.JwtAuthentication()), "http_filters[1]"),
        (of_manager(lambda x: x.rds.SetInParent()), "route_specifier"),
        (of_manager(lambda x: x.route_config.virtual_hosts.add(domains=["a"])), "virtual_hosts"),
        (of_manager(lambda x: x.route_config.typed_per_filter_config["x"].SetInParent()), "route_config"),
        (of_manager(lambda x: x.route_config.virtual_hosts[0].typed_per_filter_config["x"].SetInParent()), "hosts"),
        (
            of_manager(lambda x: x.route_config.virtual_hosts[0].routes[0].typed_per_filter_config["x"].SetInParent()),
            "typed_per_filter_config",
        ),
        (of_tls(lambda x: x.require_client_certificate.Clear()), "require_client_certificate"),
        (of_tls(not_exact), "match_subject_alt_names"),
        (of_tls(lambda x: x.common_tls_context.ClearField("validation_context_type")), "validation_context"),
        (lambda x: x.default_filter_chain.SetInParent(), "filter_chains"),
        (lambda x: x.ClearField("filter_chains"), "filter_chains"),
        (lambda x: x.listener_filters.add(name="proxy_protocol"), "listener_filters"),
        (lambda x: x.filter_chains[0].filter_chain_match.source_ports.append(1), "filter_chain_match"),
        (lambda x: x.filter_chains.add().CopyFrom(x.filter_chains[0]), "filter_chains[1]"),
        (lambda x: x.address.socket_address.ClearField("port_specifier"), "address"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_may_keep_somebody_out_is_never_passed_over(change: Change, field: str) -> None:
    """It is refused, and the refusal names where it stands."""
    with pytest.raises(InvalidResource) as refused:
        decoded(changed(change))
    assert field in str(refused.value)
    assert NAME in str(refused.value)


def test_two_filters_that_allow_are_refused() -> None:
    """Both would have to allow, and rules of ours are alternatives."""
    allows = filter_pb2.RBAC(rules=rbac_pb2.RBAC(policies={"p": policy(path="/")}))
    with pytest.raises(InvalidResource, match="second that allows"):
        decoded(changed(add_filter(allows), add_filter(allows)))
    shadow = filter_pb2.RBAC(shadow_rules=rbac_pb2.RBAC(policies={"s": policy(path="/")}))
    rules = decoded(changed(add_filter(allows), add_filter(shadow))).access.rules
    assert [(each.name, each.action, each.dry_run) for each in rules] == [
        ("p", Action.ALLOW, False),
        ("s", Action.ALLOW, True),
    ]
