"""Does analyze say what istioctl says, by the same codes and in the same words? And nothing of what is well?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshlib.istio.analyze import Level, Message, Suppression, analyze
from meshlib.istio.analyze.messages import KINDS
from meshlib.istio.analyze.scene import Workload
from meshlib.istio.analyze.selectors import idle
from meshlib.istio.parse import parse_text

BOOKINFO = Path(__file__).parents[2] / "examples" / "bookinfo"
SERVICES = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: two-ports, namespace: other}
spec: {ports: [{name: http, port: 80}, {name: http-admin, port: 81}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec: {host: reviews, subsets: [{name: v1, labels: {version: v1}}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: wild}
spec: {hosts: ["*.example.com"], ports: [{number: 80, name: http, protocol: HTTP}]}
"""


def rule(name: str, spec: str, kind: str = "VirtualService", group: str = "networking", namespace: str = "") -> str:
    where = f", namespace: {namespace}" if namespace else ""
    return f"---\napiVersion: {group}.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}{where}}}\nspec: {spec}\n"


def service(name: str, spec: str) -> str:
    return f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {spec}\n"


def told(text: str, *, is_whole: bool = False, suppressions: tuple[Suppression, ...] = ()) -> tuple[Message, ...]:
    parsed = parse_text(text, "mesh.yaml")
    problems = (*parsed.problems, *parsed.warnings)
    return analyze(parsed.objects, problems, is_whole=is_whole, suppressions=suppressions)


def lines(text: str, *, is_whole: bool = False) -> list[str]:
    """Without the place, which test_a_message_points_at_the_field holds."""
    return [f"{each.level.word} [{each.code}] ({each.origin}) {each.text}" for each in told(text, is_whole=is_whole)]


def to(host: str, more: str = "") -> str:
    return f"{{route: [{{destination: {{host: {host}{more}}}}}]}}"


ANNOTATED = "{apiVersion: v1, kind: Service, metadata: {name: a, annotations: {%s}}, spec: {}}"
CASES = {
    "a host that is not there": (
        SERVICES + rule("a", f"{{hosts: [reviews], http: [{to('revews')}]}}"),
        'Error [IST0101] (VirtualService default/a) Referenced host not found: "revews"',
    ),
    "a mirror that is not there": (
        SERVICES
        + rule("a", "{hosts: [reviews], http: [{route: [{destination: {host: reviews}}], mirror: {host: shadow}}]}"),
        'Error [IST0101] (VirtualService default/a) Referenced host not found: "shadow"',
    ),
    "a subset that is not there": (
        SERVICES + rule("a", f"{{hosts: [reviews], http: [{to('reviews', ', subset: v9')}]}}"),
        'Error [IST0101] (VirtualService default/a) Referenced host+subset in destinationrule not found: "reviews+v9"',
    ),
    "a field that is not there": (
        rule("a", "{hosts: [reviews], htp: []}"),
        "Error [IST0106] (VirtualService default/a) Schema validation error: spec.htp: there is no such field",
    ),
    "a field without effect": (
        SERVICES + rule("a", "{hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}], tcp: []}"),
        "Warning [IST0133] (VirtualService default/a) Schema validation warning: spec.tcp: has no effect yet",
    ),
    "an annotation of another kind": (
        ANNOTATED % "sidecar.istio.io/inject: 'true'",
        "Warning [IST0107] (Service default/a) "
        "Misplaced annotation: sidecar.istio.io/inject can only be applied to Pod",
    ),
    "an annotation that Istio does not know": (
        ANNOTATED % "networking.istio.io/exportto: x",
        "Warning [IST0108] (Service default/a) Unknown annotation: networking.istio.io/exportto",
    ),
    "a port of many": (
        SERVICES + rule("a", f"{{hosts: [reviews], http: [{to('two-ports.other.svc.cluster.local')}]}}"),
        "Error [IST0112] (VirtualService default/a) This VirtualService routes to a service "
        '"two-ports.other.svc.cluster.local" that exposes multiple ports [80 81]. Specifying a port in the destination '
        "is required to disambiguate.",
    ),
    "a port name without a protocol": (
        service("a", "{ports: [{name: api, port: 80, targetPort: 8080}, {name: tcp-db, port: 81}]}"),
        "Info [IST0118] (Service default/a) "
        "Port name api (port: 80, targetPort: 8080) doesn't follow the naming convention of Istio port.",
    ),
    "a port name of an ExternalName": (
        service("a", "{type: ExternalName, externalName: a.example.com, ports: [{name: tcp, port: 80}]}"),
        "Warning [IST0150] (Service default/a) Port name for ExternalName service is invalid. Proxy may prevent tcp "
        "named ports and unmatched traffic for ports serving TCP protocol from being forwarded correctly",
    ),
    "a rule behind one that takes all": (
        SERVICES + rule("a", f"{{hosts: [reviews], http: [{to('reviews')}, {to('reviews')}]}}"),
        "Warning [IST0130] (VirtualService default/a) "
        "VirtualService rule #1 not used (only the last rule can have no matches).",
    ),
    "a selector that chooses nothing": (
        "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: a}}}\n"
        + rule("a", "{selector: {matchLabels: {app: b}}}", "AuthorizationPolicy", "security"),
        "Warning [IST0127] (AuthorizationPolicy default/a) "
        "No matching workloads for this resource with the following labels: app=b",
    ),
    "two injection labels": (
        "{apiVersion: v1, kind: Namespace, metadata: {name: a, labels: {istio-injection: enabled, istio.io/rev: x}}}",
        "Warning [IST0123] (Namespace a) The namespace has more than one type of injection labels "
        "[istio-injection=enabled istio.io/rev=x], which may lead to undefined behavior. Make sure only one injection "
        "label exists.",
    ),
    "a namespace without injection": (
        "{apiVersion: v1, kind: Namespace, metadata: {name: frod}}",
        "Info [IST0102] (Namespace frod) The namespace is not enabled for Istio injection. Run 'kubectl label "
        "namespace frod istio-injection=enabled' to enable it, or 'kubectl label namespace frod "
        "istio-injection=disabled' to explicitly mark it as not needing injection.",
    ),
    "plaintext to a STRICT server": (
        SERVICES
        + rule("dr", "{host: reviews, trafficPolicy: {tls: {mode: DISABLE}}}", "DestinationRule")
        + rule("strict", "{mtls: {mode: STRICT}}", "PeerAuthentication", "security", "istio-system"),
        "Error [IST0113] (DestinationRule default/dr) A DestinationRule and Policy are in conflict with regards to "
        'mTLS for host reviews.default.svc.cluster.local. The DestinationRule "default/dr" specifies that mTLS must be '
        'false but the Policy object "istio-system/strict" specifies STRICT.',
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_message_is_istios_and_comes_alone(case: str) -> None:
    """Code, level, object and words: scripts grep for them."""
    text, expected = CASES[case]
    assert lines(text) == [expected]


def test_conflicts_are_told_of_everyone_who_takes_part() -> None:
    """In no other order than by name: whoever looks at one of them finds the others."""
    both = SERVICES + "".join(rule(name, f"{{hosts: [reviews], http: [{to('reviews')}]}}") for name in "ab")
    words = (
        "The VirtualServices default/a,default/b associated with mesh gateway define the same host "
        "*/reviews.default.svc.cluster.local which can lead to undefined behavior. This can be fixed by merging the "
        "conflicting VirtualServices into a single resource."
    )
    assert lines(both) == [f"Error [IST0109] (VirtualService default/{name}) {words}" for name in "ab"]
    private = both.replace("hosts: [reviews]", "exportTo: [x], hosts: [reviews]", 1)
    assert {each.partition(" same host ")[2].split()[0] for each in lines(private)} == {
        "x/reviews.default.svc.cluster.local"
    }
    apart = "exportTo: [y], hosts: [reviews]".join(private.rsplit("hosts: [reviews]", 1))
    assert lines(apart) == []
    gateways = "".join(
        rule(
            name,
            "{selector: {a: b}, servers: [{hosts: [x.com], port: {number: 80, name: http, protocol: HTTP}}]}",
            "Gateway",
        )
        for name in "ab"
    )
    assert lines(gateways) == [
        f"Error [IST0145] (Gateway default/{one}) Conflict with gateways default/{other} (workload selector a=b, port "
        "80, hosts x.com)."
        for one, other in ("ab", "ba")
    ]
    sidecars = "".join(rule(name, "{egress: [{hosts: ['./*']}]}", "Sidecar") for name in "ab")
    assert [each.code for each in told(sidecars)] == ["IST0111", "IST0111"]
    chosen = "".join(
        rule(name, "{workloadSelector: {labels: {app: a}}, egress: [{hosts: ['./*']}]}", "Sidecar") for name in "ab"
    )
    pod = "{apiVersion: v1, kind: Pod, metadata: {name: p, labels: {app: a}}}\n"
    assert {each.text for each in told(pod + chosen)} == {
        'The Sidecars [default/a default/b] in namespace "default" select the same workload pod "p", which can lead to '
        "undefined behavior."
    }


@pytest.mark.parametrize(
    ("first", "second", "is_told"),
    [
        ("{uri: {prefix: /a}}", "{uri: {exact: /a/b}}", True),
        ("{uri: {prefix: /a}}", "{uri: {prefix: /a}, headers: {x: {exact: y}}}", True),
        ("{headers: {x: {}}}", "{headers: {x: {exact: y}}}", True),
        ("{uri: {prefix: /a}, headers: {x: {exact: y}}}", "{uri: {prefix: /a}}", False),
        ("{uri: {exact: /a}}", "{uri: {prefix: /a}}", False),
        ("{uri: {regex: /a.*}}", "{uri: {exact: /ab}}", False),
        ("{uri: {prefix: /a}, sourceLabels: {app: x}}", "{uri: {prefix: /a}}", False),
        ("{uri: {prefix: /a}, gateways: [g]}", "{uri: {prefix: /a}}", False),
        ("{uri: {prefix: /a}, withoutHeaders: {x: {}}}", "{uri: {prefix: /a}}", False),
    ],
)
def test_a_match_that_an_earlier_one_takes_in_is_told(first: str, second: str, is_told: bool) -> None:
    """And only where it is certain: a warning about a rule that works would teach people to look away."""
    rules = f"{{name: one, match: [{first}], {to('reviews')[1:]}, {{match: [{second}], {to('reviews')[1:]}"
    found = told(SERVICES + rule("a", f"{{hosts: [reviews], http: [{rules}]}}"))
    expected = [
        ("IST0130", "VirtualService rule #1 not used (all matches used by prior rules)."),
        ("IST0131", 'VirtualService rule #1 match #0 is not used (duplicate/overlapping match in rule "one").'),
    ]
    assert [(each.code, each.text) for each in found if each.code != "IST0101"] == (expected if is_told else [])


def test_a_gateway_must_be_there_and_have_the_host() -> None:
    """Its hosts may name namespaces."""
    text = SERVICES + rule("a", f"{{hosts: [b.com], gateways: [g, none], http: [{to('x.example.com')}]}}")
    gateway = "{selector: {}, servers: [{hosts: [%s], port: {number: 80, name: http, protocol: HTTP}}]}"
    found = lines(text + rule("g", gateway % "a.com", "Gateway"))
    assert found == [
        'Error [IST0101] (VirtualService default/a) Referenced gateway not found: "none"',
        "Warning [IST0132] (VirtualService default/a) one or more host [b.com] defined in VirtualService default/a not "
        "found in Gateway default/g.",
        "Warning [IST0132] (VirtualService default/a) one or more host [b.com] defined in VirtualService default/a not "
        "found in Gateway default/none.",
    ]
    for hosts in ("b.com", "'*'", "'*.com'", "./b.com", "'*/*'", "default/b.com"):
        assert "Gateway default/g" not in str(lines(text + rule("g", gateway % hosts, "Gateway"))), hosts
    assert "Gateway default/g" in str(lines(text + rule("g", gateway % "other/b.com", "Gateway")))


def test_what_only_a_whole_cluster_can_say_is_not_said_of_files() -> None:
    """Pods and namespaces are hardly ever written down."""
    text = rule(
        "g",
        "{selector: {istio: x}, servers: [{hosts: [a], port: {number: 80, name: http, protocol: HTTP}}]}",
        "Gateway",
    )
    source = "{rules: [{from: [{source: {namespaces: [gone, 'f*']}}]}]}"
    text += rule("p", source, "AuthorizationPolicy", "security")
    text += "---\n{apiVersion: v1, kind: Namespace, metadata: {name: foo, labels: {istio-injection: enabled}}}"
    assert lines(text) == []
    assert lines(text, is_whole=True) == [
        'Error [IST0101] (AuthorizationPolicy default/p) Referenced namespace not found: "gone"',
        'Error [IST0101] (Gateway default/g) Referenced selector not found: "istio=x"',
        "Warning [IST0127] (AuthorizationPolicy default/p) No matching workloads for this resource with the following "
        "labels: ",
    ]


POD = "---\n{apiVersion: v1, kind: Pod, metadata: {name: p, labels: {app: a, version: v1}}}\n"
GATEWAY = "{selector: {app: a}, servers: [{hosts: ['*'], port: {number: 80, name: http, protocol: HTTP}}]}"


def codes(text: str, *, is_whole: bool = False) -> list[str]:
    return [f"{each.code} {each.origin}" for each in told(text, is_whole=is_whole)]


@pytest.mark.parametrize("kind", ["Sidecar", "Telemetry"])
def test_a_selector_of_sidecars_and_telemetry_that_fits_nobody_is_told(kind: str) -> None:
    """As Istio tells it, by another code than that of policies; and in their own namespace alone."""
    named = "workloadSelector: {labels: {app: b}}, egress: [{hosts: ['./*']}]"
    named = named if kind == "Sidecar" else "selector: {matchLabels: {app: b}}"
    text = rule("t", f"{{{named}}}", kind, "networking" if kind == "Sidecar" else "telemetry")
    assert codes(POD + text) == [f"IST0101 {kind} default/t"]
    assert codes(text) == []
    assert codes(POD + text.replace("app: b", "app: a")) == []


def test_telemetry_objects_that_meet_are_told() -> None:
    """Of which the oldest holds; Istio leaves it open."""
    both = "".join(rule(name, "{tracing: []}", "Telemetry", "telemetry") for name in "ab")
    assert [each.split()[0] for each in codes(both)] == ["IST0160", "IST0160"]
    chosen = "".join(rule(name, "{selector: {matchLabels: {app: a}}}", "Telemetry", "telemetry") for name in "ab")
    assert [each.split()[0] for each in codes(POD + chosen)] == ["IST0159", "IST0159"]


def test_a_policy_for_a_namespace_of_nobody_is_told_of_a_whole_cluster() -> None:
    """And namespaces that are not there, behind `notNamespaces`, too."""
    text = rule("p", "{rules: [{from: [{source: {notNamespaces: [gone, d*]}}]}]}", "AuthorizationPolicy", "security")
    text += "---\n{apiVersion: v1, kind: Namespace, metadata: {name: default, labels: {istio-injection: enabled}}}\n"
    assert codes(text) == []
    assert codes(text, is_whole=True) == [
        "IST0101 AuthorizationPolicy default/p",
        "IST0127 AuthorizationPolicy default/p",
    ]


def test_a_gateways_port_certificate_and_claims_are_looked_at() -> None:
    """Against the Services and pods that stand behind it."""
    front = service("front", "{selector: {app: a}, ports: [{name: http, port: 8080}]}")
    assert codes(POD + front + rule("g", GATEWAY, "Gateway")) == ["IST0162 Gateway default/g"]
    assert codes(POD + front.replace("8080", "80") + rule("g", GATEWAY, "Gateway")) == []
    tls = "{number: 443, name: https, protocol: HTTPS}, tls: {mode: SIMPLE, credentialName: c}"
    pair = "".join(
        rule(name, f"{{selector: {{app: a}}, servers: [{{hosts: [{name}.com], port: {tls}}}]}}", "Gateway")
        for name in "ab"
    )
    assert codes(pair) == ["IST0138 Gateway default/a", "IST0138 Gateway default/b"]
    claims = "{hosts: [reviews], gateways: [g], http: [{match: [{headers: {'@request.auth.claims.a': {exact: b}}}], "
    routed = SERVICES + POD + rule("g", GATEWAY, "Gateway") + rule("v", claims + to("reviews")[1:] + "]}")
    assert codes(routed) == ["IST0149 VirtualService default/v"]
    verified = rule("r", "{jwtRules: [{issuer: i}]}", "RequestAuthentication", "security", "istio-system")
    assert codes(routed + verified) == []


def test_a_destination_rule_is_about_somebody() -> None:
    """Its host is a service's, and each subset holds somebody, where it is said who runs."""
    rules = rule("d", "{host: gone}", "DestinationRule")
    assert codes(rules) == ["IST0174 DestinationRule default/d"]
    assert codes(rule("d", "{host: '*.local'}", "DestinationRule")) == []
    subsets = rule("d", "{host: a, subsets: [{name: v2, labels: {version: v2}}]}", "DestinationRule")
    behind = service("a", "{selector: {app: a}, ports: [{name: http, port: 80}]}")
    assert codes(behind + subsets) == []
    assert codes(POD + behind + subsets, is_whole=True) == ["IST0173 DestinationRule default/d"]
    assert codes(POD + behind + subsets.replace("version: v2", "version: v1"), is_whole=True) == []


def test_an_annotation_beside_a_template_is_in_the_wrong_place() -> None:
    """Pods get those of the template; on the Deployment itself they say nothing to anybody."""
    named = "metadata: {name: a, annotations: {sidecar.istio.io/inject: 'true'}}"
    assert codes(f"{{apiVersion: apps/v1, kind: Deployment, {named}, spec: {{}}}}") == ["IST0107 Deployment default/a"]


def test_services_and_entries_that_contradict_each_other_are_told() -> None:
    """Two protocols of one port, two ports that lead to one, two ServiceEntries of one host."""
    labels = "{metadata: {labels: {app: a}}}"
    deployment = (
        f"---\n{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: a}}, spec: {{template: {labels}}}}}\n"
    )
    pair = service("a", "{selector: {app: a}, ports: [{name: http, port: 80, targetPort: 8080}]}")
    other = service("b", "{selector: {app: a}, ports: [{name: http, port: 81, targetPort: 8080}]}")
    assert codes(deployment + pair + other) == ["IST0137 Deployment default/a"]
    other = service("b", "{selector: {app: a}, ports: [{name: udp, port: 80, targetPort: 8080, protocol: UDP}]}")
    assert codes(deployment + pair + other) == ["IST0116 Deployment default/a"]
    entries = "".join(
        rule(name, f"{{hosts: [a.com], ports: [{{number: 80, name: a, protocol: {protocol}}}]}}", "ServiceEntry")
        for name, protocol in (("a", "HTTP"), ("b", "TLS"))
    )
    assert codes(entries) == ["IST0177 ServiceEntry default/a", "IST0177 ServiceEntry default/b"]
    assert codes(entries.replace("protocol: TLS", "protocol: http")) == []


def test_a_status_that_is_not_well_is_told() -> None:
    """What somebody's controller wrote there."""
    text = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: a}
spec: {}
status: {parents: [{conditions: [{type: Accepted, status: "False", reason: NoMatchingParent, message: none}]}]}
"""
    assert lines(text) == [
        "Warning [IST0171] (HTTPRoute default/a) A condition with a negative status is present: type=Accepted, "
        "reason=NoMatchingParent, message=none."
    ]


def test_fields_that_go_and_references_without_effect_are_told() -> None:
    """The old percent of a delay, a gateway that Istio makes, subsets that a gateway's route leaves out."""
    fault = "fault: {delay: {fixedDelay: 1s, percent: 5}}, "
    old = SERVICES + rule("a", f"{{hosts: [reviews], http: [{{{fault}{to('reviews')[1:]}]}}")
    assert codes(old) == ["IST0002 VirtualService default/a"]
    made = rule(
        "a", f"{{hosts: [reviews], gateways: ['g/g~istio-autogenerated-k8s-gateway~http'], http: [{to('reviews')}]}}"
    )
    assert codes(SERVICES + made) == ["IST0165 VirtualService default/a"]
    inside = rule("in", f"{{hosts: [reviews], http: [{to('reviews', ', subset: v1')}]}}")
    outside = rule("out", f"{{hosts: [x.com], gateways: [g], http: [{to('reviews')}]}}") + rule("g", GATEWAY, "Gateway")
    assert codes(SERVICES + inside + outside) == ["IST0140 VirtualService default/out"]


def test_what_selects_nobody_who_runs_is_told() -> None:
    """Once somebody is known where it holds: who is to come is not there yet."""
    text = rule(
        "p", "{selector: {matchLabels: {app: b}}, action: DENY, rules: [{}]}", "AuthorizationPolicy", "security"
    )
    objects = parse_text(text, "mesh.yaml").objects
    assert list(idle(objects, (), "istio-system")) == []
    (found,) = idle(objects, (Workload("default", "a", {"app": "a"}),), "istio-system")
    assert (found.object, found.field) == ("AuthorizationPolicy default/p", "spec.selector")
    assert list(idle(objects, (Workload("default", "b", {"app": "b"}),), "istio-system")) == []
    assert list(idle(objects, (Workload("other", "a", {"app": "a"}),), "istio-system")) == []


class Asked(dict[str, str]):
    """Labels that count how often one of them is looked up."""

    count = 0

    def get(self, *args: Any) -> Any:
        type(self).count += 1
        return super().get(*args)


def test_many_policies_among_many_workloads() -> None:
    """A selector is held against those who bear its rarest label, and not against everybody: the control plane asks
    this for every look at its problems. The root namespace's policies are for all namespaces."""
    form = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
    spec = "spec: {selector: {matchLabels: {app: a%d}}}\n"
    here = "---\n".join(f"{form}metadata: {{name: p{at}}}\n{spec % at}" for at in range(50))
    root = f"{form}metadata: {{name: p, namespace: istio-system}}\n{spec % 7}"
    workloads = [Workload("default", f"w{at}", Asked(app=f"a{at % 25}")) for at in range(1000)]
    found = list(idle(parse_text(f"{here}---\n{root}", "mesh.yaml").objects, workloads, "istio-system"))
    assert [each.object for each in found] == [f"AuthorizationPolicy default/p{at}" for at in range(25, 50)]
    assert Asked.count < 2 * len(workloads)


def test_a_message_points_at_the_field() -> None:
    """At its line, not at the object's first."""
    text = """apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: a
spec:
  hosts: [reviews]
  http:
  - route:
    - destination:
        host: revews
"""
    (message,) = told(text)
    assert message.line() == (
        'Error [IST0101] (VirtualService default/a mesh.yaml:10) Referenced host not found: "revews"'
    )
    assert message.shown() == {
        "code": "IST0101",
        "documentationUrl": "https://istio.io/latest/docs/reference/config/analysis/ist0101/",
        "level": "Error",
        "message": 'Referenced host not found: "revews"',
        "origin": "VirtualService default/a",
        "reference": "mesh.yaml:10",
    }


def test_messages_can_be_suppressed() -> None:
    """By code and object, with wildcards; or on the object itself, as Istio has it."""
    namespaces = "---\n".join(
        f"{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}{more}}}}}\n"
        for name, more in (
            ("a", ""),
            ("b", ", annotations: {galley.istio.io/analyze-suppress: 'IST0001, IST0102'}"),
            ("c", ", annotations: {galley.istio.io/analyze-suppress: '*'}"),
        )
    )
    assert [each.origin for each in told(namespaces)] == ["Namespace a"]
    assert told(namespaces, suppressions=(Suppression.parse("IST0102=Namespace a"),)) == ()
    assert told(namespaces, suppressions=(Suppression.parse("IST0102=Namespace *"),)) == ()
    assert len(told(namespaces, suppressions=(Suppression.parse("IST0103=Namespace a"),))) == 1
    text = rule("a", f"{{hosts: [x], http: [{to('y')}]}}", namespace="shop")
    assert told(text, suppressions=(Suppression.parse("IST0101=VirtualService *.shop"),)) == ()
    for bad in ("IST0101", "=x", "IST0101=a=b"):
        with pytest.raises(ValueError, match="not a valid suppression"):
            Suppression.parse(bad)


def test_codes_are_told_once_each_and_levels_have_istios_order() -> None:
    """Error first."""
    assert len({each.code for each in KINDS}) == len(KINDS)
    assert Level.ERROR > Level.WARNING > Level.INFO


def test_bookinfo_is_well() -> None:
    """Its services and destination rules with the routes of each task: nothing but what Istio says of them, too."""
    names = ("bookinfo.yaml", "bookinfo-ratings-grpc.yaml")
    whole = [*(BOOKINFO / "platform" / name for name in names), BOOKINFO / "networking" / "destination-rule-all.yaml"]
    base = "\n---\n".join(file.read_text() for file in whole)
    expected = {"fault-injection-details-v1": {"IST0130"}}
    for file in sorted((BOOKINFO / "networking").glob("virtual-service-*.yaml")) + sorted(
        (BOOKINFO / "networking").glob("fault-*.yaml")
    ):
        codes = {each.code for each in told(f"{base}\n---\n{file.read_text()}")}
        assert codes == expected.get(file.stem, set()), file.name
