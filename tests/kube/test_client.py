"""What is asked of the API server, as whom, and what its refusals become."""

import asyncio
import base64
import contextlib
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from kube.api_server import ApiServer
from meshlib.kube.client import KubeClient
from meshlib.kube.errors import Busy, Conflict, Forbidden, InvalidSettings, NotFound, Unauthorized, Unreachable
from meshlib.kube.settings import KubeSettings, find_settings, from_kubeconfig, in_cluster

CONFIG_MAP: dict[str, Any] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"x": "1"}}
PATH = "/api/v1/namespaces/default/configmaps"


async def test_the_token_is_read_anew_for_each_request(any_api: ApiServer, tmp_path: Path) -> None:
    """Kubernetes rotates it each hour; one that was read at the start would be refused after that."""
    token = tmp_path / "token"
    async with any_api as api, KubeClient(KubeSettings(api.url, token_file=token)) as client:
        api.tokens = {"one": "system:serviceaccount:a:b", "two": "system:serviceaccount:a:b"}
        token.write_text("one\n")
        await client.list(PATH)
        token.write_text("two\n")
        await client.list(PATH)
        token.write_text("three")
        with pytest.raises(Unauthorized):
            await client.list(PATH)
        token.unlink()
        with pytest.raises(InvalidSettings, match="token"):
            await client.list(PATH)
    assert api.authorizations == ["Bearer one", "Bearer two", "Bearer three"]


async def test_each_refusal_has_its_class(any_api: ApiServer) -> None:
    """Callers handle each differently, so none of them is told by its text."""
    async with any_api as api, KubeClient(KubeSettings(api.url)) as client:
        with pytest.raises(NotFound, match="configmaps"):
            await client.get(f"{PATH}/a")
        made = await client.create(PATH, CONFIG_MAP)
        with pytest.raises(Conflict) as exists:
            await client.create(PATH, CONFIG_MAP)
        assert exists.value.reason == "AlreadyExists"
        await client.replace(f"{PATH}/a", {**made, "data": {"x": "2"}})
        with pytest.raises(Conflict) as conflict:
            await client.replace(f"{PATH}/a", {**made, "data": {"x": "3"}})
        assert conflict.value.reason == "Conflict"
        api.forbidden.add("configmaps")
        with pytest.raises(Forbidden, match="forbidden"):
            await client.list(PATH)
        api.failures = [(429, {"retry-after": "7"})]
        with pytest.raises(Busy) as busy:
            await client.list(PATH)
        assert busy.value.retry_after == 7.0
        await api.stop()
        with pytest.raises(Unreachable):
            await client.list(PATH)


async def test_apply_makes_what_is_not_there_and_keeps_what_it_does_not_name(any_api: ApiServer) -> None:
    """Server-side apply: install may run again, and fields of others stay."""
    async with any_api as api, KubeClient(KubeSettings(api.url)) as client:
        await client.apply(f"{PATH}/a", CONFIG_MAP, manager="meshctl")
        await client.merge(f"{PATH}/a", {"data": {"other": "2"}})
        await client.apply(f"{PATH}/a", CONFIG_MAP, manager="meshctl")
        assert (await client.get(f"{PATH}/a"))["data"] == {"x": "1", "other": "2"}
        await client.delete(f"{PATH}/a")
        await client.delete(f"{PATH}/a")
        assert api.find("configmaps", "a") is None


def _kubeconfig(tmp_path: Path, server: str, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    file = tmp_path / "config"
    document = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "books"}}],
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "u", "user": user}],
    }
    file.write_text(yaml.safe_dump(document))
    return file


async def test_a_kubeconfig_with_certificates_leads_to_the_server(tmp_path: Path) -> None:
    """CA and client certificate as data and as files, over real TLS; a server that the CA did not sign is refused."""
    ca = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(server_side)
    ca.configure_trust(server_side)
    server_side.verify_mode = ssl.CERT_REQUIRED
    mine = ca.issue_cert("me@example.org")
    (tmp_path / "me.crt").write_bytes(mine.cert_chain_pems[0].bytes())
    key = base64.b64encode(mine.private_key_pem.bytes()).decode()
    async with ApiServer(tls=server_side) as api:
        authority = {"certificate-authority-data": base64.b64encode(ca.cert_pem.bytes()).decode()}
        file = _kubeconfig(tmp_path, api.url, authority, {"client-certificate": "me.crt", "client-key-data": key})
        settings = from_kubeconfig([file])
        assert settings.namespace == "books"
        async with KubeClient(settings) as client:
            assert (await client.list(PATH)).items == []
        other = {"certificate-authority-data": base64.b64encode(trustme.CA().cert_pem.bytes()).decode()}
        file = _kubeconfig(tmp_path, api.url, other, {"client-certificate": "me.crt", "client-key-data": key})
        async with KubeClient(from_kubeconfig([file])) as client:
            with pytest.raises(Unreachable, match=r"(?i)certificate"):
                await client.list(PATH)


async def test_a_new_ca_file_is_read_once_the_old_one_fails(tmp_path: Path) -> None:
    """A rotated cluster CA costs one failed attempt, not a restart."""
    ca = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(server_side)
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.crt")
    (tmp_path / "token").write_text("t")
    async with ApiServer(tls=server_side) as api:
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.port)}
        async with KubeClient(in_cluster(environ, tmp_path)) as client:
            with pytest.raises(Unreachable):
                await client.list(PATH)
            ca.cert_pem.write_to_path(tmp_path / "ca.crt")
            assert (await client.list(PATH)).items == []


async def test_connections_of_an_old_ca_end_with_their_last_request(tmp_path: Path) -> None:
    """What is under way goes on; the idle ones are not left to the garbage collector."""
    first, second = trustme.CA(), trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    first.issue_cert("127.0.0.1").configure_cert(server_side)
    first.cert_pem.write_to_path(tmp_path / "ca.crt")
    (tmp_path / "token").write_text("t")
    async with ApiServer(tls=server_side) as api:
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.port)}
        async with KubeClient(in_cluster(environ, tmp_path)) as client:
            version = (await client.list(PATH)).version
            events = client.watch(PATH, version, seconds=60, silence=60)
            api.list_gate.clear()
            async with contextlib.aclosing(events):
                following = asyncio.create_task(anext(events))
                await asyncio.wait_for(api.watched("configmaps"), 10)
                slow = asyncio.create_task(client.list(PATH))
                await asyncio.wait_for(api.asked(3), 10)
                second.issue_cert("127.0.0.1").configure_cert(server_side)
                with pytest.raises(Unreachable, match=r"(?i)certificate"):
                    await client.list(PATH)  # needs a connection of its own
                second.cert_pem.write_to_path(tmp_path / "ca.crt")
                api.list_gate.set()
                assert (await client.list(PATH)).items == []
                assert (await slow).items == []
                api.put(CONFIG_MAP)
                assert (await following).type == "ADDED"
                assert await api.connected(3) == 3
            api.end_watches()  # the stand-in sees that a connection is closed when it answers
            assert await api.connected(1) == 1


def test_a_user_that_asks_to_run_a_program_is_refused(tmp_path: Path) -> None:
    """We execute nothing that a file names; the message says what to do instead."""
    file = _kubeconfig(tmp_path, "https://x", {}, {"exec": {"command": "aws"}})
    with pytest.raises(InvalidSettings, match="runs none"):
        find_settings({"KUBECONFIG": str(file)})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "no kubeconfig"),
        ("{a: b: c}", "can't be used"),
        ("{}", "current-context"),
        ("{current-context: x}", "no entry 'x'"),
    ],
)
def test_a_broken_kubeconfig_names_the_file(tmp_path: Path, text: str, says: str) -> None:
    """Whoever reads the message should know which file to open."""
    file = tmp_path / "config"
    file.write_text(text)
    with pytest.raises(InvalidSettings, match=says) as error:
        find_settings({"KUBECONFIG": str(file)})
    assert str(file) in str(error.value)


def test_outside_of_a_pod_and_without_kubeconfig_there_is_no_cluster(tmp_path: Path) -> None:
    """The message names both places where it was looked for."""
    with pytest.raises(InvalidSettings, match="no pod"):
        find_settings({"HOME": str(tmp_path)})


async def test_pages_of_two_kinds_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of one moment go on from the same version; each token leads to the next page of its own kind."""
    monkeypatch.setattr("meshlib.kube.client.PAGE", 2)
    async with ApiServer() as api, KubeClient(KubeSettings(api.url)) as client:
        for number in range(5):
            api.put({"apiVersion": "v1", "kind": "Service", "metadata": {"name": f"s-{number}"}})
            api.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"c-{number}"}})
        paths = ("/api/v1/services", "/api/v1/configmaps")
        found = await asyncio.gather(*(client.list(path) for path in paths))
    names = [[each["metadata"]["name"] for each in listing.items] for listing in found]
    assert names == [[f"{letter}-{number}" for number in range(5)] for letter in "sc"]
