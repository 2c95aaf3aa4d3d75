"""How is a gateway run? Gateway: follows the mesh's configuration with its doors, and lets traffic through them.

    async with Gateway(mesh, ports={80: 8080, 443: 8443}): ...

The composition root of the gateway, as Mesh is of the data plane.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import uvicorn

from meshlib.errors import MeshClosed, SettingsError
from meshlib.gateway.doors import RETRY, Doors
from meshlib.gateway.kubernetes_secrets import KubernetesSecrets
from meshlib.gateway.limits import Limits
from meshlib.gateway.proxy import Proxy
from meshlib.gateway.secrets import Secrets, SecretSource
from meshlib.gateway.upstream import UpstreamEngine
from meshlib.kube.settings import KubeSettings
from meshlib.mesh import Mesh
from meshlib.policy.live import Live

if TYPE_CHECKING:
    from meshlib.model import Snapshot

_log = logging.getLogger("meshlib.gateway")


class Gateway:
    """An ingress reverse proxy in this process, on this event loop.

    mesh: made with kind=NodeKind.ROUTER and the labels that Gateway objects select; not closed by the gateway.
    bind: the address to listen on where a Gateway server names none; `0.0.0.0` for the world.
    ports: local port by the port that a Gateway names, as the ports of Istio's ingress Service map to targetPorts;
      others are listened on as they are. 0 takes any that is free, see `addresses`.
    trusted_hops: proxies of yours in front of this one, whose X-Forwarded-* and X-Request-Id are believed (Envoy
      xff_num_trusted_hops). With 0, nothing that a client claims is.
    server_name: the Server header of every response, whatever the upstream said, as in Envoy.
    credentials: the folder of the secrets that a Gateway's credentialName names (meshlib.gateway.secrets), or the API
      server that has them in the gateway's namespace; default the folder that the mesh is configured by, where it is
      one.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        bind: str = "127.0.0.1",
        ports: Mapping[int, int] | None = None,
        limits: Limits | None = None,
        trusted_hops: int = 0,
        server_name: str = "meshlib",
        credentials: Path | KubeSettings | None = None,
    ) -> None:
        if trusted_hops < 0:
            raise SettingsError(
                f"trusted_hops={trusted_hops}: give the number of proxies in front of the gateway, 0 or more"
            )
        self.mesh = mesh
        limits = limits or Limits()
        self._proxy = Proxy(mesh, UpstreamEngine(), limits, trusted_hops, server_name)
        config = uvicorn.Config(
            self._proxy,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=limits.keep_alive,  # type: ignore[arg-type]  # it is handed to call_later
        )
        config.load()
        folder = Path(mesh.settings.control_plane)
        if credentials is None and mesh.settings.control_plane and folder.is_dir():
            credentials = folder
        namespace = mesh.settings.namespace
        secrets: SecretSource
        self._kubernetes: KubernetesSecrets | None = None
        if isinstance(credentials, KubeSettings):
            secrets = self._kubernetes = KubernetesSecrets(credentials, namespace)
        else:
            secrets = Secrets(credentials, namespace)
        self._doors = Doors(config, limits, server_name, bind, ports or {}, secrets)
        self._followed: Live | None = None
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the mesh's feed and follow it. Returns at once; the first configuration may take a moment."""
        if self._task is None:
            self.mesh.start()
            if self._kubernetes is not None:
                self._following = asyncio.create_task(self._kubernetes.run(), name="meshlib-gateway secrets")
            try:
                await self._follow(self.mesh.live)
            except BaseException:
                await self._doors.close()
                await self._unfollow()
                raise
            self._task = asyncio.create_task(self._run(), name="meshlib-gateway")

    async def run(self) -> None:
        """`start`, and serve until cancelled or stopped; then `stop`."""
        await self.start()
        try:
            assert self._task is not None
            await asyncio.wait({self._task})
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Take no new connections, let requests in flight finish within `limits.drain` seconds, close. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._doors.close()
            await self._unfollow()
            await self._proxy.aclose()

    async def _unfollow(self) -> None:
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    @property
    def addresses(self) -> dict[str, tuple[str, int]]:
        """Where each listener (`0.0.0.0_8080`) can be reached now."""
        return self._doors.addresses

    @property
    def problems(self) -> tuple[str, ...]:
        """What is configured and can't be served now, one sentence each: a port, a certificate."""
        return self._doors.problems

    async def until(self, snapshot: Snapshot) -> None:
        """Wait until `snapshot` is what is served (or reported in `problems`)."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._followed is not None and self._followed.snapshot is snapshot)

    async def _run(self) -> None:
        while True:
            live = self.mesh.live
            if self._followed is not live or not self._doors.is_complete:
                try:
                    await self._follow(live)
                except Exception:
                    _log.exception("%r can't follow %r", self, live)
            is_done = self._followed is live and self._doors.is_complete
            try:
                async with asyncio.timeout(None if is_done else RETRY):
                    await self.mesh.next_live(live)
            except TimeoutError:
                pass
            except MeshClosed:  # what is served goes on until `stop`
                return

    async def _follow(self, live: Live) -> None:
        await self._doors.follow(live.snapshot.listeners)
        async with self._changed:
            self._followed = live
            self._changed.notify_all()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def __repr__(self) -> str:
        return f"<Gateway {self._doors!r}>"
