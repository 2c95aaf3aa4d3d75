"""Which secrets does an Envoy get, and who gives them? SDS: the mesh's certificate (`default`) and roots (`ROOTCA`).

- An Envoy that says in which folder it has them is told the names of its own files: its key never travels.
- Another is given a key and a certificate for the identity that it has proved on this stream, renewed at half life.
- Whoever has proved nothing, and has no folder, gets nothing: what needs a certificate then takes and makes no
  connection.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography import x509

from meshlib.controlplane.ca import CertificateAuthority
from meshlib.controlplane.changes import Changes, ChangesByType, differing
from meshlib.controlplane.resource import Resource, combined_version, resource_of
from meshlib.controlplane.sight import Seen
from meshlib.identity.files import CERTIFICATE, KEY, ROOTS
from meshlib.identity.rotation import renew_after
from meshlib.model import SpiffeId
from meshlib.xds import messages as m
from meshlib.xds.encode_tls import CERTIFICATE_SECRET, ROOTS_SECRET
from meshlib.xds.resource_types import SECRET

Secrets = Mapping[str, Resource]
NONE: Secrets = {}


class SecretsOf:
    """The secrets of one stream. identity: what was proved on it; None is nobody."""

    def __init__(self, authority: CertificateAuthority | None, identity: SpiffeId | None) -> None:
        self._authority, self._identity = authority, identity
        self._made: Secrets = NONE
        self._folder = ""
        self._roots: tuple[bytes, ...] = ()
        self.renew_at = 0.0
        """Seconds since 1970; 0 for never."""

    def now(self, folder: str, clock: Callable[[], float] = time.time) -> Secrets:
        """What the client gets; the same object until something has changed. folder: where it has its own, or ""."""
        if folder:
            if folder != self._folder:
                self._made, self._folder, self.renew_at = _of_files(folder), folder, 0.0
            return self._made
        if self._authority is None or self._identity is None:
            return NONE
        roots = tuple(self._authority.roots)
        if not self._made or self._folder or clock() >= self.renew_at or roots != self._roots:
            chain, key = self._authority.issue(self._identity)
            ends = x509.load_pem_x509_certificate(chain[0]).not_valid_after_utc.timestamp()
            self._made = _of_bytes(b"".join(chain[:-1]), key, b"".join(roots))
            self.renew_at = clock() + renew_after(ends - clock(), random.Random())
            self._folder, self._roots = "", roots
        return self._made


class WithSecrets:
    """What a client sees, and its secrets. A Seen."""

    def __init__(self, seen: Seen, secrets: Secrets) -> None:
        self.seen, self.secrets = seen, secrets
        self.snapshot, self.routed = seen.snapshot, seen.routed
        self.resources = {**seen.resources, SECRET: secrets}
        self.versions = {**seen.versions, SECRET: combined_version(secrets.values())}

    def find(self, type_url: str, name: str, *, has_catch_all: bool) -> Resource | None:
        if type_url == SECRET:
            return self.secrets.get(name)
        return self.seen.find(type_url, name, has_catch_all=has_catch_all)

    def changes_since(self, before: Any) -> ChangesByType:
        had, secrets = (before.seen, before.secrets) if isinstance(before, WithSecrets) else (before, NONE)
        shared = self.seen.changes_since(had) if self.seen is not had else {}
        return {**shared, SECRET: Changes(differing(secrets, self.secrets))}


def _of_files(folder: str) -> Secrets:
    """Envoy looks at the files again when a link in the folder is swapped."""
    where = Path(folder)
    certificate, roots = m.Secret(name=CERTIFICATE_SECRET), m.Secret(name=ROOTS_SECRET)
    shown, trusted = certificate.tls_certificate, roots.validation_context
    shown.certificate_chain.filename, shown.private_key.filename = str(where / CERTIFICATE), str(where / KEY)
    trusted.trusted_ca.filename = str(where / ROOTS)
    shown.watched_directory.path = trusted.watched_directory.path = folder
    return _resources(certificate, roots)


def _of_bytes(chain: bytes, key: bytes, trusted: bytes) -> Secrets:
    certificate, roots = m.Secret(name=CERTIFICATE_SECRET), m.Secret(name=ROOTS_SECRET)
    certificate.tls_certificate.certificate_chain.inline_bytes = chain
    certificate.tls_certificate.private_key.inline_bytes = key
    roots.validation_context.trusted_ca.inline_bytes = trusted
    return _resources(certificate, roots)


def _resources(*secrets: Any) -> Secrets:
    return {each.name: resource_of(SECRET, each.name, m.serialize(each)) for each in secrets}
