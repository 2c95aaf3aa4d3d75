"""What must hold in WorkloadEntry, WorkloadGroup and ProxyConfig that their shapes can't say?"""

from __future__ import annotations

import re

from meshlib.istio import resources as r
from meshlib.istio.checks.labels import check_labels
from meshlib.istio.checks.parts import UNIX, check_bind, check_host, check_port_name, is_address
from meshlib.istio.problems import Refused

_HEADER = re.compile(r"[-A-Za-z0-9]+")
"""Of a probe: stricter than HTTP's (Kubernetes)."""


def check_workload_entry(spec: r.WorkloadEntry) -> None:
    """Raises Refused."""
    check_labels(spec.labels, "labels")
    if not spec.address and not spec.network:
        raise Refused("address", "is missing")
    if spec.address.startswith(UNIX):
        check_bind(spec.address, "address")
        if spec.ports:
            raise Refused("ports", "have no meaning beside a socket")
    elif spec.address and not is_address(spec.address):
        check_host(spec.address, "address", wildcard=False)
    for name in spec.ports:
        check_port_name(name, f"ports.{name}")


def check_workload_group(spec: r.WorkloadGroup) -> None:
    """Raises Refused. Its template needs no address: that is what registers itself."""
    if spec.metadata is not None:
        check_labels(spec.metadata.labels, "metadata.labels")
    probe = spec.probe
    if probe is None:
        return
    kinds = {"httpGet": probe.http_get, "tcpSocket": probe.tcp_socket, "exec": probe.exec, "grpc": probe.grpc}
    if sum(each is not None for each in kinds.values()) != 1:
        raise Refused("probe", f"needs exactly one of {', '.join(kinds)}")
    for index, header in enumerate(probe.http_get.http_headers if probe.http_get is not None else ()):
        if not _HEADER.fullmatch(header.name):
            raise Refused(f"probe.httpGet.httpHeaders[{index}].name", f"no header name: {header.name!r}")
    if probe.exec is not None and not probe.exec.command:
        raise Refused("probe.exec.command", "is missing")


def check_proxy_config(spec: r.ProxyConfigOfWorkloads) -> None:
    """Raises Refused."""
    if spec.selector is not None:
        if spec.selector.labels:
            raise Refused("selector.labels", "there is no such field; there is matchLabels")
        check_labels(spec.selector.match_labels, "selector.matchLabels")
