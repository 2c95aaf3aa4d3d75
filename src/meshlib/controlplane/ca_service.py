"""How does one get a certificate, and hear of new roots? Istio's certificate service, and a stream of our own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from meshlib.controlplane.authentication import Authenticator, Caller, NotAuthenticated, TooManyFailures, bearer
from meshlib.controlplane.ca import BadRequest, CertificateAuthority
from meshlib.controlplane.join_tokens import Refused
from meshlib.controlplane.own_metrics import OwnMetrics
from meshlib.controlplane.private_files import StateError
from meshlib.xds import messages as m

logger = logging.getLogger("meshlib.controlplane.ca")


async def caller_of(context: Any, authenticator: Authenticator, *, may_join: bool = False) -> Caller:
    """Who calls, by the `authorization` of the call; ends it otherwise."""
    headers = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
    try:
        if len(headers) > 1:
            raise NotAuthenticated("several authorization headers")
        token = bearer(headers[0]) if headers else ""
        return await authenticator.authenticate(token, context.peer(), may_join=may_join)
    except TooManyFailures:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "refused too often; wait a minute")
    except NotAuthenticated:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who calls could not be verified")
    except StateError as error:
        logger.error("a caller from %s can't be judged: %s", context.peer(), error)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "who calls can't be verified now")
    raise AssertionError  # abort raises


class CertificateService:
    """Belongs to one event loop."""

    def __init__(
        self, authority: CertificateAuthority, authenticator: Authenticator, metrics: OwnMetrics | None = None
    ) -> None:
        self._authority, self._authenticator, self._metrics = authority, authenticator, metrics
        self._watchers: dict[asyncio.Event, tuple[str, str]] = {}
        """Who listens, by what wakes it, and which bundle it has."""
        self._is_closing = False
        authority.on_change(self._wake)

    def add_to(self, server: grpc.aio.Server) -> None:
        create: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(self._create, None, None)
        watch: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(self._watch, None, None)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(m.CA_SERVICE, {"CreateCertificate": create}),
                grpc.method_handlers_generic_handler(m.TRUST_SERVICE, {"Watch": watch}),
            )
        )

    def late(self) -> Sequence[str]:
        """Who listens and has not said yet that it trusts all of today's roots."""
        return [who for who, version in self._watchers.values() if version != self._authority.version]

    def close(self) -> None:
        self._is_closing = True
        self._wake()

    def _wake(self) -> None:
        for news in self._watchers:
            news.set()

    async def _create(self, data: bytes, context: Any) -> bytes:
        if self._metrics is not None:
            self._metrics.certificate_asked()
        caller = await caller_of(context, self._authenticator, may_join=True)
        if caller.identity is None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "certificates are for workloads")
        assert caller.identity is not None
        try:
            request = m.CertificateRequest.FromString(data)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this is no IstioCertificateRequest")
        try:
            csr = request.csr.encode("ascii", "replace")
            signed = self._authority.sign(csr, caller.identity, float(request.validity_duration))
            if caller.token is not None:
                # Last, so that a bad request costs no token; and before the answer, so that it buys one certificate.
                await self._authenticator.tokens.spend(caller.token)
        except BadRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Refused as error:
            logger.warning("a caller from %s is refused: %s", context.peer(), error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who calls could not be verified")
        except StateError as error:
            logger.error("a caller from %s gets no certificate: %s", context.peer(), error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the control plane can't keep that the token is spent")
        if self._metrics is not None:
            self._metrics.certificate_given()
        logger.info("certificate for %s, by %s, from %s", caller.identity, caller.method, context.peer())
        answer = m.CertificateResponse(cert_chain=[each.decode() for each in signed])
        return m.serialize(answer)

    async def _watch(self, requests: Any, context: Any) -> None:
        caller = await caller_of(context, self._authenticator)
        who = caller.subject
        news = asyncio.Event()
        self._watchers[news] = (who, "")

        async def receive() -> None:
            while (data := await context.read()) is not grpc.aio.EOF:
                version = m.TrustBundleRequest.FromString(data).version[:64]
                self._watchers[news] = (who, version)

        receiving = asyncio.create_task(receive())
        receiving.add_done_callback(lambda _: news.set())
        sent = ""
        try:
            while not receiving.done() and not self._is_closing:
                if sent != self._authority.version:
                    sent = self._authority.version
                    bundle = m.TrustBundle(
                        version=sent, trust_domain=self._authority.trust_domain, roots=self._authority.bundle.decode()
                    )
                    await context.write(m.serialize(bundle))
                await news.wait()
                news.clear()
        finally:
            del self._watchers[news]
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
