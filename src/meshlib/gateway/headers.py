"""Which headers cross the gateway? What belongs to one hop stays, what a client claims goes, what we know is added.

Sources: RFC 9110, 7.6 (message forwarding); Envoy's source/common/http/conn_manager_utility.cc for an edge proxy.
"""

from __future__ import annotations

import uuid
from urllib.parse import unquote

from meshlib.outbound.wire import RawHeaders

# RFC 9110, 7.6.1, and what RFC 2616 counted among them: credentials for a proxy are not the server's business.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
# A client can't talk us out of these by naming them in Connection: they frame and address the message.
_NOT_FOR_CONNECTION = frozenset({b"host", b"content-length"})
# Whoever believes these believes the last proxy that set them. Envoy sanitizes x-forwarded-client-cert at the edge and
# x-envoy-* from outside; Forwarded and the x-forwarded-* that we do not set would otherwise be the client's word.
_CLAIMS = frozenset({b"forwarded", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-port"})
_NEVER_BELIEVED = frozenset({b"x-forwarded-client-cert", b"expect"})
_NAMED_BY_US = _CLAIMS | _NEVER_BELIEVED | {b"x-forwarded-for", b"x-request-id", b"x-envoy-external-address"}

EXTERNAL_ADDRESS = b"x-envoy-external-address"

_UPGRADE: RawHeaders = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]


def end_to_end(raw: RawHeaders) -> RawHeaders:
    """`raw` (names in any case) without what belongs to one hop, what Connection lists included. Names lower case."""
    lowered = [(name.lower(), value) for name, value in raw]
    gone = _HOP_BY_HOP
    for name, value in lowered:
        if name == b"connection":
            listed = {token.strip().lower() for token in value.split(b",")} - _NOT_FOR_CONNECTION
            gone = gone | listed
    return [pair for pair in lowered if pair[0] not in gone]


def to_upstream(raw: RawHeaders, client: str, is_tls: bool, trusted_hops: int, is_upgrade: bool) -> RawHeaders:
    """A client's headers as the upstream shall see them; Host where it stood, framing left to the caller. The client's
    address, as far as it is to be believed, is in EXTERNAL_ADDRESS.

    client: its address. trusted_hops: how many proxies in front of this one are ours, so that what they say is so
    (Envoy xff_num_trusted_hops).
    """
    found: RawHeaders = []
    forwarded_for: list[bytes] = []
    request_id = None
    scheme = None
    for pair in end_to_end(raw):
        name, value = pair
        if name == b"x-forwarded-for":
            forwarded_for += [part for part in (each.strip() for each in value.split(b",")) if part]
        elif name == b"x-request-id":
            request_id = value
        elif name in _NEVER_BELIEVED or name.startswith(b"x-envoy-"):
            continue
        elif b"_" in name and name.replace(b"_", b"-") in _NAMED_BY_US:
            continue  # to a WSGI application behind us it would be what we say
        elif name in _CLAIMS:
            if trusted_hops:
                if name == b"x-forwarded-proto":
                    scheme = value
                else:
                    found.append(pair)
        else:
            found.append(pair)
    address = client.encode("ascii", "replace")
    external = address
    if 0 < trusted_hops <= len(forwarded_for):
        external = forwarded_for[-trusted_hops]
    # Envoy appends and never removes: the last entry is the one to believe.
    found.append((b"x-forwarded-for", b",".join((*forwarded_for, address))))
    if scheme not in (b"http", b"https"):
        scheme = b"https" if is_tls else b"http"
    found.append((b"x-forwarded-proto", scheme))
    found.append((EXTERNAL_ADDRESS, external))
    if request_id is None or not trusted_hops:  # Envoy's preserve_external_request_id is off
        request_id = str(uuid.uuid4()).encode("ascii")
    found.append((b"x-request-id", request_id))
    if is_upgrade:
        found += _UPGRADE
    return found


def to_client(raw: RawHeaders, status: int) -> RawHeaders:
    """An upstream's headers as the client shall see them, framing included."""
    names = {name.lower() for name, _ in raw}
    found = [pair for pair in end_to_end(raw) if pair[0] != b"server"]
    if status == 101:
        found = [pair for pair in found if pair[0] != b"content-length"]
        return [*found, *_UPGRADE]
    # RFC 9112, 6.3: Transfer-Encoding overrides Content-Length; a proxy removes the latter. 204 has none; that of a
    # 304 says what a 200 would have had, and the server underneath would wait for that many bytes.
    if b"transfer-encoding" in names or status in (204, 304):
        found = [pair for pair in found if pair[0] != b"content-length"]
    return found


def first(raw: RawHeaders, name: bytes) -> bytes | None:
    return next((value for key, value in raw if key == name), None)


def for_logs(path: str) -> str:
    """A path without its query, which may hold secrets, and without control characters."""
    return unquote(path.partition("?")[0]).encode("unicode_escape").decode("ascii")[:200]
