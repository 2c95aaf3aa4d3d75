"""Tokens and quotas at gRPC's servers, sync and of asyncio: what HTTP's edges do, in gRPC's words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from inbound.grpc_homes import AioHome, SyncHome
from meshlib.model import Access, Inbound, RateLimit, Snapshot
from outbound.grpc_peers import SyncFace
from security.test_tokens_at_edges import JWKS, rules, token
from snapshots import mesh

homes = pytest.mark.parametrize("home", [SyncHome, AioHome])


def refused(call: Callable[..., Any], *arguments: Any, **terms: Any) -> Any:
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, **terms)
    return raised.value


def told(context: Any) -> bytes:
    """What the handler sees of a token."""
    metadata = dict(context.invocation_metadata())
    seen = [context.meshlib_principal, (context.meshlib_claims or {}).get("scope"), metadata.get("x-user")]
    return json.dumps([*seen, "authorization" in metadata]).encode()


@homes
def test_a_token_admits_calls_of_every_arity(home: Any) -> None:
    """It stands in metadata, which the handler sees without it, and with the claim that becomes a header; one that is
    wrong is UNAUTHENTICATED, none where one is wanted is PERMISSION_DENIED."""
    given = rules(
        f"jwks: '{JWKS}', outputClaimToHeaders: [{{header: x-user, claim: sub}}]",
        "{from: [{source: {requestPrincipals: ['https://issuer/jane']}}]}",
    )
    with mesh(Snapshot(inbound=(given,), complete=True)) as made, home(made, told) as serving:
        face = SyncFace(grpc.insecure_channel(f"127.0.0.1:{serving.port}"))
        bearer = (("authorization", f"Bearer {token()}"), ("x-user", "root"))
        expected = json.dumps(["https://issuer/jane", ["read", "write"], "jane", False]).encode()
        assert face.every(b"", metadata=bearer) == [expected] * 4
        for call, request in ((face.unary, b""), (face.stream, b""), (face.collect, [b""]), (face.echo, [b""])):
            assert refused(call, request).code() is grpc.StatusCode.PERMISSION_DENIED
            wrong = refused(call, request, metadata=(("authorization", "Bearer a.b.c"),))
            assert wrong.code() is grpc.StatusCode.UNAUTHENTICATED
        face.close()


@homes
def test_a_quota_that_is_used_up_is_resource_exhausted(home: Any) -> None:
    """Calls of every arity count, and none of those turned away reaches its handler."""
    limited = Inbound("inbound", access=Access(rate_limits=(RateLimit("three", 3, 3, 3600.0),)))
    with mesh(Snapshot(inbound=(limited,), complete=True)) as made, home(made, lambda context: b"in") as serving:
        face = SyncFace(grpc.insecure_channel(f"127.0.0.1:{serving.port}"))
        assert [face.unary(b""), face.collect([b""]), face.echo([b""])[0]] == [b"in"] * 3
        while not serving.started.empty():
            serving.started.get()
        for call, request in ((face.unary, b""), (face.stream, b""), (face.collect, [b""]), (face.echo, [b""])):
            assert refused(call, request).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert serving.started.empty()
        face.close()
