"""Which objects are in force after folders, applies, deletes and restarts?"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.sources import ObjectStore, StateError, UnknownKind
from meshlib.istio.parse import parse_text
from meshlib.istio.resources import Object


def virtual_service(name: str = "reviews", subset: str = "v1", namespace: str = "") -> str:
    in_namespace = f"\n  namespace: {namespace}" if namespace else ""
    return f"""
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: {name}{in_namespace}
spec:
  hosts: [{name}]
  http:
  - route:
    - destination: {{host: {name}, subset: {subset}}}
"""


BROKEN = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: broken}
spec:
  hosts: [broken]
  http:
  - route:
    - destination: {hots: broken}
"""


def outcomes(results: api.Results) -> list[str]:
    return [f"{result.resource}/{result.name} {result.outcome}" for result in results.results]


def subset_of(store: ObjectStore, name: str = "reviews") -> str:
    (found,) = [each for each in store.objects() if each.name == name]
    return str(found.raw["spec"]["http"][0]["route"][0]["destination"]["subset"])


def set_folder(store: ObjectStore, *texts: str) -> None:
    parsed = parse_text("\n---\n".join(texts), "mesh/all.yaml")
    store.set_folder(parsed.objects, parsed.problems, parsed.warnings)


def test_apply_says_created_then_unchanged_then_configured() -> None:
    """kubectl's three answers, by content: formatting and comments make no difference."""
    store = ObjectStore()
    assert outcomes(store.apply(virtual_service(), "a.yaml")) == ["virtualservice.networking.istio.io/reviews created"]
    again = store.apply("# a comment\n" + virtual_service(), "b.yaml")
    assert outcomes(again) == ["virtualservice.networking.istio.io/reviews unchanged"]
    changed = store.apply(virtual_service(subset="v2"), "a.yaml")
    assert outcomes(changed) == ["virtualservice.networking.istio.io/reviews configured"]
    assert subset_of(store) == "v2"


def test_a_refused_object_hinders_no_good_one_and_leaves_its_last_good_form() -> None:
    """Objects are taken one by one; the message names file, line, object, field and reason."""
    store = ObjectStore()
    store.apply(virtual_service(), "good.yaml")
    bad = virtual_service().replace("route:", "rout:")
    results = store.apply(f"{bad}---\n{virtual_service('ratings')}", "mixed.yaml")
    assert outcomes(results) == ["virtualservice.networking.istio.io/ratings created"]
    (problem,) = results.problems
    assert (problem.source, problem.object, problem.field) == (
        "mixed.yaml:9",
        "VirtualService default/reviews",
        "spec.http[0].rout",
    )
    assert "no such field" in problem.reason
    assert subset_of(store) == "v1"


def test_what_was_applied_wins_over_the_folder_until_it_is_deleted() -> None:
    """And deleting says that the folder's form is back."""
    store = ObjectStore()
    set_folder(store, virtual_service(subset="v1"))
    assert outcomes(store.apply(virtual_service(subset="v2"), "mine.yaml")) == [
        "virtualservice.networking.istio.io/reviews configured"
    ]
    set_folder(store, virtual_service(subset="v3"))
    assert subset_of(store) == "v2"
    (result,) = store.delete_named("vs", "default", "reviews").results
    assert result.outcome == "deleted"
    assert result.note == "the form in mesh/all.yaml:2 is in force again"
    assert subset_of(store) == "v3"


def test_applying_what_the_folder_says_leaves_the_folder_in_charge() -> None:
    """Else a later edit of that very file would have no effect."""
    store = ObjectStore()
    set_folder(store, virtual_service(subset="v1"))
    (result,) = store.apply(virtual_service(subset="v1"), "mesh/all.yaml").results
    assert result.outcome == "unchanged"
    set_folder(store, virtual_service(subset="v2"))
    assert subset_of(store) == "v2"


def test_deleting_a_folders_object_holds_until_the_file_changes() -> None:
    """The file is not ours to edit, so the deletion is remembered, with the form that it was about."""
    store = ObjectStore()
    set_folder(store, virtual_service(subset="v1"))
    (result,) = store.delete(virtual_service(), "any.yaml").results
    assert (result.outcome, result.note) == (
        "deleted",
        "mesh/all.yaml:2 still has it: out of force until it changes there",
    )
    set_folder(store, "# touched, not changed\n", virtual_service(subset="v1"))
    assert store.objects() == ()
    set_folder(store, virtual_service(subset="v2"))
    assert subset_of(store) == "v2"


def test_applying_undoes_the_deletion_of_a_folders_object() -> None:
    """With the folder's own form the folder is in charge again."""
    store = ObjectStore()
    set_folder(store, virtual_service(subset="v1"))
    store.delete_named("virtualservices", "default", "reviews")
    (result,) = store.apply(virtual_service(subset="v1"), "a.yaml").results
    assert result.outcome == "created"
    assert [stored.origin for stored in store.stored()] == ["folder"]


def test_deleting_what_is_not_there_is_not_found() -> None:
    """By name and by file."""
    store = ObjectStore()
    assert [result.outcome for result in store.delete_named("vs", "default", "nope").results] == ["not found"]
    assert [result.outcome for result in store.delete(virtual_service(), "a.yaml").results] == ["not found"]


def test_an_unknown_kind_is_told_so() -> None:
    """A kind nobody knows differs from a kind of which there is nothing."""
    store = ObjectStore()
    assert store.stored(kind="dr") == []
    with pytest.raises(UnknownKind, match="teapot"):
        store.stored(kind="teapot")


def test_the_namespace_given_is_for_objects_that_name_none() -> None:
    """As with kubectl -n."""
    store = ObjectStore()
    text = f"{virtual_service()}---\n{virtual_service('ratings', namespace='prod')}"
    store.apply(text, "a.yaml", namespace="staging")
    assert {(each.namespace, each.name) for each in store.objects()} == {("staging", "reviews"), ("prod", "ratings")}


def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    """Applied and deleted objects, their sources and ages; the lock is free again after close()."""
    now = 1000.0
    store = ObjectStore(tmp_path, clock=lambda: now)
    set_folder(store, virtual_service("details"))
    store.apply(virtual_service(subset="v2"), "/home/me/mine.yaml")
    store.delete_named("vs", "default", "details")
    store.close()
    restarted = ObjectStore(tmp_path, clock=lambda: 2000.0)
    assert subset_of(restarted) == "v2"
    set_folder(restarted, virtual_service("details"))
    (stored,) = restarted.stored()
    assert (stored.name, stored.origin, stored.source, stored.created) == (
        "reviews",
        "applied",
        "/home/me/mine.yaml:2",
        1000.0,
    )
    restarted.close()


def test_two_control_planes_can_not_share_a_state_folder(tmp_path: Path) -> None:
    """Each would overwrite what the other was told."""
    store = ObjectStore(tmp_path)
    with pytest.raises(StateError, match="in use by another control plane"):
        ObjectStore(tmp_path)
    store.close()


def test_a_damaged_state_file_stops_the_start(tmp_path: Path) -> None:
    """To go on without it would drop what users applied, and seal that at the next change."""
    (tmp_path / "objects.json").write_text('{"applied": [')
    with pytest.raises(StateError, match=r"objects\.json is damaged"):
        ObjectStore(tmp_path)
    (tmp_path / "objects.json").unlink()
    ObjectStore(tmp_path).close()


def test_a_kept_object_that_is_no_longer_understood_stays_in_the_file(tmp_path: Path) -> None:
    """It is listed as a problem; a version that understands it finds it again."""
    store = ObjectStore(tmp_path)
    store.apply(virtual_service(), "a.yaml")
    store.close()
    file = tmp_path / "objects.json"
    kept = json.loads(file.read_text())
    kept["applied"].append({"source": "b.yaml:1", "created": 1, "changed": 1, "yaml": BROKEN})
    file.write_text(json.dumps(kept))
    restarted = ObjectStore(tmp_path)
    (problem,) = restarted.problems()
    assert (problem.source, problem.object) == ("b.yaml:1", "VirtualService default/broken")
    restarted.apply(virtual_service(subset="v2"), "a.yaml")
    assert [each["source"] for each in json.loads(file.read_text())["applied"]] == ["a.yaml:2", "b.yaml:1"]
    restarted.close()


def test_what_can_not_be_kept_is_not_said_to_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the answer is an error, nothing has changed, and no half file is left."""
    store = ObjectStore(tmp_path)
    store.apply(virtual_service(), "a.yaml")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(StateError, match="No space left on device; nothing was changed"):
            store.apply(virtual_service(subset="v2"), "a.yaml")
    assert subset_of(store) == "v1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "objects.json"]
    store.close()


def test_listeners_hear_of_changes_only() -> None:
    """An apply that changes nothing wakes nobody."""
    store = ObjectStore()
    told: list[int] = []
    store.on_change(lambda: told.append(len(store.objects())))
    store.apply(virtual_service(), "a.yaml")
    store.apply(virtual_service(), "a.yaml")
    store.apply(BROKEN, "b.yaml")
    store.delete_named("vs", "default", "reviews")
    store.delete_named("vs", "default", "reviews")
    set_folder(store, virtual_service("details"))
    assert told == [1, 0, 1]


def test_warnings_reach_whoever_applies_and_stay_listed() -> None:
    """An object whose effect is less than its author thinks is in force, and says so, while it is."""
    store = ObjectStore()
    given = """
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: nothing}
spec: {}
"""
    results = store.apply(given, "filter.yaml")
    assert outcomes(results) == ["envoyfilter.networking.istio.io/nothing created"]
    assert [(warning.level, warning.source) for warning in results.warnings] == [("warning", "filter.yaml:2")]
    assert len(store.problems()) == 1
    store.delete_named("envoyfilters", "default", "nothing")
    assert store.problems() == ()


def test_a_folder_applied_at_once_costs_no_more_for_each_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 objects with a warning each took half a minute, when every object looked through all warnings."""
    looked = 0
    title = Object.title.fget  # type: ignore[attr-defined]

    def counted(each: Object) -> str:
        nonlocal looked
        looked += 1
        return str(title(each))

    def filters(count: int) -> str:
        kind = "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\n"
        return "---\n".join(f"{kind}metadata: {{name: f{number}}}\nspec: {{}}\n" for number in range(count))

    monkeypatch.setattr(Object, "title", property(counted))
    store = ObjectStore()
    results = store.apply(filters(50), "filters.yaml")
    assert len(results.warnings) == len(store.problems()) == 50
    assert looked <= 50 * 5


def test_threads_that_apply_at_once_lose_nothing(tmp_path: Path) -> None:
    """The admin API applies on worker threads."""
    store = ObjectStore(tmp_path)
    names = [f"service-{number}" for number in range(8)]
    threads = [threading.Thread(target=store.apply, args=(virtual_service(name), "a.yaml")) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    restarted = ObjectStore(tmp_path)
    assert [each.name for each in restarted.objects()] == names
    restarted.close()
