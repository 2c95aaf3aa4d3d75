"""Which claim of a token does a route ask for?"""

from __future__ import annotations

CLAIMS = "@request.auth.claims"


def claim_of(header: str) -> tuple[str, ...] | None:
    """The claim that a match means by `@request.auth.claims.a.b` or `@request.auth.claims[a][b.c]`; () where that form
    is broken, None for an ordinary header (pilot/pkg/security/authn: ToRoutingClaim)."""
    if not header.startswith("@"):
        return None
    if not header.lower().startswith(CLAIMS):
        return ()
    rest = header[len(CLAIMS) :]
    if rest.startswith("."):
        parts = rest[1:].split(".")
    elif rest.startswith("[") and rest.endswith("]"):
        parts = rest[1:-1].split("][")
    else:
        return ()
    return tuple(parts) if all(part and not set("[]") & set(part) for part in parts) else ()
