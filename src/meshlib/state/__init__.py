"""What changes while calls run? Counters, budgets, buckets and breakers, each with the lock that guards it.

Configuration is replaced whole; these objects are carried over by reference from one Live to the next, so an update
forgets neither calls in flight nor ejections. A lock is held for a few additions, never across I/O.
"""

from meshlib.state.counters import NEVER, ClusterState, EndpointState

__all__ = ["NEVER", "ClusterState", "EndpointState"]
