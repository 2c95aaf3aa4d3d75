"""Does `meshctl bootstrap` say what gRPC and Envoy need, keep a certificate fresh, and tell what is missing?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from stock_grpc import CLIENT, SERVER, Admin, stock
from typer.testing import CliRunner

from certificates import TestCA
from joining import join_token
from meshlib.cli.app import app
from meshlib.controlplane import load_reports
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.identity.access import Access
from meshlib.identity.folder import write_credentials
from meshlib.identity.relay import Relay
from meshlib.model import SpiffeId
from peers import unused_port


def bootstrap(*words: str, **environment: str) -> Any:
    clean = {key: None for key in os.environ if key.startswith(("MESHLIB_", "MESHCTL_"))}
    given = {"MESHLIB_CONTROL_PLANE": "127.0.0.1:15010", **environment}
    return CliRunner().invoke(app, ["bootstrap", *words], env={**clean, **given})


def test_the_file_of_grpc(tmp_path: Path) -> None:
    """Nothing of a certificate where there is none; a provider and the label by which callers know where there is."""
    found = json.loads(bootstrap(MESHLIB_LOCALITY="eu/a").stdout)
    assert found["xds_servers"][0]["server_uri"] == "127.0.0.1:15010"
    assert found["xds_servers"][0]["channel_creds"] == [{"type": "insecure"}]
    assert found["node"]["locality"] == {"region": "eu", "zone": "a"}
    assert "certificate_providers" not in found
    assert "MESHLIB_CERTIFICATES" not in found["node"]["metadata"]
    found = json.loads(
        bootstrap("--certificates", str(tmp_path), MESHLIB_SERVICE="a", MESHLIB_ADDRESS="10.0.0.1:80").stdout
    )
    watched = found["certificate_providers"]["default"]["config"]
    assert watched["private_key_file"] == str(tmp_path.resolve() / "tls.key")
    metadata = found["node"]["metadata"]
    assert (metadata["MESHLIB_CERTIFICATES"], metadata["MESHLIB_READY"]) == ("default", True)
    assert metadata["LABELS"] == {"security.istio.io/tlsMode": "istio"}


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """And replaced at once: somebody may read it at that moment."""
    (tmp_path / "file").write_text("old")
    assert bootstrap("-o", str(tmp_path / "file")).exit_code == 0
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert json.loads((tmp_path / "file").read_text())["node"]
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [
        (("--watch",), {}, "--certificates DIR"),
        ((), {"MESHLIB_CONTROL_PLANE": "10.0.0.1:15010"}, "plaintext is for this machine only"),
        ((), {"MESHLIB_CONTROL_PLANE": "nowhere"}, "an address is HOST:PORT"),
        (("--envoy", "--inbound", "80"), {}, "write PORT=HOST:PORT"),
        (("--envoy",), {"MESHLIB_SERVICE": "a", "MESHLIB_ADDRESS": "10.0.0.1:80"}, "--inbound 80=HOST:PORT"),
        (("--admin", "x"), {}, "an address is HOST:PORT"),
    ],
)
def test_what_is_missing_is_said(words: tuple[str, ...], environment: dict[str, str], told: str) -> None:
    """In one sentence, on stderr."""
    ran = bootstrap(*words, **environment)
    assert ran.exit_code == 1
    assert told in ran.stderr
    assert "Traceback" not in ran.output


def test_credentials_are_swapped_at_once(tmp_path: Path) -> None:
    """Three files by one link; nothing is left of the generation before, and nobody else may read a key."""
    folder, authority = tmp_path / "made", TestCA()
    for name in ("one", "two"):
        credentials = authority.credentials(name)
        write_credentials(folder, credentials)
        assert (folder / "tls.crt").read_bytes() == credentials.certificate_chain
        assert (folder / "tls.key").read_bytes() == credentials.private_key
        assert (folder / "ca.crt").read_bytes() == authority.root
    assert stat.S_IMODE((folder / "tls.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.iterdir())) == 5  # three links, ..data, and one generation
    folder.chmod(0o777)
    with pytest.raises(OSError, match="written by others"):
        write_credentials(folder, authority.credentials("three"))


def test_the_relay_is_its_owners_alone(tmp_path: Path) -> None:
    """Whoever connects to it is believed to be this workload."""
    relay = Relay(Access("127.0.0.1:1"), tmp_path)
    relay.start()
    assert stat.S_IMODE(relay.path.stat().st_mode) == 0o600
    relay.stop()
    assert not relay.path.exists()


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    found = ControlPlane(ControlPlaneSettings(xds=("127.0.0.1", 0), admin=("127.0.0.1", 0), tls=True))
    await found.start()
    yield found
    await found.stop()


@contextlib.asynccontextmanager
async def watching(plane: ControlPlane, folder: Path, name: str, **environment: str) -> AsyncIterator[Path]:
    """`meshctl bootstrap --watch` with nothing but a join token. Yields its file, which is written last."""
    assert plane.tokens is not None
    assert plane.authority is not None
    identity, token = SpiffeId.of("cluster.local", "default", name), folder / f"{name}.token"
    if not token.exists():
        token.write_text(join_token(plane, identity))
    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MESHLIB_", "MESHCTL_"))}
    given = {
        "MESHLIB_SERVICE_ACCOUNT": name,
        "MESHLIB_TOKEN_FILE": str(folder / f"{name}.token"),
        "MESHLIB_IDENTITY_TIMEOUT": "60",
        **environment,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "meshlib.cli", "bootstrap", "--watch", "--certificates", str(folder / name)),
        *("-o", str(file)),
        env={**clean, "MESHLIB_CONTROL_PLANE": plane.xds_address, **given},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not file.exists():
            assert process.returncode is None, (await process.communicate())[1].decode()
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        yield file
    finally:
        process.send_signal(signal.SIGTERM)
        _, told = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, told.decode()
    assert "Traceback" not in told.decode()
    assert not (folder / name / "xds.sock").exists()


@pytest.mark.processes
@pytest.mark.timeout(180)
async def test_a_join_token_is_all_that_a_stock_server_needs(
    plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS and a proof to the control plane, mTLS between the two: the watching command does it for both; and the client
    reports its load by the same way."""
    monkeypatch.setattr(load_reports, "INTERVAL", 1)
    address = f"127.0.0.1:{unused_port()}"
    serving = {"MESHLIB_SERVICE": "echo", "MESHLIB_ADDRESS": address}
    async with (
        watching(plane, tmp_path, "echo", **serving) as server_file,
        watching(plane, tmp_path, "friend") as client_file,
        stock(SERVER, address, bootstrap=server_file),
    ):
        await Admin(plane).until_serving(address)
        async with stock(CLIENT, f"echo:{address.rpartition(':')[2]}", bootstrap=client_file) as client:
            assert await client.call() == "spiffe://cluster.local/ns/default/sa/friend"
            async with asyncio.timeout(60):
                while not (loads := (await Admin(plane).get("/v1/load"))["loads"]):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        assert [(each["succeeded"], each["failed"], each["namespace"]) for each in loads] == [(1, 0, "default")]
        assert "echo" in loads[0]["cluster"]
        await Admin(plane).assert_accepted()


@pytest.mark.processes
@pytest.mark.timeout(180)
async def test_a_restart_needs_no_other_token(plane: ControlPlane, tmp_path: Path) -> None:
    """A join token is good once; the certificate in the folder proves the rest."""
    shown = []
    for _ in range(2):
        async with watching(plane, tmp_path, "friend"):
            shown.append((tmp_path / "friend" / "tls.crt").read_bytes())
    assert len(set(shown)) == 2
