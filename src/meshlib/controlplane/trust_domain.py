"""Do callers expect the identities that the CA gives? MeshConfig's trustDomain beside the CA's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meshlib.istio.mesh_settings import mesh_settings
from meshlib.istio.problems import ConfigurationWarning
from meshlib.istio.resources import MESH_CONFIG_KEY, Object

FIELD = "data.mesh.trustDomain"


def trust_domain_warnings(objects: Sequence[Object], domain: str) -> Iterator[ConfigurationWarning]:
    """domain: what the CA signs for. An alias of MeshConfig is as good as its trustDomain: callers take both."""
    settings = mesh_settings(objects)
    if domain in (settings.trust_domain, *settings.trust_domain_aliases):
        return
    given = next((each for each in objects if each.key == MESH_CONFIG_KEY), None)
    kind, namespace, name = MESH_CONFIG_KEY
    reason = (
        f"is {settings.trust_domain}, and the CA signs for {domain}: callers take no server's certificate. Say "
        f"{domain} here, or start the control plane with --trust-domain {settings.trust_domain}"
    )
    source = given.source if given is not None else "no MeshConfig"
    yield ConfigurationWarning(source, f"{kind} {namespace}/{name}", FIELD, reason)
