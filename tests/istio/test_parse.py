"""What is read, what is refused, and what its author is told."""

from __future__ import annotations

import json
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from views import BOOKINFO, PREFIX, destination_rule, service, virtual_service

from meshlib.istio.decoding import parse_duration
from meshlib.istio.parse import parse_text
from meshlib.istio.resources import Duration, dump_yaml

TO_A = "route: [{destination: {host: a}}]"


def refused(text: str) -> tuple[str, str]:
    """(field, reason) of the one problem, whose object is not there."""
    parsed = parse_text(text, "f.yaml")
    assert parsed.objects == ()
    (problem,) = parsed.problems
    return problem.field, problem.reason


def rule(http: str) -> str:
    return virtual_service(f"[{{{http}}}]")


def entry(spec: str) -> str:
    return f"{PREFIX}kind: ServiceEntry\nmetadata: {{name: se}}\nspec: {spec}\n"


def gateway(server: str) -> str:
    return f"{PREFIX}kind: Gateway\nmetadata: {{name: g}}\nspec: {{servers: [{{{server}}}]}}\n"


def test_a_problem_names_file_line_object_field_and_reason() -> None:
    """All that one needs to mend it, in one line."""
    text = (
        f"# a comment\n{PREFIX}kind: VirtualService\nmetadata:\n  name: reviews\nspec:\n  hosts: [reviews]\n  http:\n"
        "  - route:\n    - destination: {host: reviews}\n      wieght: 10\n"
    )
    (problem,) = parse_text(text, "net/reviews.yaml").problems
    assert str(problem) == (
        "net/reviews.yaml:11: VirtualService default/reviews: spec.http[0].route[0].wieght: there is no such field"
    )


def test_a_bad_object_hides_no_good_one() -> None:
    """Neither one of a wrong shape, nor one that is no YAML, nor one that stands there twice."""
    broken = "apiVersion: v1\nkind: Service\nmetadata: {name: [\n"
    parsed = parse_text("---\n".join([service("a"), broken, rule("route: 5"), service("b"), service("a")]), "f.yaml")
    assert [each.name for each in parsed.objects] == ["a", "b"]
    assert len(parsed.problems) == 3
    assert parsed.problems[2].reason == "stands in this file twice"


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("kind: Service\nmetadata: {name: a}\n", "apiVersion", "is missing"),
        ("apiVersion: v1\nmetadata: {name: a}\n", "kind", "is missing"),
        ("apiVersion: v1\nkind: Service\n", "metadata.name", "is missing"),
        ("- 1\n- 2\n", "", "mapping"),
        (service("a_b"), "metadata.name", "no name"),
        (service("a", "A.B"), "metadata.namespace", "no namespace"),
        (service(ports="[{port: 70000}]"), "spec.ports[0].port", "65535"),
        (service().replace("v1", "v2", 1), "apiVersion", "there are v1"),
        (rule(TO_A).replace("v1", "v9", 1), "apiVersion", "v1beta1"),
        (virtual_service(f"[{{{TO_A}}}]", hosts="[]", more="tcp: []"), "spec.hosts", "is missing"),
        (virtual_service(f"[{{{TO_A}}}]", hosts="[a, A]"), "spec.hosts", "twice"),
        (virtual_service(f"[{{{TO_A}}}]", hosts="['a b']"), "spec.hosts[0]", "no host name"),
        (rule(""), "spec.http[0]", "exactly one of"),
        (rule(f"{TO_A}, redirect: {{uri: /x}}"), "spec.http[0]", "route and redirect"),
        (rule("route: [{destination: {host: '*.e.com'}}]"), "spec.http[0].route[0].destination.host", "wildcard"),
        (
            rule("route: [{destination: {host: a}}, {destination: {host: b}}]"),
            "spec.http[0].route",
            "must not all be 0",
        ),
        (rule(f"match: [{{uri: {{exact: /, prefix: /}}}}], {TO_A}"), "spec.http[0].match[0].uri", "exactly one"),
        (rule(f"match: [{{uri: {{regex: '('}}}}], {TO_A}"), "spec.http[0].match[0].uri.regex", "RE2"),
        (rule(f"match: [{{uri: {{regex: '(?=x)'}}}}], {TO_A}"), "spec.http[0].match[0].uri.regex", "RE2"),
        (rule(f"match: [{{headers: {{'a b': {{}}}}}}], {TO_A}"), "spec.http[0].match[0].headers", "no header name"),
        (rule(f"timeout: 5, {TO_A}"), "spec.http[0].timeout", "unit"),
        (rule(f"timeout: 5x, {TO_A}"), "spec.http[0].timeout", "no duration"),
        (rule(f"timeout: 10us, {TO_A}"), "spec.http[0].timeout", "at least 1ms"),
        (rule(f"retries: {{retryOn: '5xx,sometimes'}}, {TO_A}"), "spec.http[0].retries", ""),
        (rule(f"retries: {{attempts: 1, retryOn: sometimes}}, {TO_A}"), "spec.http[0].retries.retryOn", "sometimes"),
        (rule(f"fault: {{}}, {TO_A}"), "spec.http[0].fault", "needs delay or abort"),
        (rule(f"fault: {{abort: {{}}}}, {TO_A}"), "spec.http[0].fault.abort", "exactly one"),
        (rule(f"rewrite: {{}}, {TO_A}"), "spec.http[0].rewrite", "rewrites nothing"),
        (rule("redirect: {}"), "spec.http[0]", ""),
        (rule("redirect: {uri: /, redirectCode: 200}"), "spec.http[0].redirect.redirectCode", "301"),
        (rule("directResponse: {status: 99}"), "spec.http[0].directResponse.status", ""),
        (rule("directResponse: {status: 200, body: {bytes: '!'}}"), "spec.http[0].directResponse.body.bytes", "base64"),
        (rule(f'headers: {{request: {{set: {{x: "a\\nb"}}}}}}, {TO_A}'), "spec.http[0].headers.request.set.x", "holds"),
        (rule(f"mirrorPercentage: {{value: 101}}, {TO_A}"), "spec.http[0].mirrorPercentage.value", "100"),
        (destination_rule("{subsets: []}"), "spec.host", "is missing"),
        (destination_rule("{host: a, subsets: [{name: v1}, {name: v1}]}"), "spec.subsets[1].name", "twice"),
        (destination_rule("{host: a, trafficPolicy: {loadBalancer: {simple: BEST}}}"), "", "BEST"),
        (
            destination_rule("{host: a, trafficPolicy: {tls: {mode: ISTIO_MUTUAL, privateKey: a}}}"),
            "spec.trafficPolicy.tls.mode",
            "",
        ),
        (entry("{hosts: ['*'], ports: [{number: 80, name: x}]}"), "spec.hosts[0]", "every host"),
        (entry("{hosts: [e.com], ports: [{number: 80, name: x, protocol: FTP}]}"), "spec.ports[0].protocol", "FTP"),
        (
            entry(
                "{hosts: [e.com], resolution: STATIC, ports: [{number: 80, name: x}], endpoints: [{address: 1.2.3}]}"
            ),
            "spec.endpoints[0].address",
            "IP address",
        ),
        (entry("{hosts: ['*.e.com'], resolution: DNS, ports: [{number: 80, name: x}]}"), "spec.hosts", "wildcard"),
        (gateway("port: {number: 80, name: http, protocol: HTTP}, hosts: []"), "spec.servers[0].hosts", "is missing"),
        (
            gateway("port: {number: 443, name: https, protocol: HTTPS}, hosts: ['*']"),
            "spec.servers[0].tls.mode",
            "is missing",
        ),
        (
            gateway("port: {number: 80, name: tcp, protocol: TCP}, hosts: ['*']"),
            "spec.servers[0].port.protocol",
            "not there yet",
        ),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {podIP: nowhere}\n", "status.podIP", "IP address"),
        (
            "apiVersion: v1\nkind: Endpoints\nmetadata: {name: a}\nsubsets: [{addresses: [{ip: a.com}]}]\n",
            "subsets[0].addresses[0].ip",
            "IP address",
        ),
        (
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a}\n"
            "endpoints: [{addresses: [x]}]\n",
            "endpoints[0].addresses[0]",
            "IP address",
        ),
    ],
)
def test_what_can_not_be_used_is_refused(text: str, field: str, reason: str) -> None:
    """With the field it is about, and a reason."""
    found_field, found_reason = refused(text)
    assert field in found_field
    assert reason in found_reason


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7s", 7),
        ("0.5s", 0.5),
        ("250ms", 0.25),
        ("1h1m1s", 3661),
        ("1.5h", 5400),
        ("10us", 1e-5),
        (".5s", 0.5),
        ("0s", 0),
    ],
)
def test_durations_are_gos(text: str, seconds: float) -> None:
    """Units add up."""
    assert parse_duration(text) == Duration(pytest.approx(seconds))


@pytest.mark.parametrize("text", ["", "s", "1", "-1s", "1 s", "1s2", "1d", 5, None, True, "9" * 400 + "s"])
def test_what_is_no_duration_is_an_error(text: object) -> None:
    """A number without a unit above all."""
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        (
            rule(f"fault: {{abort: {{httpStatus: 500}}}}, {TO_A}"),
            "spec.http[0].fault.abort.percentage",
            "is missing, so no request is affected",
        ),
    ],
)
def test_what_is_asked_for_and_not_had_is_told(text: str, field: str, reason: str) -> None:
    """The object is taken all the same."""
    parsed = parse_text(text, "f.yaml")
    assert len(parsed.objects) == 1
    assert [(each.field, each.reason) for each in parsed.warnings] == [(field, reason)]


def test_an_object_written_out_reads_the_same() -> None:
    """`meshctl get -o yaml`, for every object of the examples that is accepted."""
    for file in sorted(BOOKINFO.glob("*/*.yaml")):
        for each in parse_text(file.read_text(), file.name).objects:
            (again,) = parse_text(dump_yaml(each), "again.yaml").objects
            assert again.same_content(each)
            assert (again.key, again.spec, again.labels) == (each.key, each.spec, each.labels)


def test_a_list_holds_objects() -> None:
    """`kubectl get -o yaml`."""
    text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: a}\n- 5\n"
    parsed = parse_text(text, "f.yaml")
    assert [each.name for each in parsed.objects] == ["a"]
    assert [problem.source for problem in parsed.problems] == ["f.yaml:7"]


_SNIPPETS = st.sampled_from(
    [
        "a",
        "kind: Service\n",
        PREFIX,
        "metadata: {name: a}\n",
        "spec:\n",
        "  http: [",
        "]",
        "{",
        "}",
        "- ",
        ": ",
        "&a ",
        "*a ",
        "!!binary ",
        "---\n",
        "\t",
        "\n",
        "'",
        '"',
        "\u2028",
        "\ufeff",
        "\x00",
        "<<: ",
        "? ",
        "| \n",
        "0x1",
        "~",
        service(),
        rule(TO_A),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(_SNIPPETS, st.text(max_size=5)), max_size=12).map("".join))
def test_no_text_raises(text: str) -> None:
    """Whatever is saved half-written, the reader of a folder lives on."""
    parsed = parse_text(text, "f.yaml")
    assert all(problem.reason for problem in parsed.problems)


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ("hosts", "http", "route", "destination", "host", "ports", "number", "servers", "tls", "match")
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(_JSON, st.sampled_from(("VirtualService", "DestinationRule", "ServiceEntry", "Gateway", "Service", "Pod")))
def test_no_shape_raises(spec: object, kind: str) -> None:
    """An object is either taken or refused."""

    version = "v1" if kind in ("Service", "Pod") else "networking.istio.io/v1"
    whole = {"apiVersion": version, "kind": kind, "metadata": {"name": "a"}, "spec": spec}
    parsed = parse_text(yaml.safe_dump(whole), "f.yaml")
    assert len(parsed.objects) + len(parsed.problems) == 1


LABEL = st.text(alphabet="0123456789abcdefonyexs.-_~:#'\"{}[]<>=!&*|@%\n\x85\u2028é ", max_size=12)


@given(st.dictionaries(LABEL, LABEL, max_size=5))
def test_labels_written_out_read_the_same(labels: dict[str, str]) -> None:
    """Not only to us: `12e4567` is a number to Kubernetes, and `on` to PyYAML."""
    text = json.dumps(
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"selector": labels}},
        ensure_ascii=True,
    )
    (read,) = parse_text(text, "f.yaml").objects
    written = dump_yaml(read)
    (again,) = parse_text(written, "f.yaml").objects
    assert again.same_content(read)
    assert yaml.safe_load(written)["spec"]["selector"] == labels


def test_text_of_many_lines_stays_readable() -> None:
    """As a block, the way people write it."""
    data = "data:\n  mesh: |\n    accessLogFile: x\n\n    outboundTrafficPolicy:\n      mode: REGISTRY_ONLY\n"
    (read,) = parse_text(f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m}}\n{data}", "f.yaml").objects
    assert data in dump_yaml(read)


@pytest.mark.parametrize(
    ("text", "line", "field", "reason"),
    [
        (f"{PREFIX}kind: Gateway\nmetadata: {{name: g}}\nsepc: {{}}\n", 4, "sepc", "there is no such field"),
        (
            f"{PREFIX}kind: Gateway\nmetadata:\n  name: g\n  labls: {{}}\n",
            5,
            "metadata.labls",
            "there is no such field",
        ),
        (f"{PREFIX}kind: Gatway\nmetadata: {{name: g}}\n", 2, "kind", "networking.istio.io has no kind 'Gatway'"),
        (
            "apiVersion: v1\nkind: VirtualService\nmetadata: {name: g}\n",
            1,
            "apiVersion",
            "'v1' has no kind VirtualService; networking.istio.io/v1 has",
        ),
        ("apiVersion: v1\nkind: List\nitems: {a: b}\n", 3, "items", "must be a list, not a mapping"),
        ("apiVersion: v1\nkind: Service\nmetadata: [name]\n", 3, "metadata", "must be a mapping, not a list"),
        (
            entry("{hosts: [a.com], addresses: [here], ports: [{number: 80, name: http}]}"),
            4,
            "spec.addresses[0]",
            "must be an IP address or a CIDR: 'here'",
        ),
        (
            rule(f"match: [{{headers: {{a: {{exact: b}}, end-user: {{exakt: b}}}}}}], {TO_A}"),
            0,
            "spec.http[0].match[0].headers.end-user.exakt",
            "there is no such field",
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  selector:\n    a: b\n    version: 1.5\n",
            7,
            "spec.selector.version",
            "must be text, not a number",
        ),
        (
            gateway(
                "hosts: ['*'], port: {number: 443, name: s, protocol: HTTPS}, tls: {mode: MUTUAL, privateKey: /k, "
                "serverCertificate: /c, caCertificates: /ca, subjectAltNames: [a]}"
            ),
            0,
            "spec.servers[0].tls.subjectAltNames",
            "is not checked yet, so this is refused",
        ),
    ],
)
def test_what_was_once_passed_over_in_silence(text: str, line: int, field: str, reason: str) -> None:
    """A slip of the pen takes no effect away unnoticed. line: 0 where it says nothing."""
    parsed = parse_text(text, "f.yaml")
    assert parsed.objects == ()
    (problem,) = parsed.problems
    assert (problem.field, problem.reason) == (field, reason)
    assert not line or problem.source == f"f.yaml:{line}"


def test_a_list_of_hundreds_is_read_in_time() -> None:
    """`kubectl get services -A -o yaml`; 400 objects once took 17 s."""
    item = "- apiVersion: v1\n  kind: Service\n  metadata: {{name: s{0}}}\n  spec: {{ports: [{{port: 80}}]}}\n"
    text = "apiVersion: v1\nkind: List\nitems:\n" + "".join(item.format(number) for number in range(2000))
    began = time.monotonic()
    parsed = parse_text(text, "f.yaml")
    assert time.monotonic() - began < 10
    assert [each.source for each in parsed.objects[:2]] == ["f.yaml:4", "f.yaml:8"]
    assert len(parsed.objects) == 2000


def test_too_much_text_is_refused_unread() -> None:
    """A file of that size is no configuration."""
    (problem,) = parse_text("a: 1\n" * 4_000_000, "f.yaml").problems
    assert str(problem) == "f.yaml: more than 16777216 characters"


def test_kubernetes_kinds_may_have_fields_that_nobody_here_knows() -> None:
    """Real manifests are full of them; kinds that mean nothing to a mesh are passed over."""
    text = (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a, x: y}\nspec: {ports: [{port: 80, nodePort: 3000}], x: 1}\n"
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n"
        "---\napiVersion: batch/v1\nkind: CronJob\nmetadata: {name: n}\nspec: {x: 1}\n"
    )
    parsed = parse_text(text, "f.yaml")
    assert (len(parsed.objects), parsed.problems, parsed.warnings) == (3, (), ())


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (r'redirect: {uri: "/a\r\nset-cookie: b"}', "redirect.uri"),
        (r'redirect: {authority: "a\nb"}', "redirect.authority"),
        (r'redirect: {scheme: "a\0"}', "redirect.scheme"),
        (rf'{TO_A}, rewrite: {{uri: "/\n"}}', "rewrite.uri"),
        (rf'{TO_A}, rewrite: {{uri: "/日本"}}', "rewrite.uri"),
        (rf'{TO_A}, rewrite: {{authority: "a\r"}}', "rewrite.authority"),
        (rf'{TO_A}, rewrite: {{uriRegexRewrite: {{match: a, rewrite: "\n"}}}}', "rewrite.uriRegexRewrite.rewrite"),
        (rf"{TO_A}, rewrite: {{uriRegexRewrite: {{match: a, rewrite: /\1}}}}", "rewrite.uriRegexRewrite.rewrite"),
        (rf"{TO_A}, rewrite: {{uriRegexRewrite: {{match: a, rewrite: /\x}}}}", "rewrite.uriRegexRewrite.rewrite"),
        (rf'{TO_A}, headers: {{response: {{set: {{a: "\e[2J"}}}}}}', "headers.response.set.a"),
        (f"{TO_A}, headers: {{request: {{set: {{Content-Length: '1'}}}}}}", "headers.request.set.Content-Length"),
        (f"{TO_A}, headers: {{response: {{add: {{transfer-encoding: a}}}}}}", "headers.response.add.transfer-encoding"),
    ],
)
def test_what_no_message_may_hold_is_refused_where_it_was_written(given: str, field: str) -> None:
    """Everybody would refuse the whole route configuration; its author would look for the reason in their logs."""
    (problem,) = parse_text(rule(given), "f.yaml").problems
    assert problem.field == f"spec.http[0].{field}"
