"""What does an `xdstp://` name name? The URIs of xDS resources (xDS TP1, gRFC A47), and the plain names behind them.

    xdstp://{authority}/{type}/{id}?{context parameters}#{directives}

Two names are the same if authority, type, id and the set of context parameters are; so the parameters are
sorted by key. Directives say how a resource is fetched and are no part of its name.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

SCHEME = "xdstp://"


class ResourceName(NamedTuple):
    """authority: who is asked for it; "" is whoever is asked for everything. type_name: `envoy.config...`, without
    `type.googleapis.com/`. context: sorted (key, value) pairs."""

    authority: str
    type_name: str
    id: str
    context: tuple[tuple[str, str], ...] = ()

    @property
    def plain(self) -> str:
        """As a server knows it that has one authority: the id, with the context parameters if there are any."""
        return self.id + "".join(f"{'&' if at else '?'}{key}={value}" for at, (key, value) in enumerate(self.context))


def parse(name: str) -> ResourceName | None:
    """None for what is none, or is malformed: no type, no id, a context parameter twice or without a value."""
    if not name.startswith(SCHEME):
        return None
    try:
        uri = urlsplit(name)
        context = parse_qsl(uri.query, keep_blank_values=True, strict_parsing=True) if uri.query else []
    except ValueError:
        return None
    type_name, _, identity = uri.path.removeprefix("/").partition("/")
    if not type_name or not identity or len(dict(context)) != len(context):
        return None
    return ResourceName(unquote(uri.netloc), unquote(type_name), unquote(identity), tuple(sorted(context)))
