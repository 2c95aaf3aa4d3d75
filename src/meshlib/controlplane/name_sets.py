"""Which streams ask for the same names? They share one set of them, and who repeats it is not read again.

State of the world repeats all names in each acknowledgement: a thousand clients with a thousand names would make a
million strings for each change, and keep as many.
"""

from __future__ import annotations

import hashlib
from typing import Any
from weakref import WeakValueDictionary

FEW = 20
"""Up to so many names it is cheaper to read them."""

_known: WeakValueDictionary[bytes, frozenset[str]] = WeakValueDictionary()
"""By a digest of the names as they were sent; for as long as a stream has them."""


def names_of(message: Any, field: str) -> frozenset[str]:
    """The names in a repeated field; the same object for all requests that have the same. Takes all else away from the
    message."""
    if len(getattr(message, field)) <= FEW:
        return frozenset(getattr(message, field))
    for descriptor, _ in message.ListFields():
        if descriptor.name != field:
            message.ClearField(descriptor.name)
    message.DiscardUnknownFields()
    key = hashlib.blake2b(message.SerializeToString(), digest_size=32).digest()
    found = _known.get(key)
    if found is None:
        found = _known[key] = frozenset(getattr(message, field))
    return found
