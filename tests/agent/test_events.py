"""The event log: what is written is read back; what is torn is dropped; what is damaged is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from rorqual.agent import EventLog, EventLogError, project, read_log
from rorqual.agent.events import DURABLE, KINDS


def fill(path: Path, count: int = 5) -> None:
    with EventLog(path) as log:
        for number in range(count):
            log.append("error", where="test", error=f"number {number} ｜DSML｜ \n", recovered=True)


def test_events_come_back_as_written(tmp_path: Path) -> None:
    seen = []
    with EventLog(tmp_path / "runs" / "a.jsonl", on_event=seen.append) as log:
        log.append("goal", text="größe \u2028 \x00 \ud800")
        log.append("run.end", outcome="submitted", answer=None)
    loaded = read_log(tmp_path / "runs" / "a.jsonl")
    assert loaded.events == tuple(seen) == log.events
    assert loaded.torn_bytes == 0 and not loaded.live
    assert (tmp_path / "runs" / "a.jsonl").stat().st_mode & 0o777 == 0o600


def test_every_line_is_json_with_a_crc_over_the_rest(tmp_path: Path) -> None:
    fill(tmp_path / "a.jsonl", 3)
    for number, line in enumerate((tmp_path / "a.jsonl").read_bytes().splitlines()):
        body = json.loads(line)
        crc = body.pop("crc")
        rest = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        assert body["seq"] == number and crc == f"{zlib.crc32(rest):08x}"


def test_a_torn_tail_of_any_length_is_dropped_and_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path, 3)
    raw = path.read_bytes()
    start = raw.rindex(b"\n", 0, len(raw) - 1) + 1
    for cut in range(start, len(raw)):
        path.write_bytes(raw[:cut])
        loaded = read_log(path)
        assert len(loaded.events) == 2 and loaded.torn_bytes == cut - start
    with EventLog(path) as log:
        log.append("goal", text="again")
    assert [event.kind for event in read_log(path).events] == ["error", "error", "goal"]


def test_a_last_line_of_garbage_is_torn_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path, 2)
    path.write_bytes(path.read_bytes() + b"\0" * 4096 + b"\n")
    assert len(read_log(path).events) == 2


def test_damage_before_the_end_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path, 4)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"number 1") + 7] ^= 1
    path.write_bytes(raw)
    with pytest.raises(EventLogError, match=r"line 2 is damaged \(checksum differs\)"):
        read_log(path)


def test_a_missing_line_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fill(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2] + lines[3])
    with pytest.raises(EventLogError, match="event 2 where 1 was due"):
        read_log(path)


def test_one_writer_only_and_readers_see_that_it_lives(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with EventLog(path) as log:
        log.append("goal", text="x")
        assert read_log(path).live
        with pytest.raises(EventLogError, match="another process is writing"):
            EventLog(path)
    assert not read_log(path).live


def test_a_missing_log_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(EventLogError, match=r"no\.jsonl: cannot read the event log: No such file"):
        read_log(tmp_path / "no.jsonl")


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from rorqual.agent import EventLog, EventLogError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "try:\n"
        "    for n in range(100): log.append('goal', text='x' * 300)\n"
        "except EventLogError as error:\n"
        "    print(n, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    written, _, said = done.stdout.partition(" ")
    assert "cannot write the event log: File too large" in said
    loaded = read_log(path)
    assert len(loaded.events) == int(written) > 0 and loaded.torn_bytes == 0


def test_kill_9_in_the_middle_keeps_every_durable_event(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rorqual.agent import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "n = 0\n"
        "while True:\n"
        "    log.append('tool.intent', call=str(n), name='bash', arguments={'command': 'x' * n}, key='k')\n"
        "    print(n, flush=True)\n"
        "    n += 1\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    confirmed = [int(process.stdout.readline()) for _ in range(40)][-1]
    os.kill(process.pid, signal.SIGKILL)
    confirmed = max([confirmed, *map(int, process.stdout.read().split())])
    process.stdout.close()
    process.wait()
    loaded = read_log(path)
    assert len(loaded.events) >= confirmed + 1
    assert not loaded.live
    with EventLog(path) as log:
        log.append("run.end", outcome="interrupted")
    assert read_log(path).events[-1].kind == "run.end"


def test_the_prompt_is_a_projection_of_the_log() -> None:
    log = EventLog()
    log.append("run.start", run="r", system="S")
    log.append("goal", text="G")
    call = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    log.append("model.response", reasoning="R", content="", tool_calls=[call])
    log.append("tool.intent", call="c1", name="bash", arguments={}, key="k")
    log.append("guard.verdict", guard="same_call", action="warn", call="c1", count=3)
    log.append("tool.result", call="c1", text="T", digest="d", key="k")
    log.append("model.response", reasoning="", content="done", tool_calls=[])
    log.append("guard.verdict", guard="plain_reply", action="nudge", text="N")
    assert project(log.events) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "G"},
        {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "T"},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "N"},
    ]
    for length in range(len(log.events)):  # it only ever grows
        shorter = project(log.events[:length])
        assert project(log.events)[: len(shorter)] == shorter


def test_display_events_are_not_recorded() -> None:
    seen = []
    log = EventLog(on_event=seen.append)
    log.show("model.delta", channel="content", text="x")
    assert log.events == () and seen[0].seq == -1


def test_intents_and_results_are_durable_kinds() -> None:
    assert {"tool.intent", "tool.result", "model.response", "run.end"} <= DURABLE < KINDS
