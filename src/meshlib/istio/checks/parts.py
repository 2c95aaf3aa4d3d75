"""What do the checks of all kinds have in common? Hosts, namespaces, texts of a head."""

from __future__ import annotations

import ipaddress
import re

from meshlib.istio import resources as r
from meshlib.istio.problems import Refused

_HOST = re.compile(r"(\*|(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\.?)\Z", re.IGNORECASE)
SUBSET = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9_.]*[a-zA-Z0-9])?\Z")
HEADER = re.compile(r":?[!#$%&'*+.^_`|~0-9a-zA-Z-]+\Z")
_NOT_IN_A_HEAD = re.compile(r"[^\t\x20-\x7e]")


def check_host(host: str, field: str, *, wildcard: bool = True) -> None:
    if not _HOST.match(host) or len(host) > 255:
        raise Refused(field, f"no host name: {host!r}")
    if not wildcard and "*" in host:
        raise Refused(field, f"must be one host, not a wildcard: {host!r}")


def check_export(names: list[str], field: str = "exportTo") -> None:
    for index, name in enumerate(names):
        if name not in (".", "*", "~") and not r.NAMESPACE.match(name):
            raise Refused(f"{field}[{index}]", f"must be a namespace, '.', '*' or '~': {name!r}")
        if name in names[:index]:
            raise Refused(f"{field}[{index}]", f"{name!r} stands there twice")
    for name, told in (("*", "everybody"), ("~", "nobody")):  # validateExportTo, istio/istio pkg/config/validation
        if name in names and len(names) > 1:
            raise Refused(field, f"{name!r} is {told}, so that nothing can stand beside it")


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
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except re2.error as error:
        told = error.args[0] if error.args else error
        raise Refused(at, f"is no RE2 expression: {told.decode() if isinstance(told, bytes) else told}") from None


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
