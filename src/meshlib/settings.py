"""Who is this process, and where does its configuration come from? Settings, read from MESHLIB_* variables."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from meshlib.errors import SettingsError
from meshlib.model import Locality, Node, NodeKind, Workload
from meshlib.telemetry.setup import Setup, target_of
from meshlib.version import __version__

RESOLVE_TIMEOUT = 5.0
"""Seconds a call waits for the feed's answer about a host it has not asked for before."""
IDENTITY_TIMEOUT = 10.0
DNS = "dns:"
"""In place of a control plane: name servers alone."""
KUBERNETES = "kubernetes:"
"""In place of a control plane: Kubernetes' EndpointSlices alone."""
ISTIO = "istio"
"""The dialect of an istiod."""
_PREFIX = "MESHLIB_"


@dataclass(frozen=True, slots=True)
class Settings:
    """Who this process is and where its configuration comes from.

    Each field is read from the environment variable MESHLIB_<FIELD>; OpenTelemetry's and gRPC's own variables are
    left to them.

    control_plane: `host:port` of a control plane (`a:15012,b:15012` of several replicas: another is taken when one is
      lost), a folder of YAML, `dns:` for name servers alone (`dns:host:port` for this one), or `kubernetes:` for
      EndpointSlices alone (`kubernetes:NAME` for this context of the kubeconfig); "" is no mesh: every call goes where
      it says.
    dialect: `istio` where the control plane is an istiod, to which this process is a client without a proxy; "" is our
      own, and any other that speaks xDS.
    service: the Service this process serves, by name; "" when labels alone decide.
    workload: name shared by this process and its replicas; default `<service>-<version label>`, or the host's name.
    pod: the pod's name, by which an istiod knows it; default the host's name, which is the node's under hostNetwork.
    labels: as `app=reviews,version=v1`. locality: `region/zone/subzone`.
    address: `host:port` where this process serves; "" serves nothing, so nothing is registered.
    forward_headers: headers that a request brings in and that calls made while serving it take out, besides trace
      context and x-request-id; as `end-user,tenant`.
    probe_paths: paths that may be asked for in plaintext where a port is STRICT, by whomever; as `/healthz,/ready`.
    cache_dir: where the last good configuration is kept; default the user's cache folder; "-" keeps none.
    resolve_timeout: seconds that a call waits for the first answer about a host, and a request that comes in for the
      first rules.
    failure_policy: `deny` (503) or `allow`: what becomes of requests that come in while the control plane, or folder,
      was never heard and nothing is kept of it, so that nobody knows who may call. Rules that came and can't be used
      let nobody in either way. Without a control plane, and by name servers alone, nothing is enforced.
    outbound_failure_policy: `allow` or `deny`: what becomes of calls in plaintext to other machines while nobody has
      answered for their host. `allow` sends them where their URL says, by DNS; `deny` answers them with 503. ""
      is `deny` for a process with an identity, since nobody else encrypts what it sends, and `allow` for others.
    identity: who vouches for this process: `control-plane`; `ca:host:port`, another CA that speaks Istio's certificate
      service; `files:FOLDER` with tls.crt, tls.key and ca.crt, watched; `spiffe`, the Workload API (SPIRE) at
      SPIFFE_ENDPOINT_SOCKET, or `spiffe:unix:///PATH`; "" is nobody, so it has no certificate.
    ca_roots: PEM file of those who vouch for the control plane and CA; with it they are called by TLS. A join token
      names its root by itself.
    token_file: holds the token that proves to them who this process is; read at each use.
    identity_timeout: seconds for which a call that needs the first certificate waits for it.
    telemetry: where metrics and traces are pushed: `control-plane`, the http(s) URL of an OTLP receiver, or `off`;
      default OTEL_EXPORTER_OTLP_ENDPOINT, else the control plane at host:port.
    telemetry_interval: seconds between two pushes.
    prometheus: `host:port` to be scraped on, shared by all workers of a server; "" is none.
    strict_istio_labels: write `unknown` where Istio's proxies know less than this library.
    access_log: `text` or `json`: Istio's access log, to the logger `meshlib.access`; "" is none.
    breaker_storage: `redis://host:port/0`, where the processes of this workload tell each other which circuits are
      open; "" is each for itself.
    trace_sampling: percent of the traces that begin here; a trace that comes in is heeded.
    """

    control_plane: str = ""
    dialect: str = ""
    service: str = ""
    namespace: str = "default"
    service_account: str = "default"
    workload: str = ""
    pod: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    locality: Locality = Locality()  # noqa: RUF009 -- frozen
    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    address: str = ""
    forward_headers: tuple[str, ...] = ()
    probe_paths: tuple[str, ...] = ()
    cache_dir: str = ""
    resolve_timeout: float = RESOLVE_TIMEOUT
    identity: str = ""
    ca_roots: str = ""
    token_file: str = ""
    identity_timeout: float = IDENTITY_TIMEOUT
    failure_policy: str = "deny"
    outbound_failure_policy: str = ""
    telemetry: str = ""
    telemetry_interval: float = 10.0
    prometheus: str = ""
    strict_istio_labels: bool = False
    trace_sampling: float = 1.0
    access_log: str = ""
    breaker_storage: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Raises SettingsError, naming the variable, for a value that can't be used."""
        environ = os.environ if environ is None else environ
        found: dict[str, Any] = {}
        for field in cls.__dataclass_fields__:
            variable = _PREFIX + field.upper()
            text = environ.get(variable, "").strip()
            if text:
                try:
                    found[field] = _parsers.get(field, str)(text)
                except ValueError as error:
                    raise SettingsError(f"{variable}={text!r}: {error}") from None
        return cls(**found)

    def check(self, kind: NodeKind = NodeKind.SIDECAR) -> None:
        """Raises SettingsError for what no parser has seen, since it was given in code."""
        for field in ("identity", "dialect", "breaker_storage", "failure_policy", "outbound_failure_policy"):
            value = getattr(self, field)
            if value:
                try:
                    _parsers[field](value)
                except ValueError as error:
                    raise SettingsError(f"{field} {value!r}: {error}") from None
        if self.dialect and kind is NodeKind.ROUTER:
            raise SettingsError(f"dialect {self.dialect!r}: an istiod sends no listeners that a gateway could bind")

    @property
    def denies_unanswered(self) -> bool:
        """Whether a call in plaintext waits for an answer about its host, and fails without one."""
        return (self.outbound_failure_policy or ("deny" if self.identity else "allow")) == "deny"

    def telemetry_setup(self) -> Setup:
        """What is measured, and where it goes. Raises SettingsError."""
        is_ours = not self.dialect and not self.control_plane.startswith((DNS, KUBERNETES))
        control_plane = self.control_plane if is_ours else ""
        return target_of(self.telemetry, control_plane)._replace(
            interval=self.telemetry_interval,
            prometheus=host_and_port(self.prometheus) if self.prometheus else None,
            strict=self.strict_istio_labels,
            sampling=self.trace_sampling,
            access_log=self.access_log,
        )

    def node(self, kind: NodeKind = NodeKind.SIDECAR) -> Node:
        """The xDS node that this process is."""
        host, port = resolved(*host_and_port(self.address)) if self.address else ("", 0)
        labels = tuple(sorted(self.labels))
        version = dict(labels).get("version", "")
        name = self.workload or "-".join(part for part in (self.service, version) if part) or socket.gethostname()
        workload = Workload(
            name=name,
            namespace=self.namespace,
            service=self.service,
            service_account=self.service_account,
            labels=labels,
            address=host,
            port=port,
            locality=self.locality,
        )
        instance = f"{name}-{os.getpid()}-{random.SystemRandom().getrandbits(24):06x}"
        if self.dialect == ISTIO:
            instance = self.pod or socket.gethostname()  # by which an istiod finds what Kubernetes says of the pod
        identity = f"{kind}~{host or '127.0.0.1'}~{instance}.{self.namespace}~{self.namespace}.svc.cluster.local"
        return Node(
            id=identity,
            workload=workload,
            kind=kind,
            user_agent=f"meshlib/{__version__}",
            takes_ttl=True,
            trust_domain=self.trust_domain,
            cluster_id=self.cluster_id,
            metrics_port=host_and_port(self.prometheus)[1] if self.prometheus else 0,
        )


def _labels(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if bad := [key for key, mark, _ in pairs if not mark or not key]:
        raise ValueError(f"labels are written key=value,key=value; found {bad[0]!r}")
    return tuple(sorted((key.strip(), value.strip()) for key, _, value in pairs))


def _locality(text: str) -> Locality:
    parts = text.split("/")
    if len(parts) > 3:
        raise ValueError("a locality is region/zone/subzone, and the last two may be left out")
    return Locality(*parts)


def _names(text: str) -> tuple[str, ...]:
    return tuple(sorted({part.strip().lower() for part in text.split(",") if part.strip()}))


def host_and_port(text: str) -> tuple[str, int]:
    """`[::1]:80` as ("::1", 80). Raises ValueError."""
    host, mark, port = text.rpartition(":")
    if not mark or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"an address is host:port; found {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def resolved(host: str, port: int) -> tuple[str, int]:
    """Others are told an IP address, whatever name this process has for it. Raises SettingsError."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise SettingsError(
                f"address {host}:{port}: {error}; give an IP address that others can reach, or a name that resolves"
            ) from None
        # IPv4 first: a server that listens on "localhost" mostly means that one.
        families = sorted(found, key=lambda each: each[0] != socket.AF_INET)
        return str(families[0][4][0]), port
    if address.is_unspecified:
        raise SettingsError(f"address {host}:{port}: others can't call {host}; give the address they can reach")
    return host, port


def _address(text: str) -> str:
    host_and_port(text)
    return text


def _paths(text: str) -> tuple[str, ...]:
    found = tuple(sorted({part.strip() for part in text.split(",") if part.strip()}))
    if bad := [path for path in found if not path.startswith("/") or "?" in path]:
        raise ValueError(f"a path begins with / and has no query; found {bad[0]!r}")
    return found


def _identity(text: str) -> str:
    kind, _, where = text.partition(":")
    if kind == "ca":
        host_and_port(where)
    elif kind == "spiffe":
        if where and not where.startswith(("unix:", "tcp:")):
            raise ValueError(
                "a Workload API is at unix:///PATH or tcp://ADDRESS:PORT, or where SPIFFE_ENDPOINT_SOCKET says"
            )
    elif text != "control-plane" and not (kind == "files" and where):
        raise ValueError("an identity comes from control-plane, ca:HOST:PORT, files:FOLDER or spiffe")
    return text


def _dialect(text: str) -> str:
    if text not in ("", ISTIO):
        raise ValueError(f"there is {ISTIO} for an istiod; leave it out for any other control plane")
    return text


def _failure_policy(text: str) -> str:
    if text not in ("deny", "allow"):
        raise ValueError("there are deny and allow")
    return text


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number of seconds is wanted, as 0.5") from None


def _interval(text: str) -> float:
    seconds = _seconds(text)
    if not 0.1 <= seconds <= 3600:
        raise ValueError("an interval is 0.1 to 3600 seconds")
    return seconds


def _log_format(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError("there are text and json")
    return text


def _breaker_storage(text: str) -> str:
    if not text.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("breakers are shared through redis://host:port/0, rediss:// or unix://")
    if find_spec("redis") is None:
        raise ValueError("breakers that are shared need the extra redis: pip install 'meshlib-proxyless[redis]'")
    return text


def _percent(text: str) -> float:
    try:
        percent = float(text)
    except ValueError:
        raise ValueError("a share is a number of percent, as 12.5") from None
    if not 0 <= percent <= 100:
        raise ValueError("a share is 0 to 100 percent")
    return percent


def _yes(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError("must be true or false")
    return text.lower() in ("true", "1")


_parsers: dict[str, Callable[[str], Any]] = {
    "dialect": _dialect,
    "labels": _labels,
    "locality": _locality,
    "forward_headers": _names,
    "probe_paths": _paths,
    "address": _address,
    "resolve_timeout": _seconds,
    "identity": _identity,
    "identity_timeout": _seconds,
    "failure_policy": _failure_policy,
    "outbound_failure_policy": _failure_policy,
    "telemetry_interval": _interval,
    "prometheus": _address,
    "strict_istio_labels": _yes,
    "trace_sampling": _percent,
    "access_log": _log_format,
    "breaker_storage": _breaker_storage,
}
