"""Where are join tokens kept? In memory, in a file of one control plane, or in a Secret of the cluster, so that what
one replica has made every other takes, and one that is spent is spent for all.

A write says what it is based on: of two replicas that spend one token at the same moment the API server lets one, and
the other reads again and finds it spent.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from meshlib.controlplane.ca_secret import SECRETS
from meshlib.controlplane.private_files import StateError, private_folder, read_private, write_private
from meshlib.kube.client import KubeClient, Object
from meshlib.kube.errors import Conflict, Forbidden, KubernetesError, NotFound


class JoinToken(msgspec.Struct, frozen=True):
    """What is known of a token. used: when, seconds since 1970; 0 is never."""

    id: str
    hash: str
    identity: str
    created: float
    expires: float
    used: float = 0.0

    def __repr__(self) -> str:
        return f"<JoinToken {self.id} for {self.identity}>"


Tokens = Mapping[str, JoinToken]
"""By their ids."""


class Shelf(Protocol):
    async def read(self) -> tuple[Tokens, str]:
        """All of them, and of which version this is. Raises StateError."""

    async def write(self, tokens: Tokens, version: str) -> bool:
        """These from now on; False where another has written since `version`, and nothing is. Raises StateError; then
        nothing is written either."""


class FileShelf:
    """For a control plane that is alone. file: None keeps them in memory. Raises StateError for one that can't be
    used."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._tokens: Tokens = {}
        if file is not None:
            private_folder(file.parent)
            self._tokens = _decoded(read_private(file) or b"[]", str(file))

    async def read(self) -> tuple[Tokens, str]:
        return self._tokens, ""

    async def write(self, tokens: Tokens, version: str) -> bool:
        if self._file is not None:
            write_private(self._file, _encoded(tokens))
        self._tokens = tokens
        return True

    def __repr__(self) -> str:
        return f"<FileShelf {self._file or 'in memory'} {len(self._tokens)} tokens>"


KEY = "tokens.json"
"""What of the Secret's data they are."""
_RIGHTS = "; `get` and `patch` of it are needed, and `create` of secrets where it is not there yet"


class SecretShelf:
    """For replicas. Belongs to the client's event loop. The Secret is read at each use: there is a join, or a person,
    behind each."""

    def __init__(self, client: KubeClient, namespace: str, name: str) -> None:
        self._client, self._namespace, self._name = client, namespace, name
        self._title = f"the Secret {namespace}/{name}"

    async def read(self) -> tuple[Tokens, str]:
        try:
            found = await self._client.get(SECRETS.path("v1", self._namespace, self._name))
        except NotFound:
            return {}, ""
        except KubernetesError as error:
            raise self._trouble("can't be read", error) from error
        data = found.get("data") or {}
        try:
            content = base64.b64decode(str(data.get(KEY) or ""), validate=True)
        except ValueError as error:
            raise StateError(f"{self._title}: {KEY}: {error}") from None
        return _decoded(content or b"[]", f"{self._title}: {KEY}"), str(found["metadata"].get("resourceVersion") or "")

    async def write(self, tokens: Tokens, version: str) -> bool:
        metadata: Object = {"name": self._name, "namespace": self._namespace}
        body: Object = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}
        body["data"] = {KEY: base64.b64encode(_encoded(tokens)).decode("ascii")}
        try:
            if version:
                metadata["resourceVersion"] = version  # else the API server would not ask who wrote last
                await self._client.merge(SECRETS.path("v1", self._namespace, self._name), body)
            else:
                await self._client.create(SECRETS.path("v1", self._namespace), body)
        except (Conflict, NotFound):
            return False
        except KubernetesError as error:
            raise self._trouble("can't be written", error) from error
        return True

    def _trouble(self, what: str, error: KubernetesError) -> StateError:
        return StateError(f"{self._title} {what}{_RIGHTS if isinstance(error, Forbidden) else ''}: {error}")

    def __repr__(self) -> str:
        return f"<SecretShelf {self._namespace}/{self._name}>"


def _decoded(content: bytes, origin: str) -> Tokens:
    try:
        return {each.id: each for each in msgspec.json.decode(content, type=list[JoinToken])}
    except msgspec.DecodeError as error:
        raise StateError(f"{origin}: {error}") from None


def _encoded(tokens: Tokens) -> bytes:
    return msgspec.json.encode(list(tokens.values()))
