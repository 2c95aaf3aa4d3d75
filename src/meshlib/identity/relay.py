"""How does a client that can't prove who it is reach the control plane? By a relay on this machine, which adds the
proof.

Envoy and gRPC's own xDS client read no token that is good for one call. The relay takes their streams on a Unix socket
that is its owner's alone, and opens each anew to the control plane, by TLS and with a fresh proof of this process's
certificate. It understands nothing of what it carries.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from meshlib.identity.access import Access
from meshlib.xds import messages as m
from meshlib.xds.resource_types import SERVICES

SOCKET = "xds.sock"
LONGEST_PATH = 100
"""Bytes; the system's limit is 104 (macOS) or 108 (Linux)."""
STREAMS = 256
"""At a time: gRPC's client opens one for each name that it calls (since 1.67), and one more to report its load."""
_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_OPTIONS = (
    *_UNLIMITED,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class Relay:
    """Serves from start() to stop().

    access: the way to the control plane. folder: for its owner alone; the socket is made in it.
    """

    def __init__(self, access: Access, folder: Path) -> None:
        self._access, self.path = access, folder.resolve() / SOCKET
        if len(str(self.path).encode()) > LONGEST_PATH:
            raise OSError(f"{self.path}: too long for a socket's path; choose another folder")
        self._server: Any = grpc.server(ThreadPoolExecutor(STREAMS, "meshlib-relay"), options=_UNLIMITED)
        for service, plural in ((m.ADS_SERVICE, "AggregatedResources"), *SERVICES.values()):
            handlers = {name: self._handler(f"/{service}/{name}") for name in (f"Stream{plural}", f"Delta{plural}")}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        reports = {m.LRS_STREAM.rpartition("/")[2]: self._handler(m.LRS_STREAM)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(m.LRS_SERVICE, reports),))

    @property
    def target(self) -> str:
        return f"unix:{self.path}"

    def start(self) -> None:
        """Raises OSError."""
        self.path.unlink(missing_ok=True)  # of a relay that was killed
        # For its owner alone from the first moment, even in a folder that others may enter: who connects is believed.
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(self.target)
        except RuntimeError as error:
            raise OSError(f"{self.path} can't be served") from error
        finally:
            os.umask(before)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait(5.0)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _handler(self, method: str) -> Any:
        def relay(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            try:
                channel = self._access.channel(_OPTIONS)
            except OSError as error:
                context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            try:
                call = channel.stream_stream(method)(_until_gone(requests), metadata=self._access.metadata())
                if not context.add_callback(call.cancel):
                    call.cancel()
                yield from call
            except grpc.RpcError as error:
                told: Any = error
                context.abort(told.code(), told.details())
            finally:
                channel.close()

        return grpc.stream_stream_rpc_method_handler(relay, None, None)

    def __repr__(self) -> str:
        return f"<Relay {self.path} to {self._access!r}>"


def _until_gone(requests: Iterator[bytes]) -> Iterator[bytes]:
    """A client that vanishes ends its stream like one that leaves."""
    with contextlib.suppress(grpc.RpcError):
        yield from requests
