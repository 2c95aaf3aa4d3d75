"""How do the demo's processes get their identities? By a join token each, made anew before each start.

A join token is good once, and a process may begin anew without us (gunicorn replaces a worker that was killed), or
while the control plane is down. So whatever was used is replaced, as soon as the control plane can be asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import httpx
import msgspec

from meshlib.cli.bookinfo import Part
from meshlib.cli.supervisor import Program
from meshlib.controlplane import admin_api as api
from meshlib.controlplane.admin_api import Token, Tokens
from meshlib.controlplane.private_files import private_folder, write_private
from meshlib.controlplane.sources import StateError

TTL = "3600"
"""Seconds for which a token can be used."""
LOOK_AGAIN = 1.0
"""Seconds between two looks at which tokens were used."""
PATIENCE = 5.0
"""Seconds that a start waits for its token. Without one a process starts all the same, and reads it later."""
_NOT_NOW = (httpx.HTTPError, msgspec.DecodeError, StateError)


class TokenFiles:
    """One file for each part that has a service account. Belongs to one event loop.

    admin: the URL of the control plane's admin API, which makes tokens for who is on this machine.
    """

    def __init__(self, admin: str, parts: Iterable[Part], client: httpx.AsyncClient) -> None:
        self._url, self._client = f"{admin}/v1/tokens", client
        self._parts = {part.program.name: part for part in parts if part.account is not None}
        self._made: dict[str, str] = {}
        """Ids, by the part that each was made for."""
        self._begun: set[str] = set()
        self._lock = asyncio.Lock()

    async def prepare(self, program: Program) -> None:
        """Before `program` starts: a token that nobody has used. For a Supervisor; never raises."""
        part = self._parts.get(program.name)
        if part is None:
            return
        self._begun.add(program.name)
        try:
            async with asyncio.timeout(PATIENCE), self._lock:
                await self._renew(part)
        except (TimeoutError, *_NOT_NOW):
            self._made.pop(program.name, None)  # keep() makes it

    async def keep(self) -> None:
        """Replace used and expired tokens, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_AGAIN)
            try:
                async with self._lock:
                    answer = (await self._client.get(self._url)).raise_for_status()
                    found = msgspec.json.decode(answer.content, type=Tokens).tokens
                    good = {each.id for each in found if each.state == "unused"}
                    for name in tuple(self._begun):
                        if self._made.get(name, "") not in good:
                            await self._renew(self._parts[name])
            except _NOT_NOW:
                continue  # it is being restarted; the next look will find it

    async def _renew(self, part: Part) -> None:
        assert part.account is not None
        query = {"namespace": part.account.namespace, "service_account": part.account.name, "ttl": TTL}
        answer = await self._client.post(self._url, params=query, headers={"content-type": api.YAML})
        made = msgspec.json.decode(answer.raise_for_status().content, type=Token)
        private_folder(part.token_file.parent)
        write_private(part.token_file, made.text.encode())
        self._made[part.program.name] = made.id
