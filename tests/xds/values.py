"""Any value of the model that can be configured, for properties: of those that mean the same, the one that Envoy has a
form for, so that a real Envoy must accept every one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from meshlib import model as md

names = st.text("abcxyz0-.", min_size=1, max_size=12)
headers = st.sampled_from(["x-a", "x-b", "end-user"])
texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=8)
seconds = st.integers(1, 3_600_000).map(lambda ms: ms / 1000)
shares = st.integers(1, 1_000_000)
counts = st.integers(1, 10_000)
optional_counts = st.none() | st.integers(0, 10_000)

some_text = texts.filter(bool)
plain_strings = st.builds(md.StringMatch, st.just("exact"), texts, st.booleans()) | st.builds(
    md.StringMatch, st.sampled_from(["prefix", "suffix", "contains"]), some_text, st.booleans()
)
strings = plain_strings | st.builds(md.StringMatch, st.just("regex"), st.sampled_from(["a+", "v[0-9]", ".*"]))
present = st.just(md.StringMatch("present"))
paths = st.one_of(
    st.none(),
    st.builds(md.StringMatch, st.just("exact"), texts.map("/".__add__), st.booleans()),
    st.builds(md.StringMatch, st.just("prefix"), texts.map("/p".__add__), st.booleans()),
    st.builds(md.StringMatch, st.just("path-prefix"), names.map("/p".__add__), st.booleans()),
    st.builds(md.StringMatch, st.just("regex"), st.just("/v[0-9]+")),
)
matches = st.builds(
    md.RouteMatch,
    paths,
    st.none() | strings,
    st.none() | strings,
    st.none() | strings,
    st.lists(st.builds(md.HeaderMatch, headers, strings | present, st.booleans()), max_size=3).map(tuple),
    st.lists(st.builds(md.QueryMatch, names, strings | present), max_size=2).map(tuple),
    st.lists(
        st.builds(md.ClaimMatch, st.lists(names, min_size=1, max_size=3).map(tuple), strings | present, st.booleans()),
        max_size=2,
    ).map(tuple),
)
pairs = st.lists(st.tuples(headers, texts), max_size=2).map(tuple)
operations = st.builds(md.HeaderOperations, pairs, pairs, st.lists(headers, max_size=2).map(tuple))
weighted = st.builds(md.WeightedCluster, names, counts, operations, operations, st.none() | names)
new_paths = texts.map("/".__add__)
rewrites = st.one_of(
    st.none(),
    st.builds(md.Rewrite, prefix=texts.map("/".__add__), authority=st.none() | names),
    st.builds(md.Rewrite, path=texts.map("/".__add__), authority=st.none() | names),
    st.builds(md.Rewrite, regex=st.just("^/(.*)$"), substitution=st.just(r"/x/\1"), authority=st.none() | names),
    st.builds(md.Rewrite, authority=names),
)
back_offs = st.tuples(seconds, st.integers(1, 20)).map(lambda pair: (pair[0], round(pair[0] * pair[1], 3)))
reset_headers = st.builds(
    md.ResetHeader, st.sampled_from(["retry-after", "x-reset"]), st.sampled_from(["seconds", "unix-timestamp"])
)
heeded = st.just({"reset_headers": ()}) | st.fixed_dictionaries(
    {"reset_headers": st.lists(reset_headers, min_size=1, max_size=2).map(tuple), "max_reset": seconds}
)
retries = st.builds(
    lambda attempts, on, codes, per_try, back_off, *others, heeded, **named: md.RetryPolicy(
        attempts, on, codes, per_try, *back_off, *others, **heeded, **named
    ),
    counts,
    st.frozensets(st.sampled_from(["5xx", "reset", "connect-failure", "unavailable"])),
    st.frozensets(st.integers(400, 599)),
    st.none() | seconds,
    back_offs,
    st.integers(0, 20),
    st.booleans(),
    retriable_headers=st.lists(st.builds(md.HeaderMatch, headers, strings | present, st.booleans()), max_size=2).map(
        tuple
    ),
    heeded=heeded,
    resend_unsafe=st.booleans(),
)
hash_policies = st.one_of(
    st.builds(md.HashPolicy, st.sampled_from(["header", "query"]), headers, terminal=st.booleans()),
    st.builds(md.HashPolicy, st.just("source"), terminal=st.booleans()),
    st.builds(
        md.HashPolicy,
        st.just("cookie"),
        headers,
        st.none() | st.just(0.0) | seconds,
        st.sampled_from(["", "/", "/shop"]),
        st.booleans(),
    ),
)
forwards = st.builds(
    md.Forward,
    st.lists(weighted, min_size=1, max_size=3).map(tuple),
    st.none() | seconds,
    st.none() | retries,
    rewrites,
    st.lists(st.builds(md.Mirror, names, shares, st.booleans()), max_size=2).map(tuple),
    st.none() | seconds,
    st.none() | st.builds(md.HedgePolicy, seconds, counts),
    st.lists(hash_policies, max_size=3).map(tuple),
    st.sampled_from([503, 404, 500]),
)
to_the_application = st.just(md.Forward(()))
redirects = st.builds(
    lambda path, **others: md.Redirect(**{**others, **path}),
    path=st.just({})
    | st.fixed_dictionaries({"path": new_paths})
    | st.fixed_dictionaries({"prefix": new_paths})
    | st.just({"regex": "^/old(/.*)?$", "substitution": "/new\\1"}),
    status=st.sampled_from([301, 302, 303, 307, 308]),
    scheme=st.none() | st.sampled_from(["http", "https"]),
    authority=st.none() | names,
    port=st.integers(-1, 65535),
)
direct = st.builds(md.DirectResponse, st.integers(200, 599), st.binary(max_size=20))
faults = st.builds(
    md.Fault,
    st.none() | st.builds(md.FaultDelay, seconds, shares),
    st.none()
    | st.builds(md.FaultAbort, shares, st.integers(200, 599))
    | st.builds(md.FaultAbort, shares, st.just(0), st.integers(0, 16)),
)
cors = st.builds(
    md.Cors,
    st.lists(st.builds(md.StringMatch, st.sampled_from(["exact", "prefix"]), names), max_size=2).map(tuple),
    names,
    st.just("") | names,
    st.just("") | names,
    st.none() | st.integers(0, 86400),
    st.booleans(),
    st.booleans(),
)
routes = st.builds(
    md.Route,
    matches,
    forwards | redirects | direct | to_the_application,
    names,
    st.none() | faults,
    operations,
    operations,
    texts,
    st.just("") | names,
    st.none() | cors,
)
virtual_hosts = st.lists(names, min_size=1, max_size=3, unique=True).flatmap(
    lambda hosts: st.tuples(
        *(
            st.builds(
                md.VirtualHost, st.just(host), st.just((host,)), st.lists(routes, max_size=3).map(tuple), st.booleans()
            )
            for host in hosts
        )
    )
)
route_configurations = st.builds(md.RouteConfiguration, names, virtual_hosts)

client_checks = st.sampled_from([{}, {"mutual": True}, {"optional": True}])
listener_tls = st.builds(
    lambda certificate, key, ca, checks: md.ListenerTls(certificate, key, ca if checks else "", **checks),
    names,
    names,
    names,
    client_checks,
) | st.builds(lambda name, checks: md.ListenerTls("", "", credential=name, **checks), names, client_checks)
told = st.builds(
    md.Told,
    st.none() | st.integers(0, 1_000_000),
    st.booleans(),
    st.lists(
        st.builds(md.SpanTag, names, st.sampled_from(["literal", "header", "environment"]), names), max_size=2
    ).map(tuple),
    st.none() | st.booleans(),
    names,
    st.lists(names, max_size=2).map(tuple),
    st.lists(names, max_size=2).map(tuple),
)
reporting = st.none() | st.builds(md.Reporting, told, told, names)
listeners = st.builds(md.Listener, names, names, reporting=reporting) | st.builds(
    md.Listener,
    names,
    st.just(""),
    st.just("0.0.0.0"),
    st.integers(1, 65535),
    st.lists(
        st.builds(md.FilterChain, names, st.lists(names, max_size=2).map(tuple), st.none() | listener_tls),
        min_size=1,
        max_size=2,
    ).map(tuple),
    reporting=reporting,
)

localities = st.builds(md.Locality, st.sampled_from(["", "eu"]), st.sampled_from(["", "a", "b"]))
endpoints = st.builds(
    md.Endpoint,
    st.sampled_from(["10.0.0.1", "10.0.0.2", "::1"]),
    st.integers(1, 65535),
    st.integers(1, 100),
    localities,
    st.integers(0, 2),
    st.sampled_from(list(md.Health)),
    names,
    st.just("") | texts,
)
sorted_endpoints = st.lists(endpoints, max_size=5, unique=True).map(lambda found: tuple(sorted(found)))


@st.composite
def load_assignments(draw: st.DrawFn) -> md.LoadAssignment:
    """With weights of their own for all localities, or for none."""
    found = draw(sorted_endpoints)
    weights: list[md.LocalityWeight] = []
    if found and draw(st.booleans()):
        for priority, locality in sorted({(each.priority, each.locality) for each in found}):
            weights.append(md.LocalityWeight(locality, priority, draw(st.integers(0, 5) | st.integers(501, 1000))))
    return md.LoadAssignment(draw(names), found, tuple(weights))


assignments = load_assignments()


limits = st.builds(
    md.ConnectionLimits,
    optional_counts,
    optional_counts,
    optional_counts,
    optional_counts,
    st.integers(0, 100),
    st.none() | st.integers(1, 1000),
    st.none() | seconds,
    st.none() | seconds,
    st.none() | st.builds(md.TcpKeepalive, st.integers(0, 9), st.integers(0, 9000), st.integers(0, 90)),
)
percents = st.integers(0, 100)
sizes = st.integers(0, 1000)
outliers = st.builds(
    md.OutlierDetection,
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
    seconds,
    seconds,
    percents,
    percents,
    st.just(300.0) | seconds,
    st.just(0.0) | seconds,
    st.booleans(),
    percents,
    sizes,
    sizes,
    st.floats(0, 10),
    percents,
    percents,
    sizes,
    sizes,
    st.frozensets(st.integers(400, 499), max_size=3),
)
retry_budgets = st.builds(md.RetryBudget, percents.map(float), percents) | st.builds(
    md.RateBudget, st.floats(0, 1000), st.floats(0, 1000), seconds
)
rings = st.tuples(st.integers(1, 2000), st.integers(2000, 8 * 1024 * 1024))
hash_tables = st.builds(
    lambda sizes, maglev: md.HashTable(*sizes, maglev),
    st.just((1024, 8 * 1024 * 1024)) | rings,
    st.sampled_from([65537, 251, 5_000_011]),
)
slow_starts = st.builds(md.SlowStart, seconds, st.just(1.0) | st.floats(0.1, 10), st.floats(0, 100))
zone_aware = st.builds(md.ZoneAware, st.floats(0, 100), sizes)
ranges = st.tuples(st.integers(100, 300), st.integers(300, 599))
checking = {
    "port": st.integers(0, 65535),
    "interval": seconds,
    "timeout": seconds,
    "healthy_threshold": counts,
    "unhealthy_threshold": counts,
}
health_checks = st.one_of(
    st.builds(
        md.HealthCheck,
        st.just("http"),
        texts.map("/".__add__),
        st.just("") | names,
        expected_statuses=st.lists(ranges, min_size=1, max_size=2).map(tuple),
        **checking,
    ),
    st.builds(md.HealthCheck, st.just("grpc"), host=st.just("") | names, service=st.just("") | names, **checking),
    st.builds(md.HealthCheck, st.just("tcp"), **checking),
)
breakers = st.builds(
    md.BreakerRules, sizes, st.floats(0, 100), st.floats(0, 100), seconds, seconds, counts, seconds, counts
)
upstream_tls = st.one_of(
    st.builds(
        md.UpstreamTls,
        st.just("SIMPLE"),
        st.just("") | names,
        st.just(()) | st.just(("a.b", "spiffe://x")),
        st.just("/ca"),
    ),
    st.builds(md.UpstreamTls, st.just("MUTUAL"), names, st.just(()), st.just(""), st.just("/c"), st.just("/k")),
    st.builds(md.UpstreamTls, st.just("SIMPLE"), names, insecure_skip_verify=st.just(True)),
)
service_names = st.builds(md.ServiceName, names, names, names)


some_words = st.lists(texts, max_size=2).map(tuple)
limit_keys = st.builds(
    md.LimitKey,
    st.sampled_from(["header", "principal", "address", "method", "path", "value", "match"]),
    headers,
    texts,
    texts,
    st.booleans(),
    st.lists(st.builds(md.HeaderMatch, headers, strings | present, st.booleans()), max_size=1).map(tuple),
    st.booleans(),
)
some_keys = st.lists(limit_keys, max_size=2).map(tuple)
limit_answers = st.builds(md.LimitAnswer, st.sampled_from([429, 503]), st.sampled_from([8, 14]), pairs)
rate_limits = st.builds(
    md.RateLimit,
    texts,
    counts,
    counts,
    seconds,
    some_keys,
    some_words,
    shadow=st.booleans(),
    port=st.integers(1, 65535),
    hosts=some_words,
    otherwise=st.booleans(),
    answer=limit_answers,
)
quota_services = st.builds(
    md.QuotaService, st.sampled_from(["redis", "envoy"]), texts, texts, st.floats(0.001, 1000), st.booleans()
)
quotas = st.builds(
    md.Quota,
    texts,
    quota_services,
    st.lists(some_keys, max_size=2).map(tuple),
    st.integers(0, 1000),
    st.integers(1, 1000),
    st.integers(0, 9),
    some_words,
    port=st.integers(1, 65535),
    hosts=some_words,
    answer=limit_answers,
)


@st.composite
def clusters(draw: st.DrawFn) -> md.Cluster:
    kind = draw(st.sampled_from(list(md.ClusterType)))
    static = kind in (md.ClusterType.STATIC, md.ClusterType.STRICT_DNS, md.ClusterType.LOGICAL_DNS)
    service = draw(st.none() | service_names)
    checks = draw(st.lists(health_checks, max_size=2))
    if service is not None:  # a check's own host is one that differs from the service's
        checks = [replace(each, host="") if each.host == service.host else each for each in checks]
    return md.Cluster(
        draw(names),
        kind,
        draw(st.sampled_from(list(md.LoadBalancing))),
        draw(seconds),
        draw(limits),
        draw(st.none() | retry_budgets),
        draw(st.none() | outliers),
        draw(st.none() | upstream_tls),
        draw(st.booleans()),
        draw(sorted_endpoints) if static else (),
        service,
        draw(st.just("") | names),
        draw(st.just(md.HashTable()) | hash_tables),
        draw(st.none() | slow_starts),
        draw(st.booleans()),
        draw(st.none() | zone_aware),
        tuple(checks),
        draw(st.none() | breakers),
        draw(st.frozensets(st.sampled_from(sorted(md.SHADOWABLE)))),
        draw(st.just("") | texts),
        draw(st.lists(rate_limits, max_size=1).map(tuple)),
        draw(st.lists(quotas, max_size=1).map(tuple)),
    )
