"""What must hold in ServiceEntry, Gateway and endpoints that their shapes can't say?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from meshlib.istio import resources as r
from meshlib.istio.checks.labels import check_labels, check_selector
from meshlib.istio.checks.parts import (
    PROTOCOLS,
    UNIX,
    check_bind,
    check_export,
    check_host,
    check_port_name,
    is_address,
    is_network,
    msgspec_name,
)
from meshlib.istio.problems import Refused

_TOLD_BY_HOST = frozenset({"HTTP", "HTTPS", "HTTP2", "GRPC", "GRPC-WEB", "TLS"})


def check_addresses(spec: r.Pod | r.Endpoints | r.EndpointSlice) -> None:
    """One endpoint that is no IP address, and an Envoy refuses all endpoints of its cluster."""
    found: Iterator[tuple[str, str]]
    if isinstance(spec, r.Pod):
        found = iter([("status.podIP", spec.status.pod_ip)] if spec.status.pod_ip else [])
    elif isinstance(spec, r.Endpoints):
        found = (
            (f"subsets[{index}].addresses[{number}].ip", address.ip)
            for index, subset in enumerate(spec.subsets)
            for number, address in enumerate(subset.addresses)
        )
    else:
        found = (
            (f"endpoints[{index}].addresses[{number}]", address)
            for index, endpoint in enumerate(spec.endpoints if spec.address_type != "FQDN" else ())
            for number, address in enumerate(endpoint.addresses)
        )
    for field, address in found:
        if not is_address(address) or address.startswith("["):
            raise Refused(field, f"must be an IP address: {address!r}")


def check_service_entry(spec: r.ServiceEntry) -> None:
    check_selector(spec.workload_selector)
    if not spec.hosts:
        raise Refused("hosts", "is missing")
    for index, host in enumerate(spec.hosts):
        if host == "*":
            raise Refused(f"hosts[{index}]", "* would take every host; name a domain")
        check_host(host, f"hosts[{index}]")
    for index, address in enumerate(spec.addresses):
        if not is_address(address.partition("/")[0]) or not is_network(address):
            raise Refused(f"addresses[{index}]", f"must be an IP address or a CIDR: {address!r}")
        if "/" in address and spec.resolution not in ("NONE", "STATIC"):
            raise Refused(f"addresses[{index}]", f"a CIDR goes with resolution NONE and STATIC only: {address!r}")
    for kind in ("number", "name"):
        seen: set[Any] = set()
        for index, port in enumerate(spec.ports):
            value = getattr(port, kind)
            if kind == "name" and not value:
                raise Refused(f"ports[{index}].name", "is missing")
            if value in seen:
                raise Refused(f"ports[{index}].{kind}", f"{value!r} is there twice")
            seen.add(value)
    for index, port in enumerate(spec.ports):
        check_port_name(port.name, f"ports[{index}].name")
        if port.protocol and port.protocol.upper() not in PROTOCOLS:
            raise Refused(f"ports[{index}].protocol", f"unknown protocol {port.protocol!r}")
        by_name = spec.resolution == "NONE" or port.protocol.upper() in _TOLD_BY_HOST
        if len(spec.hosts) > 1 and not by_name:
            raise Refused(f"ports[{index}].protocol", "several hosts need HTTP or TLS, which name theirs")
    check_export(spec.export_to, nobody=True)
    for index, name in enumerate(spec.subject_alt_names):
        if not name or "*" in name:
            raise Refused(f"subjectAltNames[{index}]", f"must be one whole name: {name!r}")
    if spec.endpoints and spec.workload_selector is not None:
        raise Refused("endpoints", "either endpoints or workloadSelector")
    if spec.resolution == "NONE" and spec.endpoints:
        raise Refused("endpoints", "have no meaning with resolution NONE")
    if spec.resolution == "DYNAMIC_DNS":
        for field, given in (("endpoints", spec.endpoints), ("workloadSelector", spec.workload_selector)):
            if given:
                raise Refused(field, "has no meaning with resolution DYNAMIC_DNS: each name is looked up when called")
        for index, host in enumerate(spec.hosts):
            if "*" not in host:
                raise Refused(f"hosts[{index}]", f"DYNAMIC_DNS is for wildcards; {host!r} wants resolution DNS")
    if spec.resolution == "DYNAMIC_DNS":
        _check_dynamic(spec)
    names = {port.name for port in spec.ports}
    for index, endpoint in enumerate(spec.endpoints):
        at = f"endpoints[{index}]"
        _check_endpoint(endpoint, spec, at)
        check_labels(endpoint.labels, f"{at}.labels")
        for port_name in endpoint.ports:
            if port_name not in names:
                raise Refused(f"{at}.ports.{port_name}", "names no port of this ServiceEntry")
    if spec.resolution in ("DNS", "DNS_ROUND_ROBIN"):
        if not spec.endpoints and not spec.workload_selector and any("*" in host for host in spec.hosts):
            raise Refused("hosts", "a wildcard has no address to look up: give endpoints, or resolution NONE")
        if spec.resolution == "DNS_ROUND_ROBIN" and len(spec.endpoints) > 1:
            raise Refused("endpoints", "at most one with resolution DNS_ROUND_ROBIN")


def _check_dynamic(spec: r.ServiceEntry) -> None:
    if spec.addresses:
        raise Refused("addresses", "have no meaning with resolution DYNAMIC_DNS")
    for index, port in enumerate(spec.ports):
        if port.protocol.upper() not in ("HTTP", "HTTP2", "GRPC", "TLS"):
            reason = f"DYNAMIC_DNS goes with HTTP, HTTP2, GRPC and TLS: {port.protocol!r}"
            raise Refused(f"ports[{index}].protocol", reason)


def _check_endpoint(endpoint: r.WorkloadEntry, spec: r.ServiceEntry, at: str) -> None:
    address, is_static = endpoint.address, spec.resolution == "STATIC"
    if not address and not (is_static and endpoint.network):
        raise Refused(f"{at}.address", "is missing")
    if address.startswith(UNIX) and is_static:
        check_bind(address, f"{at}.address")
        if endpoint.ports:
            raise Refused(f"{at}.ports", "have no meaning beside a socket")
        if len(spec.ports) != 1:
            raise Refused(f"{at}.address", "a socket serves one port, so the ServiceEntry must have exactly one")
    elif is_static and address and not is_address(address):
        raise Refused(f"{at}.address", f"must be an IP address with resolution STATIC: {address!r}")
    elif address and not is_address(address):
        check_host(address, f"{at}.address", wildcard=False)


def check_gateway(spec: r.Gateway) -> None:
    check_labels(spec.selector, "selector")
    if not spec.servers:
        raise Refused("servers", "is missing")
    names: set[str] = set()
    for index, server in enumerate(spec.servers):
        at = f"servers[{index}]"
        if not server.port.name:
            raise Refused(f"{at}.port.name", "is missing")
        if server.port.name in names:
            raise Refused(f"{at}.port.name", f"{server.port.name!r} is there twice")
        names.add(server.port.name)
        if server.port.target_port:
            raise Refused(f"{at}.port.targetPort", "has no effect on a Gateway: say it to `meshctl gateway --port`")
        check_bind(server.bind, f"{at}.bind")
        if server.bind.startswith(UNIX):
            raise Refused(f"{at}.bind", "a socket has no port, and servers have one here: name an IP address")
        if not server.hosts:
            raise Refused(f"{at}.hosts", "is missing")
        for number, host in enumerate(server.hosts):
            namespace, slash, name = host.rpartition("/")
            if slash and namespace not in (".", "*") and not r.NAMESPACE.match(namespace):
                raise Refused(f"{at}.hosts[{number}]", f"no namespace before the slash: {host!r}")
            check_host(name, f"{at}.hosts[{number}]")
        protocol = server.port.protocol.upper()
        if protocol not in ("HTTP", "HTTPS", "HTTP2", "GRPC"):
            reason = "is not there yet" if protocol in ("TCP", "TLS", "MONGO", "GRPC-WEB") else "is unknown"
            raise Refused(f"{at}.port.protocol", f"{server.port.protocol!r} {reason}; there are HTTP and HTTPS")
        tls = server.tls
        if protocol == "HTTPS":
            if tls is None or tls.mode is None:
                raise Refused(f"{at}.tls.mode", "is missing: HTTPS needs SIMPLE")
            if tls.mode not in ("SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL"):
                there = "there are SIMPLE, MUTUAL and OPTIONAL_MUTUAL"
                raise Refused(f"{at}.tls.mode", f"{tls.mode} is not there yet; {there}")
            if tls.credential_names:
                raise Refused(f"{at}.tls.credentialNames", "there is one certificate for a server: use credentialName")
            has_files = bool(tls.server_certificate or tls.private_key or tls.ca_certificates)
            if tls.credential_name and has_files:
                raise Refused(f"{at}.tls.credentialName", "contradicts the files that are named beside it")
            if not tls.credential_name and not (tls.server_certificate and tls.private_key):
                raise Refused(f"{at}.tls", "needs credentialName, or serverCertificate and privateKey (files)")
            if tls.mode != "SIMPLE" and not tls.credential_name and not tls.ca_certificates:
                raise Refused(f"{at}.tls.caCertificates", f"is missing: {tls.mode} checks the client's certificate")
            for name in ("subject_alt_names", "verify_certificate_spki", "verify_certificate_hash", "ca_crl"):
                if getattr(tls, name):
                    # Whoever asks for a check must not be let in without it.
                    raise Refused(f"{at}.tls.{msgspec_name(name)}", "is not checked yet, so this is refused")
        elif tls is not None and tls.mode is not None:
            raise Refused(f"{at}.tls.mode", f"has no meaning on a port of protocol {server.port.protocol}")
