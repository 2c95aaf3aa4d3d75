"""One leader at a time, soon another one when it goes, and no two clocks compared."""

import asyncio
import contextlib

from kube.api_server import ApiServer
from meshlib.kube.client import KubeClient
from meshlib.kube.lease import Election
from meshlib.kube.settings import KubeSettings

PATIENCE = 30.0
NAMESPACE = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mesh"}}


class Replica:
    def __init__(self, client: KubeClient, name: str, duration: float = 30.0, renew_within: float = 20.0) -> None:
        self.changed = asyncio.Event()
        self.history: list[bool] = []
        self.election = Election(
            client,
            "mesh",
            "leader",
            name,
            on_change=self._tell,
            duration=duration,
            renew_within=renew_within,
            retry=0.02,
        )
        self.task = asyncio.create_task(self.election.run())

    def _tell(self, leads: bool) -> None:
        self.history.append(leads)
        self.changed.set()

    async def becomes(self, leads: bool) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.election.is_leader is not leads:
                self.changed.clear()
                await self.changed.wait()

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def test_one_of_several_leads_and_a_clean_end_hands_over_at_once(any_api: ApiServer) -> None:
    """The lease is given back, so the next one need not wait until it expires."""
    async with any_api as api, KubeClient(KubeSettings(api.url)) as client:
        api.put(NAMESPACE)
        one = Replica(client, "one")
        await one.becomes(True)
        two = Replica(client, "two")
        await api.asked(len(api.requests) + 10)
        assert not two.election.is_leader
        await one.stop()
        assert not one.election.is_leader
        await two.becomes(True)
        lease = api.find("leases", "leader", "mesh")
        assert lease is not None
        assert lease["spec"]["holderIdentity"] == "two"
        assert lease["spec"]["leaseTransitions"] == 1
        await two.stop()


async def test_the_lease_of_a_dead_leader_expires(any_api: ApiServer) -> None:
    """It is killed: nobody gives anything back, and its lease has not changed for its whole duration."""
    async with any_api as api, KubeClient(KubeSettings(api.url)) as client:
        spec = {"holderIdentity": "dead", "leaseDurationSeconds": 1, "renewTime": "2099-01-01T00:00:00.000000Z"}
        api.put(
            {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": "leader", "namespace": "mesh"},
                "spec": spec,
            }
        )
        one = Replica(client, "one")
        await one.becomes(True)
        await one.stop()


async def test_a_leader_that_can_not_renew_steps_down(any_api: ApiServer) -> None:
    """Before others may take over: two that write at once would undo each other's words."""
    async with any_api as api, KubeClient(KubeSettings(api.url)) as client:
        api.put(NAMESPACE)
        one = Replica(client, "one", duration=3.0, renew_within=0.5)
        await one.becomes(True)
        await api.stop()
        await one.becomes(False)
        await api.start()
        await one.becomes(True)
        await one.stop()
    assert one.history[:3] == [True, False, True]
