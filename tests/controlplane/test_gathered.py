"""After changes of a cluster's objects, is what is in force what it would be if all were read anew?"""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.controlplane import in_force
from meshlib.controlplane.audit import KUBERNETES, AuditLog, Entry
from meshlib.controlplane.gathered import Gathered, Update
from meshlib.controlplane.in_force import InForce, Key, key_of
from meshlib.controlplane.sources import ObjectStore
from meshlib.istio.parse import Parsed, parse_text

NET = "apiVersion: networking.istio.io/v1\n"
SECURITY = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
FORMS: Mapping[str, tuple[str, ...]] = {
    "service a": tuple(
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: a}}\nspec: {{ports: [{{port: {port}}}]}}\n"
        for port in (80, 81)
    ),
    "pod": tuple(f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nstatus: {{podIP: 10.0.0.{n}}}\n" for n in (1, 2)),
    "istio's gateway": (f"{NET}kind: Gateway\nmetadata: {{name: g}}\nspec: {{selector: {{app: g}}}}\n",),
    "gateway": (
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: g}\n"
        "spec: {gatewayClassName: meshlib, listeners: [{name: http, port: 80, protocol: HTTP}]}\n",
    ),
    "rule": (
        f"{NET}kind: VirtualService\nmetadata: {{name: v}}\n"
        "spec: {hosts: [a], http: [{route: [{destination: {host: a}}]}]}\n",
        f"{NET}kind: VirtualService\nmetadata: {{name: v}}\nspec: {{hosts: [a], unknown: 1}}\n",
    ),
    "mirror": (
        f"{NET}kind: EnvoyFilter\nmetadata: {{name: f}}\nspec: {{configPatches: []}}\n",
        f"{NET}kind: EnvoyFilter\nmetadata: {{name: f}}\nspec: {{configPatches: [{{applyTo: LISTENER}}]}}\n",
    ),
    "policy": (
        f"{SECURITY}metadata: {{name: p}}\nspec: {{}}\n",
        f"{SECURITY}metadata: {{name: p}}\nspec: {{wrong: 1}}\n",
        f"{SECURITY}metadata: {{name: p}}\nspec: {{selector: {{matchLabels: {{app: a}}}}, wrong: 2}}\n",
    ),
    "policy without a good name": (f"{SECURITY}metadata: {{name: _}}\nspec: {{wrong: 1}}\n",),
    "another without a good name": (f"{SECURITY}metadata: {{name: '?'}}\nspec: {{wrong: 1}}\n",),
}
PARSED: Mapping[str, tuple[Parsed | None, ...]] = {
    place: (None, *(parse_text(each, "kubernetes") for each in forms)) for place, forms in FORMS.items()
}
CHANGES = st.lists(
    st.lists(
        st.sampled_from(sorted(PARSED)).flatmap(lambda place: st.tuples(st.just(place), st.sampled_from(PARSED[place])))
    ),
    max_size=8,
)


def store_of(update: Update) -> ObjectStore:
    store = ObjectStore(clock=lambda: 0.0)
    store.update_kubernetes(update)
    return store


@settings(deadline=None, max_examples=60)
@given(CHANGES)
def test_news_upon_news_are_what_all_says(changes: list[list[tuple[str, Parsed | None]]]) -> None:
    """Objects and their order, problems, warnings, and what stands for security objects that can't be used."""
    gathered, store = Gathered(), ObjectStore(clock=lambda: 0.0)
    for some in changes:
        for place, parsed in some:
            gathered.put(place, parsed)
        store.update_kubernetes(gathered.news())
        anew = store_of(Update.of_all(gathered.contents()))
        assert store.objects() == anew.objects()
        assert store.problems() == anew.problems()
        assert store.stored() == anew.stored()
        assert not gathered.news().objects


@settings(deadline=None, max_examples=40)
@given(CHANGES, st.integers(0, 3))
def test_the_order_is_kept_by_few_changes_and_by_many(changes: list[list[tuple[str, Parsed | None]]], few: int) -> None:
    """Put in one by one, or sorted anew."""
    store = ObjectStore(clock=lambda: 0.0)
    gathered = Gathered()
    before, in_force.FEW = in_force.FEW, few
    try:
        for some in changes:
            for place, parsed in some:
                gathered.put(place, parsed)
            store.update_kubernetes(gathered.news())
            held = store._contents.in_force()
            assert store.objects() == InForce(held).objects
            assert sorted(map(key_of, store.objects())) == sorted(held)
    finally:
        in_force.FEW = before


def test_only_what_has_changed_is_told_and_written_down() -> None:
    """Of two objects one: the other is neither looked at nor in the audit log; the tuple is the same where nothing is
    new."""
    gathered, log, written = Gathered(), AuditLog(), list[Entry]()
    log.on_entries(written.extend)
    store = ObjectStore(audit=log)
    gathered.put("service a", PARSED["service a"][1])
    gathered.put("rule", PARSED["rule"][1])
    store.update_kubernetes(gathered.news())
    assert not written
    first = store.objects()
    store.update_kubernetes(gathered.news())
    assert store.objects() is first
    gathered.put("service a", PARSED["service a"][2])
    update = gathered.news()
    assert list(update.objects) == [Key("", "Service", "default", "a")]
    store.update_kubernetes(update)
    assert [(each.who, each.object) for each in written] == [(KUBERNETES.who, "Service default/a")]
    assert store.objects()[0] is first[0]


def test_what_is_applied_and_in_folders_counts_as_before() -> None:
    """Kubernetes' form is in force over the folders', and what was applied over both, whichever comes last."""
    store, gathered = ObjectStore(), Gathered()
    text = f"{NET}kind: DestinationRule\nmetadata: {{name: a}}\nspec: {{host: %s}}\n"
    store.set_folder(parse_text(text % "folder", "a.yaml").objects)
    gathered.put("a", parse_text(text % "cluster", "kubernetes"))
    store.update_kubernetes(gathered.news())
    store.apply(text % "applied", "b.yaml")
    gathered.put("a", parse_text(text % "other", "kubernetes"))
    store.update_kubernetes(gathered.news())
    assert [each.spec.host for each in store.objects() if hasattr(each.spec, "host")] == ["applied"]
    store.delete_named("dr", "default", "a")
    assert [each.spec.host for each in store.objects() if hasattr(each.spec, "host")] == ["other"]
    gathered.put("a", None)
    store.update_kubernetes(gathered.news())
    assert [each.spec.host for each in store.objects() if hasattr(each.spec, "host")] == ["folder"]
