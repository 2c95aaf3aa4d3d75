"""Does a process know who it is, and hear of each rotation? Real files, real certificates, a real fork."""

from __future__ import annotations

import os
import queue
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

import meshlib
from certificates import TestCA, write_identity
from meshlib.errors import SettingsError
from meshlib.identity.credentials import Credentials
from meshlib.identity.held import held
from meshlib.identity.pem import BadCredentials, credentials_of


def write(folder: Path, credentials: Credentials) -> None:
    """As Kubernetes does: a new folder, and a symbolic link that is swapped."""
    version = folder / f"..{credentials.not_before}"
    version.mkdir(mode=0o700)
    write_identity(version, credentials)
    (folder / "..next").symlink_to(version.name)
    (folder / "..next").rename(folder / "..data")
    for name in ("tls.crt", "tls.key", "ca.crt"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


def test_files_are_followed_through_a_swap(tmp_path: Path) -> None:
    """The holder hears of the first credentials and of the next, and has the newest."""
    authority = TestCA()
    first, second = authority.credentials("reviews"), authority.credentials("reviews", begins=-30)
    write(tmp_path, first)
    heard: queue.Queue[Credentials] = queue.Queue()
    with meshlib.connect("", identity=f"files:{tmp_path}") as mesh:
        mesh.on_rotation(heard.put)
        assert mesh.credentials is None, "nothing is read before the first use"
        found = mesh.wait_for_credentials(30)
        assert found is not None
        assert found.certificate_chain == first.certificate_chain
        assert found.identity.uri == "spiffe://cluster.local/ns/default/sa/reviews"
        assert heard.get(timeout=30) == found
        write(tmp_path, second)
        assert heard.get(timeout=30).certificate_chain == second.certificate_chain
        assert mesh.credentials is not None
        assert mesh.credentials.certificate_chain == second.certificate_chain
        assert "PRIVATE" not in repr(mesh.credentials)


def test_a_fork_gets_a_source_of_its_own(tmp_path: Path) -> None:
    """The child reads what was current at once, and hears of what comes after."""
    authority = TestCA()
    write(tmp_path, authority.credentials("reviews"))
    with meshlib.connect("", identity=f"files:{tmp_path}") as mesh:
        assert mesh.wait_for_credentials(30)
        ready, told = os.pipe()
        child = os.fork()
        if not child:
            code = 1
            try:
                heard: queue.Queue[Credentials] = queue.Queue()
                mesh.on_rotation(heard.put)
                os.write(told, b"x")
                while heard.get(timeout=30).identity.service_account != "ratings":
                    pass
                code = 0
            finally:
                os._exit(code)
        os.read(ready, 1)
        write(tmp_path, authority.credentials("ratings", begins=-20))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.close(ready)
        os.close(told)


def test_waiting_is_bounded(tmp_path: Path) -> None:
    """A folder that stays empty is no reason to hang."""
    with meshlib.connect("", identity=f"files:{tmp_path}") as mesh:
        assert mesh.wait_for_credentials(0.05) is None


@pytest.mark.parametrize(
    "uris", [(), ("spiffe://a/b", "spiffe://a/c"), ("https://example.com/",)], ids=["none", "two", "no SPIFFE ID"]
)
def test_a_certificate_has_exactly_one_spiffe_id(uris: tuple[str, ...]) -> None:
    """X509-SVID, 2: with none or several it is nobody's."""
    bad = TestCA().credentials("reviews", uris=uris, dns=["reviews"])
    with pytest.raises(BadCredentials, match=r"URI name|no SPIFFE ID"):
        credentials_of(bad.certificate_chain, bad.private_key, bad.trust_bundles[0][1])


def test_a_key_of_another_certificate_is_refused() -> None:
    """Between two files of a writer, say; the message holds no part of the key."""
    one, other = TestCA().credentials(), TestCA().credentials()
    with pytest.raises(BadCredentials, match="not the certificate's"):
        credentials_of(one.certificate_chain, other.private_key, one.trust_bundles[0][1])


def test_what_is_held_is_told_by_serial_number() -> None:
    """The leaf first, then each root; a federated trust domain whose bundle is empty has none."""
    given = TestCA().credentials()
    bundles = (*given.trust_bundles, ("elsewhere.example", b""))
    leaf, root = held(replace(given, trust_bundles=bundles))
    assert (leaf.name, root.name) == ("default", "ROOTCA")
    assert leaf.serial == f"{x509.load_pem_x509_certificate(given.certificate_chain).serial_number:x}"
    assert leaf.not_after == int(given.not_after)


def test_a_setting_that_names_no_source_is_refused() -> None:
    """It is told before anything is started."""
    with pytest.raises(SettingsError, match="MESHLIB_IDENTITY"):
        meshlib.Settings.from_environment({"MESHLIB_IDENTITY": "magic"})
