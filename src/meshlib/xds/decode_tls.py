"""Which certificates does a transport socket name, and whom does it trust? Files are understood, and the
mesh's own certificate by each name that it has on the wire; no check that is asked for is passed over."""

from __future__ import annotations

from typing import Any

from meshlib.model import ListenerTls, UpstreamTls
from meshlib.xds import fields as read
from meshlib.xds import messages as m
from meshlib.xds.encode_tls import CA_SUFFIX, CERTIFICATE_SECRET, PROVIDER, ROOTS_SECRET, SECRET
from meshlib.xds.fields import Wrong

_RAW_BUFFER = "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
_TLS_PARAMETERS, _KEY_LOG = 1, 15
_SESSIONS = (4, 5, 6, 7, 10)
_OCSP, _FULL_SCAN, _PREFER_CLIENT_CIPHERS = 8, 9, 11


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


def mesh_server_tls(context: Any, field: str) -> None:
    """Check that it is mutual TLS with the mesh's own certificate and roots, as a gRPC server is told it (gRFC A29)."""
    read.closed(context, field, *_SESSIONS, _OCSP, _FULL_SCAN, _PREFER_CLIENT_CIPHERS)
    if not context.require_client_certificate.value:
        raise Wrong(f"{field}.require_client_certificate", "must be true: TLS of the mesh is mutual here")
    if _of_provider(context.common_tls_context, f"{field}.common_tls_context"):
        raise Wrong(f"{field}.common_tls_context", "has match_subject_alt_names, which are not checked here")


def upstream_tls(socket: Any) -> UpstreamTls:
    context = read.unpacked(socket.typed_config, m.UpstreamTlsContext, "transport_socket.typed_config")
    field = "transport_socket.typed_config.common_tls_context"
    common = context.common_tls_context
    if [each.name for each in common.tls_certificate_sds_secret_configs] == [CERTIFICATE_SECRET]:
        return _mesh_tls(context, field)
    if _shown_by_provider(common) is not None:
        return UpstreamTls("ISTIO_MUTUAL", context.sni, _of_provider(common, field))
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


def _shown_by_provider(common: Any) -> Any:
    """gRPC's form of the certificate that is shown, or the one that it had before; None where neither is there."""
    for name in ("tls_certificate_provider_instance", "tls_certificate_certificate_provider_instance"):
        if common.HasField(name):
            return getattr(common, name)
    return None


def _of_provider(common: Any, field: str) -> tuple[str, ...]:
    """The names that the other side may bear, where the mesh's own certificate and roots are named by their provider.
    Istio writes its deprecated form (certificate_provider_instance), gRPC's docs the later one."""
    read.closed(common, field, _TLS_PARAMETERS, _KEY_LOG)
    shown = _shown_by_provider(common)
    if shown is None or shown.instance_name != PROVIDER or common.tls_certificates:
        raise Wrong(f"{field}.tls_certificate_provider_instance", f"must be {PROVIDER!r}, and nothing beside it")
    kind = common.WhichOneof("validation_context_type")
    trusted, validation, place = None, None, f"{field}.{kind}"
    if kind == "combined_validation_context":
        combined = common.combined_validation_context
        read.closed(combined, place)
        if combined.HasField("validation_context_certificate_provider_instance"):
            trusted = combined.validation_context_certificate_provider_instance
        validation, place = combined.default_validation_context, f"{place}.default_validation_context"
    elif kind == "validation_context":
        validation = common.validation_context
    if validation is not None and validation.HasField("ca_certificate_provider_instance"):
        trusted = validation.ca_certificate_provider_instance
    if validation is None or trusted is None or trusted.instance_name != PROVIDER:
        raise Wrong(f"{field}.validation_context", f"must name the roots of provider {PROVIDER!r}")
    read.closed(validation, place)
    if validation.HasField("trusted_ca") or validation.HasField("system_root_certs"):
        raise Wrong(place, f"names other roots than those of provider {PROVIDER!r}")
    names = []
    for index, each in enumerate(validation.match_subject_alt_names):
        if each.WhichOneof("match_pattern") != "exact" or not each.exact or each.ignore_case:
            raise Wrong(f"{place}.match_subject_alt_names[{index}]", "must be exact: names are compared whole")
        names.append(each.exact)
    return tuple(names) or _typed_names(validation, place)


def _names(validation: Any, field: str) -> tuple[str, ...]:
    if validation.match_subject_alt_names:
        raise Wrong(f"{field}.match_subject_alt_names", "is gRPC's form: use match_typed_subject_alt_names")
    return _typed_names(validation, field)


def _typed_names(validation: Any, field: str) -> tuple[str, ...]:
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
