"""A real kube-apiserver with its etcd, on loopback: RBAC, admission, TLS and tokens as everywhere, nothing behind it.

No controller runs but those that a test starts (real_controllers.py), no scheduler and no kubelet: what they would
write (EndpointSlices, pods' status, the `default` service accounts), tests write themselves. The programs come from
`$KUBEBUILDER_ASSETS` or `make cluster-tools`.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import yaml
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import rsa

from certificates import TestCA
from meshlib.kube.settings import KubeSettings, Pem

Object = dict[str, Any]
BUILT = Path(__file__).parents[2] / ".venv" / "go" / "bin"
PATIENCE = 60.0
LOOPBACK = "127.0.0.1"
HOW = "there is no kube-apiserver and etcd here: make test-cluster builds them, KUBEBUILDER_ASSETS names them"
SYSTEM = ("kube-system", "kube-public", "kube-node-lease")
_ITS_OWN = ("apiregistration.k8s.io", "events", "masterleases", "peerserverleases", "flowschemas", "ranges")


def programs() -> tuple[Path, Path] | None:
    """kube-apiserver and etcd, None where they are not."""
    for folder in (os.environ.get("KUBEBUILDER_ASSETS", ""), BUILT):
        found = Path(folder) / "kube-apiserver", Path(folder) / "etcd"
        if folder and all(each.is_file() for each in found):
            return found
    return None


def own_address() -> str:
    """Of this machine, and not loopback, which no EndpointSlice takes. "" where there is none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))  # nothing is sent
        found = str(probe.getsockname()[0])
        return "" if found.startswith("127.") else found
    return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Collection(NamedTuple):
    """Where objects of a kind are. versions: the preferred one first."""

    kind: str
    group: str
    plural: str
    versions: tuple[str, ...]
    namespaced: bool

    def path(self, version: str, namespace: str = "", name: str = "") -> str:
        parts = ["", *(("apis", self.group) if self.group else ("api",)), version]
        parts += ["namespaces", namespace] if self.namespaced and namespace else []
        return "/".join((*parts, self.plural, *((name,) if name else ())))


class RealCluster:
    """`with RealCluster() as cluster:` runs until the end; wipe() makes it as good as new."""

    def __init__(self, address: str = LOOPBACK) -> None:
        """address: where it serves. One that is not loopback is what pods of a real node find as `kubernetes`."""
        found = programs()
        assert found is not None, HOW
        self._api_server, self._etcd = found
        self.folder = Path(tempfile.mkdtemp(prefix="meshlib-cluster-"))
        self.ca = TestCA("cluster.local")
        self.address = address
        self.port, self._etcd_port = _free_port(), _free_port()
        self._peer_port = _free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._baseline: set[str] = set()
        """Of etcd's keys."""
        self._first: set[tuple[str, str, str]] = set()
        self._collections: dict[tuple[str, str], Collection] = {}
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def root(self) -> str:
        return self.ca.root.decode()

    # Life

    def __enter__(self) -> Self:
        try:
            self._write_keys()
            self._start_etcd()
            self.http = httpx.Client(
                base_url=self.url, verify=self.settings().tls(), trust_env=False, timeout=PATIENCE, http2=False
            )
            self.start()
            self.until(lambda: self._answers("/api/v1/namespaces/kube-node-lease"), "the first namespaces")
            self.until(lambda: self._answers("/api/v1/namespaces/default"), "the first namespaces")
            self.until(lambda: self._answers("/api/v1/namespaces/default/services/kubernetes"), "its own Service")
            self._baseline, self._first = set(self._keys()), set(self.everything())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "http"):
            self.http.close()
        for name in ("kube-apiserver", "etcd"):
            self._end(name, kill=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Again after stop(), on the same port, with what etcd has kept."""
        keys = self.folder
        self._run(
            "kube-apiserver",
            str(self._api_server),
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--bind-address={self.address}",
            f"--secure-port={self.port}",
            f"--advertise-address={self.address}",
            f"--endpoint-reconciler-type={'none' if self.address == LOOPBACK else 'lease'}",
            f"--kubelet-certificate-authority={keys / 'ca.crt'}",
            f"--kubelet-client-certificate={keys / 'admin.crt'}",
            f"--kubelet-client-key={keys / 'admin.key'}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--tls-cert-file={keys / 'server.crt'}",
            f"--tls-private-key-file={keys / 'server.key'}",
            f"--client-ca-file={keys / 'ca.crt'}",
            "--authorization-mode=Node,RBAC",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={keys / 'accounts.key'}",
            f"--service-account-signing-key-file={keys / 'accounts.key'}",
            "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112",
            # No kube-proxy, so no cluster IP: it calls webhooks at what their EndpointSlices say.
            "--enable-aggregator-routing=true",
            "--allow-privileged=true",
            "--profiling=false",
            "--shutdown-delay-duration=0s",
            "--shutdown-watch-termination-grace-period=0s",
        )
        self.until(lambda: self._answers("/readyz"), "the API server")

    def stop(self) -> None:
        """etcd goes on."""
        self._end("kube-apiserver", kill=True)

    @property
    def is_running(self) -> bool:
        return "kube-apiserver" in self._processes

    def log(self, name: str = "kube-apiserver") -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _write_keys(self) -> None:
        names = ("localhost", "kubernetes", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
        chain, key = self.ca.issue(dns=names, ips=(self.address, "10.96.0.1"))
        accounts = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
        )
        files = {"ca.crt": self.ca.root, "server.crt": chain, "server.key": key, "accounts.key": accounts}
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        self.write_client(self.folder, "admin", "system:masters")

    def write_client(self, folder: Path, user: str, *groups: str) -> None:
        """USER.crt and USER.key, by which the API server, and a kubelet, know them."""
        settings = self.settings(user, *groups)
        for pem, suffix in ((settings.certificate, "crt"), (settings.key, "key")):
            assert pem is not None
            (folder / f"{user}.{suffix}").write_text(pem.text)

    def _start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        self._run(
            "etcd",
            str(self._etcd),
            f"--data-dir={self.folder / 'etcd'}",
            "--name=one",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=one={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )

        def is_up() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{client}/health", trust_env=False).status_code == 200
            return False

        self.until(is_up, "etcd")

    def _run(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(words, stdout=log, stderr=log, cwd=self.folder)

    def _end(self, name: str, *, kill: bool = False) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            (process.kill if kill else process.terminate)()
            process.wait(PATIENCE)

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} has ended: {self.log(name)[-3000:]}"
            assert time.monotonic() < deadline, f"{what}: {self.log()[-3000:]}"
            time.sleep(0.05)

    def _answers(self, path: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get(path).status_code == 200
        return False

    # Who may come in

    def settings(self, user: str = "admin", *groups: str, namespace: str = "default") -> KubeSettings:
        """By a client certificate; without groups one of the cluster's masters."""
        from cryptography import x509
        from cryptography.x509.oid import NameOID

        subject = [x509.NameAttribute(NameOID.COMMON_NAME, user)]
        subject += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, each) for each in groups or ("system:masters",)]
        chain, key = self.ca.issue(subject=subject, server=False)
        return KubeSettings(
            self.url,
            namespace=namespace,
            ca=Pem(text=self.root),
            certificate=Pem(text=chain.decode()),
            key=Pem(text=key.decode()),
        )

    def token(self, namespace: str, account: str, audience: str = "") -> str:
        """Of a service account, as a pod is given it. audience: "" is the API server itself."""
        spec = {"audiences": [audience]} if audience else {}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        return str(self.ask("POST", path, body)["status"]["token"])

    def kubeconfig(
        self,
        file: Path,
        *,
        token: str = "",
        namespace: str = "default",
        user: str = "admin",
        groups: Sequence[str] = (),
    ) -> Path:
        """By a service account's token, else by a client certificate."""
        settings = self.settings(user, *groups, namespace=namespace)

        def data(pem: Pem | None) -> str:
            assert pem is not None
            return base64.b64encode(pem.text.encode()).decode()

        certificate = {"client-certificate-data": data(settings.certificate), "client-key-data": data(settings.key)}
        who = {"token": token} if token else certificate
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
            "clusters": [
                {"name": "c", "cluster": {"server": self.url, "certificate-authority-data": data(settings.ca)}}
            ],
            "users": [{"name": "u", "user": who}],
        }
        file.write_text(yaml.safe_dump(document))
        file.chmod(0o600)
        return file

    # What is in it

    def ask(self, method: str, path: str, body: Any = None, **params: str) -> Object:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        answer = self.http.request(method, path, json=body, params=params, headers={"content-type": kind})
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        found: Object = answer.json()
        return found

    def collection(self, group: str, kind: str) -> Collection:
        with self._lock:
            if (group, kind) not in self._collections:
                self._discover()
            return self._collections[group, kind]

    def _discover(self) -> None:
        found: dict[tuple[str, str], Collection] = {}
        groups = [("", ("v1",))]
        for each in self.ask("GET", "/apis")["groups"]:
            preferred = each["preferredVersion"]["version"]
            others = [version["version"] for version in each["versions"] if version["version"] != preferred]
            groups.append((each["name"], (preferred, *others)))
        for group, versions in groups:
            for version in versions:
                answer = self.http.get(f"/apis/{group}/{version}" if group else f"/api/{version}")
                for each in answer.json().get("resources", ()) if answer.is_success else ():
                    if "/" not in each["name"]:
                        known = found.get(
                            (group, each["kind"]), Collection(each["kind"], group, each["name"], (), each["namespaced"])
                        )
                        found[group, each["kind"]] = known._replace(versions=(*known.versions, version))
        self._collections = found

    def find_collection(self, plural: str) -> Collection:
        """By its name in paths; of several the one that is found first, Kubernetes' own."""
        with self._lock:
            for _ in range(2):
                for each in self._collections.values():
                    if each.plural == plural:
                        return each
                self._discover()
        raise LookupError(plural)

    def find(self, kind: str, name: str, namespace: str = "default", group: str = "") -> Object | None:
        place = self.collection(group, kind)
        answer = self.http.get(place.path(place.versions[0], namespace, name))
        if answer.status_code == 404:
            return None
        assert answer.is_success, answer.text
        found: Object = answer.json()
        return found

    def put(self, *objects: Object) -> Object:
        """Create or replace, with what is said of their status, and what nobody here would make for them."""
        last: Object = {}
        for each in objects:
            last = self._put(copy.deepcopy(each))
        return last

    def _put(self, given: Object) -> Object:
        group, _, version = str(given["apiVersion"]).rpartition("/")
        place, metadata = self.collection(group, given["kind"]), given["metadata"]
        namespace = ""
        if place.namespaced:
            namespace = metadata.setdefault("namespace", "default")
            self._provide(("Namespace", namespace, ""))
        if given["kind"] == "Pod":
            _complete(given)
            self._provide(("ServiceAccount", given["spec"].setdefault("serviceAccountName", "default"), namespace))
        status = given.pop("status", None)
        path = place.path(version, namespace, metadata["name"])
        for key in ("resourceVersion", "uid", "generation", "managedFields"):
            metadata.pop(key, None)
        old = self.http.get(path)
        if old.status_code == 404:
            made = self.ask("POST", place.path(version, namespace), given)
        elif given["kind"] == "Pod":
            about = {key: metadata.get(key) for key in ("labels", "annotations")}
            made = self.ask("PATCH", path, {"metadata": about})
        else:
            before = old.json()["metadata"]
            body = {**given, "metadata": {**metadata, "resourceVersion": before["resourceVersion"]}}
            answer = self.http.put(path, json=body)
            if answer.status_code == 422:  # it can't be changed so
                self._delete(path)
                if given["kind"] == "Service" and given["spec"].get("clusterIP") != "None":
                    for key in ("clusterIP", "clusterIPs"):
                        given["spec"].pop(key, None)
                made = self.ask("POST", place.path(version, namespace), given)
            else:
                assert answer.is_success, answer.text
                made = answer.json()
        if status:
            made = self.ask("PATCH", f"{path}/status", {"status": status})
        elif status is not None and made.get("status"):
            made = self.ask("PUT", f"{path}/status", {**made, "status": {}})
        if given["kind"] == "CustomResourceDefinition":
            made = self._served(path, given)
        return made

    def _provide(self, wanted: tuple[str, str, str]) -> None:
        kind, name, namespace = wanted
        if self.find(kind, name, namespace) is None:
            metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
            place = self.collection("", kind)
            body = {"apiVersion": "v1", "kind": kind, "metadata": metadata}
            answer = self.http.post(place.path("v1", namespace), json=body)
            assert answer.is_success or answer.status_code == 409, answer.text

    def _served(self, path: str, given: Object) -> Object:
        """Its objects can be listed only some moments after it was made."""
        spec = given["spec"]
        places = [f"/apis/{spec['group']}/{each['name']}/{spec['names']['plural']}" for each in spec["versions"]]
        self.until(lambda: all(map(self._answers, places)), f"the CRD {given['metadata']['name']}")
        with self._lock:
            self._collections.clear()
        return self.ask("GET", path)

    def remove(self, kind: str, name: str, namespace: str = "default", group: str = "") -> None:
        place = self.collection(group, kind)
        self._delete(place.path(place.versions[0], namespace, name))
        if kind == "Namespace":
            self.http.put(f"/api/v1/namespaces/{name}/finalize", json=self._finalized(name))

    def _delete(self, path: str) -> None:
        answer = self.http.delete(path, params={"gracePeriodSeconds": "0"})
        assert answer.is_success or answer.status_code == 404, answer.text

    def _finalized(self, name: str) -> Object:
        found = self.http.get(f"/api/v1/namespaces/{name}").json()
        return {**found, "spec": {"finalizers": []}} if "spec" in found else found

    def everything(self) -> dict[tuple[str, str, str], Object]:
        """All objects that tests have made, by kind, namespace and name."""
        with self._lock:
            self._discover()
        found: dict[tuple[str, str, str], Object] = {}
        for (_, kind), place in self._collections.items():
            if kind in ("APIService", "Event", "IPAddress", "ComponentStatus"):
                continue
            answer = self.http.get(place.path(place.versions[0]))
            for each in answer.json().get("items", ()) if answer.is_success else ():
                metadata = each["metadata"]
                who = (kind, metadata.get("namespace", ""), metadata["name"])
                if who not in self._first and who[1] not in SYSTEM:
                    found[who] = each
        return found

    # etcd

    def wipe(self) -> None:
        """What tests have made goes, without a finalizer's leave; it is seen by all watches."""
        crds: list[Object] = self.ask("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions")["items"]
        for key in self._keys():
            if key not in self._baseline and not self._is_internal(key):
                self._etcd_ask("kv/deleterange", key=_coded(key))
        for each in crds:
            spec = each["spec"]
            place = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
            self.until(lambda place=place: self.http.get(place).status_code == 404, "the end of a CRD")  # type: ignore[misc]
        with self._lock:
            self._collections.clear()

    def compact(self) -> None:
        """etcd forgets its history. The API server remembers some of it, until it is restarted."""
        revision = self._etcd_ask("kv/range", key=_coded("/"))["header"]["revision"]
        self._etcd_ask("kv/compaction", revision=revision, physical=True)

    def _keys(self) -> Iterator[str]:
        end = _coded("/registry0")  # the next after all that begin with /registry/
        found = self._etcd_ask("kv/range", key=_coded("/registry/"), range_end=end, keys_only=True)
        return iter([base64.b64decode(each["key"]).decode() for each in found.get("kvs", ())])

    def _is_internal(self, key: str) -> bool:
        parts = key.split("/")
        return parts[2] in _ITS_OWN or any(each in parts for each in SYSTEM)

    def _etcd_ask(self, what: str, **body: Any) -> Any:
        answer = httpx.post(
            f"http://127.0.0.1:{self._etcd_port}/v3/{what}", json=body, trust_env=False, timeout=PATIENCE
        )
        assert answer.is_success, answer.text
        return answer.json()

    def __repr__(self) -> str:
        return f"<RealCluster {self.url}>"


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _complete(pod: Object) -> None:
    """What the API server asks of every pod, and tests of a mesh leave out."""
    spec = pod.setdefault("spec", {})
    for each in spec.setdefault("containers", [{"name": "app"}]):
        each.setdefault("image", "none")
    spec.setdefault("terminationGracePeriodSeconds", 0)
