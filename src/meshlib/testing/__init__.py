"""How does my service behave while others fail? FakeMesh: the real engine in front of fake services that do as told.

Under pytest it is the fixture `mesh` (meshlib.pytest_plugin, named in `pytest_plugins`).
"""

from meshlib.testing.mesh import CallMade, FakeMesh
from meshlib.testing.script import Received, Response
from meshlib.testing.services import FakeGrpcService, FakeService

__all__ = ["CallMade", "FakeGrpcService", "FakeMesh", "FakeService", "Received", "Response"]
