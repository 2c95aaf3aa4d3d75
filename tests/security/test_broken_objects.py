"""Claims about security objects that can't be read from the start on: what they may select is refused, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from meshlib.cli.admin_client import AdminClient
from meshlib.cli.stored import objects_of
from meshlib.controlplane import admin_api as api
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.controlplane.sources import ObjectStore
from meshlib.istio.folder import Folder
from meshlib.istio.parse import parse_value
from meshlib.istio.translate import translate
from meshlib.mesh import Mesh
from meshlib.model import Headers, Node, NodeKind, Peer, Request, SpiffeId, TlsMode, Workload
from meshlib.policy.admission import Allow
from meshlib.policy.guard import Guard

POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reviews}
spec:
  selector: {matchLabels: {app: reviews}}
  rules: [{to: [{operation: {method: ["GET"]}}]}]
"""
"""`method` is `methods`: everybody would come in if it were passed over."""
MENDED = POLICY.replace("method:", "methods:")
PROBLEM = "AuthorizationPolicy default/reviews: spec.rules[0].to[0].operation.method: there is no such field"
OTHER = MENDED.replace("GET", "HEAD").replace("reviews", "ratings")


async def _asgi_app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def ask(mesh: Mesh, path: str = "/") -> int:
    transport = httpx.ASGITransport(mesh.asgi(_asgi_app))
    async with httpx.AsyncClient(transport=transport, base_url="http://reviews") as client:
        return (await client.get(path)).status_code


async def until(mesh: Mesh, status: int) -> None:
    """A request is the only way to ask whether a rule has come."""
    async with asyncio.timeout(30):
        while await ask(mesh) != status:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@contextmanager
def serving(control_plane: str, app: str) -> Iterator[Mesh]:
    labels = {"app": app}
    with meshlib.connect(
        control_plane, service=app, labels=labels, cache_dir="-", telemetry="off", probe_paths=("/healthz",)
    ) as mesh:
        yield mesh


@asynccontextmanager
async def control_plane(folder: Path) -> AsyncIterator[ControlPlane]:
    settings = ControlPlaneSettings(folders=(folder,), xds=("127.0.0.1", 0), admin=("127.0.0.1", 0))
    plane = ControlPlane(settings)
    await plane.start()
    try:
        yield plane
    finally:
        await plane.stop()


async def _claim(at: str, folder: Path) -> None:
    with serving(at, "reviews") as reviews, serving(at, "ratings") as ratings, serving(at, "details") as details:
        await until(reviews, 403)
        assert await ask(reviews, "/healthz") == 200
        assert (await ask(ratings), await ask(details)) == (403, 200)  # HEAD alone is what the other policy says
        (folder / "reviews.yaml").write_text(MENDED)
        await until(reviews, 200)
        (folder / "reviews.yaml").write_text(POLICY)
        (folder / "ratings.yaml").unlink()
        await until(ratings, 200)
        assert await ask(reviews) == 200  # the last good form
        (folder / "reviews.yaml").unlink()
        (folder / "again.yaml").write_text(POLICY)
        await until(reviews, 403)
        (folder / "again.yaml").unlink()
        await until(reviews, 200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "reviews.yaml").write_text(POLICY)
    (tmp_path / "ratings.yaml").write_text(OTHER)
    return tmp_path


async def test_a_process_with_a_folder_refuses_until_it_is_mended_or_removed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the broken policy does not select is as it was, and the log names object, field and consequence."""
    await _claim(str(folder), folder)
    assert f"{PROBLEM}; until it is mended or removed, every call to namespace default with app=reviews" in caplog.text


async def test_a_control_plane_with_a_folder_has_it_refused_over_xds(folder: Path) -> None:
    """The same, and the problem stands where a person looks. What is applied mended opens; broken, it is refused."""
    async with control_plane(folder) as plane:
        await _claim(plane.xds_address, folder)
        (folder / "reviews.yaml").write_text(POLICY)
        with serving(plane.xds_address, "reviews") as reviews:
            await until(reviews, 403)
            with AdminClient(plane.admin_url) as client:  # what `meshctl authz check` judges by
                stored = await asyncio.to_thread(objects_of, client)
            assert not is_open(_seen(stored, "reviews", "default"))
            async with httpx.AsyncClient(base_url=plane.admin_url, trust_env=False) as admin:
                told = (await admin.get("/v1/problems")).text
                assert PROBLEM.split(": ")[1] in told
                assert "every call to namespace default with app=reviews is refused" in told
                yaml = {"content-type": api.YAML}
                before = (await admin.get("/v1/objects")).json()
                assert (await admin.post("/v1/apply", content=POLICY, headers=yaml)).status_code == 422
                assert (await admin.get("/v1/objects")).json() == before
                assert await ask(reviews) == 403
                assert (await admin.post("/v1/apply", content=MENDED, headers=yaml)).is_success
                await until(reviews, 200)


# What is selected


def inbound_of(tmp_path: Path, text: str | bytes, app: str = "reviews", namespace: str = "default") -> Any:
    (tmp_path / "it.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return _seen(Folder([tmp_path]).read().objects, app, namespace)


def _seen(objects: Any, app: str, namespace: str) -> Any:
    workload = Workload(app, namespace, app, app, labels=(("app", app),))
    return translate(objects, (), Node("n", workload)).snapshot.inbound[0]


def is_open(inbound: Any) -> bool:
    who = Peer(SpiffeId.of("cluster.local", "default", "sleep"), True, "10.0.0.9", 8080)
    return isinstance(Guard([inbound]).admit(Request("GET", "http", "reviews", "/", Headers([])), who, 0.0), Allow)


def refused(tmp_path: Path, text: str | bytes) -> str:
    """Of reviews and ratings in default, and reviews in shop, those that nobody may call."""
    where = (("reviews", "default"), ("ratings", "default"), ("reviews", "shop"))
    found = [f"{app}.{home}" for app, home in where if not is_open(inbound_of(tmp_path, text, app, home))]
    return " ".join(found)


ONE, HOME, ALL = "reviews.default", "reviews.default ratings.default", "reviews.default ratings.default reviews.shop"


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        (POLICY, ONE),
        (POLICY.replace("AuthorizationPolicy", "RequestAuthentication"), ONE),
        (POLICY.replace("security.istio.io/v1", "security.istio.io/v9"), ONE),
        (POLICY.replace("apiVersion: security.istio.io/v1\n", ""), ONE),
        (POLICY.replace("AuthorizationPolicy", "AuthorisationPolicy"), ONE),
        (POLICY.replace("kind: AuthorizationPolicy\n", ""), ONE),
        (POLICY.replace("{name: reviews}", "{name: Reviews!}"), ONE),
        (POLICY.replace("matchLabels", "matchlabels"), HOME),
        (POLICY.replace("selector:", "selectors:"), HOME),
        (POLICY.replace("app: reviews}", "app: '*'}"), HOME),
        (POLICY.replace("  selector:", "  targetRefs: [{kind: Service, name: reviews}]\n  selector:"), HOME),
        (
            POLICY.replace("selector: {matchLabels: {app: reviews}}", "targetRefs: [{kind: Service, name: reviews}]"),
            ONE,
        ),
        (
            POLICY.replace("selector: {matchLabels: {app: reviews}}", "targetRefs: [{kind: Servise, name: reviews}]"),
            HOME,
        ),
        (POLICY.replace("{name: reviews}", "{name: reviews, namespace: shop}"), "reviews.shop"),
        (POLICY.replace("{name: reviews}", "{name: reviews, namespace: istio-system}"), "reviews.default reviews.shop"),
        (POLICY.replace("{name: reviews}", "{name: reviews, namespce: shop}"), "reviews.default reviews.shop"),
        (POLICY.replace("{name: reviews}", "{name: reviews, namespace: [shop]}"), "reviews.default reviews.shop"),
        (POLICY.replace("{name: reviews}", "[]"), "reviews.default reviews.shop"),
        (POLICY.replace("spec:\n", "spec: 5\nnothing:\n"), HOME),
        ("apiVersion: v1\nkind: List\nitems: [{kind: AuthorizationPolicy}, 5]\n", HOME),
        # What is no YAML: what was whole before it broke.
        (POLICY + "  rules: [\n", ONE),
        (POLICY + " more: 1\n", HOME),
        (POLICY.replace("rules:", "\trules:"), HOME),
        (POLICY.replace("metadata: {name: reviews}", "metadata:\n  name: reviews\n namespace: shop"), ALL),
        (POLICY.replace("spec:", "spec: {}\nspec:"), HOME),
        (POLICY + POLICY.replace("reviews", "ratings"), ALL),
        ('{"kind": "AuthorizationPolicy", "metadata": {"name": "x"', ALL),
        ("- " + POLICY.replace("\n", "\n  "), ALL),
        (POLICY.encode() + b"# \xff\n", ALL),
        # What refuses nothing when it is well, and what is nobody's rule.
        (POLICY.replace("  rules", "  action: AUDIT\n  rules"), ""),
        (POLICY.replace("reviews}\n", "reviews, annotations: {istio.io/dry-run: 'true'}}\n", 1), ""),
        (POLICY.replace("security.istio.io/v1", "policy.linkerd.io/v1alpha1"), ""),
        ("apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: x}\nspec: {hots: []}\n", ""),
        ("# kind: AuthorizationPolicy\n]\n", ""),
    ],
)
def test_what_can_be_read_of_its_selector_says_who_is_closed(tmp_path: Path, text: str | bytes, closed: str) -> None:
    """Else its namespace, else everybody."""
    assert refused(tmp_path, text) == closed


@pytest.mark.parametrize(
    ("spec", "strict"),
    [
        ("{selector: {matchLabels: {app: reviews}}, mtls: {mode: SRICT}}", ONE),
        ("{selector: {matchLabel: {app: reviews}}, mtls: {mode: STRICT}}", HOME),
        ("{mtls: STRICT}", HOME),
    ],
)
def test_a_broken_peer_authentication_is_strict(tmp_path: Path, spec: str, strict: str) -> None:
    """Whatever others say of the same workloads: nobody knows which of them it would have been above."""
    head = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
    good = f"{head}metadata: {{name: a}}\nspec: {{mtls: {{mode: DISABLE}}}}\n"
    text = f"{head}metadata: {{name: it}}\nspec: {spec}\n---\n{good}"
    where = (("reviews", "default"), ("ratings", "default"), ("reviews", "shop"))
    modes = {f"{app}.{home}": inbound_of(tmp_path, text, app, home).tls for app, home in where}
    assert " ".join(name for name, mode in modes.items() if mode is TlsMode.STRICT) == strict


def test_a_good_form_elsewhere_counts(tmp_path: Path) -> None:
    """Whichever file comes first."""
    (tmp_path / "a.yaml").write_text(POLICY)
    (tmp_path / "b.yaml").write_text(MENDED)
    contents = Folder([tmp_path]).read()
    assert is_open(_seen(contents.objects, "reviews", "default"))
    assert [str(each).partition(": ")[2] for each in contents.problems] == [PROBLEM]


def test_two_broken_forms_close_both(tmp_path: Path) -> None:
    """Of one name, with two selectors."""
    (tmp_path / "a.yaml").write_text(POLICY)
    (tmp_path / "b.yaml").write_text(POLICY.replace("app: reviews", "app: ratings"))
    objects = Folder([tmp_path]).read().objects
    assert not is_open(_seen(objects, "reviews", "default"))
    assert not is_open(_seen(objects, "ratings", "default"))
    assert is_open(_seen(objects, "details", "default"))


def test_a_text_that_is_no_yaml_any_more_keeps_the_last_good_form(tmp_path: Path) -> None:
    """And closes what is new in it."""
    (tmp_path / "it.yaml").write_text(MENDED)
    folder = Folder([tmp_path])
    folder.read()
    (tmp_path / "it.yaml").write_text(MENDED + "]\n")
    assert is_open(_seen(folder.read().objects, "reviews", "default"))
    (tmp_path / "it.yaml").write_text(MENDED + "---\n" + POLICY.replace("reviews", "ratings"))
    objects = folder.read().objects
    assert is_open(_seen(objects, "reviews", "default"))
    assert not is_open(_seen(objects, "ratings", "default"))


def test_a_gateway_is_closed_too(tmp_path: Path) -> None:
    """By its labels, as any workload."""
    gateway = (
        "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: g, namespace: istio-system}\n"
        "spec: {selector: {app: reviews}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}\n"
    )
    (tmp_path / "it.yaml").write_text(
        gateway + "---\n" + POLICY.replace("{name: r", "{namespace: istio-system, name: r")
    )
    workload = Workload("g", "istio-system", "g", "g", labels=(("app", "reviews"),))
    (listener,) = translate(
        Folder([tmp_path]).read().objects, (), Node("n", workload, NodeKind.ROUTER)
    ).snapshot.listeners
    assert [rule.name for rule in listener.access.rules] == ["ns[istio-system]-AuthorizationPolicy[reviews]-unusable"]


def test_a_rule_tells_which_object_and_field_it_stands_for(tmp_path: Path) -> None:
    """The log of refusals shows it."""
    (rule,) = inbound_of(tmp_path, POLICY).access.rules
    assert rule.origin == (
        f"AuthorizationPolicy default/reviews ({tmp_path}/it.yaml:6), which can't be used: "
        "spec.rules[0].to[0].operation.method: there is no such field"
    )


def test_what_was_applied_and_can_no_longer_be_read_is_closed_at_a_restart(tmp_path: Path) -> None:
    """As by a later version that takes less; deleting it, or applying it anew, opens, then and after the next."""
    for mend in (lambda store: store.delete_named("AuthorizationPolicy", "default", "reviews"),
                 lambda store: store.apply(MENDED, "by hand")):  # fmt: skip
        store = ObjectStore(tmp_path)
        store.apply(MENDED, "by hand")
        store.close()
        kept = tmp_path / "objects.json"
        kept.write_text(kept.read_text().replace("methods", "method"))
        for _ in range(2):
            store = ObjectStore(tmp_path)
            assert not is_open(_seen(store.objects(), "reviews", "default"))
            store.apply(OTHER, "by hand")
            store.close()
        store = ObjectStore(tmp_path)
        mend(store)
        assert is_open(_seen(store.objects(), "reviews", "default"))
        store.close()
        store = ObjectStore(tmp_path)
        assert is_open(_seen(store.objects(), "reviews", "default"))
        store.close()


def test_what_an_api_server_sends_is_read_in_the_same_way() -> None:
    """One object that was decoded already."""
    broken = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "it", "namespace": "shop"},
        "spec": {"actoin": "DENY"},
    }
    parsed = parse_value(broken, "kubernetes")
    assert not parsed.objects
    assert not is_open(_seen(parsed.closed, "reviews", "shop"))
    assert is_open(_seen(parsed.closed, "reviews", "default"))
