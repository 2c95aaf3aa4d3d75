"""Which options do several commands share? Each is written once here, so it reads the same in every --help."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

import typer

from meshlib.cli.failure import CommandFailed

ControlPlaneUrl = Annotated[
    str,
    typer.Option(
        "--control-plane",
        envvar="MESHCTL_ADMIN",
        metavar="URL",
        help="The control plane's admin API. Without it: the one running on this machine.",
    ),
]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Kubernetes namespace.")]
Files = Annotated[
    list[str],
    typer.Option("--filename", "-f", metavar="FILE|DIR|-", help="YAML file, folder of them, - for stdin. Repeatable."),
]
Recursive = Annotated[bool, typer.Option("--recursive", "-R", help="Folders with all folders below them.")]


def prometheus(url: str) -> str:
    """`url` of --prometheus-url, "" for none. CommandFailed for what is no HTTP URL."""
    if url and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
        raise CommandFailed(f"--prometheus-url {url!r}: is written http://HOST:PORT")
    return url
