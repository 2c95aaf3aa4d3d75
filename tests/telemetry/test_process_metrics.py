"""What does a process tell of its own place in the mesh: of the control plane, and of its certificate?"""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cli.test_tap import eventually
from dashboard.pictured_town import Town
from meshlib.mesh import Mesh, Settings
from meshlib.model import FeedState, HeldCertificate, ProcessState
from meshlib.policy.live import empty_live
from meshlib.telemetry.gauges import values
from meshlib.telemetry.prometheus import Counted, merged
from meshlib.telemetry.recorder import Recorder, Value


def counted(mesh: Mesh) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    assert mesh.telemetry is not None
    text = mesh.telemetry.exposition()[1].decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("meshlib_")
    }


def test_the_control_plane_is_told_of(tmp_path: Path) -> None:
    """A real one: connected, what was accepted and when; and that it is gone."""
    with ExitStack() as stack:
        town = stack.enter_context(Town(tmp_path))
        with Mesh(Settings(control_plane=town.target, cache_dir="-")) as mesh:
            mesh.start()
            mesh.resolve("nowhere:80")
            connected = ("meshlib_xds_connected", ())
            eventually(lambda: counted(mesh).get(connected) == 1.0, "it is connected")
            accepted = ("meshlib_xds_updates_total", (("result", "accepted"), ("type", "LDS")))
            eventually(lambda: counted(mesh).get(accepted, 0) >= 1, "the answer has come")
            told = counted(mesh)
            assert told["meshlib_xds_connections_total", ()] == 1
            assert abs(told["meshlib_xds_last_update_timestamp_seconds", ()] - time.time()) < 60
            stack.close()
            eventually(lambda: counted(mesh).get(connected) == 0.0, "it is not connected any more")


def test_what_was_refused_and_until_when_the_certificate_holds() -> None:
    """By their names."""
    feed = FeedState(True, 2, (("CDS", 3),), (("RDS", 1),), 1000.0)
    own = HeldCertificate("default", "2a", 1000, 2000)
    found = values(Recorder(lambda: 0.0), empty_live(random.Random()), "1", ProcessState(feed, 2000.0, 4, (own,)))
    told = {(each.name, each.labels): (each.value, each.is_counter) for each in found}
    assert told["meshlib_certificate_expiry_timestamp_seconds", ()] == (2000.0, False)
    assert told["meshlib_certificate_rotations_total", ()] == (4, True)
    said = (("resource", "default"), ("serial", "2a"), ("not_before", "1000"), ("not_after", "2000"))
    assert told["meshlib_certificate_info", said] == (1, False)
    assert told["meshlib_xds_updates_total", (("result", "refused"), ("type", "RDS"))] == (1, True)
    assert told["meshlib_xds_updates_total", (("result", "accepted"), ("type", "CDS"))] == (3, True)


def test_of_several_workers_the_worst_is_told() -> None:
    """One that is cut off is seen beside those that are not; dates are not added up."""

    def worker(connected: float, expires: float) -> Counted:
        told = (("meshlib_xds_connected", connected), ("meshlib_certificate_expiry_timestamp_seconds", expires))
        return Counted((), [Value(name, (), value, False) for name, value in told])

    found = {each.name: each.value for each in merged([worker(1, 50.0), worker(0, 40.0), worker(1, 60.0)]).values}
    assert found == {"meshlib_xds_connected": 0, "meshlib_certificate_expiry_timestamp_seconds": 40.0}
