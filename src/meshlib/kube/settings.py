"""Which API server, and who are we to it? A kubeconfig file, or what every pod finds mounted.

Nothing is ever executed: a user with `exec` or `auth-provider` is refused with a sentence that says so.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from meshlib.kube.errors import InvalidSettings

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class Pem:
    """A certificate or key: in a file, which is read whenever a TLS context is made, or given as text."""

    file: Path | None = None
    text: str = field(default="", repr=False)

    def read(self) -> str:
        return self.text if self.file is None else self.file.read_text()


@dataclass(frozen=True, slots=True)
class KubeSettings:
    """server: its URL. token_file: read anew for each request, since Kubernetes rotates it. namespace: the one to use
    where none is named. server_name: whom its certificate must name, where that is not the URL's host."""

    server: str
    namespace: str = "default"
    ca: Pem | None = None
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    certificate: Pem | None = None
    key: Pem | None = None
    username: str = ""
    password: str = field(default="", repr=False)
    server_name: str = ""
    verify: bool = True
    proxy: str = ""

    def authorization(self) -> str:
        """The Authorization header of the next request, "" for none. Raises InvalidSettings."""
        if self.token_file is not None:
            try:
                return f"Bearer {self.token_file.read_text().strip()}"
            except OSError as error:
                raise InvalidSettings(f"the token file {self.token_file} can't be read: {error.strerror}") from error
        if self.token:
            return f"Bearer {self.token}"
        if self.username:
            return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
        return ""

    def tls(self) -> ssl.SSLContext:
        """A context from what is on disk now. Raises InvalidSettings."""
        try:
            context = ssl.create_default_context(cadata=self.ca.read() if self.ca is not None else None)
            if not self.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if self.certificate is not None and self.key is not None:
                _load_pair(context, self.certificate.read() + "\n" + self.key.read())
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise InvalidSettings(f"the certificates for {self.server} can't be used: {error}") from error
        return context


def _load_pair(context: ssl.SSLContext, pem: str) -> None:
    """OpenSSL reads keys from files only: one that nobody else can read, for a moment."""
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:  # 0600
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)


def find_settings(environ: Mapping[str, str] = os.environ, *, context: str = "") -> KubeSettings:
    """As kubectl looks: $KUBECONFIG, else ~/.kube/config, else what a pod finds mounted. Raises InvalidSettings."""
    named = environ.get("KUBECONFIG", "")
    files = [Path(part).expanduser() for part in named.split(os.pathsep) if part]
    if not files and (home := Path(environ.get("HOME") or "~").expanduser() / ".kube" / "config").is_file():
        files = [home]
    if files:
        return from_kubeconfig(files, context=context)
    return in_cluster(environ)


def in_cluster(environ: Mapping[str, str] = os.environ, folder: Path = SERVICE_ACCOUNT) -> KubeSettings:
    """What every pod is given. Raises InvalidSettings outside of one."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise InvalidSettings(
            "no kubeconfig ($KUBECONFIG, ~/.kube/config), and this is no pod of Kubernetes: name a kubeconfig"
        )
    if not (folder / "token").is_file():
        raise InvalidSettings(f"{folder}/token is missing: is automountServiceAccountToken false?")
    namespace = folder / "namespace"
    return KubeSettings(
        server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        namespace=namespace.read_text().strip() if namespace.is_file() else "default",
        ca=Pem(folder / "ca.crt"),
        token_file=folder / "token",
    )


def from_kubeconfig(files: list[Path], *, context: str = "") -> KubeSettings:
    """Of several files, each entry of the first one that has it, as kubectl merges them. Raises InvalidSettings."""
    documents = []
    for file in files:
        try:
            found = yaml.safe_load(file.read_text())
        except FileNotFoundError:
            continue  # kubectl goes on too
        except (OSError, yaml.YAMLError, UnicodeError) as error:
            raise InvalidSettings(f"{file} can't be used: {error}") from error
        if not isinstance(found, dict):
            raise InvalidSettings(f"{file} is no kubeconfig: clusters, users and contexts are wanted")
        documents.append((file, found))
    shown = ", ".join(map(str, files))
    if not documents:
        raise InvalidSettings(f"no kubeconfig in {shown}: set KUBECONFIG to one that is there")
    name = context or next((str(d["current-context"]) for _, d in documents if d.get("current-context")), "")
    if not name:
        raise InvalidSettings(
            f"{shown}: current-context is not set: name a context, or kubectl config use-context NAME"
        )

    def entry(table: str, name: str) -> tuple[Path, dict[str, Any]]:
        key = table.removesuffix("s")
        for file, document in documents:
            for each in document.get(table) or ():
                if isinstance(each, dict) and each.get("name") == name and isinstance(each.get(key), dict):
                    return file.parent, each[key]
        raise InvalidSettings(
            f"{shown}: {table} has no entry {name!r}: kubectl config get-contexts shows what there is"
        )

    _, chosen = entry("contexts", name)
    home, cluster = entry("clusters", str(chosen.get("cluster", "")))
    user_home, user = entry("users", str(chosen["user"])) if chosen.get("user") else (home, {})
    for way in ("exec", "auth-provider"):
        if way in user:
            raise InvalidSettings(
                f"{shown}: the user {chosen['user']!r} asks to run a program ({way}); meshlib runs none. "
                "Give it a token, a tokenFile or a client certificate"
            )
    server = str(cluster.get("server", "")).rstrip("/")
    if not server.startswith(("https://", "http://")):
        raise InvalidSettings(f"{shown}: the cluster {chosen.get('cluster')!r} has no server URL: {server!r}")
    token_file = user.get("tokenFile")
    return KubeSettings(
        server=server,
        namespace=str(chosen.get("namespace") or "default"),
        ca=_pem(cluster, "certificate-authority", home),
        token=str(user.get("token", "")),
        token_file=user_home / str(token_file) if token_file else None,
        certificate=_pem(user, "client-certificate", user_home),
        key=_pem(user, "client-key", user_home),
        username=str(user.get("username", "")),
        password=str(user.get("password", "")),
        server_name=str(cluster.get("tls-server-name", "")),
        verify=cluster.get("insecure-skip-tls-verify") is not True,
        proxy=str(cluster.get("proxy-url", "")),
    )


def _pem(table: Mapping[str, Any], key: str, home: Path) -> Pem | None:
    """`key` names a file, relative to the kubeconfig's folder; `key`-data holds it, and wins."""
    data = table.get(f"{key}-data")
    if data:
        try:
            return Pem(text=base64.b64decode(str(data), validate=True).decode())
        except (binascii.Error, UnicodeError) as error:
            raise InvalidSettings(f"{key}-data is not base64 of a PEM text") from error
    return Pem(home / str(table[key])) if table.get(key) else None
