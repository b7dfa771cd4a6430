"""The smallest guest, for doctor and tests: 512 bytes that a BIOS starts: a greeting, then an echo of what is typed.

xor ax, ax / mov ds, ax / cld / mov si, text
next: lodsb / test al, al / jz keys / mov ah, 0x0e / int 0x10 / jmp next      BIOS: write a character
keys: mov ah, 0 / int 0x16 / mov ah, 0x0e / int 0x10 / jmp keys               BIOS: read a key
"""

from __future__ import annotations

_CODE = bytes.fromhex("31c0 8ed8 fc be1d7c ac 84c0 7406 b40e cd10 ebf5 b400 cd16 b40e cd10 ebf6")
MAX_TEXT = 440 - len(_CODE) - 1


def boot_sector(text: str, *, size: int = 1 << 20) -> bytes:
    """A raw disk of `size` bytes that shows `text` (at most MAX_TEXT characters of ASCII)."""
    words = text.encode("ascii")
    if len(words) > MAX_TEXT or size < 512:
        raise ValueError(f"{len(words)} characters, {size} bytes: at most {MAX_TEXT}, at least 512")
    return (_CODE + words).ljust(510, b"\0") + b"\x55\xaa" + bytes(size - 512)
