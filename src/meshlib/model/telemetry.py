"""What do metrics call a workload? Istio's canonical names, from its labels; and how they travel beside an endpoint."""

from __future__ import annotations

from collections.abc import Mapping

_SERVICE = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
_REVISION = ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")


def canonical_service(labels: Mapping[str, str], workload: str) -> str:
    return next((labels[name] for name in _SERVICE if labels.get(name)), workload)


def canonical_revision(labels: Mapping[str, str]) -> str:
    return next((labels[name] for name in _REVISION if labels.get(name)), "latest")


def peer_of(labels: Mapping[str, str], workload: str, namespace: str, cluster: str = "Kubernetes") -> str:
    """Endpoint.peer: Istio's `namespace;service;revision;cluster`, and app and version of our own behind it."""
    told = (
        namespace,
        canonical_service(labels, workload),
        canonical_revision(labels),
        cluster,
        labels.get("app", ""),
        labels.get("version", ""),
    )
    return ";".join(part.replace(";", "_") for part in told)
