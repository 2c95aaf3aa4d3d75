"""Compiles xds/protos/*.proto into the descriptor set that meshlib.xds.messages loads. Needs grpcio-tools."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

PROTOS = Path(__file__).parents[1] / "src" / "meshlib" / "xds" / "protos"
OUTPUT = PROTOS.parent / "descriptors.binpb"


def compile_protos(output: Path) -> None:
    """Writes the descriptor set, well-known types included. Raises SystemExit when a file is wrong."""
    from grpc_tools import protoc

    arguments = [
        "protoc",
        f"--proto_path={PROTOS}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        "--include_imports",
        f"--descriptor_set_out={output}",
        *sorted(path.name for path in PROTOS.glob("*.proto")),
    ]
    if protoc.main(arguments):
        raise SystemExit("the .proto files don't compile")


if __name__ == "__main__":
    compile_protos(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
