"""Pictures and input events, without a machine: what a hostile monitor may send, what a key's name means."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.sandbox.errors import GuestProtocolError, InvalidRequest
from rorqual.sandbox.machines import screen
from rorqual.sandbox.machines.screen import Picture


def pressed(events: list[dict[str, object]]) -> str:
    """'+shift +a -a -shift'."""
    return " ".join(("+" if e["data"]["down"] else "-") + e["data"]["key"]["data"] for e in events)  # type: ignore[index]


def test_a_ppm_becomes_a_png_with_the_same_pixels() -> None:
    pixels = bytes(range(3 * 4 * 2))
    picture = screen.parse_ppm(b"P6\n4 2\n255\n" + pixels)
    assert (picture.width, picture.height, picture.pixel(3, 1)) == (4, 2, (21, 22, 23))
    png = screen.to_png(picture)
    assert struct.unpack_from(">II", png, 16) == (4, 2)
    at = png.index(b"IDAT")
    size = struct.unpack_from(">I", png, at - 4)[0]
    plain = zlib.decompress(png[at + 4 : at + 4 + size])
    assert plain[1:13] + plain[14:26] == pixels and plain[0] == plain[13] == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"P5\n1 1\n255\n\0",
        b"P6\n2 2\n255\n" + bytes(11),
        b"P6\n2 2\n255\n" + bytes(13),
        b"P6\n99999 99999\n255\n",
        b"P6\n0 5\n255\n",
        b"P6\n1 1\n65535\n" + bytes(6),
        b"\x89PNG\r\n",
    ],
)
def test_a_picture_that_lies_about_itself_is_refused(data: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        screen.parse_ppm(data)


@given(st.binary(max_size=64))
def test_no_bytes_make_the_reader_of_pictures_fail_otherwise(data: bytes) -> None:
    try:
        picture = screen.parse_ppm(b"P6\n" + data)
    except GuestProtocolError:
        return
    assert len(picture.rgb) == 3 * picture.width * picture.height


def test_changed_pixels_are_counted() -> None:
    black = Picture(width=10, height=10, rgb=bytes(300))
    one = Picture(width=10, height=10, rgb=bytes(297) + b"\xff\xff\xff")
    assert screen.changed_pixels(black, black) == 0
    assert screen.changed_pixels(black, one) == 1
    assert screen.changed_pixels(black, Picture(width=5, height=20, rgb=bytes(300))) == 100


@pytest.mark.parametrize(
    ("name", "events"),
    [
        ("ctrl-alt-f2", "+ctrl +alt +f2 -f2 -alt -ctrl"),
        ("Enter", "+ret -ret"),
        ("a", "+a -a"),
        ("-", "+minus -minus"),
        ("ctrl--", "+ctrl +minus -minus -ctrl"),
        ("super-l", "+meta_l +l -l -meta_l"),
    ],
)
def test_a_key_has_a_name(name: str, events: str) -> None:
    assert pressed(screen.press(screen.key_codes(name))) == events


@pytest.mark.parametrize("name", ["", "hyper", "ctrl-", "f25", "a-b-c-d-e-f-g-h-i", "é", "ctrl alt"])
def test_what_is_no_key_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="key"):
        screen.press(screen.key_codes(name)) if name != "ctrl-" else screen.key_codes("ctrl-nokey")


def test_all_of_a_us_keyboard_can_be_typed() -> None:
    text = "".join(chr(number) for number in range(32, 127)) + "\n\t"
    groups = screen.typing(text)
    assert len(groups) == len(text)
    assert pressed(groups[text.index("A")]) == "+shift +a -a -shift"
    assert pressed(groups[text.index("~")]) == "+shift +grave_accent -grave_accent -shift"
    assert pressed(groups[text.index("'")]) == "+apostrophe -apostrophe"
    assert len({pressed(group) for group in groups}) == len(text)  # no two characters look the same
    with pytest.raises(InvalidRequest, match="'é' at 1"):
        screen.typing("aé")


@given(st.integers(1, 4096), st.data())
def test_a_pixel_is_hit_by_its_own_axis_value(size: int, data: st.DataObject) -> None:
    x = data.draw(st.integers(0, size - 1))
    picture = Picture(width=size, height=1, rgb=b"")
    value = screen.position(x, 0, picture=picture)[0]["data"]["value"]
    assert 0 <= value <= screen.AXIS and value * size // (screen.AXIS + 1) == x


@pytest.mark.parametrize("steps", [101, -101, 1.5, True])
def test_a_wheel_has_bounds(steps: object) -> None:
    with pytest.raises(InvalidRequest):
        screen.wheel(steps)  # type: ignore[arg-type]
    assert [event["data"]["button"] for event in screen.wheel(-1)] == ["wheel-up", "wheel-up"]
