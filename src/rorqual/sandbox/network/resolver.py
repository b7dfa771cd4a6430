"""The name server of the sandboxes: answers what the policy allows, and opens the addresses it answers.

A query is parsed, judged, and asked anew upstream with nothing of the guest's in it but the name and the type, so
that a refused name never leaves this process and an allowed one carries no hidden bits. An address is answered only
when it is not protected (DNS rebinding), and only after the firewall lets it pass for the answer's time. AAAA is
answered empty: sandboxes have no IPv6. A refused name is NXDOMAIN, with the Extended DNS Error 'Prohibited' (RFC 8914),
since resolvers retry a REFUSED for seconds. Parsing and building: dnspython. Owns port 53 of the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from rorqual.sandbox.network.guests import Guest
from rorqual.sandbox.network.namespaces import Host
from rorqual.sandbox.network.nft import NftError
from rorqual.sandbox.network.policy import Ports

log = logging.getLogger(__name__)

MAX_TTL = 3600
MIN_OPEN_S = 5
"""An address stays open at least so long, and GRACE_S longer than its answer may be used."""
GRACE_S = 2
PENDING = 64
"""Queries of one sandbox under way."""
TRIES = 2
TRY_S = 2.0
UDP_SIZE = 1232
_IDLE_S = 30.0
STREAMS = 16
"""Connections of one sandbox to port 53."""
_EMPTY = {dns.rdatatype.AAAA, dns.rdatatype.HTTPS, dns.rdatatype.SVCB}
"""Answered without records: the first is not routed, the others carry addresses past the filter."""
_FORWARDED = {
    dns.rdatatype.A,
    dns.rdatatype.CNAME,
    dns.rdatatype.MX,
    dns.rdatatype.NS,
    dns.rdatatype.PTR,
    dns.rdatatype.SOA,
    dns.rdatatype.SRV,
    dns.rdatatype.TXT,
    dns.rdatatype.CAA,
}
_HOST_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")

Opener = Callable[[Guest, list[str], Ports, int], Awaitable[None]]
"""Lets a sandbox reach addresses on ports for so many seconds. Raises NftError."""


class Refused(Exception):
    """The policy does not allow it; the text is the reason."""


class Resolver:
    """Answers for every sandbox of one gateway."""

    def __init__(
        self,
        host: Host,
        *,
        guests: Callable[[str], Guest | None],
        protected: Callable[[], list[ipaddress.IPv4Network]],
        opener: Opener,
        resolvers: tuple[str, ...] = (),
        resolv_conf: Path = Path("/etc/resolv.conf"),
    ) -> None:
        self._host = host
        self._guest = guests
        self._protected = protected
        self._open = opener
        self._fixed = [_endpoint(text) for text in resolvers]
        self._resolv_conf = resolv_conf
        self._read: tuple[int, list[tuple[str, int]]] = (-1, [])
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None

    async def start(self, address: str = "0.0.0.0", port: int = 53) -> None:
        """Listens in the namespace of the calling thread."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(
            lambda: _Datagrams(self), local_addr=(address, port), family=socket.AF_INET
        )
        self._server = await asyncio.start_server(
            self._stream, address, port, family=socket.AF_INET, limit=1 << 16
        )

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- from the sandboxes

    def datagram(self, data: bytes, peer: tuple[str, int]) -> None:
        guest = self._guest(peer[0])
        if guest is None or guest.pending >= PENDING or not guest.may_ask():
            return

        async def work() -> None:
            answer = await self.answer(guest, data, stream=False)
            if answer and self._transport is not None and not self._transport.is_closing():
                self._transport.sendto(answer, peer)

        task = asyncio.get_running_loop().create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """DNS over TCP (RFC 7766): one query after the other."""
        peer = writer.get_extra_info("peername")
        guest = self._guest(peer[0]) if peer else None
        if guest is None or guest.streams >= STREAMS:
            writer.close()
            return
        guest.streams += 1
        try:
            while guest.pending < PENDING:
                async with asyncio.timeout(_IDLE_S):
                    (size,) = struct.unpack("!H", await reader.readexactly(2))
                    data = await reader.readexactly(size)
                if not guest.may_ask():
                    break
                answer = await self.answer(guest, data, stream=True)
                if not answer:
                    break
                writer.write(struct.pack("!H", len(answer)) + answer)
                async with asyncio.timeout(_IDLE_S):
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            guest.streams -= 1
            writer.close()

    async def answer(self, guest: Guest, data: bytes, *, stream: bool) -> bytes:
        """The answer's bytes, b'' for what deserves none. Never raises but for cancellation."""
        guest.pending += 1
        try:
            try:
                query = dns.message.from_wire(data)
            except Exception:  # dnspython's own errors, and whatever hostile bytes make of it
                guest.events.note("dns", "(malformed query)", "it could not be parsed")
                return _form_error(data)
            if query.flags & dns.flags.QR:
                return b""
            try:
                response = await self._judge(guest, query)
            except Refused as error:
                name = _name(query)
                guest.dns_refused += 1
                guest.events.note("dns", name, str(error))
                log.info("a name was refused", extra={"sandbox": guest.id, "reason": str(error)})
                response = dns.message.make_response(query, recursion_available=True)
                response.set_rcode(dns.rcode.NXDOMAIN)
                if query.edns >= 0:
                    why = dns.edns.EDEOption(dns.edns.EDECode.PROHIBITED, "the sandbox's network policy")
                    response.use_edns(0, payload=UDP_SIZE, options=[why])
            except (TimeoutError, OSError, dns.exception.DNSException, ValueError) as error:
                guest.events.note("dns", _name(query), f"no answer from upstream: {type(error).__name__}")
                response = dns.message.make_response(query, recursion_available=True)
                response.set_rcode(dns.rcode.SERVFAIL)
            else:
                guest.dns_answered += 1
            return _wire(query, response, stream=stream)
        finally:
            guest.pending -= 1

    async def _judge(self, guest: Guest, query: dns.message.Message) -> dns.message.Message:
        response = dns.message.make_response(query, recursion_available=True)
        if query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
            response.set_rcode(dns.rcode.NOTIMP)
            return response
        question = query.question[0]
        name = _name(query)
        if question.rdclass != dns.rdataclass.IN or not _HOST_NAME.fullmatch(name) or len(name) > 253:
            raise Refused("not a host name")
        ports = guest.policy.ports(name)
        if not ports:
            raise Refused("the policy does not allow this name")
        if question.rdtype in _EMPTY:
            return response
        if question.rdtype not in _FORWARDED:
            raise Refused(f"queries of type {dns.rdatatype.to_text(question.rdtype)} are not answered")
        upstream = await self._ask(name, question.rdtype)
        response.set_rcode(upstream.rcode())
        if question.rdtype != dns.rdatatype.A or upstream.rcode() != dns.rcode.NOERROR:
            response.answer = [_capped(rrset) for rrset in upstream.answer if rrset.rdtype not in _EMPTY]
            # A record of type A beside what was asked for would not be open, and is none of its business.
            response.answer = [rrset for rrset in response.answer if rrset.rdtype != dns.rdatatype.A]
            return response
        response.answer = await self._open_answer(guest, name, ports, upstream)
        return response

    async def _open_answer(
        self, guest: Guest, name: str, ports: Ports, upstream: dns.message.Message
    ) -> list[dns.rrset.RRset]:
        """The chain from `name` to its addresses, the refused ones left out, the others opened."""
        assert isinstance(upstream, dns.message.QueryMessage)
        chain = upstream.resolve_chaining()
        for cname in chain.cnames:
            for target in cname:
                alias = target.target.to_text(omit_final_dot=True).lower()
                if any(rule.matches(alias) for rule in guest.policy.deny):
                    raise Refused(f"it is an alias of {alias}, which the policy denies")
        answer = [_capped(cname) for cname in chain.cnames]
        if chain.answer is None:
            return answer
        good: list[str] = []
        bad: list[str] = []
        for record in chain.answer:
            address = ipaddress.IPv4Address(record.address)
            closed = guest.policy.denies(address) or (
                any(address in network for network in self._protected())
                and not guest.policy.opens(address, self._protected())
            )
            (bad if closed else good).append(str(address))
        if bad:
            guest.events.note("dns", name, f"its address {bad[0]} is protected or denied")
        if not good:
            raise Refused(f"its address {bad[0]} is protected or denied")
        ttl = max(0, min(chain.minimum_ttl, MAX_TTL))
        seconds = max(ttl + GRACE_S, MIN_OPEN_S)
        try:
            await self._open(guest, good, ports, seconds)
        except NftError as error:
            guest.events.note("dns", name, f"its addresses could not be opened: {error}")
            raise
        for address_text in good:
            guest.learn(address_text, name, seconds)
        answer.append(
            dns.rrset.from_text_list(chain.canonical_name, ttl, dns.rdataclass.IN, dns.rdatatype.A, good)
        )
        return answer

    # -- to the world

    async def addresses(self, name: str) -> list[str]:
        """Addresses of a name for the gateway's own use. Raises OSError, TimeoutError, dns.exception.DNSException."""
        reply = await self._ask(name, dns.rdatatype.A)
        assert isinstance(reply, dns.message.QueryMessage)
        answer = reply.resolve_chaining().answer
        return [record.address for record in answer] if answer is not None else []

    def _servers(self) -> list[tuple[str, int]]:
        if self._fixed:
            return self._fixed
        try:
            changed = os.stat(self._resolv_conf).st_mtime_ns
            if changed != self._read[0]:
                found = []
                for line in self._resolv_conf.read_text(encoding="utf-8", errors="replace").splitlines():
                    words = line.split()
                    if len(words) >= 2 and words[0] == "nameserver":
                        with contextlib.suppress(ValueError):
                            found.append((str(ipaddress.ip_address(words[1].partition("%")[0])), 53))
                self._read = (changed, found)
        except OSError:
            return []
        return self._read[1]

    async def _ask(self, name: str, rdtype: dns.rdatatype.RdataType) -> dns.message.Message:
        servers = self._servers()
        if not servers:
            raise OSError("no name server: /etc/resolv.conf names none")
        query = dns.message.make_query(name, rdtype, use_edns=0, payload=UDP_SIZE)
        error: Exception = OSError("no answer")
        for server in servers[:3] * TRIES:
            query.id = secrets.randbelow(1 << 16)
            try:
                async with asyncio.timeout(TRY_S):
                    reply = await self._exchange(query, server, stream=False)
                    if reply.flags & dns.flags.TC:
                        reply = await self._exchange(query, server, stream=True)
                if reply.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                    return reply
                error = OSError(f"upstream said {dns.rcode.to_text(reply.rcode())}")
            except (TimeoutError, OSError, dns.exception.DNSException, ValueError) as problem:
                error = problem
        raise error

    async def _exchange(
        self, query: dns.message.Message, server: tuple[str, int], *, stream: bool
    ) -> dns.message.Message:
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        kind = socket.SOCK_STREAM if stream else socket.SOCK_DGRAM
        sock = await loop.run_in_executor(
            self._host.pool, lambda: socket.socket(family, kind | socket.SOCK_NONBLOCK)
        )
        with sock:
            await loop.sock_connect(sock, server)
            wire = query.to_wire()
            if not stream:
                await loop.sock_sendall(sock, wire)
                while True:  # anything else that comes to this port is somebody's guess
                    data = await loop.sock_recv(sock, 65535)
                    with contextlib.suppress(dns.exception.DNSException, ValueError):
                        reply = dns.message.from_wire(data)
                        if query.is_response(reply):
                            return reply
            await loop.sock_sendall(sock, struct.pack("!H", len(wire)) + wire)
            (size,) = struct.unpack("!H", await _exactly(sock, 2))
            reply = dns.message.from_wire(await _exactly(sock, size))
            if not query.is_response(reply):
                raise ValueError("an answer to another question")
            return reply


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._resolver.datagram(data, addr)


def _endpoint(text: str) -> tuple[str, int]:
    address, _, port = text.partition(":")
    return address, int(port or 53)


async def _exactly(sock: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        more = await loop.sock_recv(sock, size - len(data))
        if not more:
            raise OSError("the name server hung up")
        data += more
    return data


def _name(query: dns.message.Message) -> str:
    if not query.question:
        return "(no question)"
    return str(query.question[0].name.to_text(omit_final_dot=True)).lower()


def _capped(rrset: dns.rrset.RRset) -> dns.rrset.RRset:
    ttl = max(0, min(rrset.ttl, MAX_TTL))
    return dns.rrset.from_rdata_list(rrset.name, ttl, list(rrset))


def _form_error(data: bytes) -> bytes:
    """The twelve bytes that say FORMERR, for whatever has a header."""
    if len(data) < 12 or data[2] & 0x80:
        return b""
    return data[:2] + struct.pack("!BBHHHH", 0x80 | (data[2] & 0x79), 0x80 | dns.rcode.FORMERR, 0, 0, 0, 0)


def _wire(query: dns.message.Message, response: dns.message.Message, *, stream: bool) -> bytes:
    limit = 65535 if stream else min(UDP_SIZE, max(512, query.payload if query.edns >= 0 else 512))
    try:
        return bytes(response.to_wire(max_size=limit))
    except dns.exception.TooBig:
        response.answer = []
        response.flags |= dns.flags.TC
        return bytes(response.to_wire())
    except (dns.exception.DNSException, ValueError):
        return b""
