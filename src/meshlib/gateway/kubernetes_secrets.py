"""Which certificate has the name that a Gateway's `credentialName` gives? Secrets of Kubernetes, asked by the gateway.

Each name that is asked for is listed and watched by itself, by `metadata.name` in one namespace, so that a Role may
name the Secrets (`resourceNames`) and nothing else is ever read. What was last known stays while the API server is
away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from meshlib.gateway.secrets import CA_SUFFIX, NAME, NotYetKnown, Pem, pem_of
from meshlib.kube.client import KubeClient, Object, Resource
from meshlib.kube.reflector import FIRST_PAUSE, Changes, Key, Reflector
from meshlib.kube.settings import KubeSettings

_log = logging.getLogger("meshlib.gateway")

SECRETS = Resource("Secret", "secrets")


class KubernetesSecrets:
    """A SecretSource. Belongs to one event loop, on which `run` is a task.

    namespace: the gateway's own; no other is asked for anything. first_pause: see Reflector.
    """

    def __init__(self, settings: KubeSettings, namespace: str, *, first_pause: float = FIRST_PAUSE) -> None:
        self._settings, self._namespace, self._first_pause = settings, namespace, first_pause
        self._wanted: dict[str, Reflector | None] = {}
        self._pems: dict[str, tuple[str, Pem]] = {}
        self._news = asyncio.Event()

    def find(self, name: str, *, roots: bool = True) -> Pem | None:
        """What is known of it now; never blocks. None when there is no such Secret. roots: whether a CA is needed,
        which may stand in `NAME-cacert`. Raises NotYetKnown before the API server's first answer."""
        found = self._one(name)
        if found is None or found.roots or not roots:
            return found
        beside = self._one(name + CA_SUFFIX) or Pem()
        return found._replace(roots=beside.roots)

    def _one(self, name: str) -> Pem | None:
        if not NAME.fullmatch(name):
            return None
        reflector = self._wanted.setdefault(name, None)
        if reflector is None:
            self._news.set()
        if reflector is None or not reflector.has_synced.is_set():
            raise NotYetKnown(f"{name}: {(reflector and reflector.error) or 'the API server has not answered yet'}")
        given = reflector.objects.get(Key(self._namespace, name))
        if given is None:
            return None
        version = str(given["metadata"].get("resourceVersion", ""))
        known = self._pems.get(name)
        if known is None or known[0] != version:
            known = self._pems[name] = (version, pem_of(name, given))
        return known[1]

    async def run(self) -> None:
        """Follow what is asked for, until it is cancelled."""
        try:
            await self._follow()
        except Exception:  # a defect of ours, or certificates of the API server's that can't be used
            _log.exception("%r: what is known stays, and is not renewed any more", self)

    async def _follow(self) -> None:
        async with KubeClient(self._settings) as client, asyncio.TaskGroup() as group:
            while True:
                self._news.clear()
                for name in [each for each, reflector in self._wanted.items() if reflector is None]:
                    reflector = self._wanted[name] = Reflector(
                        client,
                        SECRETS,
                        _nobody,
                        namespace=self._namespace,
                        params={"fieldSelector": f"metadata.name={name}"},
                        keep=_kept,
                        first_pause=self._first_pause,
                    )
                    group.create_task(reflector.run(), name=f"watch Secret {name}")
                await self._news.wait()

    def __repr__(self) -> str:
        return f"<KubernetesSecrets of {self._namespace} at {self._settings.server}>"


def _nobody(_: Changes) -> None:
    """They are asked, at each handshake."""


def _kept(given: Object) -> Object:
    metadata: Mapping[str, object] = given["metadata"]
    names = ("name", "namespace", "resourceVersion")
    return {"metadata": {name: metadata[name] for name in names if name in metadata}, "data": given.get("data")}
