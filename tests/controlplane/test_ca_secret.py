"""Replicas have one CA, whoever of them was first."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kube.api_server import ApiServer
from kube.real_api import RealApi
from meshlib.cli.app import app
from meshlib.controlplane.ca import CertificateAuthority
from meshlib.controlplane.ca_secret import shared_authority
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.controlplane.sources import StateError
from meshlib.kube.client import KubeClient
from meshlib.kube.settings import KubeSettings

PATIENCE = 60.0


@pytest.fixture
async def api(any_api: ApiServer) -> AsyncIterator[ApiServer]:
    async with any_api as api:
        api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "istio-system"}})
        yield api


async def authority(api: ApiServer) -> CertificateAuthority:
    async with KubeClient(KubeSettings(api.url)) as client:
        return CertificateAuthority(
            "mesh.test", None, await shared_authority(client, "istio-system", "ca", "mesh.test")
        )


async def test_replicas_that_begin_at_the_same_time_agree(api: ApiServer) -> None:
    """All but one are refused by the API server, and take what is there."""
    made = await asyncio.wait_for(asyncio.gather(*(authority(api) for _ in range(5))), PATIENCE)
    assert len({each.bundle for each in made}) == 1
    assert len({each.signing for each in made}) == 1
    assert [name for kind, _, name in api.everything() if kind == "Secret"] == ["ca"]
    assert (await authority(api)).bundle == made[0].bundle


async def test_an_api_server_that_is_away_is_waited_for(api: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    """A CA of its own would not be trusted by anybody who has the other one. It is told once."""
    first = await authority(api)
    api.failures = [(503, {}), (500, {})]
    assert (await asyncio.wait_for(authority(api), PATIENCE)).bundle == first.bundle
    assert len([each for each in caplog.records if "nobody is served before" in each.getMessage()]) == 1


async def test_a_right_that_is_missing_is_named_and_waited_for(
    api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    """No other CA takes its place. An API server that has just started refuses everybody, and to end would be too
    much; it is told once."""
    api.forbidden = {"secrets"}
    waiting = asyncio.create_task(authority(api))
    async with asyncio.timeout(PATIENCE):
        while len(api.requests) < 2:  # noqa: ASYNC110 -- a server's list of requests tells nobody
            await asyncio.sleep(0.05)
    assert not waiting.done()
    api.forbidden = set()
    assert (await asyncio.wait_for(waiting, PATIENCE)).bundle
    (told,) = [each.getMessage() for each in caplog.records if "nobody is served before" in each.getMessage()]
    assert re.match(r"the Secret istio-system/ca .*`get` of it and `create` of secrets are needed: .*403", told)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, r"istio-system/ca: ca-cert.pem: it is missing"),
        ({"ca-cert.pem": "!"}, "ca-cert.pem"),
        ({"ca-cert.pem": "", "ca-key.pem": "", "root-cert.pem": ""}, "istio-system/ca make no chain"),
    ],
)
async def test_a_secret_without_a_ca_is_left_alone(api: ApiServer, data: dict[str, str] | None, says: str) -> None:
    """Somebody else's, or a broken one: to replace it is for people."""
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ca", "namespace": "istio-system"}, "data": data}
    if isinstance(api, RealApi) and "!" in str(data):
        pytest.skip("only the stand-in takes what is no base64")
    before = api.put(body)
    with pytest.raises(StateError, match=says):
        await authority(api)
    assert api.find("secrets", "ca", "istio-system") == before


async def test_a_certificate_of_one_replica_is_trusted_by_the_other(api: ApiServer) -> None:
    """Two control planes, started at once, vouch for each other's processes."""
    settings = ControlPlaneSettings(
        xds=("127.0.0.1", 0),
        admin=("127.0.0.1", 0),
        cluster=KubeSettings(api.url),
        ca_secret=("istio-system", "ca"),
    )
    planes = [ControlPlane(settings) for _ in range(2)]
    try:
        await asyncio.wait_for(asyncio.gather(*(each.start() for each in planes)), PATIENCE)
        assert planes[0].roots == planes[1].roots != ""
    finally:
        await asyncio.gather(*(each.stop() for each in planes))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ca-secret", "istio-system/ca"), "--ca-secret needs --kubernetes"),
        (("--kubernetes", "--ca-secret", "ca"), "is written NAMESPACE/NAME"),
    ],
)
def test_the_secret_is_one_of_a_cluster(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    """Said before anything is served."""
    config = tmp_path / "kubeconfig"
    config.write_text(
        "{current-context: a, contexts: [{name: a, context: {cluster: b}}],"
        " clusters: [{name: b, cluster: {server: 'http://127.0.0.1:9'}}]}"
    )
    answer = CliRunner().invoke(app, ["control-plane", *words], env={"KUBECONFIG": str(config)})
    assert answer.exit_code != 0
    assert says in f"{answer.output} {answer.exception}"
