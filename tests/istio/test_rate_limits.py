"""What RateLimit and BackendTrafficPolicy.rateLimits ask for, field by field, and what is refused."""

from __future__ import annotations

import pytest
from test_backend_policy import cluster, policy
from views import node, objects, service, view

from meshlib.istio.parse import parse_text
from meshlib.istio.translate import translate, view_key
from meshlib.model import LimitKey, NodeKind, Quota, QuotaService, RateLimit

LIMIT = """
apiVersion: meshlib.io/v1alpha1
kind: RateLimit
metadata: {name: api, namespace: default}
spec:
  selector: {matchLabels: {app: reviews}}
  limits:
  - {name: all, requests: 100, per: 60s, burst: 150, answers: true}
  - {requests: 5, per: 1s, keys: ["header:End-User", principal], methods: [post], pathPrefix: /api/, shadow: true}
"""


def test_outbound_limits_are_the_clusters() -> None:
    """In shadow one by one, or all by the policy's word."""
    limits = "rateLimits: [{name: calls, requests: 10, per: 1s}, {requests: 1, per: 1m, keys: [path]}]"
    made = cluster(view(service(), policy(f"{{host: a, {limits}, shadow: [rate-limit]}}")))
    assert [(each.name, each.tokens, each.interval, each.keys, each.shadow) for each in made.rate_limits] == [
        ("calls", 10, 1.0, (), True),
        (f"{made.name} limit 1", 1, 60.0, (LimitKey("path"),), True),
    ]
    assert "BackendTrafficPolicy default/p" in made.rate_limits[0].origin


@pytest.mark.parametrize(("labels", "count"), [({"app": "reviews"}, 2), ({"app": "ratings"}, 0)])
def test_inbound_limits_are_the_selected_workloads(labels: dict[str, str], count: int) -> None:
    """With everything that is written, and where it stands."""
    parsed = parse_text(LIMIT, "limits.yaml")
    assert not parsed.problems
    seen = node(**labels)
    (inbound,) = translate(parsed.objects, (), seen).snapshot.inbound
    limits = inbound.access.rate_limits
    assert len(limits) == count
    assert view_key(parsed.objects, seen) != view_key(parsed.objects, node())
    if count:
        origin = limits[0].origin
        assert limits == (
            RateLimit("all", 150, 100, 60.0, answers=True, origin=origin),
            RateLimit(
                "default/api 1",
                5,
                5,
                1.0,
                (LimitKey("header", "end-user"), LimitKey("principal")),
                ("POST",),
                "/api/",
                shadow=True,
                origin=origin,
            ),
        )
        assert "RateLimit default/api (limits.yaml" in origin


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("limits: []", "spec.limits"),
        ("limits: [{requests: 0, per: 1s}]", "spec.limits[0].requests"),
        ("limits: [{requests: 1, per: 0s}]", "spec.limits[0].per"),
        ("limits: [{requests: 1, per: 1s, keys: [header]}]", "spec.limits[0].keys[0]"),
        ("limits: [{requests: 1, per: 1s, keys: ['user:x']}]", "spec.limits[0].keys[0]"),
        ("limits: [{requests: 1, per: 1s, pathPrefix: api}]", "spec.limits[0].pathPrefix"),
        ("limits: [{requests: 1, per: 1s, rate: 3}]", "spec.limits[0].rate"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(given: str, field: str) -> None:
    """And the object is left out."""
    text = f"apiVersion: meshlib.io/v1alpha1\nkind: RateLimit\nmetadata: {{name: x}}\nspec: {{{given}}}\n"
    found = parse_text(text, "x.yaml")
    assert [problem.field for problem in found.problems] == [field]
    assert not found.objects


def test_a_limit_of_outbound_calls_has_no_callers_to_tell_apart() -> None:
    """This process is the only one."""
    text = policy("{host: a, rateLimits: [{requests: 1, per: 1s, keys: [principal]}]}")
    (problem,) = parse_text(text, "x.yaml").problems
    assert problem.field == "spec.rateLimits[0].keys[0]"


RULES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: a, namespace: default}
spec:
  hosts: [a]
  http:
  - match: [{uri: {prefix: /old}}]
    redirect: {uri: /new}
  - route: [{destination: {host: a}}]
"""


@pytest.mark.parametrize("limits", ["rateLimits: [{name: calls, requests: 10, per: 1s}]", "resendUnsafe: true"])
def test_a_route_that_answers_by_itself_is_limited_by_its_host(limits: str) -> None:
    """The redirect is a call to `a`, too."""
    seen = view(service(), policy(f"{{host: a, {limits}}}"), RULES)
    made = next(each for each in seen.snapshot.route_configurations if "a.default" in each.name)
    redirect, forward = made.virtual_hosts[0].routes
    wanted = cluster(seen).name if "rateLimits" in limits else ""
    assert (redirect.limited_by, forward.limited_by) == (wanted, "")
    assert redirect.clusters == ((wanted,) if wanted else ())


GATEWAY = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: g, namespace: default}
spec:
  selector: {app: reviews}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["*"]}]
"""


def test_a_ratelimit_that_selects_a_gateway_holds_at_its_doors() -> None:
    """Each listener has it."""
    (listener,) = translate(objects(LIMIT, GATEWAY), (), node(kind=NodeKind.ROUTER, app="reviews")).snapshot.listeners
    assert listener.access is not None
    assert [each.name for each in listener.access.rate_limits] == ["all", "default/api 1"]


QUOTAS = """
apiVersion: meshlib.io/v1alpha1
kind: RateLimit
metadata: {name: shared, namespace: default}
spec:
  selector: {matchLabels: {app: reviews}}
  quotas:
  - name: users
    redis: rediss://user:secret@redis:6379/1
    requests: 100
    per: 1m
    keys: ["header:End-User", principal]
    hits: 2
    timeout: 50ms
    failureModeDeny: true
  - service: a:80
    domain: shop
    descriptors:
    - [{key: tier, value: gold}, {key: who, from: "header:End-User"}]
    - [{key: from, from: address}]
    methods: [post]
    pathPrefix: /api
    answers: true
    shadow: true
"""


def test_quotas_are_what_is_written() -> None:
    """By both who can count, with everything that may be said."""
    (inbound,) = translate(tuple(objects(QUOTAS)), (), node(app="reviews")).snapshot.inbound
    origin = "RateLimit default/shared (test.yaml)"
    assert inbound.access.quotas == (
        Quota(
            "users",
            QuotaService("redis", "rediss://user:secret@redis:6379/1", "", 0.05, True),
            ((LimitKey("header", "end-user"), LimitKey("principal")),),
            100,
            60,
            2,
            origin=origin,
        ),
        Quota(
            "default/shared 1",
            QuotaService("envoy", "a:80", "shop"),
            (
                (LimitKey("value", entry="tier", value="gold"), LimitKey("header", "end-user", "who")),
                (LimitKey("address", entry="from"),),
            ),
            methods=("POST",),
            path_prefix="/api",
            answers=True,
            shadow=True,
            origin=origin,
        ),
    )
    assert str(inbound.access.quotas[0].service) == "rediss://redis:6379/1"


def test_outbound_quotas_are_the_clusters() -> None:
    """And a gateway finds its way to a service of the mesh that counts, which it has no listener for."""
    made = cluster(view(service(), policy("{host: a, quotas: [{redis: 'redis://r', requests: 1, per: 1s}]}")))
    assert [(each.name, each.requests, each.interval) for each in made.quotas] == [(f"{made.name} quota 0", 1, 1)]
    seen = view(QUOTAS, GATEWAY, service(), given=node(kind=NodeKind.ROUTER, app="reviews")).snapshot
    (listener,) = seen.listeners
    assert listener.access is not None
    way = listener.access.quotas[1].service.route_configuration
    assert way == made.name
    assert way in listener.route_configurations
    assert [each.name for each in seen.route_configurations] == ["http.80", way]
    assert [each.name for each in seen.clusters] == [way]
    assert seen.inconsistencies() == ()


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("requests: 1, per: 1s", ""),
        ("redis: 'redis://r', service: 'a:80', requests: 1, per: 1s", ""),
        ("redis: r, requests: 1, per: 1s", ".redis"),
        ("redis: 'redis://r', per: 1s", ".requests"),
        ("redis: 'redis://r', requests: 1", ".per"),
        ("redis: 'redis://r', requests: 1, per: 1500ms", ".per"),
        ("redis: 'redis://r', requests: 1, per: 8761h", ".per"),
        ("redis: 'redis://r', requests: 1, per: 1s, hits: 2", ".hits"),
        ("redis: 'redis://r', requests: 1, per: 1s, domain: d", ".domain"),
        ("redis: 'redis://r', requests: 1, per: 1s, keys: [user]", ".keys[0]"),
        ("redis: 'redis://r', requests: 1, per: 1s, timeout: 0s", ".timeout"),
        ("service: a, domain: d, descriptors: [[{key: k, value: v}]]", ".service"),
        ("service: 'a:80', descriptors: [[{key: k, value: v}]]", ".domain"),
        ("service: 'a:80', domain: d", ".descriptors"),
        ("service: 'a:80', domain: d, descriptors: [[]]", ".descriptors[0]"),
        ("service: 'a:80', domain: d, descriptors: [[{key: k}]]", ".descriptors[0][0]"),
        ("service: 'a:80', domain: d, descriptors: [[{key: k, from: user}]]", ".descriptors[0][0].from"),
        ("service: 'a:80', domain: d, requests: 1, descriptors: [[{key: k, value: v}]]", ".requests"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused_by_its_field(given: str, field: str) -> None:
    """And the object is left out."""
    text = f"apiVersion: meshlib.io/v1alpha1\nkind: RateLimit\nmetadata: {{name: x}}\nspec: {{quotas: [{{{given}}}]}}\n"
    found = parse_text(text, "x.yaml")
    assert [problem.field for problem in found.problems] == [f"spec.quotas[0]{field}"]
    assert not found.objects
