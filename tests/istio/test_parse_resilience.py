"""What the author of resilience YAML is told: the field, and why."""

from __future__ import annotations

import pytest
from views import PREFIX, destination_rule, objects, service, virtual_service

from meshlib.istio.parse import parse_text
from meshlib.istio.resources import SHAPES

BALANCER = "spec.trafficPolicy.loadBalancer"
POOL = "spec.trafficPolicy.connectionPool"
TLS = "spec.trafficPolicy.tls"


def policy(text: str) -> str:
    return destination_rule(f"{{host: a, trafficPolicy: {{{text}}}}}")


def balancer(text: str) -> str:
    return policy(f"loadBalancer: {{{text}}}")


def hashing(text: str) -> str:
    return balancer(f"consistentHash: {{{text}}}")


def locality(text: str) -> str:
    return policy(f"outlierDetection: {{}}, loadBalancer: {{localityLbSetting: {{{text}}}}}")


def istio(kind: str, spec: str) -> str:
    return f"{PREFIX}kind: {kind}\nmetadata: {{name: x}}\nspec: {{{spec}}}\n"


def backend(spec: str) -> str:
    return f"apiVersion: meshlib.io/v1alpha1\nkind: BackendTrafficPolicy\nmetadata: {{name: x}}\nspec: {{{spec}}}\n"


def mesh(text: str) -> str:
    return (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"
        f"data:\n  mesh: |\n    {text}\n"
    )


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        # consistentHash
        (hashing(""), f"{BALANCER}.consistentHash", "needs exactly one of httpHeaderName, httpCookie"),
        (
            hashing("httpHeaderName: a, useSourceIp: true"),
            f"{BALANCER}.consistentHash",
            "found httpHeaderName and useSourceIp",
        ),
        (hashing("httpHeaderName: 'a b'"), f"{BALANCER}.consistentHash.httpHeaderName", "no header name: 'a b'"),
        (hashing("httpCookie: {name: ''}"), f"{BALANCER}.consistentHash.httpCookie.name", "no name of a cookie"),
        (hashing("httpCookie: {}"), f"{BALANCER}.consistentHash.httpCookie.name", "is missing"),
        (hashing("httpCookie: {name: a, path: 'x;y'}"), f"{BALANCER}.consistentHash.httpCookie.path", "no path"),
        (hashing("httpCookie: {name: a, ttl: 5}"), f"{BALANCER}.consistentHash.httpCookie.ttl", "duration has a unit"),
        (hashing("useSourceIp: true, ringHash: {}, maglev: {}"), f"{BALANCER}.consistentHash", "ringHash or maglev"),
        (
            hashing("useSourceIp: true, maglev: {tableSize: 100}"),
            f"{BALANCER}.consistentHash.maglev.tableSize",
            "must be a prime number of at most 5000011: 100",
        ),
        (
            hashing("useSourceIp: true, maglev: {tableSize: 5000077}"),
            f"{BALANCER}.consistentHash.maglev.tableSize",
            "at most 5000011",
        ),
        (
            hashing("useSourceIp: true, ringHash: {minimumRingSize: 9000000}"),
            f"{BALANCER}.consistentHash.ringHash.minimumRingSize",
            "must be at most 8388608",
        ),
        (
            hashing("useSourceIp: true, minimumRingSize: 9000000"),
            f"{BALANCER}.consistentHash.minimumRingSize",
            "must be at most 8388608",
        ),
        (balancer("simple: RANDOM, consistentHash: {useSourceIp: true}"), BALANCER, "either simple or consistentHash"),
        # warm-up
        (balancer("warmup: {}"), f"{BALANCER}.warmup.duration", "is missing"),
        (balancer("warmup: {duration: 0s}"), f"{BALANCER}.warmup.duration", "must be at least 1ms"),
        (balancer("warmup: {duration: 1s, aggression: 0.5}"), f"{BALANCER}.warmup.aggression", "at least 1"),
        (balancer("warmup: {duration: 1s, minimumPercent: 101}"), f"{BALANCER}.warmup.minimumPercent", "100"),
        (
            balancer("simple: RANDOM, warmup: {duration: 1s}"),
            f"{BALANCER}.warmup",
            "ROUND_ROBIN and LEAST_REQUEST only",
        ),
        (
            hashing("useSourceIp: true}, warmupDurationSecs: 1s, localityLbSetting: {"),
            f"{BALANCER}.warmupDurationSecs",
            "ROUND_ROBIN and LEAST_REQUEST only",
        ),
        # localities
        (
            locality("distribute: [{from: eu, to: {eu: 100}}], failover: [{from: eu, to: us}]"),
            f"{BALANCER}.localityLbSetting",
            "either distribute or failover",
        ),
        (
            locality("distribute: [{from: eu, to: {eu: 100}}], failoverPriority: [rack]"),
            f"{BALANCER}.localityLbSetting",
            "either distribute or failoverPriority",
        ),
        (
            locality("distribute: [{from: eu, to: {eu: 60, us: 30}}]"),
            f"{BALANCER}.localityLbSetting.distribute[0].to",
            "must add up to 100, not 90",
        ),
        (
            locality("distribute: [{from: eu, to: {eu: 100, us: 0}}]"),
            f"{BALANCER}.localityLbSetting.distribute[0].to.us",
            "must be from 1 to 100: 0",
        ),
        (
            locality("distribute: [{from: eu/a, to: {eu: 100}}, {from: eu, to: {eu: 100}}]"),
            f"{BALANCER}.localityLbSetting.distribute[1].from",
            "'eu' and 'eu/a' are both for the same place",
        ),
        (
            locality("distribute: [{from: '*/a', to: {eu: 100}}]"),
            f"{BALANCER}.localityLbSetting.distribute[0].from",
            "must be region/zone/subzone, with * at the end",
        ),
        (locality("distribute: [{to: {eu: 100}}]"), f"{BALANCER}.localityLbSetting.distribute[0].from", "''"),
        (
            locality("failover: [{from: eu, to: eu}]"),
            f"{BALANCER}.localityLbSetting.failover[0]",
            "from and to are both 'eu'",
        ),
        (
            locality("failover: [{from: eu/a, to: us}]"),
            f"{BALANCER}.localityLbSetting.failover[0].from",
            "must be one region: 'eu/a'",
        ),
        (
            locality("failover: [{from: eu, to: us}], failoverPriority: [topology.kubernetes.io/region]"),
            f"{BALANCER}.localityLbSetting.failoverPriority",
            "either failover or the label topology.kubernetes.io/region",
        ),
        (
            locality("failoverPriority: ['=x']"),
            f"{BALANCER}.localityLbSetting.failoverPriority[0]",
            "must be a label or label=value: '=x'",
        ),
        (
            balancer("zoneAwareLbSetting: {failover: [{from: eu, to: eu}]}"),
            f"{BALANCER}.zoneAwareLbSetting.failover[0]",
            "from and to are both",
        ),
        # connections
        (policy("connectionPool: {tcp: {maxConnectionDuration: 0s}}"), f"{POOL}.tcp.maxConnectionDuration", "1ms"),
        (policy("connectionPool: {tcp: {tcpKeepalive: {time: 5ms}}}"), f"{POOL}.tcp.tcpKeepalive.time", "at least 1s"),
        (policy("connectionPool: {tcp: {idleTimeout: 1us}}"), f"{POOL}.tcp.idleTimeout", "must be at least 1ms"),
        (policy("connectionPool: {http: {idleTimeout: 1us}}"), f"{POOL}.http.idleTimeout", "must be at least 1ms"),
        (policy("connectionPool: {http: {h2UpgradePolicy: YES}}"), f"{POOL}.http.h2UpgradePolicy", "must be"),
        (policy("connectionPool: {http: {maxConcurrentStreams: -1}}"), f"{POOL}.http.maxConcurrentStreams", "0"),
        (
            policy("outlierDetection: {outlierDetectionHttpErrorCodes: [99]}"),
            "spec.trafficPolicy.outlierDetection.outlierDetectionHttpErrorCodes[0]",
            "100",
        ),
        # TLS
        (policy("tls: {mode: ISTIO_MUTUAL, caCertificates: /ca.pem}"), f"{TLS}.mode", "files contradict it"),
        (policy("tls: {mode: SIMPLE, credentialName: x}"), f"{TLS}.credentialName", "name files"),
        (policy("tls: {mode: MUTUAL, clientCertificate: /c}"), TLS, "MUTUAL needs clientCertificate and privateKey"),
        (policy("tls: {mode: SIMPLE, subjectAltNames: ['*.e.com']}"), f"{TLS}.subjectAltNames[0]", "one whole name"),
        (
            policy("tls: {mode: SIMPLE, subjectAltNames: [a], insecureSkipVerify: true}"),
            f"{TLS}.insecureSkipVerify",
            "contradict it",
        ),
        (policy("tls: {mode: SIMPLE, sni: '*.e.com'}"), f"{TLS}.sni", "not a wildcard"),
        # delegates
        (
            virtual_service("[{delegate: {name: p}, route: [{destination: {host: a}}]}]"),
            "spec.http[0]",
            "found route and delegate",
        ),
        (virtual_service("[{delegate: {name: A_B}}]"), "spec.http[0].delegate.name", "no name of Kubernetes"),
        (virtual_service("[{delegate: {name: p}}]", hosts="[]"), "spec.http[0].delegate", "can't delegate further"),
        (
            virtual_service("[{route: [{destination: {host: a}}]}]", hosts="[]", more="gateways: [g]"),
            "spec.gateways",
            "has no meaning in a delegate",
        ),
        (
            virtual_service("[{match: [{sourceLabels: {a: b}}], route: [{destination: {host: a}}]}]", hosts="[]"),
            "spec.http[0].match[0].sourceLabels",
            "has no meaning in a delegate",
        ),
        # Sidecar, WorkloadEntry, ServiceEntry
        (istio("Sidecar", "egress: [{hosts: []}]"), "spec.egress[0].hosts", "is missing"),
        (istio("Sidecar", "egress: [{hosts: [a.e.com]}]"), "spec.egress[0].hosts[0]", "must be namespace/host"),
        (istio("Sidecar", "egress: [{hosts: [A_B/*]}]"), "spec.egress[0].hosts[0]", "before the slash"),
        (istio("Sidecar", "egress: [{hosts: ['./a*']}]"), "spec.egress[0].hosts[0]", "no host name"),
        (
            istio("Sidecar", "egress: [{hosts: [./*]}, {hosts: [./*]}]"),
            "spec.egress[0].port",
            "only the last listener may be for every port",
        ),
        (istio("Sidecar", "outboundTrafficPolicy: {mode: ANY}"), "spec.outboundTrafficPolicy.mode", "ANY"),
        (istio("WorkloadEntry", "labels: {a: b}"), "spec.address", "is missing"),
        (istio("WorkloadEntry", "address: 'a b'"), "spec.address", "no host name"),
        (
            istio("ServiceEntry", "hosts: [x.e.com], resolution: DYNAMIC_DNS, ports: [{number: 80, name: h}]"),
            "spec.hosts[0]",
            "DYNAMIC_DNS is for wildcards; 'x.e.com' wants resolution DNS",
        ),
        (
            istio(
                "ServiceEntry",
                "hosts: ['*.e.com'], resolution: DYNAMIC_DNS, ports: [{number: 80, name: h}], endpoints: [{}]",
            ),
            "spec.endpoints",
            "has no meaning with resolution DYNAMIC_DNS",
        ),
        (
            istio("ServiceEntry", "hosts: [x.e.com], ports: [{number: 80, name: h}], subjectAltNames: ['*.e']"),
            "spec.subjectAltNames[0]",
            "must be one whole name",
        ),
        # MeshConfig
        (mesh("["), "data.mesh", "is no YAML"),
        (mesh("outboundTrafficPolicy: {mode: SOME}"), "data.mesh.outboundTrafficPolicy.mode", "SOME"),
        (mesh("connectTimeout: 5"), "data.mesh.connectTimeout", "duration has a unit"),
        (mesh("localityLbSetting: {failover: [{from: a, to: a}]}"), "data.mesh.localityLbSetting.failover[0]", "both"),
        (
            mesh("defaultHttpRetryPolicy: {attempts: 1, retryOn: nope}"),
            "data.mesh.defaultHttpRetryPolicy.retryOn",
            "nope",
        ),
        (
            mesh("defaultTrafficPolicy: {outlierDetection: {interval: 0s}}"),
            "data.mesh.defaultTrafficPolicy.outlierDetection.interval",
            "at least 1ms",
        ),
        (mesh("defaultServiceExportTo: [A_B]"), "data.mesh.defaultServiceExportTo[0]", "must be a namespace"),
        # BackendTrafficPolicy
        (backend("breaker: {consecutiveFailures: 1}"), "spec.host", "is missing"),
        (backend("host: a"), "spec", "says nothing about its host"),
        (backend("host: a, braker: {}"), "spec.braker", "there is no such field"),
        (backend("host: 'a b', shadow: [limits]"), "spec.host", "no host name"),
        (backend("host: a, subset: 'a b', shadow: [limits]"), "spec.subset", "no subset name"),
        (backend("host: a, shadow: [all]"), "spec.shadow[0]", "must be one of breaker, limits, outlier-detection"),
        (backend("host: a, breaker: {}"), "spec.breaker", "never opens"),
        (backend("host: a, breaker: {failureRate: 101}"), "spec.breaker.failureRate", "100"),
        (backend("host: a, breaker: {slowCallRate: 50}"), "spec.breaker.slowCall", "from how long on is a call slow?"),
        (backend("host: a, breaker: {consecutiveFailures: 1, openFor: 0s}"), "spec.breaker.openFor", "at least 1ms"),
        (backend("host: a, breaker: {consecutiveFailures: 1, probes: 0}"), "spec.breaker.probes", "1"),
        (backend("host: a, retryBudget: {ttl: 10ms}"), "spec.retryBudget.ttl", "at least 1s"),
        (backend("host: a, retryBudget: {ratio: -1}"), "spec.retryBudget.ratio", "0"),
        (backend("host: a, hedge: {}"), "spec.hedge.delay", "is missing"),
        (backend("host: a, hedge: {delay: 0s}"), "spec.hedge.delay", "at least 1ms"),
        (backend("host: a, hedge: {delay: 1s, maxAttempts: 1}"), "spec.hedge.maxAttempts", "2"),
        (backend("host: '*.e.com', hedge: {delay: 1s}"), "spec.hedge", "must be asked for by one host"),
        (backend("host: a, loadBalancer: RANDOM"), "spec.loadBalancer", "RANDOM"),
        (
            backend("host: a, healthChecks: [{}]"),
            "spec.healthChecks[0]",
            "exactly one of http, grpc and tcp; found none",
        ),
        (backend("host: a, healthChecks: [{tcp: {}, grpc: {}}]"), "spec.healthChecks[0]", "found grpc and tcp"),
        (backend("host: a, healthChecks: [{http: {path: x}}]"), "spec.healthChecks[0].http.path", "begin with a slash"),
        (
            backend("host: a, healthChecks: [{http: {expectedStatuses: [200-199]}}]"),
            "spec.healthChecks[0].http.expectedStatuses[0]",
            "must be as 200 or 200-299: '200-199'",
        ),
        (backend("host: a, healthChecks: [{tcp: {}, timeout: 0s}]"), "spec.healthChecks[0].timeout", "at least 1ms"),
        (
            backend("host: a, outlierDetection: {successRateMinimumHosts: 2}"),
            "spec.outlierDetection.successRateMinimumHosts",
            "has no meaning without successRateEnforcing",
        ),
        (
            backend("host: a, outlierDetection: {failurePercentageThreshold: 2}"),
            "spec.outlierDetection.failurePercentageThreshold",
            "has no meaning without failurePercentageEnforcing",
        ),
        (
            backend("host: a, outlierDetection: {successRateEnforcing: 1, maxEjectionTime: 0s}"),
            "spec.outlierDetection.maxEjectionTime",
            "at least 1ms",
        ),
    ],
)
def test_what_can_not_be_used_is_refused(text: str, field: str, reason: str) -> None:
    """With the very field, and a reason that says what to write."""
    parsed = parse_text(text, "f.yaml")
    assert parsed.objects == ()
    (problem,) = parsed.problems
    assert problem.field == field
    assert reason in problem.reason
    assert problem.source.startswith("f.yaml:")


@pytest.mark.parametrize(
    "setting", ["localityLbSetting: {failover: [{from: eu, to: us}]}", "zoneAwareLbSetting: {failoverPriority: [rack]}"]
)
def test_failover_without_outlier_detection_is_warned_of(setting: str) -> None:
    """Istio's webhook does so too; with it, there is nothing to say."""
    name, _, rest = setting.partition(": {")
    kind = rest.partition(":")[0]
    level = f"portLevelSettings: [{{port: {{number: 80}}, loadBalancer: {{{setting}}}}}]"
    for text, place in ((f"loadBalancer: {{{setting}}}", ""), (level, ".portLevelSettings[0]")):
        (warning,) = parse_text(policy(text), "f.yaml").warnings
        assert warning.field == f"spec.trafficPolicy{place}.loadBalancer.{name}.{kind}"
        assert warning.reason == "has no effect without outlierDetection"
    assert parse_text(policy(f"loadBalancer: {{{setting}}}, outlierDetection: {{}}"), "f.yaml").warnings == ()


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        (policy("tls: {mode: SIMPLE, clientCertificate: /c}"), f"{TLS}.clientCertificate", "has no effect with SIMPLE"),
        (
            istio(
                "ServiceEntry", "hosts: [x.e.com], ports: [{number: 80, name: h}], workloadSelector: {labels: {a: b}}"
            ),
            "spec.workloadSelector",
            "has no effect with resolution NONE",
        ),
        (istio("Sidecar", "ingress: [{port: {number: 80, protocol: HTTP}}]"), "spec.ingress", "has no effect yet"),
        (policy("retryBudget: {budgetInterval: 10s}"), "spec.trafficPolicy.retryBudget.budgetInterval", "no effect"),
        (
            hashing("httpCookie: {name: a, attributes: [{name: SameSite, value: Strict}]}"),
            f"{BALANCER}.consistentHash.httpCookie.attributes",
            "has no effect yet",
        ),
    ],
)
def test_what_is_valid_and_has_no_effect_is_warned_of(text: str, field: str, reason: str) -> None:
    """The object is used all the same."""
    parsed = parse_text(text, "f.yaml")
    assert parsed.objects
    (warning,) = parsed.warnings
    assert warning.field == field
    assert reason in warning.reason


def test_a_kind_of_the_same_name_in_another_group_is_passed_over() -> None:
    """Envoy Gateway has a BackendTrafficPolicy of its own; ours has no other versions and no other kinds."""
    theirs = backend("targetRef: {}").replace("meshlib.io/v1alpha1", "gateway.envoyproxy.io/v1alpha1")
    (found,) = objects(theirs)
    assert found.spec is None
    for old, new, field in (
        ("meshlib.io/v1alpha1", "meshlib.io/v1", "apiVersion"),
        ("kind: BackendTrafficPolicy", "kind: BackendPolicy", "kind"),
        ("metadata: {name: x}", "metadata: {name: x, nmespace: y}", "metadata.nmespace"),
    ):
        (problem,) = parse_text(backend("host: a, shadow: [limits]").replace(old, new), "f.yaml").problems
        assert problem.field == field


def test_another_config_map_is_passed_over() -> None:
    """Whatever stands under `mesh` in it."""
    assert objects(mesh("[").replace("name: istio,", "name: other,"))


def test_every_kind_of_ours_is_refused_with_an_unknown_field() -> None:
    """A misspelt field must not be a policy that is not there."""
    for kind, shape in SHAPES.items():
        if shape.group == "meshlib.io":
            text = f"{{apiVersion: meshlib.io/v1alpha1, kind: {kind}, metadata: {{name: x}}, spec: {{nope: 1}}}}"
            assert parse_text(text, "f.yaml").problems, kind


def test_services_may_be_asked_for_what_is_near() -> None:
    """Kubernetes' own field, in a kind whose unknown fields are passed over."""
    (found,) = objects(service().replace("spec: {", "spec: {trafficDistribution: PreferClose, "))
    assert found.spec.traffic_distribution == "PreferClose"  # type: ignore[union-attr]
