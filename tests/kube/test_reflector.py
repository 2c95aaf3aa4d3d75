"""The cluster's objects as a Reflector knows them: all, each change once, whatever happens to the connection."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kube.api_server import ApiServer, crd
from meshlib.kube.client import KubeClient, Resource
from meshlib.kube.errors import Forbidden, NotFound
from meshlib.kube.reflector import Changes, Key, Reflector, Refusals
from meshlib.kube.settings import KubeSettings

CONFIG_MAPS = Resource("ConfigMap", "configmaps")
RULES = Resource("VirtualService", "virtualservices", "networking.istio.io", ("v1", "v1beta1"))
PATIENCE = 30.0


def config_map(name: str, value: str = "") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"value": value}}


class Story:
    """What a Reflector told, in order, as (name, value or None for gone)."""

    def __init__(self, api: ApiServer, client: KubeClient, resource: Resource = CONFIG_MAPS) -> None:
        self.api = api
        self.told: list[tuple[str, str | None]] = []
        self.batches: list[int] = []
        self._changed = asyncio.Event()
        self.reflector = Reflector(client, resource, self._tell, first_pause=0.01, absent=0.05, silence=PATIENCE)

    def _tell(self, changes: Changes) -> None:
        # A real API server keeps some objects of its own, in namespaces of its own.
        changes = {key: given for key, given in changes.items() if key.namespace == "default"}
        self.batches.append(len(changes))
        for key, given in changes.items():
            value = None if given is None else str((given.get("data") or {}).get("value", ""))
            self.told.append((key.name, value))
        self._changed.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not is_so():
                self._changed.clear()
                if not is_so():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), 0.05)

    async def synced(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.reflector.has_synced.wait()

    async def watching(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.api.watched(self.reflector.resource.plural)


@pytest.fixture
async def api(any_api: ApiServer) -> AsyncIterator[ApiServer]:
    async with any_api as server:
        yield server


@pytest.fixture
async def client(api: ApiServer) -> AsyncIterator[KubeClient]:
    async with KubeClient(KubeSettings(api.url)) as found:
        yield found


@contextlib.asynccontextmanager
async def running(api: ApiServer, client: KubeClient, resource: Resource = CONFIG_MAPS) -> AsyncIterator[Story]:
    story = Story(api, client, resource)
    task = asyncio.create_task(story.reflector.run())
    try:
        yield story
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_each_change_is_told_once_and_in_order(api: ApiServer, client: KubeClient) -> None:
    """The first list whole, then one by one what happens."""
    api.put(config_map("a", "1"))
    api.put(config_map("b", "1"))
    async with running(api, client) as story:
        await story.watching()
        api.put(config_map("c", "1"))
        api.put(config_map("a", "2"))
        api.remove("configmaps", "b")
        await story.until(lambda: len(story.told) == 5)
    assert story.told == [("a", "1"), ("b", "1"), ("c", "1"), ("a", "2"), ("b", None)]
    assert story.batches[0] == 2


async def test_a_long_list_comes_in_pages_of_one_moment(api: ApiServer, client: KubeClient) -> None:
    """What is written between two pages comes with the watch, not twice."""
    api.page = 7
    for number in range(40):
        api.put(config_map(f"m{number:02}"))
    async with running(api, client) as story:
        await story.synced()
        assert len(story.told) == 40
    pages = [path for _, path in api.requests if "watch" not in path]
    assert len(pages) == 6
    assert all("limit=500" in path for path in pages)


async def test_a_page_token_that_expires_makes_the_list_anew_in_one_piece(api: ApiServer, client: KubeClient) -> None:
    """Compaction between two pages: 410 for the second."""
    api.page = 7
    for number in range(10):
        api.put(config_map(f"m{number:02}"))
    api.forgets_pages = True
    assert len((await client.list("/api/v1/namespaces/default/configmaps")).items) == 10
    assert len(api.requests) == 3


@pytest.mark.parametrize("how", ["reset_watches", "end_watches"])
async def test_nothing_is_missed_or_doubled_when_a_watch_ends(api: ApiServer, client: KubeClient, how: str) -> None:
    """Resets in the middle of a stream of changes; the next watch goes on where the last one was."""
    async with running(api, client) as story:
        await story.watching()
        for number in range(60):
            api.put(config_map(f"m{number:02}", "x"))
            if number % 10 == 9:
                await asyncio.sleep(0)
                getattr(api, how)()
                await story.watching()
        await story.until(lambda: len(story.told) >= 60)
    assert story.told == [(f"m{number:02}", "x") for number in range(60)]
    assert sum("watch" not in path for _, path in api.requests) == 1


async def test_after_410_only_the_difference_is_told(api: ApiServer, client: KubeClient) -> None:
    """What was changed, made and deleted while the history was lost; and nothing of what stayed."""
    for name in ("stays", "changes", "goes"):
        api.put(config_map(name, "1"))
    async with running(api, client) as story:
        await story.watching()
        api.failures = [(503, {})] * 3
        api.reset_watches()
        api.put(config_map("changes", "2"))
        api.put(config_map("comes", "1"))
        api.remove("configmaps", "goes")
        api.compact()
        await story.until(lambda: len(story.told) >= 6)
        await story.watching()
    assert sorted(story.told[3:], key=str) == [("changes", "2"), ("comes", "1"), ("goes", None)]
    assert story.batches == [3, 3]


async def test_an_error_event_of_410_lists_again(api: ApiServer, client: KubeClient) -> None:
    """The other way in which a server says it: in the stream, with status 200."""
    api.put(config_map("a", "1"))
    async with running(api, client) as story:
        await story.watching()
        status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
        api.tell("configmaps", {"type": "ERROR", "object": status})
        await story.until(lambda: sum("watch" not in path for _, path in api.requests) == 2)
        await story.watching()
        api.put(config_map("a", "2"))
        await story.until(lambda: len(story.told) == 2)
    assert story.told == [("a", "1"), ("a", "2")]


async def test_a_bookmark_moves_the_version_of_a_quiet_kind_on(api: ApiServer, client: KubeClient) -> None:
    """Other kinds are written, history is compacted, and still nobody has to list again."""
    api.put(config_map("a", "1"))
    async with running(api, client) as story:
        await story.watching()
        api.put({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "other"}})
        bookmarked = api.bookmark()
        await story.until(lambda: story.reflector._version == bookmarked)
        api.compact()
        api.end_watches()
        await story.until(lambda: sum("watch" in path for _, path in api.requests) == 2)
        await story.watching()
        api.put(config_map("a", "2"))
        await story.until(lambda: len(story.told) == 2)
    assert sum("watch" not in path for _, path in api.requests) == 1
    assert story.told == [("a", "1"), ("a", "2")]


async def test_repetitions_and_old_events_change_nothing(api: ApiServer, client: KubeClient) -> None:
    """An event twice, an older form late, and a deletion that was long overtaken."""
    old = api.put(config_map("a", "1"))
    async with running(api, client) as story:
        await story.watching()
        new = api.put(config_map("a", "2"))
        for kind, given in (("MODIFIED", new), ("MODIFIED", old), ("DELETED", old), ("ADDED", old)):
            api.tell("configmaps", {"type": kind, "object": given})
        api.put(config_map("b", "1"))
        await story.until(lambda: ("b", "1") in story.told)
    assert story.told == [("a", "1"), ("a", "2"), ("b", "1")]


async def test_a_restarted_server_is_found_again(api: ApiServer, client: KubeClient) -> None:
    """Refused connections while it is away; then the changes of that time."""
    api.put(config_map("a", "1"))
    async with running(api, client) as story:
        await story.watching()
        await api.stop()
        await story.until(lambda: story.reflector.error is not None)
        api.put(config_map("a", "2"))
        await api.start()
        await story.until(lambda: len(story.told) == 2)
        await story.watching()
    assert story.told == [("a", "1"), ("a", "2")]
    assert story.reflector.error is None


async def test_a_restored_etcd_with_older_versions_is_believed(api: ApiServer, client: KubeClient) -> None:
    """Versions that go backwards after a restore: the list counts, and later events are not taken for old ones."""
    api.put(config_map("a", "1"))
    async with running(api, client) as story:
        await story.watching()
        causes = [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
        status = {"kind": "Status", "code": 504, "reason": "Timeout", "details": {"causes": causes}}
        api.restore(50)
        api.put(config_map("a", "restored"))
        api.tell("configmaps", {"type": "ERROR", "object": status})
        await story.until(lambda: ("a", "restored") in story.told)
        await story.watching()
        api.put(config_map("a", "newer"))
        await story.until(lambda: ("a", "newer") in story.told)
    assert story.told == [("a", "1"), ("a", "restored"), ("a", "newer")]


async def test_a_slow_list_holds_back_nothing_else(api: ApiServer, client: KubeClient) -> None:
    """Changes that are written while the list is on its way are in it or in the watch, once."""
    api.list_gate.clear()
    async with running(api, client) as story:
        await story.until(lambda: bool(api.requests))
        api.put(config_map("a", "1"))
        assert not story.reflector.has_synced.is_set()
        api.list_gate.set()
        await story.watching()
        api.put(config_map("b", "1"))
        await story.until(lambda: len(story.told) == 2)
    assert story.told == [("a", "1"), ("b", "1")]


async def test_a_kind_without_a_crd_is_picked_up_when_it_appears(api: ApiServer, client: KubeClient) -> None:
    """Absent is in sync: nobody waits for it. With the CRD its objects come, and with the CRD they go."""
    async with running(api, client, RULES) as story:
        await story.synced()
        assert isinstance(story.reflector.error, NotFound)
        assert story.told == []
        api.put(crd("VirtualService", "virtualservices", "networking.istio.io", "v1beta1"))
        api.put({"apiVersion": "networking.istio.io/v1beta1", "kind": "VirtualService", "metadata": {"name": "r"}})
        story.reflector.look()
        await story.until(lambda: story.told == [("r", "")])
        assert story.reflector.objects[Key("default", "r")]["apiVersion"] == "networking.istio.io/v1beta1"
        await story.watching()
        api.remove("customresourcedefinitions", "virtualservices.networking.istio.io")
        await story.until(lambda: ("r", None) in story.told)
    assert story.reflector.objects == {}


async def test_what_was_allowed_and_no_longer_is_stays(api: ApiServer, client: KubeClient) -> None:
    """A role that was edited wrongly must not empty the mesh; once mended, changes come again."""
    api.put(config_map("a", "1"))
    async with running(api, client) as story:
        await story.watching()
        api.forbidden.add("configmaps")
        api.reset_watches()
        await story.until(lambda: isinstance(story.reflector.error, Forbidden))
        assert Key("default", "a") in story.reflector.objects
        api.forbidden.clear()
        api.put(config_map("a", "2"))
        await story.until(lambda: len(story.told) == 2)
    assert story.told == [("a", "1"), ("a", "2")]


async def test_what_is_refused_to_all_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A server that has just started refuses everybody: some thirty kinds, and over before anybody could act on it."""
    refusals = Refusals(gather=0.05)
    error = Forbidden("403", status=403)
    refusals.add("pods", error)
    refusals.discard("pods")  # it has read its roles
    for title in ("services", "nodes", "services"):
        refusals.add(title, error)
    async with asyncio.timeout(PATIENCE):
        while not caplog.records:  # noqa: ASYNC110 -- a log tells nobody
            await asyncio.sleep(0.01)
    refusals.add("services", error)  # still
    await asyncio.sleep(0.2)
    assert [each.getMessage() for each in caplog.records] == ["the API server refuses to show nodes, services: 403"]


async def test_a_silent_connection_counts_as_dead(api: ApiServer, client: KubeClient) -> None:
    """A server's machine that is gone closes nothing: without a bound, nobody would ever hear of a change again."""
    api.put(config_map("a", "1"))
    story = Story(api, client)
    story.reflector._silence = 0.1
    task = asyncio.create_task(story.reflector.run())
    await story.until(lambda: sum("watch" in path for _, path in api.requests) >= 3)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert story.told == [("a", "1")]
