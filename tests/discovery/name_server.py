"""A name server on real sockets, UDP and TCP, whose zone a test changes while it answers."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

SOA = "ns.example. root.example. 1 3600 600 86400 5"
"""Negative answers hold for 5 seconds."""

Answer = Callable[[dns.message.QueryMessage, bool], list[bytes]]


class NameServer:
    """`with NameServer() as server: server.set("a.example. 1 A 127.0.0.1")`. answer: in place of the zone; it gets the
    question and whether it came by TCP, and yields the datagrams to send. spoof: what somebody else sends before, from
    another port, to a question that came by UDP. port: 0 takes one that is free."""

    def __init__(self, port: int = 0) -> None:
        self.zone: dict[tuple[str, str], dns.rrset.RRset] = {}
        self.asked: list[tuple[str, str, bool]] = []
        self.answer: Answer = self.by_zone
        self.spoof: Callable[[dns.message.QueryMessage], bytes] | None = None
        self.spoofed = 0
        self.port = port
        self._changed = threading.Condition()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="name-server")

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.port)

    def set(self, *records: str) -> None:
        """The zone from now on: `name ttl type data`, in place of what it was."""
        zone: dict[tuple[str, str], dns.rrset.RRset] = {}
        for record in records:
            name, ttl, kind, data = record.split(maxsplit=3)
            one = dns.rrset.from_text(name, int(ttl), "IN", kind, data)
            zone.setdefault((name, kind), one).update(one)
        self.zone = zone

    def by_zone(self, question: dns.message.QueryMessage, by_tcp: bool) -> list[bytes]:
        return [self.reply(question).to_wire()]

    def reply(self, question: dns.message.QueryMessage) -> dns.message.Message:
        """What the zone says; a CNAME by itself, as a server does that does not follow it."""
        name, kind = question.question[0].name, question.question[0].rdtype
        reply = dns.message.make_response(question, recursion_available=True)
        zone = self.zone
        for each in (dns.rdatatype.to_text(kind), "CNAME"):
            if found := zone.get((name.to_text(), each)):
                reply.answer.append(found)
                return reply
        if not any(owner == name.to_text() for owner, _ in zone):
            reply.set_rcode(dns.rcode.NXDOMAIN)
        reply.authority.append(dns.rrset.from_text(name.parent() if len(name) > 1 else name, 5, "IN", "SOA", SOA))
        return reply

    def fail(self, code: dns.rcode.Rcode) -> None:
        def answer(question: dns.message.QueryMessage, by_tcp: bool) -> list[bytes]:
            reply = dns.message.make_response(question)
            reply.set_rcode(code)
            return [reply.to_wire()]

        self.answer = answer

    def wait_for(self, holds: Callable[[list[tuple[str, str, bool]]], object], timeout: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self.asked), timeout), self.asked

    def _answers(self, wire: bytes, by_tcp: bool) -> list[bytes]:
        question = dns.message.from_wire(wire)
        assert isinstance(question, dns.message.QueryMessage)
        first = question.question[0]
        answers = self.answer(question, by_tcp)
        with self._changed:
            self.asked.append((first.name.to_text(), dns.rdatatype.to_text(first.rdtype), by_tcp))
            self._changed.notify_all()
        return answers

    def _forge(self, spoof: Callable[[dns.message.QueryMessage], bytes], data: bytes, to: tuple[str, int]) -> None:
        question = dns.message.from_wire(data)
        assert isinstance(question, dns.message.QueryMessage)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.sendto(spoof(question), to)
        self.spoofed += 1

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        server = self

        class Udp(asyncio.DatagramProtocol):
            def connection_made(self, transport: asyncio.DatagramTransport) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
                if server.spoof is not None:
                    server._forge(server.spoof, data, addr)
                for answer in server._answers(data, False):
                    self.transport.sendto(answer, addr)

        async def tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    (length,) = struct.unpack("!H", await reader.readexactly(2))
                    for answer in self._answers(await reader.readexactly(length), True):
                        writer.write(struct.pack("!H", len(answer)) + answer)
            writer.close()

        for _ in range(20):  # a port that is free for both
            listener = await asyncio.start_server(tcp, "127.0.0.1", self.port)
            self.port = listener.sockets[0].getsockname()[1]
            try:
                transport, _ = await self._loop.create_datagram_endpoint(Udp, local_addr=("127.0.0.1", self.port))
                break
            except OSError:
                listener.close()
        async with listener:
            self._ready.set()
            await self._stop.wait()
            transport.close()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
