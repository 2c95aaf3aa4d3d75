"""What is wrong, or odd, with this configuration as a whole? Istio's own messages, by its own codes.

`parse` looks at one object; here they are looked at together, as `istioctl analyze` does: references that lead nowhere,
rules that nobody can reach, objects that contradict each other. Sources: istio.io/docs/reference/config/analysis, and
istio/istio pkg/config/analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.analyze import (
    clients,
    conditions,
    deployments,
    deprecations,
    destinations,
    entries,
    gateways,
    metadata,
    namespaces,
    references,
    routes,
    selectors,
    services,
)
from meshlib.istio.analyze.messages import SCHEMA_ERROR, SCHEMA_WARNING, Level, Message, Suppression
from meshlib.istio.analyze.scene import Scene
from meshlib.istio.problems import ConfigurationWarning

__all__ = ["Level", "Message", "Suppression", "analyze"]

_CHECKS: tuple[Callable[[Scene], Iterator[Message]], ...] = (
    references.check,
    routes.check,
    clients.check,
    destinations.check,
    entries.check,
    services.check,
    deployments.check,
    selectors.check,
    gateways.check,
    namespaces.check,
    metadata.check,
    deprecations.check,
    conditions.check,
)


def analyze(
    objects: Iterable[r.Object],
    problems: Iterable[ConfigurationError] = (),
    *,
    is_whole: bool = False,
    suppressions: Iterable[Suppression] = (),
) -> tuple[Message, ...]:
    """The worst first, each once. problems: what parsing found, warnings too.

    is_whole: the objects are all that a cluster has; else nobody can say that no pod bears a label, since pods are
    hardly ever written down. An object's annotation `galley.istio.io/analyze-suppress` is heeded.
    """
    scene = Scene(objects, is_whole=is_whole)
    found = [_of_problem(each) for each in problems if each.object]
    for check in _CHECKS:
        found += check(scene)
    hidden = tuple(suppressions)
    shown = {
        message for message in found if not message.is_suppressed and not any(each.hides(message) for each in hidden)
    }
    return tuple(sorted(shown, key=lambda each: (-each.level, each.code, each.origin, each.reference, each.text)))


def _of_problem(problem: ConfigurationError) -> Message:
    kind = SCHEMA_WARNING if isinstance(problem, ConfigurationWarning) else SCHEMA_ERROR
    told = ": ".join(part for part in (problem.field, problem.reason) if part)
    return Message(kind, kind.template.format(told), problem.object, problem.source)
