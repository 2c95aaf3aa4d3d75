"""Which certificates does this process go by? Its own and the roots that it trusts, as they are told to others."""

from __future__ import annotations

from functools import lru_cache

from meshlib.identity.credentials import Credentials
from meshlib.model import HeldCertificate

OWN, ROOT = "default", "ROOTCA"
"""Envoy's names of the two secrets, and so istioctl's."""


@lru_cache(maxsize=1)  # read at every look at the metrics, and changed once in hours
def held(credentials: Credentials) -> tuple[HeldCertificate, ...]:
    """Its own leaf first, then the roots of all its trust domains."""
    from cryptography import x509

    leaf, *_ = x509.load_pem_x509_certificates(credentials.certificate_chain)
    bundles = [bundle for _, bundle in credentials.trust_bundles if bundle.strip()]  # a federated one may be empty
    roots = [each for bundle in bundles for each in x509.load_pem_x509_certificates(bundle)]
    return tuple(
        HeldCertificate(
            name,
            f"{each.serial_number:x}",
            int(each.not_valid_before_utc.timestamp()),
            int(each.not_valid_after_utc.timestamp()),
        )
        for name, each in ((OWN, leaf), *((ROOT, each) for each in roots))
    )
