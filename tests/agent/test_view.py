"""The live view: what it shows, and what it never lets through to a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rorqual.agent import Agent, EmbeddedConfig, EmbeddedModel, Event
from rorqual.agent.figures import human_bytes, read_figures
from rorqual.agent.view import RunView, clean

from .local import LocalEnvironment
from .scripted_engine import ScriptedEngine, bash, small_tokenizer, submit


def shown(tmp_path: Path, *answers: str, terminal: bool = False) -> tuple[str, tuple[Event, ...]]:
    out = io.StringIO()
    console = Console(file=out, width=90, force_terminal=terminal, color_system=None, legacy_windows=False)
    tokenizer = small_tokenizer()
    model = EmbeddedModel(
        ScriptedEngine(tokenizer, answers),
        tokenizer,
        EmbeddedConfig(context_tokens=20_000, max_tokens=4000),
        read_metrics=lambda: {"kv_bytes": 50_800, "gqa8_bytes": 7_280_000},
    )
    with RunView(console, title="task 1") as view:
        agent = Agent(model=model, sandbox=LocalEnvironment(tmp_path), on_event=view)
        result = agent.run("Find it.")
        view.verdict(False, wanted="9")
    return out.getvalue(), result.events


def test_a_run_reads_from_task_to_verdict(tmp_path: Path) -> None:
    text, events = shown(tmp_path, bash("look", "echo hello; exit 2"), submit("ok", "7"))
    lines = [line.strip(" │") for line in text.splitlines()]
    order = ["Find it.", "┆ look", "$ echo hello; exit 2", "hello", "[exit 2]", "┆ ok", "▸ submit  7"]
    positions = [lines.index(line) for line in order]
    assert positions == sorted(positions) and "task 1" in lines[1]
    assert "● submitted  7" in lines and "✘ not solved  the answer is 9" in lines
    assert "KV cache 50.8 kB; GQA8-bf16 with the same layers: 7.28 MB (0.7%)" in lines
    assert f"{read_figures(events).completion_tokens} tokens" in text


def test_long_results_are_shortened_on_screen_only(tmp_path: Path) -> None:
    text, events = shown(tmp_path, bash("x", "seq 100"), submit("y", "1"))
    assert "… 86 more lines …" in text and "\n    50 " not in text
    assert any(event.kind == "tool.result" and "\n50\n" in event.data["text"] for event in events)


def test_a_terminal_gets_the_same_blocks_and_its_cursor_back(tmp_path: Path) -> None:
    text, _ = shown(tmp_path, bash("look", "echo hello"), submit("ok", "7"), terminal=True)
    assert "● submitted  7" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # hidden and shown again


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("\x1b]0;title\x07x\x1b]8;;http://e\x1b\\link", "xlink"),
        ("\x1b[2J\x1b[Hcleared", "cleared"),
        ("bell\x07 back\x08 del\x7f c1\x9b31m nul\x00", "bell back del c131m nul"),
        ("one\r\ntwo\rthree", "one\ntwothree"),
        ("tab\tok ü 漢 ｜", "tab\tok ü 漢 ｜"),
        ("\u202egnp.exe", "gnp.exe"),
        ("lone \x1b", "lone "),
    ],
)
def test_control_characters_never_reach_the_terminal(raw: str, safe: str) -> None:
    assert clean(raw) == safe


def test_output_of_commands_and_words_of_the_model_are_cleaned(tmp_path: Path) -> None:
    command = "printf '\\033]0;owned\\007\\033[2Jvisible'"
    text, _ = shown(tmp_path, bash("think\x1b[2J", command), submit("x", "7\x1b[31m"))
    assert "    visible" in [line.rstrip() for line in text.splitlines()]
    assert "\x1b" not in text and "\x07" not in text


def test_markup_of_the_console_library_is_text(tmp_path: Path) -> None:
    text, _ = shown(tmp_path, bash("[bold]x[/nope]", "echo '[red]y[/red]'"), submit("z", "[link=x]1"))
    assert "[bold]x[/nope]" in text and "[red]y[/red]" in text and "[link=x]1" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (50_812, "50.8 kB"),
        (999_900, "1 MB"),
        (5.28e9, "5.28 GB"),
    ],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text
