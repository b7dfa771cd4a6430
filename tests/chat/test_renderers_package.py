"""Cross-check with the `renderers` package (DeepSeekV4Renderer), an independent implementation.

It gets our small BPE through its tokenizer protocol, so nothing is downloaded. Left out are the
differences that spec/encoding.md 7.3 names, its tool placement, and the block's separator that its
parser leaves in content: it trims trailing white space of parsed reasoning, makes content of white
space empty, drops text after calls, bridges one tool result only, has the 0731 effort levels, and
keeps no reasoning of a loop without tools (so we render with keep="official" there).
"""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.chat import parse_pieces, render_bridge, render_segments, train_bpe
from tests.chat.conversations import TOOLS, assistants, calls, texts
from tests.chat.test_tokenizer import corpus

renderers = pytest.importorskip("renderers")
from renderers.configs import DeepSeekV4RendererConfig  # noqa: E402
from renderers.deepseek_v4 import DeepSeekV4Renderer  # noqa: E402


class Adapter:
    """Our tokenizer.json, read by HF and so with added tokens, behind the protocol of `renderers`."""

    name_or_path, unk_token_id, eos_token_id = "rorqual-test", None, 1

    def __init__(self, serialized):
        from tokenizers import Tokenizer

        self.hf = Tokenizer.from_str(serialized)

    def encode(self, text, *args, **kwargs):
        return self.hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids, *args, **kwargs):
        return self.hf.decode([ids] if isinstance(ids, int) else list(ids), skip_special_tokens=False)

    def convert_tokens_to_ids(self, tokens):
        return self.hf.token_to_id(tokens)

    def __call__(self, text, **kwargs):
        encoding = self.hf.encode(text, add_special_tokens=False)
        return {"input_ids": encoding.ids, "offset_mapping": encoding.offsets}


@pytest.fixture(scope="module")
def ours():
    return train_bpe(corpus(), vocab_size=512)


@pytest.fixture(scope="module")
def adapter(ours):
    return Adapter(ours.serialized)


def peer(adapter, mode, **config):
    return DeepSeekV4Renderer(adapter, DeepSeekV4RendererConfig(enable_thinking=mode == "thinking", **config))


turns = st.one_of(
    st.fixed_dictionaries({"role": st.just("user"), "content": texts}),
    assistants(),
    st.builds(
        lambda t, i: {"role": "tool", "content": t, "tool_call_id": i},
        texts,
        st.sampled_from(["c0", "c1", "c2"]),
    ),
    st.builds(lambda t: {"role": "latest_reminder", "content": t}, texts),
    st.builds(lambda t: {"role": "developer", "content": t + "x"}, texts),
    st.builds(
        lambda t, k: {"role": "user", "content": t, "task": k}, texts, st.sampled_from(["action", "title"])
    ),
    st.builds(lambda t: {"role": "system", "content": t}, texts),
)
later_turns = turns.filter(lambda m: m["role"] not in ("developer", "system"))
conversations = st.lists(turns, min_size=1, max_size=8)
MODES = st.sampled_from(["thinking", "chat"])
EFFORTS = st.sampled_from(["low", "high", "max"])


@settings(max_examples=120)
@given(messages=conversations, mode=MODES, drop=st.booleans(), effort=EFFORTS)
def test_ids_and_masks_are_equal_without_tools(ours, adapter, messages, mode, drop, effort):
    options = {"drop_thinking": drop, "reasoning_effort": effort}
    theirs = peer(adapter, mode, **options).render(messages, add_generation_prompt=True)
    segments = render_segments(messages, thinking_mode=mode, keep="official", profile="v4-0731", **options)
    mine = ours.encode_conversation(segments)
    assert mine.ids == theirs.token_ids
    # A token across the edge of prompt and answer is theirs by its start, ours only if all was sampled.
    assert not any(a and not b for a, b in zip(mine.generated, theirs.sampled_mask, strict=True))
    edges = [(a, b) for a, b in pairwise(segments) if a.generated != b.generated]
    if all(a.special or b.special for a, b in edges):
        assert mine.generated == theirs.sampled_mask


@settings(max_examples=60)
@given(messages=st.lists(later_turns, max_size=7), mode=MODES, system=st.booleans())
def test_ids_are_equal_with_tools(ours, adapter, messages, mode, system):
    messages = [{"role": "system" if system else "user", "content": "s"}, *messages]
    theirs = peer(adapter, mode).render(messages, tools=TOOLS, add_generation_prompt=True)
    for keep in ("official", "auto"):
        mine = render_segments(messages, tools=TOOLS, thinking_mode=mode, keep=keep)
        assert ours.encode_segments(mine) == theirs.token_ids


@settings(max_examples=60)
@given(message=assistants(texts.map(lambda t: t + "x")), mode=MODES)
def test_both_parsers_read_the_same_message(ours, adapter, message, mode):
    segments = render_segments([{"role": "user", "content": "u"}, message], thinking_mode=mode)
    ids = ours.encode_segments([s for s in segments if s.generated])
    theirs = peer(adapter, mode).parse_response(ids)
    mine = parse_pieces(ours.pieces(ids), thinking_mode=mode)
    # They leave the separator of the block in the content (the failure that 7.3 names for mlx-lm).
    assert mine.content + ("\n\n" if message["tool_calls"] else "") == theirs.content
    assert mine.reasoning_content == (theirs.reasoning_content or "")
    assert [(c.name, json.loads(c.arguments)) for c in mine.tool_calls] == [
        (c.name, c.arguments) for c in theirs.tool_calls
    ]


@settings(max_examples=30)
@given(calls=calls(max_size=1).filter(bool), text=texts, mode=MODES)
def test_both_bridges_extend_with_the_same_ids(ours, adapter, calls, text, mode):
    history = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    prompt = ours.encode_segments(render_segments(history[:1], tools=TOOLS, thinking_mode=mode))
    full = ours.encode_segments(render_segments(history, tools=TOOLS, thinking_mode=mode))
    new = [{"role": "tool", "content": text, "tool_call_id": calls[0]["id"]}]
    theirs = peer(adapter, mode).bridge_to_next_turn(prompt, full[len(prompt) :], new, tools=TOOLS)
    mine = ours.encode_segments(render_bridge(new, previous_calls=calls, thinking_mode=mode))
    assert theirs is not None and theirs.token_ids == full + mine
