"""What must hold in an EnvoyFilter, whatever becomes of it? As the rules of Istio's CRD have it."""

from __future__ import annotations

from meshlib.istio import resources as r
from meshlib.istio.problems import Refused


def check_envoy_filter(spec: r.EnvoyFilter) -> None:
    """Raises Refused."""
    for index, patch in enumerate(spec.config_patches):
        at = f"configPatches[{index}].match"
        waypoint, context = patch.match.get("waypoint"), patch.match.get("context")
        others = [name for name in ("listener", "routeConfiguration", "cluster") if patch.match.get(name) is not None]
        if (waypoint is not None and context != "WAYPOINT") or (others and context == "WAYPOINT"):
            raise Refused(at, "a waypoint is matched with context WAYPOINT, and nothing else with it")
        port = waypoint.get("portNumber") if isinstance(waypoint, dict) else None
        if port is not None and (not isinstance(port, int) or not 0 < port < 65536):
            raise Refused(f"{at}.waypoint.portNumber", f"is no port: {port!r}")
