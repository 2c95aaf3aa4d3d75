"""Two processes' worth of mesh in one: a server and its caller, with certificates of one control plane, by mTLS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from e2e.town import give_token, member
from inbound.inbound_servers import Witness, uvicorn_server
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.mesh import Mesh

CALLER = "spiffe://cluster.local/ns/default/sa/caller"


def control_plane(folder: Path, port: int) -> ControlPlane:
    """One that comes back as itself: the same port, the same state."""
    return ControlPlane(
        ControlPlaneSettings(state=folder / "state", xds=("127.0.0.1", port), admin=("127.0.0.1", 0), tls=True)
    )


@dataclass
class Pair:
    """client: calls `url`. seen: whom the server has seen, each time; `None` is plaintext."""

    client: httpx.Client
    url: str
    caller: Mesh
    reviews: Mesh
    seen: list[str] = field(default_factory=list)

    def failure(self) -> str:
        """Of one call; "" for one that came through by mTLS."""
        try:
            answer = self.client.get(self.url)
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        return "" if answer.text == CALLER else f"{answer.status_code} {answer.text}"

    def rejoin(self, plane: ControlPlane, folder: Path) -> None:
        """A new join token for both, as for processes whose certificates have run out."""
        for name in ("reviews", "caller"):
            give_token(plane, folder, name)


@contextmanager
def pair(plane: ControlPlane, folder: Path) -> Iterator[Pair]:
    witness = Witness()

    with (
        uvicorn_server(witness, http=witness.http, timeout_keep_alive=600) as url,
        member(plane, folder, "reviews", service="reviews", address=url[7:]) as reviews,
        member(plane, folder, "caller") as caller,
        caller.Client(timeout=20) as client,
    ):
        witness.mesh = reviews
        reviews.serve()
        yield Pair(client, f"http://reviews:{url.rpartition(':')[2]}/", caller, reviews, witness.seen)
