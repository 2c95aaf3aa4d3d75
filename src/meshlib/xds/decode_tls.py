"""Which certificates does a transport socket name, and whom does it trust? Only files are understood, and no check
that is asked for is passed over."""

from __future__ import annotations

from typing import Any

from meshlib.model import ListenerTls, UpstreamTls
from meshlib.xds import fields as read
from meshlib.xds import messages as m
from meshlib.xds.encode_tls import CA_SUFFIX, CERTIFICATE_SECRET, ROOTS_SECRET, SECRET
from meshlib.xds.fields import Wrong

_RAW_BUFFER = "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
_TLS_PARAMETERS, _KEY_LOG = 1, 15


def is_secured(message: Any) -> bool:
    """Whether a transport socket does anything to the bytes."""
    if not message.HasField("transport_socket"):
        return False
    return bool(message.transport_socket.typed_config.type_url.rpartition("/")[2] != _RAW_BUFFER)


def downstream_tls(context: Any, field: str) -> ListenerTls:
    common = context.common_tls_context
    if common.tls_certificate_sds_secret_configs:
        return _of_secret(context, common, field)
    certificate_file, private_key_file = _certificate(common, field)
    if not certificate_file:
        raise Wrong(f"{field}.tls_certificates", "is missing")
    ca_file = _trusted_ca(common, field)
    validation = common.validation_context
    if validation.match_typed_subject_alt_names or validation.match_subject_alt_names:
        raise Wrong(f"{field}.validation_context.match_typed_subject_alt_names", "is not checked here")
    if context.require_client_certificate.value and not ca_file:
        raise Wrong(f"{field}.validation_context.trusted_ca", "is missing: client certificates are required")
    return ListenerTls(
        certificate_file,
        private_key_file,
        ca_file,
        context.require_client_certificate.value,
        tuple(common.alpn_protocols),
        optional=bool(ca_file) and not context.require_client_certificate.value,
    )


def _of_secret(context: Any, common: Any, field: str) -> ListenerTls:
    """A secret that the gateway has by its name, with the CA that Istio names after it."""
    read.closed(common, field, _TLS_PARAMETERS, _KEY_LOG)
    names = [each.name for each in common.tls_certificate_sds_secret_configs]
    if len(names) != 1 or common.tls_certificates or not names[0].startswith(SECRET):
        raise Wrong(f"{field}.tls_certificate_sds_secret_configs", f"must be one {SECRET}NAME; found {names}")
    credential = names[0].removeprefix(SECRET)
    kind = common.WhichOneof("validation_context_type")
    if kind not in (None, "validation_context_sds_secret_config"):
        raise Wrong(f"{field}.{kind}", "must be the secret's own CA")
    if kind is not None and common.validation_context_sds_secret_config.name != names[0] + CA_SUFFIX:
        raise Wrong(f"{field}.{kind}.name", f"must be {names[0]}{CA_SUFFIX}")
    is_required = context.require_client_certificate.value
    if is_required and kind is None:
        raise Wrong(f"{field}.validation_context_sds_secret_config", "is missing: client certificates are required")
    return ListenerTls(
        "",
        "",
        "",
        is_required,
        tuple(common.alpn_protocols),
        optional=kind is not None and not is_required,
        credential=credential,
    )


def upstream_tls(socket: Any) -> UpstreamTls:
    context = read.unpacked(socket.typed_config, m.UpstreamTlsContext, "transport_socket.typed_config")
    field = "transport_socket.typed_config.common_tls_context"
    common = context.common_tls_context
    if [each.name for each in common.tls_certificate_sds_secret_configs] == [CERTIFICATE_SECRET]:
        return _mesh_tls(context, field)
    certificate_file, private_key_file = _certificate(common, field)
    ca_file = _trusted_ca(common, field)
    names = _names(common.validation_context, f"{field}.validation_context")
    return UpstreamTls(
        "MUTUAL" if certificate_file else "SIMPLE",
        context.sni,
        () if names == (context.sni,) else names,
        ca_file,
        certificate_file,
        private_key_file,
        not common.HasField("validation_context"),
    )


def _mesh_tls(context: Any, field: str) -> UpstreamTls:
    """The mesh's own certificate and roots, by the names of their secrets (Istio's)."""
    common = context.common_tls_context
    if common.WhichOneof("validation_context_type") != "combined_validation_context":
        raise Wrong(f"{field}.combined_validation_context", "is missing: the mesh's roots verify the other side")
    combined = common.combined_validation_context
    if combined.validation_context_sds_secret_config.name != ROOTS_SECRET:
        raise Wrong(f"{field}.combined_validation_context.validation_context_sds_secret_config", "must be ROOTCA")
    place = f"{field}.combined_validation_context.default_validation_context"
    return UpstreamTls("ISTIO_MUTUAL", context.sni, _names(combined.default_validation_context, place))


def _names(validation: Any, field: str) -> tuple[str, ...]:
    if validation.match_subject_alt_names:
        raise Wrong(f"{field}.match_subject_alt_names", "is gRPC's form: use match_typed_subject_alt_names")
    names: list[str] = []
    for index, each in enumerate(validation.match_typed_subject_alt_names):
        if each.matcher.WhichOneof("match_pattern") != "exact" or not each.matcher.exact:
            place = f"{field}.match_typed_subject_alt_names[{index}]"
            raise Wrong(place, "must be exact: names are compared whole")
        names.append(each.matcher.exact)
    return tuple(names)


def _certificate(common: Any, field: str) -> tuple[str, str]:
    """The files of the certificate that is shown and its key; both "" when none is."""
    read.closed(common, field, _TLS_PARAMETERS, _KEY_LOG)
    if common.tls_certificate_sds_secret_configs or common.HasField("tls_certificate_provider_instance"):
        raise Wrong(f"{field}.tls_certificates", "must be named by files: there are no other secrets here")
    if len(common.tls_certificates) > 1:
        raise Wrong(f"{field}.tls_certificates", f"must be one at most; found {len(common.tls_certificates)}")
    if not common.tls_certificates:
        return "", ""
    certificate = common.tls_certificates[0]
    if not certificate.certificate_chain.filename or not certificate.private_key.filename:
        raise Wrong(f"{field}.tls_certificates[0]", "must name files")
    return certificate.certificate_chain.filename, certificate.private_key.filename


def _trusted_ca(common: Any, field: str) -> str:
    """The file of whom to trust; "" when nothing is said, or the system's roots."""
    kind = common.WhichOneof("validation_context_type")
    if kind not in (None, "validation_context"):
        raise Wrong(f"{field}.{kind}", "is a secret, of which there are none here: name files")
    validation = common.validation_context
    read.closed(validation, f"{field}.validation_context")
    if validation.HasField("ca_certificate_provider_instance"):
        raise Wrong(f"{field}.validation_context.ca_certificate_provider_instance", "is not known here: name files")
    ca_file = validation.trusted_ca.filename
    if kind is not None and not ca_file and not validation.HasField("system_root_certs"):
        raise Wrong(f"{field}.validation_context", "names no trusted_ca file and no system_root_certs")
    return "" if validation.HasField("system_root_certs") else str(ca_file)
