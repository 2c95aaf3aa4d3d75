"""What holds for every test: properties are judged by what they find, never by how busy the machine is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["kube.fixtures"]

settings.register_profile("meshlib", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("meshlib")

FILL_THE_MACHINE = (
    "tests/benchmarks/",
    "tests/chaos/",
    "tests/dashboard/",
    "tests/e2e/",
    "tests/observability/",
    "tests/docs/test_tutorial.py",
)
"""They run a dozen processes or a browser, or measure: one at a time, and from the start, since they take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(FILL_THE_MACHINE))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, as `make test` asks for it, with what fills the machine as if it were one file."""
    from xdist.scheduler import LoadFileScheduling

    class InTurn(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "" if nodeid.startswith(FILL_THE_MACHINE) else super()._split_scope(nodeid)

    return InTurn(config, log) if config.getoption("dist") == "loadfile" else None
