"""`rorqual serve` as a process: it says where it listens, ends on signals with clear events and exit codes."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

from rorqual.chat import train_bpe
from rorqual.model import Config, Model

BODY = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4000, "stream": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    tokenizer = train_bpe([], vocab_size=300)
    config = Config.preset("tiny").replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=8192)
    Model(config).initialize(0).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def start(*arguments, **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    argv = [sys.executable, "-m", "rorqual.cli", "serve", *map(str, arguments)]
    return subprocess.Popen(
        argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )


def url_of(process):
    line = process.stderr.readline()
    found = re.search(r"serving small at (http://127\.0\.0\.1:\d+)/v1", line)
    assert found, line
    return found[1]


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_running_streams_with_an_error_event(model_dir, sig, code):
    with start(model_dir, "--port", 0, "--drain-seconds", 0.2) as process:
        url = url_of(process)
        body = {**BODY, "temperature": 0}
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False
        ) as response:
            parts = response.iter_text()
            text = next(parts)
            process.send_signal(sig)
            text += "".join(parts)
        assert process.wait(30) == code
        assert "stopped" in process.stderr.read()
    if "[DONE]" not in text:  # the greedy answer of a random model may end by itself
        last = [line for line in text.split("\n") if line.startswith("data: ")][-1]
        error = json.loads(last[6:])["error"]
        assert error["code"] == "shutting_down" and sig.name in error["message"]


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["--host", "0.0.0.0"], "--api-key-env", 2),
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY", 2),
        (["--cors-origin", "*"], "cors_origins", 2),
        (["--kv-bytes", "2x"], "--kv-bytes 2x: expected bytes", 2),
        (["--kv-window", "some"], "kv_window is 'some'", 2),
        (["--host", "203.0.113.7", "--api-key-env", "KEY"], "cannot listen on 203.0.113.7", 3),
    ],
)
def test_wrong_use_is_one_line(model_dir, arguments, said, code):
    with start(model_dir, *arguments, KEY="k") as process:
        assert process.wait(60) == code
        text = process.stderr.read()
    assert said in text and text.count("\n") == 1


def test_a_missing_model_names_the_file(tmp_path):
    with start(tmp_path, "--port", 0) as process:
        assert process.wait(60) == 3
        assert "config.json is missing" in process.stderr.read()


def test_a_killed_server_finds_the_conversation_again(model_dir, tmp_path):
    options = ("--port", 0, "--kv-disk", tmp_path / "kv", "--unit-tokens", 128, "--kv-bytes", "64m")
    body = {"model": "small", "messages": [{"role": "user", "content": "a whale " * 60}], "max_tokens": 4}
    with start(model_dir, *options) as process:
        url = url_of(process)
        first = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
        process.kill()
    with start(model_dir, *options) as process:
        url = url_of(process)
        with start(model_dir, *options) as other:
            assert other.wait(60) == 3 and "in use by another process" in other.stderr.read()
        turn = {"role": "assistant", "content": "x"}
        body["messages"] += [turn, {"role": "user", "content": "And now?"}]
        again = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    cache = again["x_v4"]["cache"]
    assert (
        cache["tier"] == "disk" and cache["cached_tokens"] == first["usage"]["prompt_tokens"] // 128 * 128 > 0
    )
