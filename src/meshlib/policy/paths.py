"""Which path does a request ask for? What is compared with rules, whatever spelling the caller has chosen."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from meshlib.model import PathTemplate

_UNRESERVED = re.compile(r"%(2[dDeE]|3[0-9]|4[1-9a-fA-F]|5[0-9aAfF]|6[1-9a-fA-F]|7[0-9aAeE])")
_CLEAN = re.compile(r"(?:/[A-Za-z0-9_~!$&'()*+,=:@-][A-Za-z0-9_.~!$&'()*+,=:@-]*)+/?|/")


def bare(path: str) -> str:
    """Without query and fragment."""
    return path.partition("?")[0].partition("#")[0]


def is_clean(path: str) -> bool:
    """Whether every way to read this bare path comes to the same."""
    return _CLEAN.fullmatch(path) is not None


def normalized(path: str, how: str = "BASE") -> str:
    """A bare path by Istio's pathNormalization: NONE, BASE (RFC 3986: dot segments, `\\` as `/`, escapes of characters
    that need none), MERGE_SLASHES, DECODE_AND_MERGE_SLASHES."""
    if how == "NONE":
        return path
    path = _UNRESERVED.sub(lambda found: chr(int(found[1], 16)), path)
    if how == "DECODE_AND_MERGE_SLASHES":
        path = re.sub(r"%2f", "/", path, flags=re.IGNORECASE)
        path = re.sub(r"%5c", "/", path, flags=re.IGNORECASE)
    path = path.replace("\\", "/")
    if how != "BASE":
        path = re.sub(r"/{2,}", "/", path)
    return without_dots(path)


def normalized_target(target: str, how: str = "BASE") -> str:
    """`normalized`, for a path with its query, which stays as it is: so that a route sees what the server behind it
    will see."""
    path, mark, query = target.partition("?")
    return target if is_clean(path) else normalized(path, how) + mark + query


def readings(path: str, how: str = "BASE") -> tuple[str, ...]:
    """A bare path in every way that somebody behind us may read it, each once: as Istio normalizes it, and as an
    application sees it whose server decodes every escape, and which merges slashes before it resolves dots, or does
    not. The last is the shortest."""
    judged = normalized(path, how)
    decoded = _decoded(path)
    found = (judged, *(without_dots(each) for each in (_decoded(judged), decoded)))
    return tuple(dict.fromkeys((*found, *(without_dots(_merged(each)) for each in (_decoded(judged), decoded)))))


def _decoded(path: str) -> str:
    return unquote_to_bytes(path.encode("latin-1", "replace")).decode("latin-1").replace("\\", "/")


def _merged(path: str) -> str:
    return re.sub(r"/{2,}", "/", path)


def without_dots(path: str) -> str:
    """RFC 3986, 5.2.4."""
    if "/." not in path:
        return path
    kept: list[str] = []
    segments = path.split("/")[1:]
    for position, segment in enumerate(segments):
        if segment == "..":
            if kept:
                kept.pop()
        elif segment != ".":
            kept.append(segment)
            continue
        if position == len(segments) - 1:
            kept.append("")
    return "/" + "/".join(kept)


def compile_template(template: str) -> re.Pattern[str]:
    """A PathTemplate's. Raises ValueError for another form."""
    return re.compile(PathTemplate(template).regex, re.DOTALL)
