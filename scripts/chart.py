"""Writes charts/meshlib: what `meshctl install` applies, as a Helm chart. Run it after every change of the former.

The objects are made with marks in the place of what a chart lets one choose, and the marks replaced by Helm's words.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from meshlib.controlplane.installation import CA, LABELS, Installation, manifests
from meshlib.version import __version__

CHART = Path(__file__).parents[1] / "charts" / "meshlib"
HERE, IMAGE, DOMAIN, ROOT = "mark-namespace", "mark-image", "mark-domain", "mark-root"
MESH_CONFIG = "istio-system"
MISSING = f'not (or (eq .Release.Namespace "{MESH_CONFIG}") (lookup "v1" "Namespace" "" "{MESH_CONFIG}"))'
"""Istio's namespace, in which the ConfigMap with MeshConfig is read: a role in it needs that it is there."""
VALUES = f"""\
# The image of the control plane, and of what pods are given. None is published yet: build the Containerfile.
image: ghcr.io/meshlib/meshlib:{__version__}
# From two on with an autoscaler and a disruption budget.
replicas: 1
# Of the identities that the CA gives.
trustDomain: cluster.local
# Whether pods are put on the mesh, in namespaces labelled meshlib-injection=enabled.
inject: true
# Whether Istio's kinds are defined, too, for clusters without Istio.
istioCRDs: false
"""
RELEASE = re.match(r"[0-9.]+[0-9]", __version__)[0]  # type: ignore[index]  # what semantic versions take
METADATA = f"""\
apiVersion: v2
name: meshlib
description: The control plane of a service mesh without sidecars, for Python
type: application
version: {RELEASE}
appVersion: "{__version__}"
"""
SECRET = f"""\
{{{{- /* The CA's key is made once. A new root would make all certificates of the mesh worthless. */}}}}
{{{{- $known := lookup "v1" "Secret" .Release.Namespace "{CA}" }}}}
{{{{- $made := genCA "meshlib root" 3650 }}}}
{{{{- $root := b64enc $made.Cert }}}}
{{{{- if $known }}}}
{{{{- $root = index $known.data "root-cert.pem" }}}}
{{{{- end }}}}
apiVersion: v1
kind: Secret
metadata:
  name: {CA}
  namespace: {{{{ .Release.Namespace }}}}
  labels:
    app.kubernetes.io/name: {LABELS["app.kubernetes.io/name"]}
    app.kubernetes.io/managed-by: Helm
  annotations:
    helm.sh/resource-policy: keep
type: Opaque
data:
{{{{- if $known }}}}
  {{{{- toYaml $known.data | nindent 2 }}}}
{{{{- else }}}}
  ca-cert.pem: {{{{ $root }}}}
  ca-key.pem: {{{{ b64enc $made.Key }}}}
  cert-chain.pem: {{{{ $root }}}}
  root-cert.pem: {{{{ $root }}}}
{{{{- end }}}}
"""


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def files() -> dict[str, str]:
    """By path below the chart's folder."""
    given = Installation(ROOT, HERE, IMAGE, 1, DOMAIN)
    one = {_key(each): each for each in manifests(given)}
    several = [
        each
        for each in manifests(Installation(ROOT, HERE, IMAGE, 2, DOMAIN))
        if each["kind"] in ("PodDisruptionBudget", "HorizontalPodAutoscaler")
    ]
    all_crds = manifests(Installation(ROOT, HERE, IMAGE, 1, DOMAIN, istio_crds=True))
    parts: dict[str, list[str]] = {"crds": [], "control-plane": [], "webhooks": [SECRET]}
    (mesh_config,) = (each for each in all_crds if _key(each) == ("Namespace", MESH_CONFIG))
    parts["control-plane"].append(_if(MISSING, _text(_kept(mesh_config))))
    for each in all_crds:
        if each["kind"] == "CustomResourceDefinition":
            text = _text(_kept(each))
            parts["crds"].append(text if _key(each) in one else _if(".Values.istioCRDs", text))
    for each in one.values():
        kind = each["kind"]
        if kind in ("Namespace", "CustomResourceDefinition"):
            continue
        text = _text(each)
        if kind == "Deployment":
            text = _deployment(text)
        if kind == "MutatingWebhookConfiguration":
            text = _if(".Values.inject", text)
        parts["webhooks" if kind.endswith("WebhookConfiguration") else "control-plane"].append(text)
    parts["control-plane"] += [_if("gt (int .Values.replicas) 1", _text(each)) for each in several]
    templates = {f"templates/{name}.yaml": "---\n".join(texts) for name, texts in parts.items()}
    return {"Chart.yaml": METADATA, "values.yaml": VALUES, **templates}


def _key(given: dict[str, Any]) -> tuple[str, str]:
    return given["kind"], given["metadata"]["name"]


def _kept(given: dict[str, Any]) -> dict[str, Any]:
    """As `meshctl uninstall` keeps it: with a definition would go all objects of its kind, which are the users'."""
    metadata = given["metadata"]
    annotations = {**metadata.get("annotations", {}), "helm.sh/resource-policy": "keep"}
    return {**given, "metadata": {**metadata, "annotations": annotations}}


def _if(condition: str, text: str) -> str:
    return f"{{{{- if {condition} }}}}\n{text}{{{{- end }}}}\n"


def _text(given: dict[str, Any]) -> str:
    text = yaml.dump(given, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=1000)
    text = re.sub(r"caBundle: .*", "caBundle: {{ $root }}", text)
    text = text.replace("managed-by: meshctl", "managed-by: Helm")
    text = text.replace("minReplicas: 2", "minReplicas: {{ .Values.replicas }}")
    text = text.replace("maxReplicas: 5", "maxReplicas: {{ max 5 .Values.replicas }}")
    words = ((HERE, ".Release.Namespace"), (IMAGE, ".Values.image"), (DOMAIN, ".Values.trustDomain"))
    for mark, word in words:
        text = text.replace(mark, f"{{{{ {word} }}}}")
    # A value that begins with {{ is a mapping to YAML until Helm has been there: quoted it is text before and after.
    return re.sub(r"^(\s*(?:- |[\w-]+: ))(\{\{ \.Values\.(?:image|trustDomain) \}\})$", r'\1"\2"', text, flags=re.M)


def _deployment(text: str) -> str:
    text = text.replace("  replicas: 1\n", _if("le (int .Values.replicas) 1", "  replicas: 1\n"))
    return re.sub(r"((?:^ *- .*inject.*\n^ *- .*\n)+)", lambda found: _if(".Values.inject", found[1]), text, flags=re.M)


def main() -> None:
    for name, text in files().items():
        file = CHART / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    main()
