"""Who is who in a measurement with mTLS? One authority, and two identities that it has signed.

The server's certificate names its SPIFFE identity for the mesh (and as a DNS name, which is what gRPC can check), and
127.0.0.1 for clients and proxies that know nothing of SPIFFE; so all contestants shake hands with the same keys
(ECDSA, P-256).
"""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from meshlib.controlplane.ca import CertificateAuthority
from meshlib.identity.credentials import Credentials
from meshlib.identity.files import CERTIFICATE, KEY, ROOTS
from meshlib.identity.pem import credentials_of
from meshlib.model import SpiffeId

SERVER, CLIENT = "reviews", "productpage"
"""Service accounts, and the names of their folders."""


def write_identities(folder: Path) -> None:
    """FOLDER/reviews and FOLDER/productpage, each with tls.crt, tls.key, ca.crt, and both.pem of the first two."""
    authority = CertificateAuthority("cluster.local")
    for account in (SERVER, CLIENT):
        identity = SpiffeId.of("cluster.local", "default", account)
        names = ("localhost", f"{account}.default.sa.cluster.local")
        addresses = (ipaddress.ip_address("127.0.0.1"),)
        chain, key = authority.issue_own(identity, names, addresses)
        own = folder / account
        own.mkdir(parents=True)
        for name, text in ((CERTIFICATE, chain), (KEY, key), (ROOTS, authority.bundle), ("both.pem", chain + key)):
            (own / name).write_bytes(text)


def credentials(folder: Path) -> Credentials:
    return credentials_of(*((folder / name).read_bytes() for name in (CERTIFICATE, KEY, ROOTS)))


def stock_context(folder: Path) -> ssl.SSLContext:
    """What a client without a mesh would be given: the standard library's checks, by address."""
    context = ssl.create_default_context(cafile=str(folder / ROOTS))
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    return context
