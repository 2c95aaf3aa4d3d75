"""What do the messages and methods of ratings.proto look like in Python? For the service and those who call it.

Made as the process starts, of the compiled ratings.binpb (scripts/compile_protos.py), so that neither grpcio-tools nor
one certain version of protobuf is needed. Code that grpcio-tools has generated works with the mesh just the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("ratings.binpb").read_bytes()).file:
    _pool.Add(_file)

RatingsRequest: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName("bookinfo.RatingsRequest"))
ProductRatings: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName("bookinfo.ProductRatings"))
SERVICE = "bookinfo.Ratings"


class RatingsStub:
    """As a generated one: for any channel, sync or of asyncio."""

    def __init__(self, channel: Any) -> None:
        self.Get = channel.unary_unary(
            f"/{SERVICE}/Get", RatingsRequest.SerializeToString, ProductRatings.FromString, _registered_method=True
        )
        self.Put = channel.unary_unary(
            f"/{SERVICE}/Put", ProductRatings.SerializeToString, ProductRatings.FromString, _registered_method=True
        )


def add_ratings(servicer: Any, server: Any) -> None:
    """servicer: has Get and Put, which take a request and a context."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name), request.FromString, ProductRatings.SerializeToString
        )
        for name, request in (("Get", RatingsRequest), ("Put", ProductRatings))
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
