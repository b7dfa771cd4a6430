"""Whatever is sent, the answer is no 5xx and, if it is a refusal, OpenAI's envelope."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import TOOLS

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/chat/completions/render", "/tokenize", "/detokenize"]
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
fields = st.sampled_from(
    [
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "reasoning",
        "reasoning_content",
        "thinking_blocks",
        "refusal",
    ]
)
contents = st.text(max_size=8) | values
messages = st.lists(
    st.builds(
        lambda role, content, more: {"role": role, "content": content, **more},
        roles,
        contents,
        st.dictionaries(fields, values, max_size=2),
    ),
    max_size=4,
)
NAMES = """tools tool_choice temperature top_p seed stop stream n thinking prompt tokens reasoning_effort
response_format stream_options logit_bias chat_template_kwargs"""
names = st.sampled_from(NAMES.split())
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def check(response):
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=HEALTH,
)
@given(path=st.sampled_from(PATHS), talk=messages, more=st.dictionaries(names, values, max_size=3))
def test_odd_bodies(server, path, talk, more):
    body = {"model": "tiny", "max_tokens": 2, "messages": talk, **more}
    with server.http() as http:
        check(http.post(path, content=json.dumps(body), headers={"content-type": "application/json"}))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800 x"}], "max_tokens": 1}',
        b'{"model": "tiny", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "tiny", "prompt": ' + b"[" * 50_000 + b"}",
        b'{"model": "\\ud800", "prompt": "x"}',
    ],
)
def test_odd_bytes(server, path, content):
    with server.http() as http:
        check(http.post(path, content=content, headers={"content-type": "application/json"}))
        check(http.post(path, content=content, headers={"content-type": "text/plain"}))


def test_a_schema_with_a_number_that_is_none(server):
    tool = {**TOOLS[0]["function"], "parameters": {"type": "object", "x": float("nan")}}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": tool}],
    }
    with server.http() as http:
        headers = {"content-type": "application/json"}
        response = http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]
