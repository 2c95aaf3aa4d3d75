"""Which API server do the tests get? The stand-in always; a real one too, once a session, where its programs are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kube.api_server import ApiServer
from kube.real_api import RealApi
from kube.real_cluster import HOW, RealCluster, own_address, programs


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[RealCluster]:
    if programs() is None:
        pytest.skip(HOW)
    if not own_address():
        pytest.skip("this machine has no address but loopback, and an API server takes that of no endpoint")
    with RealCluster() as cluster:
        yield cluster


@pytest.fixture
def real_cluster(running_cluster: RealCluster) -> Iterator[RealCluster]:
    """A real API server, with nothing in it. It runs on for the next test; what this one has made is gone by then."""
    try:
        yield running_cluster
    finally:
        if not running_cluster.is_running:
            running_cluster.start()
        running_cluster.wipe()


@pytest.fixture(params=["stand-in", "real"])
def any_api(request: pytest.FixtureRequest) -> ApiServer | RealApi:
    """Not started yet. What passes on the stand-in passes on a real API server, or the stand-in is to be mended."""
    if request.param == "stand-in":
        return ApiServer()
    return RealApi(request.getfixturevalue("real_cluster"))
