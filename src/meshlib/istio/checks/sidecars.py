"""What must hold in a Sidecar that its shape can't say? As Istio's webhook has it (ValidateSidecar)."""

from __future__ import annotations

from meshlib.istio import resources as r
from meshlib.istio.checks.labels import check_selector
from meshlib.istio.checks.parts import PROTOCOLS, UNIX, check_bind, check_host, check_port_name, read
from meshlib.istio.problems import Refused


def check_sidecar(spec: r.Sidecar) -> None:
    """Raises Refused."""
    check_selector(spec.workload_selector)
    if not spec.egress and not any(
        (spec.ingress, spec.outbound_traffic_policy is not None, spec.inbound_connection_pool is not None)
    ):
        raise Refused("", "says nothing: give egress, ingress or outboundTrafficPolicy")
    ports: set[int] = set()
    sockets: set[str] = set()
    for index, listener in enumerate(spec.egress):
        at = f"egress[{index}]"
        if not listener.hosts:
            raise Refused(f"{at}.hosts", "is missing")
        if listener.port is None and index < len(spec.egress) - 1:
            raise Refused(f"{at}.port", "is missing: only the last listener may be for every port")
        if listener.port is not None:
            _check_egress_port(listener, ports, sockets, at)
        for number, host in enumerate(listener.hosts):
            namespace, slash, name = host.rpartition("/")
            if not slash:
                raise Refused(f"{at}.hosts[{number}]", f"must be namespace/host, as in ./*: {host!r}")
            owner = namespace.removeprefix("~")
            if namespace != "~" and owner not in (".", "*") and not r.NAMESPACE.match(owner):
                reason = (
                    f"must be a namespace, '.', '*' or '~', or one of them behind a '~', before the slash: {host!r}"
                )
                raise Refused(f"{at}.hosts[{number}]", reason)
            check_host(name, f"{at}.hosts[{number}]")
    _check_ingress(spec)


def _check_egress_port(listener: r.IstioEgressListener, ports: set[int], sockets: set[str], at: str) -> None:
    port, bind = listener.port, listener.bind
    assert port is not None
    if port.number:
        return _check_port(port, bind, ports, at)
    _check_name_and_protocol(port, at)
    if not bind.startswith(UNIX):
        raise Refused(f"{at}.port.number", "is missing: only a listener whose bind is a socket has none")
    check_bind(bind, f"{at}.bind")
    if bind in sockets:
        raise Refused(f"{at}.bind", f"{bind!r} is there twice")
    sockets.add(bind)
    if listener.capture_mode not in (None, "DEFAULT", "NONE"):
        raise Refused(f"{at}.captureMode", "must be DEFAULT or NONE beside a socket")
    return None


def _check_name_and_protocol(port: r.SidecarPort, at: str) -> None:
    if port.target_port:
        raise Refused(f"{at}.port.targetPort", "has no effect on a Sidecar")
    if port.name:
        check_port_name(port.name, f"{at}.port.name")
    if port.protocol and port.protocol.upper() not in PROTOCOLS:
        raise Refused(f"{at}.port.protocol", f"unknown protocol {port.protocol!r}")


def _check_port(port: r.SidecarPort, bind: str, seen: set[int], at: str) -> None:
    if not port.number:
        raise Refused(f"{at}.port.number", "is missing")
    _check_name_and_protocol(port, at)
    if port.number in seen:
        raise Refused(f"{at}.port.number", f"{port.number} is there twice")
    seen.add(port.number)
    check_bind(bind, f"{at}.bind")
    if bind.startswith(UNIX):
        raise Refused(f"{at}.bind", f"a listener with a port has an IP address: {bind!r}")


def _check_ingress(spec: r.Sidecar) -> None:
    """Nothing listens by it; Istio would refuse it all the same."""
    listeners: list[r.SidecarIngress] = read(spec.ingress or [], list[r.SidecarIngress], "ingress")
    ports: set[int] = set()
    for index, listener in enumerate(listeners):
        _check_port(listener.port, listener.bind, ports, f"ingress[{index}]")
        _check_default_endpoint(listener.default_endpoint, f"ingress[{index}].defaultEndpoint")


def _check_default_endpoint(given: str, at: str) -> None:
    if not given:
        return
    if given.startswith(UNIX):
        return check_bind(given, at)
    host, colon, port = given.rpartition(":")
    here = host.removeprefix("[").removesuffix("]")
    if not colon or here not in ("", "127.0.0.1", "0.0.0.0", "::1", "::") or not _is_port(port):
        raise Refused(at, f"must be 127.0.0.1:port, 0.0.0.0:port, [::1]:port or unix:///path: {given!r}")
    return None


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 65536
