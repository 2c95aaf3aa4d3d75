"""How do the gRPC channels and servers of an application that knows no mesh come onto it? Where they are made.

A channel to `host:port`, or `dns:///host:port`, becomes one of the mesh's; every other target (a socket file, `xds:`, a
resolver of one's own) says itself where it leads to, and stays. So does a channel with the option `meshlib.mesh` of 0.
Servers get the mesh's interceptors before their own.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from meshlib.instrumentation.patches import Patches, is_ours

OPTION = "meshlib.mesh"
"""gRPC ignores options that it does not know."""
_DEFAULT_PORT = "443"


def _service(target: Any, options: Any) -> str:
    """`host:port`; "" for what the mesh leaves alone."""
    if not isinstance(target, str) or (OPTION, 0) in (options or ()):
        return ""
    for scheme in ("dns:///", "dns:"):
        if target.lower().startswith(scheme):
            target = target[len(scheme) :]
            break
    host, mark, port = target.rpartition(":")
    if not mark or target.endswith("]"):
        host, port = target, _DEFAULT_PORT
    if not host or not port.isdigit() or any(each in host for each in "/%@ ,") or (":" in host and host[0] != "["):
        return ""  # another scheme, several addresses, a name server's authority
    return f"{host}:{port}"


def _sync(grpc: ModuleType, patches: Patches) -> None:
    def insecure(original: Any, target: Any, options: Any = None, compression: Any = None) -> Any:
        service = "" if is_ours(2) else _service(target, options)
        if not service:
            return original(target, options, compression)
        return patches.mesh().grpc_channel(service, options=options or (), compression=compression)

    def secure(original: Any, target: Any, credentials: Any, options: Any = None, compression: Any = None) -> Any:
        service = "" if is_ours(2) else _service(target, options)
        if not service:
            return original(target, credentials, options, compression)
        told = {"options": options or (), "compression": compression, "credentials": credentials}
        return patches.mesh().grpc_channel(service, **told)

    def server(
        original: Any, thread_pool: Any, handlers: Any = None, interceptors: Any = None, *args: Any, **options: Any
    ) -> Any:
        given = tuple(interceptors or ())
        if not is_ours(2) and not _has_ours(given):
            given = (*patches.mesh().grpc_server_interceptors(), *given)
        return original(thread_pool, handlers, given, *args, **options)

    patches.around(grpc, "insecure_channel", insecure)
    patches.around(grpc, "secure_channel", secure)
    patches.around(grpc, "server", server)


def _aio(aio: ModuleType, patches: Patches) -> None:
    def insecure(
        original: Any, target: Any, options: Any = None, compression: Any = None, interceptors: Any = None
    ) -> Any:
        service = "" if is_ours(2) else _service(target, options)
        if not service:
            return original(target, options, compression, interceptors)
        told = {"options": options or (), "compression": compression, "interceptors": interceptors or ()}
        return patches.mesh().grpc_aio_channel(service, **told)

    def secure(
        original: Any,
        target: Any,
        credentials: Any,
        options: Any = None,
        compression: Any = None,
        interceptors: Any = None,
    ) -> Any:
        service = "" if is_ours(2) else _service(target, options)
        if not service:
            return original(target, credentials, options, compression, interceptors)
        told = {"options": options or (), "compression": compression, "interceptors": interceptors or ()}
        return patches.mesh().grpc_aio_channel(service, credentials=credentials, **told)

    def server(
        original: Any, pool: Any = None, handlers: Any = None, interceptors: Any = None, *args: Any, **options: Any
    ) -> Any:
        given = tuple(interceptors or ())
        if not is_ours(2) and not _has_ours(given):
            given = (*patches.mesh().grpc_aio_server_interceptors(), *given)
        return original(pool, handlers, given, *args, **options)

    patches.around(aio, "insecure_channel", insecure)
    patches.around(aio, "secure_channel", secure)
    patches.around(aio, "server", server)


def _has_ours(interceptors: tuple[Any, ...]) -> bool:
    from meshlib.inbound.grpc import MeshAioServerInterceptor, MeshServerInterceptor

    return any(isinstance(each, (MeshServerInterceptor, MeshAioServerInterceptor)) for each in interceptors)


PATCHES = {"grpc": _sync, "grpc.aio": _aio}
"""By the module that holds what is patched."""
