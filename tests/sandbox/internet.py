"""A small Internet in network namespaces: a host to sandbox on, a name server, web servers, a man in other networks.

`python internet.py DIRECTORY` makes it and serves until its stdin closes; test_network.py's fixture `world` starts it.

    gateway of the sandboxes --- `host` namespace 203.0.113.2/24, 10.77.0.1/24 --- `net` namespace (this process)
                                                                                  203.0.113.1 router, name server
                                                                                  93.184.216.34 .. public servers
                                                                                  10.1.0.5, 169.254.169.254 private ones
Every server answers with its own address; /hold streams a byte every 50 ms; UDP port 7 echoes. DIRECTORY gets ca.pem,
`ready` (a JSON of process ids) and `queries` (a line per DNS query that arrived, whoever sent it). What names stand for
can be changed in DIRECTORY/zone.json.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import time
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

PUBLIC = ("93.184.216.34", "93.184.216.35", "93.184.216.36")
PRIVATE = ("10.1.0.5", "169.254.169.254", "192.168.7.7")
NAMESERVER = "203.0.113.1"
HOST = "203.0.113.2"
HOST_PRIVATE = "10.77.0.1"
ZONE = {
    "allowed.test": ["A 60 93.184.216.34"],
    "other.test": ["A 60 93.184.216.35"],
    "api.test": ["A 60 93.184.216.34"],
    "evil.test": ["A 60 93.184.216.36"],
    "short.test": ["A 1 93.184.216.35"],
    "alias.test": [
        "CNAME 60 middle.cdn.test",
        "A 60 93.184.216.35 far.cdn.test",
        "CNAME 60 far.cdn.test middle.cdn.test",
    ],
    "stray.test": ["A 60 93.184.216.34", "A 60 93.184.216.36 unasked.test"],
    "rebind.test": ["A 0 10.1.0.5"],
    "metadata.test": ["A 60 169.254.169.254"],
    "half.test": ["A 60 93.184.216.34", "A 60 192.168.7.7"],
    "big.test": ["TXT 60 " + "x" * 200] + [f"TXT 60 {n:03d}{'y' * 190}" for n in range(12)],
    "loop.test": ["CNAME 60 loop2.test", "CNAME 60 loop.test loop2.test"],
    "www.wild.test": ["A 60 93.184.216.35"],
    "wild.test": ["A 60 93.184.216.35"],
}


def unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def ip(text: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input=text, text=True, check=True)


def certificates(directory: Path) -> None:
    """An authority, and a certificate of it for api.test and other.test."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=directory)

    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "ca.key",
        "-out", "ca.pem", "-subj", "/CN=Test CA", "-days", "30",
    )  # fmt: skip
    openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "site.key",
        "-out", "site.csr", "-subj", "/CN=api.test",
    )  # fmt: skip
    (directory / "ext").write_text("subjectAltName=DNS:api.test,DNS:other.test\n")
    openssl(
        "x509", "-req", "-in", "site.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", "site.pem",
        "-days", "30", "-extfile", "ext",
    )  # fmt: skip


def answer(directory: Path, data: bytes, stream: bool) -> bytes:
    query = dns.message.from_wire(data)
    question = query.question[0]
    name = question.name.to_text(omit_final_dot=True)
    with open(directory / "queries", "a", encoding="utf-8") as file:
        file.write(
            f"{name} {dns.rdatatype.to_text(question.rdtype)} {'tcp' if stream else 'udp'} {query.edns}\n"
        )
    response = dns.message.make_response(query, recursion_available=True)
    zone = {**ZONE, **json.loads((directory / "zone.json").read_text())}
    if name not in zone:
        response.set_rcode(dns.rcode.NXDOMAIN)
        return response.to_wire()
    for line in zone[name]:
        kind, ttl, value, *rest = line.split()
        if kind in ("A", "TXT") and dns.rdatatype.to_text(question.rdtype) != kind:
            continue
        owner = rest[0] if rest else name
        if kind == "A" and not rest and zone[name][0].startswith("CNAME"):
            continue
        target = f"{value}." if kind == "CNAME" else value
        response.answer.append(dns.rrset.from_text(f"{owner}.", int(ttl), "IN", kind, target))
    wire = response.to_wire(max_size=65535)
    if not stream and len(wire) > 1232:
        response.answer.clear()
        response.flags |= dns.flags.TC
        wire = response.to_wire()
    return wire


async def serve(directory: Path) -> None:
    loop = asyncio.get_running_loop()

    class Names(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
            self.transport.sendto(answer(directory, data, False), peer)

    async def names(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            (size,) = struct.unpack("!H", await reader.readexactly(2))
            wire = answer(directory, await reader.readexactly(size), True)
            writer.write(struct.pack("!H", len(wire)) + wire)
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Says where it is; echoes what it got as JSON at /echo; streams at /hold; redirects at /away and /here."""
        here = writer.get_extra_info("sockname")[0]
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
            method, path, _ = first.split(" ", 2)
            size = int(headers.get("content-length", 0))
            got = 0
            if headers.get("transfer-encoding") == "chunked":
                while count := int(await reader.readline(), 16):
                    got += len(await reader.readexactly(count))
                    await reader.readexactly(2)
                await reader.readexactly(2)
            else:
                while got < size:
                    got += len(await reader.readexactly(min(size - got, 1 << 16)))
            extra = ""
            if path == "/hold":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while True:
                    writer.write(b".")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            if path.startswith("/echo"):
                report = {"method": method, "path": path, "headers": headers, "size": got, "at": here}
                text = json.dumps(report).encode()
            elif path == "/parts":  # the credential, in pieces of one byte
                secret = headers.get("authorization", "none").encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nX-Echo: " + secret + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                for byte in b"<" + secret + b">":
                    writer.write(b"1\r\n" + bytes([byte]) + b"\r\n")
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
                return
            elif path == "/gzip":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nxxxx")
                return
            elif path == "/away":
                extra, text = "Location: http://evil.test/echo\r\n", b"away"
            elif path == "/here":
                extra, text = "Location: https://api.test/echo/moved\r\n", b"here"
            else:
                text = here.encode()
            status = "302 Found" if extra else "200 OK"
            writer.write(f"HTTP/1.1 {status}\r\n{extra}Content-Length: {len(text)}\r\n\r\n".encode() + text)
            await writer.drain()
        except (
            asyncio.IncompleteReadError,
            OSError,
            ValueError,
            asyncio.LimitOverrunError,
            asyncio.CancelledError,
        ):
            pass
        finally:
            writer.close()

    class Echo(Names):
        def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
            self.transport.sendto(data, peer)

    await loop.create_datagram_endpoint(Names, local_addr=("0.0.0.0", 53))
    for address in (*PUBLIC, *PRIVATE):  # or its answers would come from another address
        await loop.create_datagram_endpoint(Echo, local_addr=(address, 7))
    servers = [await asyncio.start_server(names, "0.0.0.0", 53)]
    for port in (80, 8000):
        servers.append(await asyncio.start_server(web, "0.0.0.0", port))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "site.pem", directory / "site.key")
    servers.append(await asyncio.start_server(web, "0.0.0.0", 443, ssl=context))
    temporary = directory / "ready.tmp"
    temporary.write_text(json.dumps({"net": os.getpid(), "host": int(os.environ["HOST_PID"])}))
    temporary.rename(directory / "ready")
    await loop.run_in_executor(None, sys.stdin.read)
    for server in servers:
        server.close()


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "queries").write_text("")
    (directory / "zone.json").write_text("{}")
    certificates(directory)
    unshare(0x40000000)  # this process becomes the Internet
    # The host is a process of its own, which listens on every address of it, as a host's services do.
    host = subprocess.Popen(
        ["unshare", "--net", sys.executable, __file__, "--host"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert host.stdout is not None and host.stdin is not None
    host.stdout.readline()
    addresses = "".join(f"addr add {address}/32 dev lo\n" for address in (*PUBLIC, *PRIVATE))
    ip(
        f"link set lo up\n{addresses}link add wan type veth peer name eth0 netns {host.pid}\n"
        f"addr add {NAMESERVER}/24 dev wan\nlink set wan up\n"
    )
    host.stdin.write(b"linked\n")
    host.stdin.flush()
    host.stdout.readline()
    os.environ["HOST_PID"] = str(host.pid)
    try:
        asyncio.run(serve(directory))
    finally:
        host.stdin.close()
        host.wait(timeout=10)


def be_host() -> None:
    """The sandboxes' host: two addresses, a default route, forwarding on, services on every address of it."""
    print("up", flush=True)
    sys.stdin.readline()
    ip(
        "link set lo up\n"
        f"addr add {HOST}/24 dev eth0\nlink set eth0 up\nroute add default via {NAMESERVER}\n"
        f"link add lan0 type veth peer name lan1\naddr add {HOST_PRIVATE}/24 dev lan0\n"
        "link set lan0 up\nlink set lan1 up\n"
    )
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    services = [socket.create_server(("0.0.0.0", port)) for port in (8000, 22)]
    print("ready", flush=True)
    sys.stdin.read()
    time.sleep(0)
    for service in services:
        service.close()


class World:
    """The running Internet, as a test sees it. A context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config"

    def __enter__(self) -> World:
        words = [sys.executable, __file__, str(self.directory)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not (self.directory / "ready").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the small Internet did not come up")
            time.sleep(0.02)
        self.host: int = json.loads((self.directory / "ready").read_text())["host"]
        self.ca = str(self.directory / "ca.pem")
        self.namespace = f"/proc/{self.host}/ns/net"
        (self.config / "rorqual").mkdir(parents=True)
        self.configure(NAMESERVER)
        return self

    def configure(self, *resolvers: str) -> None:
        text = f"[gateway]\nnamespace = {self.namespace!r}\nresolvers = {list(resolvers)!r}\n"
        (self.config / "rorqual/networks.toml").write_text(text)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)

    def on_host(self, *words: str) -> str:
        """What a command prints in the host's namespace."""
        command = ["nsenter", f"--net={self.namespace}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def queries(self) -> list[str]:
        """Every DNS query that has arrived: 'name type transport edns'."""
        return (self.directory / "queries").read_text().splitlines()

    def zone(self, names: dict[str, list[str]]) -> None:
        """What other names stand for, over ZONE."""
        temporary = self.directory / "zone.tmp"
        temporary.write_text(json.dumps(names))
        temporary.rename(self.directory / "zone.json")

    def uplinks(self) -> list[str]:
        return [
            line.split()[0]
            for line in self.on_host("ip", "-br", "link").splitlines()
            if line.startswith("rqu")
        ]

    def tables(self) -> str:
        return self.on_host("nft", "list", "tables")


if __name__ == "__main__":
    be_host() if sys.argv[1] == "--host" else main()
