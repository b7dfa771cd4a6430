"""`rorqual chat` in a pseudo terminal, against a running server: what a person sees and types."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from rorqual._cli.talk_screen import printable

from .conftest import TOOLS


class Terminal:
    """The other end of the command's terminal."""

    def __init__(self, master, process):
        self.master, self.process, self.seen = master, process, ""

    def wait(self, text, *, seconds=60):
        """Reads until `text` has come; returns what came up to it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{text!r} did not come; seen: {self.seen!r}"
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux says so at the end
                data = b""
            assert data, f"the command ended before {text!r}; seen: {self.seen!r}"
            self.seen += data.decode()
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, line):
        os.write(self.master, line.encode() + b"\n")
        self.wait(line)


@contextmanager
def chatting(tmp_path, *arguments, **env):
    master, slave = pty.openpty()
    environment = {
        **os.environ,
        "XDG_STATE_HOME": str(tmp_path),
        "TERM": "xterm",
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    argv = [sys.executable, "-m", "rorqual.cli", "chat", *map(str, arguments)]
    process = subprocess.Popen(
        argv, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait(30)
        os.close(master)


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_conversation(serve, answer_ids, tokenizer, tmp_path):
    user = tokenizer.token_id("<｜User｜>")

    def script(prompt):
        turn = prompt.count(user)
        if turn == 2:
            return tokenizer.encode_text("word ") * 3000
        return answer_ids(reasoning_content="I count.", content=f"Turn {turn}.\x1b[2J")

    with serve(script=script) as server, chatting(tmp_path, server.url, "--system", "Be brief.") as terminal:
        terminal.wait("tiny (Ctrl-C stops")
        terminal.wait("> ")
        terminal.type("Hello")
        text = plain(terminal.wait("out)"))
        assert "[thought: 8 characters" in text and "Turn 1." in text and "I count." not in text
        assert "\x1b[2J" not in text and "\ufffd[2J" in text
        terminal.wait("> ")
        terminal.type("/reasoning")
        terminal.wait("I count.")
        terminal.wait("> ")
        terminal.type("Go on for ever")
        terminal.wait("thinking ... ")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait("(stopped)")
        terminal.wait("> ")
        terminal.type("And now?")
        assert "Turn 3." in plain(
            terminal.wait("cached")
        )  # the program lived on, and so did the conversation
        terminal.wait("> ")
        terminal.type("/new")
        terminal.wait("a new conversation")
        terminal.wait("> ")
        terminal.type("Hello again")
        terminal.wait("Turn 1.")
        terminal.wait("> ")
        terminal.type("/again")
        terminal.wait("Turn 1.")
        terminal.wait("> ")
        terminal.type("/nonsense")
        terminal.wait("no command /nonsense")
        terminal.wait("> ")
        os.write(terminal.master, b"\x04")
        assert terminal.process.wait(30) == 0
    history = tmp_path / "rorqual" / "chat_history"
    assert "Go on for ever" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


def test_calls_are_shown_and_their_results_typed(serve, answer_ids, call, tokenizer, tmp_path):
    user = tokenizer.token_id("<｜User｜>")

    def script(prompt):
        if prompt.count(user) == 1:
            return answer_ids(reasoning_content="I look.", tool_calls=[call("box 1")])
        return answer_ids(reasoning_content="I see.", content="A whale.")

    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    with (
        serve(script=script) as server,
        chatting(tmp_path, server.url, "--tools", tools, "--show-reasoning") as terminal,
    ):
        terminal.wait("> ")
        terminal.type("Look")
        assert "I look." in plain(terminal.wait('[call] look {"place": "box 1"}'))
        terminal.wait("result of look> ")
        terminal.type("a whale")
        assert "I see." in plain(terminal.wait("A whale."))
        terminal.wait("> ")
        terminal.type("/quit")
        assert terminal.process.wait(30) == 0
        assert "<tool_result>a whale</tool_result>" in tokenizer.decode(
            server.service.scheduler._rows.prompts[-1]
        )


def test_without_a_terminal_lines_go_in_and_answers_come_out(serve, answer_ids, tmp_path):
    ids = answer_ids(reasoning_content="I know.", content="A whale.")
    with serve(script=lambda prompt: ids) as server:
        argv = [sys.executable, "-m", "rorqual.cli", "chat", server.url, "--max-tokens", "5000"]
        refused = subprocess.run(
            argv, input="What?\n", capture_output=True, text=True, timeout=60, check=True
        )
        argv[-1] = "99"
        done = subprocess.run(argv, input="What?\n", capture_output=True, text=True, timeout=60, check=True)
    assert "error: 400: " in refused.stdout and "context is 4096" in refused.stdout.replace("\n", " ")
    assert "A whale.\n" in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["http://127.0.0.1:9"], "no server at http://127.0.0.1:9", 3),
        (["ftp://x"], "no http:// or https:// URL", 2),
        (["no-such-directory"], "no such model directory", 2),
        (["http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"], "holds no key", 2),
        (["http://127.0.0.1:9", "--tools", "/dev/null"], "not JSON", 2),
    ],
)
def test_wrong_use_is_one_line(arguments, said, code):
    argv = [sys.executable, "-m", "rorqual.cli", "chat", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code and said in done.stderr and done.stderr.count("\n") == 1


def test_the_embedded_model_is_the_default(tmp_path):
    with chatting(tmp_path, "--max-tokens", "5") as terminal:
        terminal.wait("rorqual-embedded (Ctrl-C", seconds=200)
        terminal.wait("> ")
        terminal.type("Hello")
        terminal.wait("5 out)")
        terminal.wait("> ")
        os.write(terminal.master, b"\x04")
        assert terminal.process.wait(60) == 0


def test_what_a_model_wrote_moves_no_cursor():
    assert printable("a\x1b[2Jb\r\u202ec\x07\x9b\n\té漢🧑\u200d💻\xa0") == (
        "a\ufffd[2Jb\ufffd\ufffdc\ufffd\ufffd\n\té漢🧑\u200d💻\xa0"
    )
