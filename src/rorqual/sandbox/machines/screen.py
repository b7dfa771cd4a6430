"""A machine's screen, keyboard and pointer, as QEMU's monitor knows them: pictures, key names, input events.

Pictures come as PPM (screendump) and go out as PNG, so that size and pixels are known without a decoder. Keys are names
joined by '-': 'ctrl-alt-f2', 'a', 'enter'; text is typed on a US layout. Events are those of QMP's input-send-event; a
pointer is absolute (a USB tablet), its axes run from 0 to 32767 over the whole screen. Names of keys: QKeyCode of the
QEMU QMP Reference Manual. Owns translation and bounds; _async/screen.py talks to the monitor.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal

from rorqual.sandbox.errors import GuestProtocolError, InvalidRequest

MAX_SIDE = 16384
AXIS = 0x7FFF
Button = Literal["left", "middle", "right"]
BUTTONS = ("left", "middle", "right")
Event = dict[str, Any]

_HEADER = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s")
_NAMED = {
    "enter": "ret", "return": "ret", "escape": "esc", "space": "spc", "del": "delete", "ins": "insert",
    "control": "ctrl", "cmd": "meta_l", "win": "meta_l", "super": "meta_l", "meta": "meta_l",
    "pageup": "pgup", "pagedown": "pgdn", "capslock": "caps_lock", "printscreen": "print",
    "-": "minus", "=": "equal", ",": "comma", ".": "dot", "/": "slash", ";": "semicolon", "'": "apostrophe",
    "[": "bracket_left", "]": "bracket_right", "\\": "backslash", "`": "grave_accent",
}  # fmt: skip
_WORDS = """
a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9
f1 f2 f3 f4 f5 f6 f7 f8 f9 f10 f11 f12 f13 f14 f15 f16 f17 f18 f19 f20 f21 f22 f23 f24
shift shift_r alt alt_r ctrl ctrl_r menu esc minus equal backspace tab bracket_left bracket_right ret semicolon
apostrophe grave_accent backslash comma dot slash caps_lock num_lock scroll_lock print home pgup pgdn end
left up down right insert delete pause meta_l meta_r spc less asterisk sysrq
kp_0 kp_1 kp_2 kp_3 kp_4 kp_5 kp_6 kp_7 kp_8 kp_9 kp_divide kp_multiply kp_subtract kp_add kp_enter kp_decimal
"""
_PLAIN = frozenset(_WORDS.split())
_SHIFTED = dict(zip('!@#$%^&*()_+{}|:"~<>?', "1234567890-=[]\\;'`,./", strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """What was on the screen. `rgb`: 3 bytes a pixel, rows from the top."""

    width: int
    height: int
    rgb: bytes

    def pixel(self, x: int, y: int) -> tuple[int, int, int]:
        at = 3 * (y * self.width + x)
        red, green, blue = self.rgb[at : at + 3]
        return red, green, blue


def parse_ppm(data: bytes) -> Picture:
    """Raises GuestProtocolError: the monitor, which the guest may have taken over, wrote something else."""
    match = _HEADER.match(data)
    if match is None:
        raise GuestProtocolError(f"the machine's screen is not a PPM picture: {data[:16]!r}")
    width, height = int(match[1]), int(match[2])
    if (
        not 0 < width <= MAX_SIDE
        or not 0 < height <= MAX_SIDE
        or len(data) - match.end() != 3 * width * height
    ):
        raise GuestProtocolError(
            f"the machine's screen says {width}x{height} and has {len(data) - match.end()} bytes"
        )
    return Picture(width=width, height=height, rgb=data[match.end() :])


def to_png(picture: Picture) -> bytes:
    """PNG, 8 bits a channel, without alpha (PNG specification, 11.2)."""
    step = 3 * picture.width
    rows = b"".join(
        b"\0" + picture.rgb[at : at + step] for at in range(0, len(picture.rgb), step)
    )  # filter 0: as is

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows, 4))
        + chunk(b"IEND", b"")
    )


def changed_pixels(before: Picture, after: Picture) -> int:
    """How many differ, in whole thirds rounded up; all of them when the size does."""
    if (before.width, before.height) != (after.width, after.height):
        return after.width * after.height
    if before.rgb == after.rgb:
        return 0
    both = int.from_bytes(before.rgb, "big") ^ int.from_bytes(after.rgb, "big")
    bits = both.to_bytes(len(after.rgb), "big")
    return (len(bits) - bits.count(0) + 2) // 3


def key_codes(name: str) -> list[str]:
    """'ctrl-alt-f2' -> ['ctrl', 'alt', 'f2']. Raises InvalidRequest."""
    text = name.strip().lower()
    parts = text.split("-")
    if text.endswith("-"):  # the key itself is '-'
        parts = [*[part for part in text[:-1].split("-") if part], "-"]
    codes = [_NAMED.get(part, part) for part in parts]
    wrong = next((part for part, code in zip(parts, codes, strict=True) if code not in _PLAIN), None)
    if wrong is not None or len(codes) > 8:
        raise InvalidRequest(
            f"key: {name!r}: {wrong!r} is no key. Join names with '-': letters, digits, f1 to f24, enter, tab, esc, "
            "space, backspace, delete, home, end, pgup, pgdn, left, right, up, down, shift, ctrl, alt, meta"
        )
    return codes


def press(codes: list[str]) -> list[Event]:
    """All down in order, then all up in the opposite order."""
    down = [_key(code, True) for code in codes]
    return down + [_key(code, False) for code in reversed(codes)]


def typing(text: str) -> list[list[Event]]:
    """The events of each character on a US keyboard. Raises InvalidRequest: a character that is not on it."""
    result = []
    for number, character in enumerate(text):
        if character in _SHIFTED:
            codes = ["shift", *key_codes(_SHIFTED[character])]
        elif "A" <= character <= "Z":
            codes = ["shift", character.lower()]
        elif character in "\r\n":
            codes = ["ret"]
        elif character == "\t":
            codes = ["tab"]
        elif character == " ":
            codes = ["spc"]
        elif character.isascii() and (character.isalnum() or character in _NAMED):
            codes = key_codes(character)
        else:
            raise InvalidRequest(
                f"text: {character!r} at {number} is not on a US keyboard; write it with files or commands"
            )
        result.append(press(codes))
    return result


def position(x: int, y: int, *, picture: Picture) -> list[Event]:
    """To that pixel, from the top left. Raises InvalidRequest."""
    for name, value, size in (("x", x, picture.width), ("y", y, picture.height)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
            raise InvalidRequest(f"{name}: {value!r} must be a whole number from 0 to {size - 1}")
    return [_axis("x", x, picture.width), _axis("y", y, picture.height)]


def button(name: str, down: bool) -> Event:
    """Raises InvalidRequest."""
    if name not in (*BUTTONS, "wheel-up", "wheel-down"):
        raise InvalidRequest(f"button: {name!r} must be one of {', '.join(BUTTONS)}")
    return {"type": "btn", "data": {"button": name, "down": down}}


def wheel(steps: int) -> list[Event]:
    """Down for positive steps. Raises InvalidRequest."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not -100 <= steps <= 100:
        raise InvalidRequest(f"steps: {steps!r} must be a whole number from -100 (up) to 100 (down)")
    name = "wheel-down" if steps > 0 else "wheel-up"
    return [button(name, down) for _ in range(abs(steps)) for down in (True, False)]


def _key(code: str, down: bool) -> Event:
    return {"type": "key", "data": {"down": down, "key": {"type": "qcode", "data": code}}}


def _axis(name: str, value: int, size: int) -> Event:
    # QEMU maps 0..32767 onto 0..size-1 by rounding down: the middle of a pixel's span is that pixel.
    return {"type": "abs", "data": {"axis": name, "value": min(AXIS, (2 * value + 1) * AXIS // (2 * size))}}
