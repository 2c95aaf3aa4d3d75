"""How does TLS look on the wire? The sockets of clusters and listeners, in the form that each reader has for it.

Files are for Envoy and ourselves. The mesh's own certificate and roots have Istio's names: secrets of SDS for Envoy and
ourselves, certificates of the provider `default` for gRPC, which has no SDS (gRFC A29).
"""

from __future__ import annotations

from typing import Any

from meshlib.model import ListenerTls, UpstreamTls, mesh_alpn
from meshlib.xds import messages as m
from meshlib.xds.pieces import refer
from meshlib.xds.reader import Dialect, Reader

CERTIFICATE_SECRET, ROOTS_SECRET = "default", "ROOTCA"
"""Istio's names of the mesh's own certificate and of whom it trusts."""
PROVIDER = "default"
"""Istio's name of the certificate provider in gRPC's bootstrap."""
SECRET, CA_SUFFIX = "kubernetes://", "-cacert"
"""Istio's names of the secrets that a Gateway's credentialName names: of the certificate, and of whom it trusts."""
TLS_SOCKET = "envoy.transport_sockets.tls"
SYSTEM_ROOTS = "/etc/ssl/certs/ca-certificates.crt"
"""Where Envoy is told to look for the system's roots, since it can't find them itself (system_root_certs is gRPC's,
gRFC A82): the place in Debian's, Alpine's and Envoy's own image. Where the file is missing Envoy refuses the cluster;
were none named, it would refuse every cluster that checks a name, and check no certificate for the others."""
SERVER_ALPN = ("h2", "http/1.1")
_DNS, _URI = 2, 3


def set_upstream(socket: Any, tls: UpstreamTls, http2: bool, reader: Reader) -> None:
    socket.name = TLS_SOCKET
    message = _mesh_client(tls, http2, reader) if tls.is_mesh else _files_client(tls)
    socket.typed_config.CopyFrom(m.pack(message))


def set_mesh_server(socket: Any, reader: Reader) -> None:
    """Mutual TLS with the mesh's own certificate; a client without one of the mesh's gets no connection."""
    message = m.DownstreamTlsContext()
    message.require_client_certificate.value = True
    _use_mesh(message.common_tls_context, (), reader)
    if reader.dialect is not Dialect.GRPC:
        message.common_tls_context.alpn_protocols.extend(SERVER_ALPN)
    socket.name = TLS_SOCKET
    socket.typed_config.CopyFrom(m.pack(message))


def set_files_server(socket: Any, tls: ListenerTls) -> None:
    message = m.DownstreamTlsContext()
    common = message.common_tls_context
    common.alpn_protocols.extend(tls.alpn)
    if tls.credential:
        common.tls_certificate_sds_secret_configs.add(name=SECRET + tls.credential)
        if tls.mutual or tls.optional:
            common.validation_context_sds_secret_config.name = SECRET + tls.credential + CA_SUFFIX
    else:
        certificate = common.tls_certificates.add()
        certificate.certificate_chain.filename = tls.certificate_file
        certificate.private_key.filename = tls.private_key_file
        if tls.ca_file:
            common.validation_context.trusted_ca.filename = tls.ca_file
    message.require_client_certificate.value = tls.mutual
    socket.name = TLS_SOCKET
    socket.typed_config.CopyFrom(m.pack(message))


def _mesh_client(tls: UpstreamTls, http2: bool, reader: Reader) -> Any:
    message = m.UpstreamTlsContext()
    _use_mesh(message.common_tls_context, tls.subject_alt_names, reader)
    if reader.dialect is not Dialect.GRPC:  # which passes both over
        message.sni = tls.sni
        message.common_tls_context.alpn_protocols.extend(mesh_alpn(http2))
    return message


def _use_mesh(common: Any, names: tuple[str, ...], reader: Reader) -> None:
    if reader.dialect is Dialect.GRPC:
        shown = common.tls_certificate_provider_instance
        shown.instance_name, shown.certificate_name = PROVIDER, CERTIFICATE_SECRET
        validation = common.validation_context
        trusted = validation.ca_certificate_provider_instance
        trusted.instance_name, trusted.certificate_name = PROVIDER, ROOTS_SECRET
        for name in names:
            validation.match_subject_alt_names.add(exact=name)
        return
    # meshlib has these secrets without being told where; an Envoy asks for them on the same stream.
    shown = common.tls_certificate_sds_secret_configs.add(name=CERTIFICATE_SECRET)
    combined = common.combined_validation_context
    combined.validation_context_sds_secret_config.name = ROOTS_SECRET
    combined.default_validation_context.SetInParent()
    if reader.dialect is Dialect.ENVOY:
        refer(shown.sds_config, reader)
        refer(combined.validation_context_sds_secret_config.sds_config, reader)
    _set_names(combined.default_validation_context, names)


def _files_client(tls: UpstreamTls) -> Any:
    message = m.UpstreamTlsContext(sni=tls.sni)
    common = message.common_tls_context
    if tls.certificate_file:
        certificate = common.tls_certificates.add()
        certificate.certificate_chain.filename = tls.certificate_file
        certificate.private_key.filename = tls.private_key_file
    if not tls.insecure_skip_verify:
        validation = common.validation_context
        if tls.ca_file:
            validation.trusted_ca.filename = tls.ca_file
        else:
            validation.trusted_ca.filename = SYSTEM_ROOTS
            validation.system_root_certs.SetInParent()
        _set_names(validation, tls.subject_alt_names or ((tls.sni,) if tls.sni else ()))
    return message


def _set_names(validation: Any, names: tuple[str, ...]) -> None:
    for name in names:
        kind = _URI if "://" in name else _DNS
        validation.match_typed_subject_alt_names.add(san_type=kind).matcher.exact = name
