"""Which objects are in force? Those of the control plane, read as it reads them: what can't be read closes, too."""

from __future__ import annotations

from dataclasses import replace

from meshlib.cli.admin_client import AdminClient
from meshlib.istio.parse import parse_text
from meshlib.istio.resources import Object


def objects_of(client: AdminClient) -> list[Object]:
    """source: where each stands; its lines below that are those of the text that was sent, and nobody's."""
    return [
        replace(each, source=kept.source, rule_sources=(), place=None)
        for kept in client.objects()
        for parsed in [parse_text(kept.yaml, kept.source)]
        for each in (*parsed.objects, *parsed.closed)
    ]
