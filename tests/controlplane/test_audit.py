"""Is every change written down before it counts, by whom, as it was and as it is?"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from controlplane.access import VIRTUAL_SERVICE, YAML, client_of, running, settings_of
from meshlib.controlplane.audit import MOST, Actor, AuditLog, Entry
from meshlib.controlplane.history import History
from meshlib.controlplane.private_files import StateError
from meshlib.controlplane.sources import ObjectStore
from meshlib.istio.parse import parse_text

ALICE = Actor("token:alice", "token", "10.0.0.1:4711", "meshctl/0.1.0 (alice)")
RULE = VIRTUAL_SERVICE.replace("NAMESPACE", "default")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_change_is_a_line_with_both_forms(tmp_path: Path) -> None:
    """Created, changed, deleted; what changes nothing is no line."""
    file = tmp_path / "audit.jsonl"
    store = ObjectStore(tmp_path / "state", audit=AuditLog(file), clock=lambda: 1000.0)
    store.apply(RULE, "mine.yaml", by=ALICE)
    store.apply(RULE, "mine.yaml", by=ALICE)
    store.apply(RULE.replace("2s", "3s"), "mine.yaml", by=ALICE)
    store.delete_named("vs", "default", "reviews", by=ALICE)
    store.delete_named("vs", "default", "reviews", by=ALICE)
    store.close()
    created, changed, deleted = lines(file)
    for each in (created, changed, deleted):
        assert (each["who"], each["method"], each["address"], each["agent"]) == ALICE
        assert (each["object"], each["namespace"], each["outcome"]) == (
            "VirtualService default/reviews",
            "default",
            "ok",
        )
        assert (each["at"], each["source"]) == (1000.0, "mine.yaml:2")
    assert [each["action"] for each in (created, changed, deleted)] == ["apply", "apply", "delete"]
    assert created["before"] == deleted["after"] == ""
    assert created["after"] == changed["before"]
    assert "3s" in changed["after"] and changed["after"] == deleted["before"]


def test_edits_of_files_and_of_the_cluster_are_written_down(tmp_path: Path) -> None:
    """By whom nobody knows here; what is there at the start is no change."""
    audit = AuditLog()
    store = ObjectStore(audit=audit)
    first, second = (parse_text(text, "reviews.yaml").objects for text in (RULE, RULE.replace("2s", "5s")))
    store.set_folder(first)
    store.set_folder(first)
    assert audit.entries() == []
    store.set_folder(second)
    store.set_folder(())
    assert [(each.who, each.action, bool(each.before), bool(each.after)) for each in audit.entries()] == [
        ("folder", "folder", True, True),
        ("folder", "folder", True, False),
    ]


def test_what_can_not_be_written_down_is_not_done(tmp_path: Path) -> None:
    """A full disk, a folder that is gone: the change is refused and nothing is in force."""
    file = tmp_path / "log" / "audit.jsonl"
    file.parent.mkdir()
    store = ObjectStore(audit=AuditLog(file))
    file.unlink()
    file.parent.rmdir()
    with pytest.raises(StateError, match="nothing was changed"):
        store.apply(RULE, "mine.yaml", by=ALICE)
    assert store.objects() == ()


def test_a_change_that_fails_after_all_is_told_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line was written first; a second one takes it back."""
    audit, history = AuditLog(tmp_path / "audit.jsonl"), History()
    audit.on_entries(history.add)
    store = ObjectStore(tmp_path / "state", audit=audit)

    def full(contents: object) -> None:
        raise StateError("full")

    assert store._state is not None
    monkeypatch.setattr(store._state, "write", full)
    with pytest.raises(StateError, match="full"):
        store.apply(RULE, "mine.yaml", by=ALICE)
    assert [each["outcome"] for each in lines(tmp_path / "audit.jsonl")] == ["ok", "failed"]
    assert store.objects() == ()
    assert history.since() == []
    store.close()


def test_the_log_is_read_again_and_may_be_renamed(tmp_path: Path) -> None:
    """A restart knows the last entries, a torn line is skipped, and a renamed file is begun anew."""
    file = tmp_path / "audit.jsonl"
    log = AuditLog(file, clock=lambda: 1000.0)
    log.add([Entry(float(number), *ALICE, "apply", object=f"Service default/{number}") for number in range(MOST + 5)])
    with file.open("a") as torn:
        torn.write('{"at": 1, "who":')
    again = AuditLog(file)
    assert len(again.entries()) == MOST - 1
    assert again.entries(limit=1)[0].object == f"Service default/{MOST + 4}"
    assert again.entries(since=float(MOST + 3))[0].at == MOST + 3
    file.rename(tmp_path / "audit.jsonl.1")
    log.write(ALICE, "sign in")
    assert [each["action"] for each in lines(file)] == ["sign in"]


def test_a_log_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """Who did what is not everybody's."""
    (tmp_path / "audit.jsonl").write_text("")
    (tmp_path / "audit.jsonl").chmod(0o644)
    with pytest.raises(StateError, match="read by others"):
        AuditLog(tmp_path / "audit.jsonl")


async def test_a_restart_forgets_nothing_of_who_did_what(tmp_path: Path) -> None:
    """Over the admin API: who was denied, too; the object's page of history has the name."""
    settings = settings_of(tmp_path)
    async with running(settings) as plane, client_of(plane, "olaf") as olaf, client_of(plane, "alice") as alice:
        assert (await olaf.post("/v1/apply?source=mine.yaml", content=RULE, headers=YAML)).status_code == 200
        elsewhere = RULE.replace("default", "prod")
        assert (await olaf.post("/v1/apply", content=elsewhere, headers=YAML)).status_code == 403
        async with asyncio.timeout(30):
            (change,) = (await alice.get("/v1/changes")).json()["changes"]
        assert (change["who"], change["object"]) == ("token:olaf", "VirtualService default/reviews")
    async with running(settings) as plane, client_of(plane, "alice") as alice:
        found = (await alice.get("/v1/audit")).json()["entries"]
        assert [(each["who"], each["outcome"], each["object"]) for each in found] == [
            ("token:olaf", "ok", "VirtualService default/reviews"),
            ("token:olaf", "denied", "VirtualService prod/reviews"),
        ]
        assert (await alice.get("/v1/audit?object=prod&limit=1")).json()["entries"] == found[1:]
        assert (await alice.get("/v1/audit?limit=x")).status_code == 400


async def test_tokens_and_roots_are_changes_too(tmp_path: Path) -> None:
    """Join tokens made and revoked, each step of a rotation, and one that was refused; no secret with them."""
    async with running(settings_of(tmp_path)) as plane, client_of(plane, "alice") as alice:
        query = {"namespace": "default", "service_account": "reviews", "ttl": "60"}
        made = (await alice.post("/v1/tokens", params=query, headers=YAML)).json()
        await alice.post("/v1/tokens/revoke", params={"id": made["id"]}, headers=YAML)
        assert (await alice.post("/v1/ca/rotate?step=switch", headers=YAML)).status_code == 409
        assert (await alice.post("/v1/ca/rotate?step=begin", headers=YAML)).status_code == 200
        found = (await alice.get("/v1/audit")).json()["entries"]
        assert (await alice.get("/v1/changes")).json()["changes"] == []
    assert [(each["action"], each["outcome"]) for each in found] == [
        ("token create", "ok"),
        ("token revoke", "ok"),
        ("ca switch", "ok"),
        ("ca switch", "failed"),
        ("ca begin", "ok"),
    ]
    assert made["text"].split(".")[1] not in json.dumps(found)
