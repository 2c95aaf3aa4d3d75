"""How do gunicorn's uvicorn workers serve the mesh's mTLS? By uvicorn's protocol behind our door.

`gunicorn -k meshlib.inbound.gunicorn_uvicorn.Uvicorn app:app`, with the application wrapped by `mesh.asgi`.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from meshlib.inbound.serve import uvicorn_protocol

with warnings.catch_warnings():  # uvicorn points to a package of its own for this class, which is the same
    warnings.simplefilter("ignore", DeprecationWarning)
    from uvicorn.workers import UvicornWorker


class Uvicorn(UvicornWorker):
    """uvicorn's worker."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {"loop": "auto", "http": uvicorn_protocol}  # type: ignore[misc]
