"""What Istio's rate limit samples ask for, in both of their shapes; and what is passed over, with its reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from views import node, objects, view

from meshlib.istio.parse import Parsed, parse_text
from meshlib.istio.translate import translate, view_key
from meshlib.model import (
    UNKNOWN_PEER,
    Access,
    HeaderMatch,
    Headers,
    Inbound,
    LimitAnswer,
    LimitKey,
    NodeKind,
    Quota,
    QuotaService,
    RateLimit,
    Request,
    StringMatch,
)
from meshlib.policy.admission import Deny
from meshlib.policy.guard import Guard

TYPES = "type.googleapis.com"
LOCAL = f"{TYPES}/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit"
SERVICE = f"{TYPES}/envoy.extensions.filters.http.ratelimit.v3.RateLimit"
ALL = {"runtime_key": "x", "default_value": {"numerator": 100, "denominator": "HUNDRED"}}
MANAGER = {"filterChain": {"filter": {"name": "envoy.filters.network.http_connection_manager"}}}
BUCKET = {"max_tokens": 100, "tokens_per_fill": 100, "fill_interval": "60s"}
PATH = {"request_headers": {"header_name": ":path", "descriptor_key": "PATH"}}
WHO = "outbound|8081||ratelimit.default.svc.cluster.local"


def filters(*patches: dict[str, Any], name: str = "limits", namespace: str = "istio-system", **labels: str) -> str:
    spec: dict[str, Any] = {"configPatches": list(patches)}
    if labels:
        spec["workloadSelector"] = {"labels": labels}
    whole = {
        "apiVersion": "networking.istio.io/v1alpha3",
        "kind": "EnvoyFilter",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }
    return yaml.safe_dump(whole)


def inserted(config: dict[str, Any], context: str = "SIDECAR_INBOUND", **listener: Any) -> dict[str, Any]:
    value = {"name": "whatever", "typed_config": config}
    return {
        "applyTo": "HTTP_FILTER",
        "match": {"context": context, "listener": {**MANAGER, **listener}},
        "patch": {"operation": "INSERT_BEFORE", "value": value},
    }


def local(**fields: Any) -> dict[str, Any]:
    return {"@type": LOCAL, "stat_prefix": "rl", "filter_enabled": ALL, "filter_enforced": ALL, **fields}


def asking(**fields: Any) -> dict[str, Any]:
    who = {"grpc_service": {"envoy_grpc": {"cluster_name": WHO}}, "transport_api_version": "V3"}
    return {"@type": SERVICE, "domain": "shop", "rate_limit_service": who, **fields}


def merged(
    value: dict[str, Any], vhost: str = "", context: str = "GATEWAY", to: str = "VIRTUAL_HOST"
) -> dict[str, Any]:
    routes = {"vhost": {"name": vhost, "route": {"action": "ANY"}}}
    return {
        "applyTo": to,
        "match": {"context": context, "routeConfiguration": routes},
        "patch": {"operation": "MERGE", "value": value},
    }


def access(*texts: str, kind: NodeKind = NodeKind.SIDECAR, **labels: str) -> Access:
    """Of a workload, or of a gateway's one door."""
    door = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: g, namespace: default}
spec:
  selector: {app: door}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["*"]}]
"""
    made = translate(objects(*texts, door), (), node(kind=kind, **labels or {"app": "door"})).snapshot
    found = made.inbound[0].access if kind is NodeKind.SIDECAR else made.listeners[0].access
    assert found is not None
    return found


# Local rate limits


def test_the_plain_local_limit_is_a_bucket() -> None:
    """As a typed_config or a TypedStruct, in either spelling; Envoy's answers where nothing else is said."""
    struct = {"@type": f"{TYPES}/udpa.type.v1.TypedStruct", "type_url": LOCAL}
    fields = {
        "statPrefix": "rl",
        "tokenBucket": {"maxTokens": 100, "tokensPerFill": 100, "fillInterval": "60s"},
        "filterEnabled": {"defaultValue": {"numerator": 100}},
        "filterEnforced": ALL,
    }
    wanted = RateLimit(
        "istio-system/limits rl",
        100,
        100,
        60.0,
        origin="EnvoyFilter istio-system/limits (test.yaml) configPatches[0]",
        answer=LimitAnswer(429, 14),
    )
    assert access(filters(inserted(local(token_bucket=BUCKET)))).rate_limits == (wanted,)
    assert access(filters(inserted({**struct, "value": fields}))).rate_limits == (wanted,)


def test_the_sample_that_limits_a_path_is_understood_whole() -> None:
    """Istio's local-rate-limit-service: the filter without a bucket, which a route's own configuration replaces; a
    condition on the path has a bucket of its own, and the default one counts those calls, too."""
    condition = {
        "descriptor_value": "productpage",
        "expect_match": True,
        "headers": [{"name": ":path", "string_match": {"prefix": "/productpage", "ignore_case": True}}],
    }
    own = local(
        token_bucket=BUCKET,
        enable_x_ratelimit_headers="DRAFT_VERSION_03",
        response_headers_to_add=[{"append": False, "header": {"key": "x-local-rate-limit", "value": "true"}}],
        descriptors=[
            {"entries": [{"key": "header_match", "value": "productpage"}], "token_bucket": {**BUCKET, "max_tokens": 10}}
        ],
    )
    actions = [{"actions": [{"remote_address": {}}]}, {"actions": [{"header_value_match": condition}]}]
    value = {
        "route": {"rate_limits": actions},
        "typed_per_filter_config": {"envoy.filters.http.local_ratelimit": own},
    }
    text = filters(
        inserted({"@type": LOCAL, "stat_prefix": "http_local_rate_limiter"}),
        merged(value, "inbound|http|9080", "SIDECAR_INBOUND", "HTTP_ROUTE"),
        app="productpage",
    )
    first, default = access(text, app="productpage").rate_limits
    fits = HeaderMatch(":path", StringMatch("prefix", "/productpage", True))
    assert (first.name, first.tokens, first.keys) == (
        "istio-system/limits rl header_match=productpage",
        10,
        (LimitKey("match", entry="header_match", value="productpage", headers=(fits,)),),
    )
    assert (default.tokens, default.keys, default.otherwise) == (100, (), False)
    for each in (first, default):
        assert (each.port, each.answers, each.shadow) == (9080, True, False)
        assert each.answer == LimitAnswer(429, 14, (("x-local-rate-limit", "true"),))
    assert access(text, app="reviews").rate_limits == ()


def test_calls_are_let_pass_as_by_an_envoy() -> None:
    """What a real one answered to these calls, one after the other: status, and what it said was left. Who is turned
    away by a descriptor's bucket takes nothing from the default one."""
    fits = {"headers": [{"name": ":path", "string_match": {"prefix": "/product", "ignore_case": True}}]}
    config = local(
        token_bucket={**BUCKET, "max_tokens": 5},
        enable_x_ratelimit_headers="DRAFT_VERSION_03",
        rate_limits=[{"actions": [{"header_value_match": {"descriptor_value": "page", **fits}}]}],
        descriptors=[
            {"entries": [{"key": "header_match", "value": "page"}], "token_bucket": {**BUCKET, "max_tokens": 2}}
        ],
    )
    guard = Guard([Inbound("inbound", access=access(filters(inserted(config))))])
    told = []
    for path in ("product", "Product", "product", "a", "product", "a", "a", "a"):
        request = Request("GET", "http", "here", f"/{path}", Headers())
        verdict = guard.admit(request, UNKNOWN_PEER, 0.0, 1.0)
        status, headers = (verdict.status, verdict.headers) if isinstance(verdict, Deny) else (200, verdict.answer)
        told.append((status, dict(headers)[b"x-ratelimit-remaining"]))
    assert told == [
        (200, b"1"),
        (200, b"0"),
        (429, b"0"),
        (200, b"2"),
        (429, b"0"),
        (200, b"1"),
        (200, b"0"),
        (429, b"0"),
    ]


def test_a_wildcard_has_a_bucket_for_each_value() -> None:
    """With actions of the filter's own, and a default bucket that is as good as none."""
    user = {"header_name": "X-User", "descriptor_key": "user"}
    config = local(
        token_bucket={**BUCKET, "max_tokens": 4294967295},
        always_consume_default_token_bucket=False,
        rate_limited_as_resource_exhausted=True,
        rate_limits=[
            {"actions": [{"generic_key": {"descriptor_value": "all"}}, {"request_headers": user}]},
            {"actions": [PATH]},
        ],
        descriptors=[
            {"entries": [{"key": "generic_key", "value": "all"}, {"key": "user"}], "token_bucket": BUCKET},
            {"entries": [{"key": "generic_key", "value": "other"}, {"key": "user"}], "token_bucket": BUCKET},
            {"entries": [{"key": "PATH", "value": "/login"}], "token_bucket": BUCKET},
        ],
    )  # fmt: skip
    found = access(filters(inserted(config))).rate_limits
    assert [(each.keys, each.answer.grpc_status) for each in found] == [
        ((LimitKey("header", "x-user", "user"),), 8),
        ((LimitKey("header", ":path", "PATH", "/login"),), 8),
    ]
    limited = {**config, "token_bucket": BUCKET}
    assert access(filters(inserted(limited))).rate_limits[-1].otherwise is True


def test_a_virtual_host_narrows_what_a_filter_asks_about() -> None:
    """Its actions hold for its calls; the default bucket for all that the filter is for."""
    own = local(
        token_bucket=BUCKET,
        descriptors=[{"entries": [{"key": "PATH", "value": "/login"}], "token_bucket": BUCKET}],
    )
    value = {"rate_limits": [{"actions": [PATH]}]}
    text = filters(inserted(own, "GATEWAY"), merged(value, "shop.example:80"), inserted(own, "GATEWAY", portNumber=81))
    found = access(text, kind=NodeKind.ROUTER).rate_limits
    assert [(each.port, each.hosts, len(each.keys)) for each in found] == [
        (80, ("shop.example",), 1),
        (0, (), 0),
        (81, (), 0),
    ]


def test_a_filter_that_is_not_enabled_does_nothing_and_one_not_enforced_counts() -> None:
    """Envoy's defaults are no calls at all."""
    bare = {"@type": LOCAL, "stat_prefix": "rl", "token_bucket": BUCKET}
    assert access(filters(inserted(bare))).rate_limits == ()
    (shadow,) = access(filters(inserted({**bare, "filter_enabled": ALL}))).rate_limits
    assert shadow.shadow


@pytest.mark.parametrize(
    ("context", "kinds"),
    [("SIDECAR_INBOUND", {NodeKind.SIDECAR}), ("GATEWAY", {NodeKind.ROUTER}), ("ANY", set(NodeKind))],
)
def test_a_patch_is_for_its_context(context: str, kinds: set[NodeKind]) -> None:
    """A workload's and a gateway's, by the port of the listener where one is named."""
    text = filters(inserted(local(token_bucket=BUCKET), context, portNumber=8080))
    for kind in NodeKind:
        limits = access(text, kind=kind).rate_limits
        assert [each.port for each in limits] == ([8080] if kind in kinds else [])


def test_only_the_root_namespace_speaks_for_others() -> None:
    """And labels that are asked for make nodes differ."""
    patch = inserted(local(token_bucket=BUCKET))
    assert access(filters(patch, namespace="other")).rate_limits == ()
    assert len(access(filters(patch, namespace="default")).rate_limits) == 1
    asked = tuple(objects(filters(patch, app="x")))
    assert view_key(asked, node(app="x")) != view_key(asked, node(app="y"))


# Rate limit services


def test_the_global_sample_is_a_quota() -> None:
    """Istio's rate limit task: the filter and the actions in two objects, on a gateway."""
    ask = filters(inserted(asking(failure_mode_deny=True, timeout="10s"), "GATEWAY"), name="filter-ratelimit")
    describe = filters(merged({"rate_limits": [{"actions": [PATH]}]}), name="filter-ratelimit-svc")
    assert access(ask, describe, kind=NodeKind.ROUTER).quotas == (
        Quota(
            "istio-system/filter-ratelimit shop",
            QuotaService("envoy", "ratelimit.default.svc.cluster.local:8081", "shop", 10.0, True),
            ((LimitKey("header", ":path", "PATH"),),),
            origin="EnvoyFilter istio-system/filter-ratelimit (test.yaml)",
            answer=LimitAnswer(429, 14),
        ),
    )
    assert access(ask, describe).quotas == ()
    assert access(ask, kind=NodeKind.ROUTER).quotas == ()


def test_bookinfos_policy_names_a_cluster_that_it_adds() -> None:
    """productpage_envoy_ratelimit: the filter by another name, and a CLUSTER patch that says where."""
    who = {"grpc_service": {"envoy_grpc": {"cluster_name": "rate_limit_cluster"}, "timeout": "10s"}}
    address = {"socket_address": {"address": "ratelimit.default.svc.cluster.local", "port_value": 8081}}
    cluster = {
        "applyTo": "CLUSTER",
        "match": {"cluster": {"service": "ratelimit.default.svc.cluster.local"}},
        "patch": {
            "operation": "ADD",
            "value": {
                "name": "rate_limit_cluster",
                "type": "STRICT_DNS",
                "http2_protocol_options": {},
                "load_assignment": {
                    "cluster_name": "rate_limit_cluster",
                    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
                },
            },
        },
    }
    ask = inserted(asking(rate_limit_service=who), "GATEWAY")
    describe = merged({"rate_limits": [{"actions": [PATH], "hits_addend": {"number": 3}}]}, "shop.example:80")
    (quota,) = access(filters(ask, cluster, describe), kind=NodeKind.ROUTER).quotas
    assert quota.service == QuotaService("envoy", "ratelimit.default.svc.cluster.local:8081", "shop", 10.0)
    assert (quota.hosts, quota.port, quota.hits) == (("shop.example",), 80, 3)
    missing = view(filters(ask, describe), given=node(kind=NodeKind.ROUTER, app="door"))
    assert [problem.reason for problem in missing.problems] == [
        "no cluster 'rate_limit_cluster': nobody is there to be asked"
    ]


def test_stages_tell_filters_apart() -> None:
    """Each asks about the actions of its own."""
    actions = {"rate_limits": [{"actions": [PATH], "stage": 1}, {"actions": [{"remote_address": {}}]}]}
    text = filters(inserted(asking(), "GATEWAY"), inserted(asking(stage=1), "GATEWAY"), merged(actions))
    found = access(text, kind=NodeKind.ROUTER).quotas
    assert [each.descriptors for each in found] == [
        ((LimitKey("address", entry="remote_address"),),),
        ((LimitKey("header", ":path", "PATH"),),),
    ]


# What is passed over, and what is refused


def parsed(*patches: dict[str, Any]) -> Parsed:
    return parse_text(filters(*patches), "x.yaml")


AT = "spec.configPatches[0]"
CONFIG = f"{AT}.patch.value.typed_config"
BROKEN = {"header": {"key": "a", "value": "b\nc"}}
NO_REGEX = {"descriptor_value": "v", "headers": [{"name": "a", "string_match": {"safe_regex": {"regex": "("}}}]}
ACTIONS = f"{AT}.patch.value.rate_limits[0].actions"
LUA = {"@type": f"{TYPES}/envoy.extensions.filters.http.lua.v3.Lua"}


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"applyTo": "NETWORK_FILTER", "patch": {"operation": "MERGE"}}, AT),
        (inserted(LUA), f"{AT}.patch.value"),
        (inserted(local(token_bucket=BUCKET), "SIDECAR_OUTBOUND"), f"{AT}.match.context"),
        (inserted(local(token_bucket=BUCKET), name="virtualInbound"), f"{AT}.match.listener.name"),
        (inserted(local(token_bucket=BUCKET, unheard={"x": 1})), f"{CONFIG}.unheard"),
        (inserted(local(local_cluster_rate_limit={"x": 1})), f"{CONFIG}.local_cluster_rate_limit"),
        (inserted(local(filter_enforced={"default_value": {"numerator": 50}})), f"{CONFIG}.filter_enforced"),
        (inserted(asking(failure_mode_deny_percent=ALL), "GATEWAY"), f"{CONFIG}.failure_mode_deny_percent"),
        (merged({"rate_limits": [{"actions": [{"destination_cluster": {}}]}]}), f"{ACTIONS}[0]"),
        (merged({"rate_limits": [{"actions": [PATH]}]}, "outside"), f"{AT}.match.routeConfiguration.vhost.name"),
    ],
)
def test_what_is_not_understood_has_no_effect_and_says_so(patch: dict[str, Any], field: str) -> None:
    """The whole patch: half a limit would be another one. Its object is kept, with what is understood."""
    found = parsed(patch, inserted(local(token_bucket=BUCKET)))
    assert not found.problems
    assert [warning.field for warning in found.warnings] == [field]
    (inbound,) = translate(found.objects, (), node()).snapshot.inbound
    assert len(inbound.access.rate_limits) == 1


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        (inserted(local(token_bucket={"max_tokens": 1})), f"{CONFIG}.token_bucket.fill_interval"),
        (inserted(local(token_bucket={**BUCKET, "fill_interval": 60})), f"{CONFIG}.token_bucket.fill_interval"),
        (inserted(local(token_bucket={**BUCKET, "max_tokens": 0})), f"{CONFIG}.token_bucket.max_tokens"),
        (inserted(local(status={"code": 200})), f"{CONFIG}.status.code"),
        (inserted(local(status={"code": []})), f"{CONFIG}.status.code"),
        (inserted(local(token_bucket={**BUCKET, "max_tokens": 1 << 32})), f"{CONFIG}.token_bucket.max_tokens"),
        (inserted(local(token_bucket=BUCKET), portNumber=65536), f"{AT}.match.listener.portNumber"),
        (merged({}, "a:65536"), f"{AT}.match.routeConfiguration.vhost.name"),
        (inserted(local(descriptors=[{"entries": []}])), f"{CONFIG}.descriptors[0]"),
        (inserted(local(response_headers_to_add=[BROKEN])), f"{CONFIG}.response_headers_to_add[0].header"),
        (inserted(asking(domain="")), f"{CONFIG}.domain"),
        (inserted(asking(rate_limit_service={})), f"{CONFIG}.rate_limit_service.grpc_service"),
        (merged({"rate_limits": [{}]}), ACTIONS),
        (merged({"rate_limits": "x"}), f"{AT}.patch.value.rate_limits"),
        (
            merged({"rate_limits": [{"actions": [{"header_value_match": NO_REGEX}]}]}),
            f"{ACTIONS}[0].header_value_match.headers[0].string_match.safe_regex.regex",
        ),
    ],
)
def test_what_envoy_would_refuse_is_refused_by_its_field(patch: dict[str, Any], field: str) -> None:
    """And the object is left out."""
    found = parsed(patch)
    assert [problem.field for problem in found.problems] == [field]
    assert not found.objects


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PLACES = (
    (inserted(local(token_bucket=BUCKET, rate_limits=[{"actions": [PATH]}])), "HTTP_FILTER"),
    (inserted(asking(rate_limits=[{"actions": [PATH]}])), "HTTP_FILTER"),
    (merged({"rate_limits": [{"actions": [PATH]}], "typed_per_filter_config": {}}), "VIRTUAL_HOST"),
)


@given(place=st.sampled_from(PLACES), value=anything, data=st.data())
def test_whatever_stands_in_a_field_is_understood_passed_over_or_refused(place: Any, value: Any, data: Any) -> None:
    """Never an error of ours, in the place of any field that means something."""
    patch = copy.deepcopy(place[0])
    here: Any = patch
    while True:
        steps = list(here) if isinstance(here, dict) else list(range(len(here)))
        step = data.draw(st.sampled_from(steps))
        if not isinstance(here[step], (dict, list)) or not here[step] or data.draw(st.booleans()):
            here[step] = value
            break
        here = here[step]
    found = parse_text(filters(patch), "x.yaml")
    for each in NodeKind:
        translate(found.objects, (), node(kind=each))
