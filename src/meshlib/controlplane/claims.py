"""May this process serve what it says it serves? As the service account that its workload's manifest gives it.

Whoever has an identity in a namespace could say that it serves any Service there, and get its calls. Kubernetes'
objects tell who really does: the Pods, and the templates of Deployments and the like, whose labels a Service selects,
and the service accounts that they run under. Where no manifest says so, any identity of the namespace may serve.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.by_label import ByLabel
from meshlib.istio.problems import in_order
from meshlib.istio.translate import parts_of
from meshlib.model import Workload

logger = logging.getLogger("meshlib.controlplane")

TEMPLATES = frozenset({"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"})


class _Service(NamedTuple):
    """accounts: of the manifests that it selects; empty where there are none. told: title, and where it stands."""

    selector: Mapping[str, str]
    accounts: frozenset[str]
    title: str
    source: str


class Claims:
    """What the last look has found. refused: a problem for each Service that somebody may not serve."""

    def __init__(self) -> None:
        self.refused: tuple[ConfigurationError, ...] = ()
        self._last: tuple[object, object, tuple[Workload, ...]] | None = None
        self._services: tuple[object, object, Mapping[str, Mapping[str, _Service]]] | None = None

    def admitted(self, objects: Sequence[r.Object], workloads: tuple[Workload, ...]) -> tuple[Workload, ...]:
        """Those of `workloads`, whose service accounts are proven, that may be endpoints; the very tuple where all
        may. From one thread at a time."""
        last = self._last
        if last is not None and last[0] is objects and last[1] is workloads:
            return last[2]
        services = self._services_of(objects) if workloads else {}
        verdicts: dict[tuple[object, ...], str] = {}
        problems: dict[str, ConfigurationError] = {}
        admitted = []
        for each in workloads:
            key = (each.namespace, each.service, each.service_account, each.labels)
            if key not in verdicts:
                verdicts[key] = _refusal(services.get(each.namespace, {}), each, problems)
            if not verdicts[key]:
                admitted.append(each)
        told = {str(problem) for problem in self.refused}
        self.refused = in_order(problems.values())
        for problem in self.refused:
            if str(problem) not in told:
                logger.warning("%s", problem)
        found = workloads if len(admitted) == len(workloads) else tuple(admitted)
        self._last = (objects, workloads, found)
        return found

    def _services_of(self, objects: Sequence[r.Object]) -> Mapping[str, Mapping[str, _Service]]:
        """Of endpoints that change they say nothing."""
        parts = parts_of(objects)
        pods = parts.running.get("Pod", ())
        if self._services is None or self._services[0] is not parts.rules or self._services[1] is not pods:
            self._services = (parts.rules, pods, _services((*parts.rules, *pods)))
        return self._services[2]


def _services(objects: Iterable[r.Object]) -> Mapping[str, Mapping[str, _Service]]:
    """By namespace and name; those alone that some manifest is selected by."""
    manifests: list[tuple[str, Mapping[str, str], str]] = []
    given: list[tuple[r.Object, Mapping[str, str]]] = []
    for each in objects:
        if isinstance(each.spec, r.Service):
            given.append((each, each.spec.selector))
        elif (found := _manifest(each)) is not None:
            manifests.append((each.namespace, *found))
    accounts_by_label = ByLabel(manifests)
    services: dict[str, dict[str, _Service]] = {}
    for each, selector in given:
        accounts = frozenset(accounts_by_label.chosen(each.namespace, selector))
        if accounts:
            made = _Service(selector, accounts, each.title, each.source)
            services.setdefault(each.namespace, {})[each.name] = made
    return services


def _manifest(given: r.Object) -> tuple[Mapping[str, str], str] | None:
    """(labels, service account) of the pods that it makes."""
    if given.kind != "Pod" and given.kind not in TEMPLATES:
        return None
    template: Any = given.raw
    if given.kind in TEMPLATES:
        template = (given.raw.get("spec") or {}).get("template")
    if not isinstance(template, Mapping):
        return None
    labels = (template.get("metadata") or {}).get("labels") or {}
    account = (template.get("spec") or {}).get("serviceAccountName") or "default"
    if not isinstance(labels, Mapping):
        return None
    # Nobody has checked a template; a selector asks for texts only.
    return {key: each for key, each in labels.items() if isinstance(key, str) and isinstance(each, str)}, str(account)


def _refusal(services: Mapping[str, _Service], workload: Workload, problems: dict[str, ConfigurationError]) -> str:
    """Why it may not be an endpoint, "" if it may: it would join a Service by name or by labels whose manifests run
    under other service accounts."""
    labels = dict(workload.labels)
    for name, service in services.items():
        if name != workload.service and not service.selector.items() <= labels.items():
            continue
        if workload.service_account not in service.accounts:
            accounts = ", ".join(sorted(service.accounts))
            reason = (
                f"workload {workload.name} of service account {workload.service_account} says that it serves it, and "
                f"is no endpoint: its manifests run as {accounts}"
            )
            problems[f"{service.title} {reason}"] = ConfigurationError(service.source, service.title, "spec", reason)
            return reason
    return ""
