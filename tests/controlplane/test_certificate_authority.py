"""Does the certificate authority keep what it has to, and go on where it can't?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshlib.controlplane.ca import DAY, CertificateAuthority, RotationRefused
from meshlib.controlplane.join_tokens import JoinTokens, Refused
from meshlib.controlplane.private_files import StateError
from meshlib.controlplane.token_shelf import FileShelf
from meshlib.model import SpiffeId

REVIEWS = SpiffeId.of("cluster.local", "default", "reviews")


@contextmanager
def full_disk() -> Iterator[None]:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", full)
        yield


def test_a_full_disk_ends_nobodys_identity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Leaves are given and the log says once what could not be kept; it is kept with the first leaf that can."""
    authority = CertificateAuthority("cluster.local", tmp_path / "ca")
    with full_disk():
        for _ in range(3):
            chain, _key = authority.issue(REVIEWS)
            assert len(chain) == 2
    assert [each.levelname for each in caplog.records] == ["ERROR"]
    assert "No space left on device" in caplog.text
    authority.issue(REVIEWS)
    authority.rotate("begin")
    authority.rotate("switch")
    again = CertificateAuthority("cluster.local", tmp_path / "ca")
    assert again.old_until > time.time() + DAY
    with pytest.raises(RotationRefused, match="may be valid until"):
        again.rotate("finish")


def test_a_step_of_a_rotation_that_cant_be_kept_is_not_taken(tmp_path: Path) -> None:
    """After a restart nobody would know of the root that all were told to trust."""
    authority = CertificateAuthority("cluster.local", tmp_path / "ca")
    told: list[str] = []
    authority.on_change(lambda: told.append(authority.stage))
    roots = authority.roots
    with full_disk(), pytest.raises(StateError, match="No space left"):
        authority.rotate("begin")
    assert (authority.stage, authority.roots, told) == ("idle", roots, [])
    authority.rotate("begin")
    assert (authority.stage, told) == ("begun", ["begun"])


async def test_a_token_is_spent_only_where_that_is_kept(tmp_path: Path) -> None:
    """Else it would be good again after a restart; and nothing was given for it, so it may be shown again."""
    tokens = JoinTokens(FileShelf(tmp_path / "tokens" / "tokens.json"))
    text, token = await tokens.create(REVIEWS, 60.0, "00")
    with full_disk(), pytest.raises(StateError):
        await tokens.spend(token)
    assert await tokens.check(text) == token
    await tokens.spend(token)
    with pytest.raises(Refused, match="used already"):
        await tokens.check(text)
