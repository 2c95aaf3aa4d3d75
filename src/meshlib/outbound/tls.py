"""Which TLS does a client speak to a cluster? Contexts for TLS origination, built once for each set of rules."""

from __future__ import annotations

import ssl
from functools import lru_cache

from meshlib.model import UpstreamTls


@lru_cache(maxsize=1024)
def client_context(tls: UpstreamTls) -> ssl.SSLContext:
    """A context for `tls`: at least TLS 1.2; the server's name is checked against the SNI name sent.

    Raises OSError or ssl.SSLError when a file can't be used; the call that needed it fails as a failed connection.
    """
    context = ssl.create_default_context(cafile=tls.ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.certificate_file:
        context.load_cert_chain(tls.certificate_file, tls.private_key_file or None)
    return context


@lru_cache(maxsize=1)
def default_context() -> ssl.SSLContext:
    """For https URLs to hosts whose cluster says nothing about TLS."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
