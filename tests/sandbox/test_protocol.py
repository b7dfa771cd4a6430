"""The guest protocol's bytes, host side: what a guest sends is decoded or refused as GuestProtocolError."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.sandbox import _protocol as wire
from rorqual.sandbox._protocol import Decoder, Frame, Type
from rorqual.sandbox.errors import GuestProtocolError, GuestRefused

FROM_GUEST = [Type.WELCOME, Type.RESULT, Type.ERROR, Type.STARTED, Type.DATA, Type.EXIT]
READERS: list[tuple[Type, Callable[[Frame], object]]] = [
    (Type.WELCOME, wire.read_welcome),
    (Type.ERROR, wire.read_error),
    (Type.STARTED, wire.read_started),
    (Type.DATA, wire.read_data),
    (Type.EXIT, wire.read_exit),
    (Type.RESULT, wire.read_empty),
    (Type.RESULT, wire.read_flag),
    (Type.RESULT, wire.read_handle),
    (Type.RESULT, wire.read_chunk),
    (Type.RESULT, wire.read_list),
    (Type.RESULT, wire.read_stat),
    (Type.RESULT, wire.read_page),
]

frames = st.builds(
    Frame, st.sampled_from(FROM_GUEST), st.integers(0, 2**32 - 1), st.binary(max_size=300)
)  # fmt: skip


def header(length: int, kind: int, ident: int, *, reserved: bytes = b"\0\0\0") -> bytes:
    """Written out here by the document, not by the code it judges."""
    return length.to_bytes(4, "little") + bytes([kind]) + reserved + ident.to_bytes(4, "little")


def stat_entry(name: bytes, *, kind: bytes = b"f", mode: int = 0o644, nanos: int = 0) -> bytes:
    fields = kind + struct.pack("<QIIIqI", 3, mode, 1000, 1001, 1_700_000_000, nanos)
    return len(name).to_bytes(4, "little") + name + fields + b"\0\0\0\0"


@given(st.lists(frames, max_size=5), st.integers(1, 40))
def test_frames_survive_any_cut_of_the_stream(sent: list[Frame], step: int) -> None:
    stream = b"".join(header(len(f.payload), f.type, f.id) + f.payload for f in sent)
    decoder, got = Decoder(), []
    for at in range(0, len(stream), step):
        got += decoder.feed(stream[at : at + step])
    assert got == sent


@given(st.binary(max_size=2000))
def test_any_bytes_are_frames_or_a_protocol_error(data: bytes) -> None:
    decoder = Decoder()
    try:
        got = decoder.feed(data)
    except GuestProtocolError:
        return
    for one in got:
        assert one.type in FROM_GUEST and len(one.payload) <= wire.MAX_PAYLOAD


@pytest.mark.parametrize(("kind", "read"), READERS, ids=lambda v: getattr(v, "__name__", None))
@given(payload=st.binary(max_size=400))
def test_any_payload_is_a_record_or_a_protocol_error(
    kind: Type, read: Callable[[Frame], object], payload: bytes
) -> None:
    try:
        read(Frame(kind, 1, payload))
    except GuestProtocolError as error:
        assert kind.name in str(error)


def test_an_announced_giant_is_refused_before_its_bytes_arrive() -> None:
    with pytest.raises(GuestProtocolError, match="4294967295"):
        Decoder().feed(header(2**32 - 1, Type.DATA, 1))


def test_the_largest_payload_passes_and_one_byte_more_does_not() -> None:
    [got] = Decoder().feed(header(wire.MAX_PAYLOAD, Type.RESULT, 1) + bytes(wire.MAX_PAYLOAD))
    assert len(got.payload) == wire.MAX_PAYLOAD
    with pytest.raises(GuestProtocolError):
        Decoder().feed(header(wire.MAX_PAYLOAD + 1, Type.RESULT, 1))


@pytest.mark.parametrize("kind", [0, Type.START, Type.KILL, 0x7F, 0x97, 0xFF])
def test_types_only_a_host_sends_are_refused_from_the_guest(kind: int) -> None:
    with pytest.raises(GuestProtocolError, match=f"0x{kind:02x}"):
        Decoder().feed(header(0, kind, 1))


@pytest.mark.parametrize("reserved", [b"\1\0\0", b"\0\1\0", b"\0\0\1"])
def test_reserved_bytes_must_be_zero(reserved: bytes) -> None:
    with pytest.raises(GuestProtocolError, match="reserved"):
        Decoder().feed(header(0, Type.RESULT, 1, reserved=reserved))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"../../etc/passwd", b"a\0b"])
def test_directory_entries_that_could_leave_the_directory_are_refused(name: bytes) -> None:
    with pytest.raises(GuestProtocolError, match="directory entry"):
        wire.read_page(Frame(Type.RESULT, 1, bytes(4) + stat_entry(name)))


def test_names_that_are_not_utf8_come_back_as_the_same_bytes() -> None:
    _, [entry] = wire.read_page(Frame(Type.RESULT, 1, bytes(4) + stat_entry(b"caf\xe9\xff")))
    assert entry.name.encode("utf-8", "surrogateescape") == b"caf\xe9\xff"
    assert wire.path("/" + entry.name)[4:] == b"/caf\xe9\xff"


@pytest.mark.parametrize("bad", [{"kind": b"x"}, {"mode": 0o100644}, {"nanos": 10**9}])
def test_stat_fields_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(GuestProtocolError):
        wire.read_stat(Frame(Type.RESULT, 1, stat_entry(b"f", **bad)))  # type: ignore[arg-type]


def test_pages_and_chunks_that_never_end_are_refused() -> None:
    with pytest.raises(GuestProtocolError, match="empty page"):
        wire.read_page(Frame(Type.RESULT, 1, b"\1\0\0\0"))
    with pytest.raises(GuestProtocolError, match="empty chunk"):
        wire.read_chunk(Frame(Type.RESULT, 1, b"\1\0\0\0"))


def test_a_start_lies_on_the_wire_as_documented() -> None:
    got = wire.start(
        7,
        ["ls", "-l"],
        cwd="/tmp",
        env={"A": "1"},
        who="bob",
        stdin=True,
        pty=(24, 80),
        timeout_ms=1500,
        max_output=10,
        credit=4096,
        tag="t",
    )

    def s(text: bytes) -> bytes:
        return len(text).to_bytes(4, "little") + text

    payload = (
        struct.pack("<QQIBHH", 1500, 10, 4096, 3, 24, 80) + b"\2\0\0\0\0" + s(b"bob") + s(b"/tmp") + s(b"t")
    )
    payload += b"\2\0\0\0" + s(b"ls") + s(b"-l") + b"\1\0\0\0" + s(b"A=1")
    assert got == header(len(payload), 0x10, 7) + payload


def start_of(argv: list[str], **changes: object) -> bytes:
    fields: dict[str, object] = {
        "cwd": None, "env": None, "who": None, "stdin": False, "pty": None,
        "timeout_ms": 0, "max_output": 1, "credit": 1, "tag": "",
    }  # fmt: skip
    return wire.start(1, argv, **(fields | changes))  # type: ignore[arg-type]


def test_a_request_over_one_frame_is_refused_with_advice() -> None:
    with pytest.raises(GuestRefused, match="write large content to a file") as caught:
        start_of(["echo", "x" * wire.MAX_PAYLOAD])
    assert caught.value.errno == 7
    with pytest.raises(GuestRefused, match="5000 entries"):
        start_of(["x"] * 5000)


@pytest.mark.parametrize(
    ("argv", "changes", "says"),
    [
        ([], {}, "argv is empty"),
        ([""], {}, "argv is empty"),
        (["a\0b"], {}, r"argv\[0\] contains a NUL"),
        (["a"], {"env": {"": "1"}}, "environment name"),
        (["a"], {"env": {"A=B": "1"}}, "environment name"),
        (["a"], {"env": {"A": "\0"}}, "environment variable A contains a NUL"),
        (["a"], {"cwd": "/" + "d" * 5000}, "cwd has 5001 bytes"),
        (["a"], {"who": -1}, "not a uid"),
        (["a"], {"who": ""}, "empty name"),
        (["a"], {"tag": "t" * 300}, "tag has 300 bytes"),
        (["\ud800"], {}, "argv"),
    ],
)
def test_arguments_no_program_could_get_are_refused_by_name(
    argv: list[str], changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        start_of(argv, **changes)


def test_one_string_is_not_an_argv() -> None:
    with pytest.raises(TypeError, match="/bin/sh"):
        start_of("ls -l")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["", "a", "./a", "~/a"])
def test_relative_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not absolute"):
        wire.path(path)
