"""Do the rules for calls that come in survive the wire, and is what is damaged refused?"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import values
from hypothesis import given
from hypothesis import strategies as st

from meshlib import model as md
from meshlib.errors import InvalidResource
from meshlib.xds import messages as m
from meshlib.xds.decode import decode_resource
from meshlib.xds.encode import encode_resource
from meshlib.xds.resource_types import LISTENER
from security.decisions import DECISIONS, inbound

NAME = md.INBOUND_PREFIX + "10.0.0.1:9080"

ports = st.integers(1, 65535)
positive = st.floats(0.001, 1000)
leaves = st.one_of(
    st.builds(md.HeaderMatch, values.headers, values.strings | values.present, st.booleans()),
    st.builds(md.PathIs, values.strings),
    st.builds(md.PathTemplate, st.sampled_from(["/a/{*}", "/{**}"])),
    st.builds(md.PortIs, ports, ports),
    st.builds(md.AddressIs, st.sampled_from(["peer", "remote", "destination"]), st.just("10.0.0.0/8")),
    st.builds(md.PrincipalIs, st.none() | values.strings),
    st.builds(md.ServerNameIs, values.strings),
    st.builds(md.ClaimIs, st.lists(values.texts, min_size=1, max_size=2).map(tuple), values.strings),
)
conditions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple).map(md.And),
        st.lists(inner, max_size=3).map(tuple).map(md.Or),
        inner.map(md.Not),
    ),
    max_leaves=5,
)
some_texts = st.lists(values.texts, max_size=2).map(tuple)
rules = st.builds(md.AccessRule, values.texts, st.sampled_from(md.Action), conditions, conditions, st.booleans(),
                  values.texts, values.texts)  # fmt: skip
accesses = st.builds(
    md.Access,
    st.lists(rules, max_size=2).map(tuple),
    st.lists(
        st.builds(md.JwtProvider, values.texts, values.texts, some_texts, forward=st.booleans(), timeout=positive,
                  from_headers=values.pairs),
        max_size=1,
    ).map(tuple),
    st.lists(
        st.builds(md.Authorizer, values.texts, st.sampled_from(["http", "grpc"]), values.names, ports,
                  fail_open=st.booleans(), added_headers=values.pairs),
        max_size=1,
    ).map(tuple),
    st.integers(0, 5),
    st.sampled_from(["BASE", "NONE"]),
    st.lists(values.rate_limits, max_size=1).map(tuple),
    st.lists(values.quotas, max_size=1).map(tuple),
)  # fmt: skip
inbounds = st.builds(
    md.Inbound,
    st.just(NAME),
    tls=st.sampled_from(md.TlsMode),
    port_tls=st.lists(st.tuples(ports, st.sampled_from(md.TlsMode)), max_size=2).map(tuple),
    access=accesses,
)


@given(value=inbounds)
def test_how_a_workload_is_called_survives_the_wire(value: md.Inbound) -> None:
    """decode(encode(x)) == x, and equal values have equal bytes."""
    encoded = encode_resource(LISTENER, value)
    assert decode_resource(LISTENER, encoded) == value
    assert encode_resource(LISTENER, decode_resource(LISTENER, encoded)) == encoded


@given(access=accesses)
def test_who_may_come_in_at_a_gateway_survives_the_wire(access: md.Access) -> None:
    """A bound listener carries its rules too."""
    listener = md.Listener("a", "", "0.0.0.0", 80, (md.FilterChain("routes"),), access)
    assert decode_resource(LISTENER, encode_resource(LISTENER, listener)) == listener


def test_every_policy_of_the_table_survives_the_wire() -> None:
    """What is translated from AuthorizationPolicies, whatever it is."""
    for spec in {each.spec for each in DECISIONS}:
        given_inbound = replace(inbound(spec), name=NAME)
        assert decode_resource(LISTENER, encode_resource(LISTENER, given_inbound)) == given_inbound


def _listener(note: Any, name: str = NAME) -> bytes:
    message = m.Listener(name=name)
    message.metadata.filter_metadata["meshlib"].update({"inbound": note})
    return m.serialize(message)


def _with_rule(**rule: Any) -> dict[str, Any]:
    return {"name": NAME, "access": {"rules": [{"name": "r", "action": "ALLOW", **rule}]}}


@pytest.mark.parametrize(
    ("note", "field"),
    [
        ({"name": "another"}, ".name"),
        ({}, ""),
        ({"name": NAME, "tls": "NONE"}, ".tls"),
        ({"name": NAME, "port_tls": [[8080]]}, ".port_tls[0]"),
        ({"name": NAME, "port": 65536}, ".port"),
        ({"name": NAME, "access": {"rate_limits": [{"name": "a"}]}}, ".access.rate_limits[0]"),
        ({"name": NAME, "access": {"quotas": [{"name": "a", "service": {}}]}}, ".access.quotas[0].service"),
        ({"name": NAME, "unheard": 1}, ".unheard"),
        (_with_rule(action="PERMIT"), ".access.rules[0].action"),
        (_with_rule(unheard={}), ".access.rules[0].unheard"),
        (_with_rule(dry_run=1), ".access.rules[0].dry_run"),
        (_with_rule(permission={"is": "MoonIs"}), ".access.rules[0].permission"),
        (_with_rule(permission=None), ".access.rules[0].permission"),
        (_with_rule(permission={"is": "Not"}), ".access.rules[0].permission"),
        (_with_rule(permission={"is": "And", "parts": {}}), ".access.rules[0].permission.parts"),
        (
            _with_rule(permission={"is": "PathIs", "match": {"kind": "regex", "value": "("}}),
            ".access.rules[0].permission.match.value",
        ),
        (
            _with_rule(permission={"is": "PathTemplate", "template": "/{a}"}),
            ".access.rules[0].permission.template",
        ),
        (
            _with_rule(principal={"is": "AddressIs", "of": "peer", "cidr": "10/99"}),
            ".access.rules[0].principal.cidr",
        ),
    ],
)  # fmt: skip
def test_a_damaged_rule_is_refused_with_its_field(note: Any, field: str) -> None:
    """Nothing is passed over: what is not understood might be what keeps callers out."""
    with pytest.raises(InvalidResource) as refused:
        decode_resource(LISTENER, _listener(json.dumps(note)))
    assert refused.value.field == "metadata.filter_metadata[meshlib].inbound" + field


@pytest.mark.parametrize("note", ["", "{", "[" * 100_000, 3, None, "null", "[]"])
def test_a_note_that_is_no_rules_is_refused(note: Any) -> None:
    """Broken text, endless text, another type."""
    with pytest.raises(InvalidResource):
        decode_resource(LISTENER, _listener(note))


def test_a_listener_for_calls_that_come_in_is_never_without_rules() -> None:
    """One with the name and without the note is refused."""
    with pytest.raises(InvalidResource):
        decode_resource(LISTENER, m.serialize(m.Listener(name=NAME)))
