"""What do the checks of all kinds have in common? Hosts, namespaces, texts of a head."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

import msgspec

from meshlib.istio import resources as r
from meshlib.istio.decoding import converted, explained
from meshlib.istio.problems import Refused
from meshlib.model.expressions import wrong_pattern, wrong_substitution

_HOST = re.compile(r"(\*|(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\.?)\Z", re.IGNORECASE)
LABEL = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?\Z")
"""A name of one part, as Istio takes it for ports, gateways and namespaces (IsDNS1123Label, which takes upper case)."""
SUBSET = LABEL
UNIX = "unix://"
PROTOCOLS = frozenset({"HTTP", "HTTPS", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "TCP", "TLS", "UDP", "MYSQL", "REDIS"})
HEADER = re.compile(r":?[!#$%&'*+.^_`|~0-9a-zA-Z-]+\Z")
_NOT_IN_A_HEAD = re.compile(r"[^\t\x20-\x7e]")


def check_host(host: str, field: str, *, wildcard: bool = True) -> None:
    if not _HOST.match(host) or len(host) > 255:
        raise Refused(field, f"no host name: {host!r}")
    if not wildcard and "*" in host:
        raise Refused(field, f"must be one host, not a wildcard: {host!r}")


def check_export(names: list[str], field: str = "exportTo", *, nobody: bool = False) -> None:
    """nobody: whether `~` may stand there, as in a ServiceEntry, which is then for its own workloads alone."""
    signs = (".", "*", "~") if nobody else (".", "*")
    for index, name in enumerate(names):
        if name not in signs and not r.NAMESPACE.match(name):
            raise Refused(f"{field}[{index}]", f"must be a namespace or one of {' '.join(signs)}: {name!r}")
        if name in names[:index]:
            raise Refused(f"{field}[{index}]", f"{name!r} stands there twice")
    for name, told in (("*", "everybody"), ("~", "nobody")):  # validateExportTo, istio/istio pkg/config/validation
        if name in names and len(names) > 1:
            raise Refused(field, f"{name!r} is {told}, so that nothing can stand beside it")


def check_port_name(name: str, field: str) -> None:
    if not LABEL.match(name):
        raise Refused(field, f"no name of a port: {name!r}; letters, digits and hyphens, at most 63")


def check_bind(bind: str, field: str) -> None:
    """Where a listener would listen: an IP address, or `unix:///path` or `unix://@name`."""
    if bind.startswith(UNIX):
        path = bind.removeprefix(UNIX)
        if not path.startswith(("/", "@")) or path.endswith("/"):
            raise Refused(field, f"no absolute path of a socket: {bind!r}")
    elif bind and not is_address(bind):
        raise Refused(field, f"must be an IP address or unix:///path: {bind!r}")


def read(value: Any, shape: Any, field: str) -> Any:
    """What has no effect is read here, so that what can't be right is refused as elsewhere. Raises Refused."""
    try:
        return converted(value, shape)
    except msgspec.ValidationError as error:
        at, reason = explained(str(error), "")
        raise Refused(field + (at if at.startswith("[") or not at else f".{at}"), reason) from None


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return False
    return True


def is_network(address: str) -> bool:
    try:
        ipaddress.ip_network(address, strict=False)
    except ValueError:
        return False
    return True


def check_regex(pattern: str, at: str) -> None:
    if reason := wrong_pattern(pattern):
        raise Refused(at, reason)


def check_substitution(pattern: str, substitution: str, at: str) -> None:
    if reason := wrong_substitution(pattern, substitution):
        raise Refused(at, reason)


def check_head_text(text: str, at: str) -> None:
    """Of what stands in a message's head one day: after a line break in it, a header would begin that nobody gave."""
    if _NOT_IN_A_HEAD.search(text):
        raise Refused(at, f"holds a character that no header may hold: {text!r}")


def at_least(given: r.Duration | None, least: float, at: str) -> None:
    if given is not None and given.seconds < least:
        raise Refused(at, "must be at least 1ms" if least < 1 else f"must be at least {least:g}s")


def msgspec_name(name: str) -> str:
    """`base_ejection_time` -> `baseEjectionTime`"""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)
