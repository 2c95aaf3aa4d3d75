"""What Istio's webhook refuses is refused here, with the field; what it takes is taken."""

from __future__ import annotations

import pytest

from meshlib.istio.parse import parse_text

TO = "route: [{destination: {host: a}}]"
ROUTE = f"http: [{{{TO}}}]"
PORT = "ports: [{number: 80, name: a, protocol: HTTP}]"
GROUPS = {"PeerAuthentication": "security", "RequestAuthentication": "security", "Telemetry": "telemetry"}


def text(kind: str, spec: str) -> str:
    version = "v1beta1" if kind == "ProxyConfig" else "v1"
    group = GROUPS.get(kind, "networking")
    return f"apiVersion: {group}.istio.io/{version}\nkind: {kind}\nmetadata: {{name: x}}\nspec: {spec}\n"


def server(more: str = "", name: str = "a", number: int = 80) -> str:
    return f"{{hosts: ['*'], port: {{number: {number}, name: {name}, protocol: HTTP}}{more}}}"


@pytest.mark.parametrize(
    ("kind", "spec", "field"),
    [
        ("VirtualService", f"{{hosts: ['*'], {ROUTE}}}", "hosts[0]"),
        ("VirtualService", f"{{hosts: ['*'], gateways: [g, mesh], {ROUTE}}}", "hosts[0]"),
        ("VirtualService", f"{{hosts: ['*.a.com', b.a.com], {ROUTE}}}", "hosts"),
        ("VirtualService", f"{{hosts: [a], gateways: [x/y/z], {ROUTE}}}", "gateways[0]"),
        ("VirtualService", f"{{hosts: [a], gateways: ['*'], {ROUTE}}}", "gateways[0]"),
        (
            "VirtualService",
            f"{{hosts: [a], http: [{{match: [{{gateways: ['*']}}], {TO}}}]}}",
            "http[0].match[0].gateways[0]",
        ),
        (
            "VirtualService",
            f"{{hosts: [a], http: [{{match: [{{sourceLabels: {{'!': a}}}}], {TO}}}]}}",
            "http[0].match[0].sourceLabels",
        ),
        ("VirtualService", f"{{hosts: [a], tls: [{{{TO}}}]}}", "tls[0].match"),
        ("VirtualService", f"{{hosts: [a], tls: [{{match: [{{sniHosts: []}}], {TO}}}]}}", "tls[0].match[0].sniHosts"),
        (
            "VirtualService",
            f"{{hosts: [a], tls: [{{match: [{{sniHosts: [b]}}], {TO}}}]}}",
            "tls[0].match[0].sniHosts[0]",
        ),
        ("VirtualService", f"{{hosts: [a], tls: [{{match: [{{sni: [b]}}], {TO}}}]}}", "tls[0].match[0].sni"),
        ("VirtualService", "{hosts: [a], tcp: [{route: []}]}", "tcp[0].route"),
        (
            "VirtualService",
            f"{{hosts: [a], tcp: [{{match: [{{destinationSubnets: [x]}}], {TO}}}]}}",
            "tcp[0].match[0].destinationSubnets[0]",
        ),
        (
            "VirtualService",
            f"{{hosts: [a], http: [{{corsPolicy: {{maxAge: 0.1ms}}, {TO}}}]}}",
            "http[0].corsPolicy.maxAge",
        ),
        (
            "VirtualService",
            f"{{hosts: [a], http: [{{corsPolicy: {{allowMethods: [WHAT]}}, {TO}}}]}}",
            "http[0].corsPolicy.allowMethods[0]",
        ),
        (
            "VirtualService",
            f"{{hosts: [a], http: [{{corsPolicy: {{allowOrigins: [{{}}]}}, {TO}}}]}}",
            "http[0].corsPolicy.allowOrigins[0]",
        ),
        (
            "VirtualService",
            f"{{hosts: [a], http: [{{corsPolicy: {{allowHeaders: ['a b']}}, {TO}}}]}}",
            "http[0].corsPolicy.allowHeaders[0]",
        ),
        (
            "VirtualService",
            f"{{hosts: [a], http: [{{corsPolicy: {{origins: []}}, {TO}}}]}}",
            "http[0].corsPolicy.origins",
        ),
        (
            "VirtualService",
            "{hosts: [a], http: [{route: [{destination: {host: a, subset: a/b}}]}]}",
            "http[0].route[0].destination.subset",
        ),
        (
            "VirtualService",
            f"{{hosts: [a], http: [{{{TO}, mirror: {{host: a, subset: a.b}}}}]}}",
            "http[0].mirror.subset",
        ),
        ("DestinationRule", "{host: a, subsets: [{name: a.b}]}", "subsets[0].name"),
        ("Telemetry", "{selector: {matchLabels: {app: 'a*'}}}", "selector.matchLabels"),
        ("DestinationRule", "{host: a, trafficPolicy: {}}", "trafficPolicy"),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {tunnel: {targetHost: '', targetPort: 80}}}",
            "trafficPolicy.tunnel.targetHost",
        ),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {tunnel: {targetHost: a.com, targetPort: 0}}}",
            "trafficPolicy.tunnel.targetPort",
        ),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {outlierDetection: {consecutiveLocalOriginFailures: 5}}}",
            "trafficPolicy.outlierDetection.consecutiveLocalOriginFailures",
        ),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {connectionPool: {http: {h2UpgradePolicy: UPGRADE, useClientProtocol: true}}}}",
            "trafficPolicy.connectionPool.http.useClientProtocol",
        ),
        (
            "ServiceEntry",
            "{hosts: [a.com], ports: [{number: 80, name: 'A B', protocol: HTTP}], resolution: DNS}",
            "ports[0].name",
        ),
        (
            "ServiceEntry",
            f"{{hosts: [a.com], {PORT}, resolution: DNS, endpoints: [{{address: 'unix:///x'}}]}}",
            "endpoints[0].address",
        ),
        ("ServiceEntry", f"{{hosts: [a.com], {PORT}, resolution: DNS, addresses: [192.0.2.0/24]}}", "addresses[0]"),
        (
            "ServiceEntry",
            "{hosts: [a.com, b.com], ports: [{number: 80, name: a, protocol: TCP}], resolution: DNS}",
            "ports[0].protocol",
        ),
        ("DestinationRule", "{host: a, trafficPolicy: {connectionPool: {}}}", "trafficPolicy.connectionPool"),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {connectionPool: {http: {http2KeepAlive: {interval: 1s}}}}}",
            "trafficPolicy.connectionPool.http.http2KeepAlive.timeout",
        ),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {httpCookie: "
            "{name: a, attributes: [{name: b}, {name: b}]}}}}}",
            "trafficPolicy.loadBalancer.consistentHash.httpCookie.attributes[1].name",
        ),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {portLevelSettings: [{port: {number: 80}}]}}",
            "trafficPolicy.portLevelSettings[0]",
        ),
        ("DestinationRule", "{host: a, exportTo: ['~']}", "exportTo[0]"),
        ("DestinationRule", "{host: a, exportTo: ['*'], workloadSelector: {matchLabels: {a: b}}}", "exportTo"),
        (
            "ServiceEntry",
            f"{{hosts: [a.com], {PORT}, resolution: STATIC, endpoints: [{{address: 'unix:///x', ports: {{a: 1}}}}]}}",
            "endpoints[0].ports",
        ),
        (
            "ServiceEntry",
            f"{{hosts: ['*.a.com'], {PORT}, resolution: DYNAMIC_DNS, addresses: [192.0.2.1]}}",
            "addresses",
        ),
        (
            "ServiceEntry",
            "{hosts: ['*.a.com'], ports: [{number: 80, name: a, protocol: TCP}], resolution: DYNAMIC_DNS}",
            "ports[0].protocol",
        ),
        (
            "Gateway",
            "{servers: [{hosts: ['*'], port: {number: 80, name: a, protocol: HTTP, targetPort: 8080}}]}",
            "servers[0].port.targetPort",
        ),
        ("Sidecar", "{egress: [{hosts: ['./*'], port: {number: 80, targetPort: 8080}}]}", "egress[0].port.targetPort"),
        ("Sidecar", "{ingress: [{port: {number: 80, targetPort: 8080}}]}", "ingress[0].port.targetPort"),
        ("Sidecar", "{egress: [{hosts: ['./*'], port: {number: 0}}]}", "egress[0].port.number"),
        ("Sidecar", "{egress: [{hosts: ['./*'], bind: 'unix://x', port: {number: 0}}]}", "egress[0].bind"),
        ("Sidecar", "{egress: [{hosts: ['~A B/*']}]}", "egress[0].hosts[0]"),
        ("WorkloadEntry", "{address: 'unix:///a.sock', ports: {a: 80}}", "ports"),
        ("WorkloadEntry", "{labels: {a: b}}", "address"),
        ("RequestAuthentication", "{targetRef: {kind: Service, name: a, namespace: b}}", "targetRef.namespace"),
        ("RequestAuthentication", "{targetRefs: [{kind: Pod, name: a}]}", "targetRefs[0]"),
        ("Telemetry", "{targetRef: {kind: Gateway, name: a}}", "targetRef"),
        ("Gateway", "{servers: [{hosts: ['*'], port: {number: 80, protocol: HTTP}}]}", "servers[0].port.name"),
        ("Gateway", f"{{servers: [{server()}, {server(number=81)}]}}", "servers[1].port.name"),
        ("Gateway", f"{{servers: [{server(', bind: nonsense')}]}}", "servers[0].bind"),
        ("Sidecar", "{egress: []}", ""),
        ("Sidecar", "{egress: [{hosts: ['./*'], bind: nonsense, port: {number: 80}}]}", "egress[0].bind"),
        ("Sidecar", "{egress: [{hosts: ['./*'], port: {number: 80, protocol: WHAT}}]}", "egress[0].port.protocol"),
        (
            "Sidecar",
            "{egress: [{hosts: ['./*'], port: {number: 80}}, {hosts: ['./*'], port: {number: 80}}]}",
            "egress[1].port.number",
        ),
        ("Sidecar", "{ingress: [{port: {number: 0, protocol: HTTP}}]}", "ingress[0].port.number"),
        ("Sidecar", "{ingress: [{port: {number: 80}, defaultEndpoint: '192.0.2.1:80'}]}", "ingress[0].defaultEndpoint"),
        ("PeerAuthentication", "{selector: {matchLabels: {a: b}}, portLevelMtls: {}}", "portLevelMtls"),
        ("RequestAuthentication", "{jwtRules: [{issuer: a, timeout: 0.1ms}]}", "jwtRules[0].timeout"),
        ("WorkloadEntry", "{address: 192.0.2.1, ports: {'A B': 80}}", "ports.A B"),
        ("WorkloadGroup", "{metadata: {labels: {a: b}}}", "template"),
        ("WorkloadGroup", "{template: {}, metadata: {labels: {'a b': c}}}", "metadata.labels"),
        ("WorkloadGroup", "{template: {}, probe: {periodSeconds: 1}}", "probe"),
        ("WorkloadGroup", "{template: {}, probe: {exec: {}}}", "probe.exec.command"),
        ("WorkloadGroup", "{template: {}, probe: {httpGet: {port: 0}}}", "probe.httpGet.port"),
        ("ProxyConfig", "{concurrency: -1}", "concurrency"),
        ("ProxyConfig", "{selector: {matchLabels: {'*': b}}}", "selector.matchLabels"),
        ("Telemetry", "{metrics: [{providers: [{name: ''}]}]}", "metrics[0].providers[0].name"),
    ],
)
def test_what_istio_refuses_is_refused(kind: str, spec: str, field: str) -> None:
    """With the field that it is about."""
    (problem,) = parse_text(text(kind, spec), "x.yaml").problems
    assert problem.field == (f"spec.{field}" if field else "spec")


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("VirtualService", f"{{hosts: ['*'], gateways: [istio-system/g], {ROUTE}}}"),
        ("VirtualService", f"{{hosts: [a], gateways: [g.istio-system.svc.cluster.local, mesh], {ROUTE}}}"),
        ("VirtualService", f"{{hosts: ['*.a.com', a.com, b.com], {ROUTE}}}"),
        ("VirtualService", f"{{hosts: ['*.a.com'], tls: [{{match: [{{sniHosts: [b.a.com, '*.b.a.com']}}], {TO}}}]}}"),
        ("VirtualService", f"{{hosts: [a], tcp: [{{match: [{{port: 27017, sourceLabels: {{a: b}}}}], {TO}}}]}}"),
        (
            "VirtualService",
            "{hosts: [a], http: [{corsPolicy: {allowOrigins: [{exact: 'https://a'}, {regex: '.*'}], "
            f"allowMethods: ['*'], allowHeaders: ['*', x-a], maxAge: 24h, allowCredentials: true, "
            f"unmatchedPreflights: IGNORE}}, {TO}}}]}}",
        ),
        ("ServiceEntry", f"{{hosts: [a.com], {PORT}, resolution: STATIC}}"),
        (
            "ServiceEntry",
            "{hosts: [a.com, b.com], ports: [{number: 443, name: Tls-1, protocol: tls}], resolution: DNS}",
        ),
        ("Gateway", f"{{servers: [{server(', bind: 0.0.0.0')}, {server(name='b', number=81)}]}}"),
        ("Sidecar", "{egress: [{hosts: ['~/*', './*']}]}"),
        ("Sidecar", "{egress: [{hosts: ['*/*', '~other/*', '~./a.default.svc.cluster.local', '~*/b.example.com']}]}"),
        ("Sidecar", "{egress: [{hosts: ['./*'], bind: 'unix:///a.sock', port: {number: 0, protocol: HTTP}}]}"),
        ("Sidecar", "{egress: [{hosts: ['./*'], bind: 'unix://@a', port: {protocol: HTTP}}]}"),
        ("DestinationRule", "{host: a, trafficPolicy: {connectionPool: {tcp: {}}}}"),
        ("DestinationRule", "{host: a, exportTo: [.], workloadSelector: {matchLabels: {a: b}}}"),
        ("WorkloadEntry", "{network: far}"),
        ("WorkloadEntry", "{address: 'unix:///var/run/a.sock'}"),
        ("ServiceEntry", "{hosts: [a.com]}"),
        ("ServiceEntry", f"{{hosts: [a.com], {PORT}, resolution: STATIC, endpoints: [{{address: 'unix://@a'}}]}}"),
        ("ServiceEntry", f"{{hosts: [a.com], {PORT}, exportTo: ['~']}}"),
        ("Sidecar", "{egress: [{hosts: ['./*'], bind: 127.0.0.1, port: {number: 80, protocol: HTTP, name: a}}]}"),
        ("Sidecar", "{ingress: [{port: {number: 9080, protocol: HTTP, name: a}, defaultEndpoint: 'unix:///a.sock'}]}"),
        ("WorkloadGroup", "{template: {ports: {http: 80}, serviceAccount: a}, probe: {tcpSocket: {port: 80}}}"),
        ("ProxyConfig", "{selector: {matchLabels: {a: b}}, concurrency: 0, image: {imageType: distroless}}"),
    ],
)
def test_what_istio_takes_is_taken(kind: str, spec: str) -> None:
    """Whether it has an effect or not."""
    assert parse_text(text(kind, spec), "x.yaml").problems == ()


@pytest.mark.parametrize(
    ("kind", "spec", "field"),
    [
        ("ServiceEntry", f"{{hosts: [a.com], {PORT}, resolution: STATIC}}", "spec.endpoints"),
        ("PeerAuthentication", "{selector: {matchLabels: {'a b': c}}}", "spec.selector.matchLabels"),
        ("WorkloadGroup", "{template: {}}", ""),
        ("ProxyConfig", "{concurrency: 2}", ""),
    ],
)
def test_what_is_taken_and_does_nothing_is_told(kind: str, spec: str, field: str) -> None:
    """Istio takes it without a word, or has proxies for it."""
    (warning,) = parse_text(text(kind, spec), "x.yaml").warnings
    assert warning.field == field
