"""Are join tokens made, listed and revoked from the command line, and nowhere else?"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from cli.admin_in_thread import View
from dashboard.pictured_town import Town
from meshlib.cli.app import app
from meshlib.controlplane.admin import AdminServer, admin_app
from meshlib.controlplane.ca import CertificateAuthority
from meshlib.controlplane.join_tokens import JoinTokens
from meshlib.controlplane.sources import ObjectStore
from meshlib.controlplane.token_api import TokenRoutes

YAML = {"content-type": "application/yaml"}
CREATE = "/v1/tokens?namespace=default&service_account=reviews&ttl=60"


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    folder = tmp_path / "mesh"
    folder.mkdir()
    with Town(folder) as made:
        yield made


def meshctl(town: Town, *words: str) -> Result:
    return CliRunner().invoke(app, ["token", *words, "--control-plane", town.url], env={"MESHCTL_ADMIN": ""})


def test_a_token_is_told_once_and_can_be_taken_back(town: Town, tmp_path: Path) -> None:
    """The list knows whose it is and whether it was used, and no secret."""
    assert "no tokens" in meshctl(town, "list").stderr
    text = meshctl(town, "create", "--service-account", "reviews", "--ttl", "10m").stdout.strip()
    assert text.startswith("mjt_")
    listed = meshctl(town, "list").stdout
    assert "spiffe://cluster.local/ns/default/sa/reviews" in listed
    assert "unused" in listed
    assert text.split(".")[1] not in listed
    number = text.removeprefix("mjt_").partition(".")[0]
    assert meshctl(town, "revoke", number).stdout == f"{number} revoked\n"
    again = meshctl(town, "revoke", number)
    assert (again.exit_code, again.stderr) == (1, "error: there is no such token: meshctl token list shows them\n")
    file = tmp_path / "token"
    assert meshctl(town, "create", "-o", str(file)).exit_code == 0
    assert file.read_text().startswith("mjt_")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("create", "--ttl", "30d"), "--ttl"),
        (("create", "--ttl", "200h"), "7 days"),
        (("create", "--service-account", "a/b"), "plain names"),
        (("revoke",), "which one"),
    ],
)
def test_what_can_not_be_is_told_in_a_sentence(town: Town, words: tuple[str, ...], reason: str) -> None:
    """And makes no token."""
    found = meshctl(town, *words)
    assert found.exit_code == 1
    assert reason in found.stderr
    assert "no tokens" in meshctl(town, "list").stderr


async def test_an_admin_api_for_everybody_makes_no_tokens() -> None:
    """Whoever could, could be anybody; nor does a web page's request do it on loopback."""
    authority = CertificateAuthority("cluster.local")
    for is_loopback, headers, status in ((False, YAML, 403), (True, {}, 415), (True, YAML, 200)):
        tokens = JoinTokens()
        routes = TokenRoutes(tokens, authority, is_loopback).routes()
        server = AdminServer(admin_app(ObjectStore(), View(), routes=routes), "127.0.0.1", 0)
        await server.start()
        try:
            async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as client:
                assert (await client.post(CREATE, headers=headers)).status_code == status
        finally:
            await server.stop()
        assert len(await tokens.all()) == (status == 200)
