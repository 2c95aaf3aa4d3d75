"""meshctl: what a person types. One command group a file; `main` is the entry point."""

from __future__ import annotations

import sys


def main() -> None:
    """Run meshctl. Without the optional libraries that the command line needs, say how to get them."""
    if (instrumentation := sys.modules.get("meshlib.instrumentation")) is not None:
        instrumentation.uninstrument()  # a gateway's pod may have been injected: it is no application behind a mesh
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"meshctl needs {error.name}, which is not installed. The command line and the control plane come with\n"
            "    pip install 'meshlib-proxyless[control-plane]'"
        )
    from meshlib.cli.app import app

    app(prog_name="meshctl")
