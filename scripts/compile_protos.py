"""Compiles the .proto files into descriptor sets: xds/protos/*.proto for meshlib.xds.messages, Bookinfo's ratings.proto
for its ratings_api. Needs grpcio-tools."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "src" / "meshlib" / "xds" / "protos"
OUTPUT = PROTOS.parent / "descriptors.binpb"
RATINGS = ROOT / "examples" / "bookinfo" / "services"


def compile_protos(output: Path, protos: Path = PROTOS) -> None:
    """Writes the descriptor set, well-known types included. Raises SystemExit when a file is wrong."""
    from grpc_tools import protoc

    arguments = [
        "protoc",
        f"--proto_path={protos}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        "--include_imports",
        f"--descriptor_set_out={output}",
        *sorted(path.name for path in protos.glob("*.proto")),
    ]
    if protoc.main(arguments):
        raise SystemExit("the .proto files don't compile")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])  # elsewhere, to compare
        compile_protos(folder / OUTPUT.name)
        compile_protos(folder / "ratings.binpb", RATINGS)
    else:
        compile_protos(OUTPUT)
        compile_protos(RATINGS / "ratings.binpb", RATINGS)
