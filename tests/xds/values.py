"""Any value of the model that can be configured, for properties: of those that mean the same, the one that Envoy has a
form for, so that a real Envoy must accept every one."""

from __future__ import annotations

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
retries = st.builds(
    lambda attempts, on, codes, per_try, back_off, *others: md.RetryPolicy(
        attempts, on, codes, per_try, *back_off, *others
    ),
    counts,
    st.frozensets(st.sampled_from(["5xx", "reset", "connect-failure", "unavailable"])),
    st.frozensets(st.integers(400, 599)),
    st.none() | seconds,
    back_offs,
    st.integers(0, 20),
    st.booleans(),
)
forwards = st.builds(
    md.Forward,
    st.lists(weighted, min_size=1, max_size=3).map(tuple),
    st.none() | seconds,
    st.none() | retries,
    rewrites,
    st.lists(st.builds(md.Mirror, names, shares, st.booleans()), max_size=2).map(tuple),
)
redirects = st.builds(
    lambda path, **others: md.Redirect(**{**others, **path}),
    path=st.just({}) | st.fixed_dictionaries({"path": new_paths}) | st.fixed_dictionaries({"prefix": new_paths}),
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
routes = st.builds(
    md.Route, matches, forwards | redirects | direct, names, st.none() | faults, operations, operations, texts
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

listener_tls = st.builds(md.ListenerTls, names, names, names, st.booleans())
listeners = st.builds(md.Listener, names, names) | st.builds(
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
)
sorted_endpoints = st.lists(endpoints, max_size=5, unique=True).map(lambda found: tuple(sorted(found)))


@st.composite
def load_assignments(draw: st.DrawFn) -> md.LoadAssignment:
    """With weights of their own for all localities, or for none; never just the sum of their endpoints' weights."""
    found = draw(sorted_endpoints)
    weights: list[md.LocalityWeight] = []
    if found and draw(st.booleans()):
        for priority, locality in sorted({(each.priority, each.locality) for each in found}):
            weights.append(md.LocalityWeight(locality, priority, draw(st.integers(501, 1000))))
    return md.LoadAssignment(draw(names), found, tuple(weights))


assignments = load_assignments()


limits = st.builds(
    md.ConnectionLimits,
    optional_counts,
    optional_counts,
    optional_counts,
    optional_counts,
    st.integers(0, 100),
    seconds,
)
outliers = st.builds(
    md.OutlierDetection,
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
    seconds,
    seconds,
    st.integers(0, 100),
    st.integers(0, 100),
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


@st.composite
def clusters(draw: st.DrawFn) -> md.Cluster:
    kind = draw(st.sampled_from(list(md.ClusterType)))
    static = kind in (md.ClusterType.STATIC, md.ClusterType.STRICT_DNS, md.ClusterType.LOGICAL_DNS)
    original = kind is md.ClusterType.ORIGINAL_DST
    return md.Cluster(
        draw(names),
        kind,
        md.LoadBalancing.LEAST_REQUEST if original else draw(st.sampled_from(list(md.LoadBalancing))),
        draw(seconds),
        draw(limits),
        draw(st.none() | st.builds(md.RetryBudget, st.integers(0, 100).map(float), st.integers(0, 100))),
        draw(st.none() | outliers),
        draw(st.none() | upstream_tls),
        draw(st.booleans()),
        draw(sorted_endpoints) if static else (),
        draw(st.none() | service_names),
        draw(st.just("") | names),
    )
