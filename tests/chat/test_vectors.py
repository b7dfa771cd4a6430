"""The published golden conversations and the further cases, byte for byte."""

import hashlib
import json
from pathlib import Path

import pytest

from rorqual.chat import render, render_segments
from rorqual.chat.profile import PROFILES, TOOLS_HEAD, TOOLS_TAIL

VECTORS = Path(__file__).parent / "vectors"
EXTRA = sorted((VECTORS / "extra").glob("*.json"))
WORKED = json.loads((VECTORS / "worked_examples.json").read_text("utf-8"))
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(("case", "mode"), [(1, "thinking"), (2, "thinking"), (3, "thinking"), (4, "chat")])
def test_golden_conversation_is_byte_identical(case, mode):
    data = json.loads((VECTORS / f"official_v4/test_input_{case}.json").read_text("utf-8"))
    tools = data["tools"] if isinstance(data, dict) else None
    messages = data["messages"] if isinstance(data, dict) else data
    expected = (VECTORS / f"official_v4/test_output_{case}.txt").read_text("utf-8")
    assert render(messages, tools=tools, thinking_mode=mode, keep="official") == expected


@pytest.mark.parametrize("path", EXTRA, ids=lambda p: p.stem)
def test_further_case_is_byte_identical(path):
    case = json.loads(path.read_text("utf-8"))
    assert render(case["messages"], keep="official", **case["options"]) == case["expected"]
    segments = render_segments(case["messages"], keep="official", **case["options"])
    assert "".join(s.text for s in segments) == case["expected"]


@pytest.mark.parametrize("example", WORKED, ids=lambda e: str(e["number"]))
def test_worked_example_is_byte_identical(example):
    instructions = TOOLS_HEAD + json.dumps(NOW) + TOOLS_TAIL
    expected = example["expected"].replace("‹TOOLS›", instructions)
    assert render(example["messages"], keep="official", **example["options"]) == expected


def test_all_vectors_are_there():
    assert len(WORKED) == 16
    assert len(EXTRA) == 12
    assert len(list((VECTORS / "official_v4").iterdir())) == 8


@pytest.mark.parametrize(
    ("text", "size", "digest"),
    [
        (TOOLS_HEAD, 890, "c7c9042638154a237b5d1bd48be772374a35a4d24c5cacfd1ffbd92703da329c"),
        (TOOLS_TAIL, 99, "690702850fe256512cb1ee67c4e436ecb3e735c71ebee77ca45ff357a75fb5a7"),
        (
            PROFILES["v4"].effort_text("max"),
            476,
            "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
        ),
        (
            PROFILES["v4-0731"].effort_text("max"),
            528,
            "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c",
        ),
        (
            PROFILES["v4-0731"].effort_text("high"),
            476,
            "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
        ),
    ],
)
def test_fixed_texts_have_the_published_bytes(text, size, digest):
    data = text.encode()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
