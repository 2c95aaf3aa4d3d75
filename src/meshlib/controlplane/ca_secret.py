"""How do replicas have one CA? It is a Secret of the cluster: whoever finds none makes it, and the API server decides
whose is kept."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Mapping

from meshlib.controlplane.ca import CertificateAuthority, PemAuthority
from meshlib.controlplane.sources import StateError
from meshlib.kube.client import KubeClient, Object, Resource
from meshlib.kube.errors import Busy, Conflict, Forbidden, KubernetesError, NotFound, Unauthorized, Unreachable

logger = logging.getLogger("meshlib.controlplane.ca")

SECRETS = Resource("Secret", "secrets")
PAUSE = 2.0
"""Seconds until an API server that gave no answer, or refused, is asked again."""
_RIGHTS = "; `get` of it and `create` of secrets are needed"


async def shared_authority(client: KubeClient, namespace: str, name: str, trust_domain: str) -> PemAuthority:
    """The CA in the Secret `namespace`/`name`, with the files of Istio's `cacerts`. One is made where there is none,
    and never replaced: all certificates of the mesh would be worth nothing.

    Waits for an API server that can't be reached, and for one that refuses: it does so to everybody until it has read
    its roles, some seconds after its start. Raises StateError for a Secret that holds no CA.
    """
    origin, told = f"the Secret {namespace}/{name}", ""
    while True:
        try:
            found, was_made = await find_or_make(client, _secret(namespace, name, trust_domain))
        except (Unreachable, Busy, Forbidden, Unauthorized) as error:
            trouble = _RIGHTS if isinstance(error, Forbidden | Unauthorized) else ""
            if told != (told := f"can't be read yet, and nobody is served before{trouble}"):
                logger.warning("%s %s: %s", origin, told, error)
            await asyncio.sleep(PAUSE)
        except KubernetesError as error:
            raise StateError(f"{origin}: {error}") from error
        else:
            if was_made:
                logger.info("%s made: the CA of this mesh", origin)
            return _authority(found, origin)


async def find_or_make(client: KubeClient, wanted: Object) -> tuple[Object, bool]:
    """The Secret of `wanted`'s name that is there, else `wanted`; and whether it was made by this call. Of several that
    make one at the same time, all get the same. Raises KubernetesError."""
    metadata = wanted["metadata"]
    path = SECRETS.path("v1", metadata["namespace"], metadata["name"])
    try:
        return await client.get(path), False
    except NotFound:
        pass
    try:
        return await client.create(SECRETS.path("v1", metadata["namespace"]), wanted), True
    except Conflict:  # another replica was faster
        return await client.get(path), False


def _secret(namespace: str, name: str, trust_domain: str) -> Object:
    files = CertificateAuthority(trust_domain).exported()
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": "Opaque",
        "data": {key: base64.b64encode(each).decode("ascii") for key, each in files.items()},
    }


def _authority(secret: Object, origin: str) -> PemAuthority:
    data = secret.get("data")

    def file(key: str, default: str | None = None) -> bytes:
        text = data.get(key, default) if isinstance(data, Mapping) else default
        try:
            if text is None:
                raise ValueError("it is missing")
            return base64.b64decode(str(text), validate=True)
        except ValueError as error:
            raise StateError(f"{origin}: {key}: {error}") from None

    certificate, key, root = (file(each) for each in ("ca-cert.pem", "ca-key.pem", "root-cert.pem"))
    return PemAuthority(certificate, key, root, file("cert-chain.pem", ""), origin)
