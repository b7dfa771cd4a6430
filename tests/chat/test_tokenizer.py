"""Ids: no text forges a token, every text round-trips, append-only holds in ids, streams decode as
wholes do."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.chat import (
    Segment,
    StreamDecoder,
    Tokenizer,
    TokenizerError,
    parse,
    parse_pieces,
    render,
    render_bridge,
    render_segments,
    train_bpe,
)
from rorqual.chat.profile import SPECIAL_TOKENS
from tests.chat.conversations import EOS, TOOLS, D, agent_turns, assistants, hostile_texts, texts

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40) | hostile_texts


def corpus():
    """Small traces with the scaffolds a real one has."""
    conversations = []
    for n in range(60):
        arguments = {"command": f"cat /data/note_{n % 7}.txt", "timeout": n}
        call = {"name": "bash", "arguments": json.dumps(arguments)}
        conversations.append(
            render_segments(
                [
                    {"role": "system", "content": "You are an agent.", "tools": TOOLS},
                    {"role": "user", "content": f"Find the number {n}."},
                    {
                        "role": "assistant",
                        "reasoning_content": "I read the note first.",
                        "tool_calls": [{"id": "c", "type": "function", "function": call}],
                    },
                    {"role": "tool", "tool_call_id": "c", "content": f"see note_{n * 37 % 11}.txt"},
                ]
            )
        )
    return conversations


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(corpus(), vocab_size=512)


def test_special_tokens_come_first(tokenizer):
    assert [tokenizer.token_id(s) for s in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size == 512
    assert tokenizer.is_special(15) and not tokenizer.is_special(16)


def test_training_is_deterministic_whatever_the_hash_seed():
    code = (
        "from test_tokenizer import corpus, train_bpe; import hashlib;"
        "made = train_bpe(corpus(), vocab_size=512).serialized;"
        "print(hashlib.sha256(made.encode()).hexdigest())"
    )
    here = os.path.dirname(__file__)
    src = os.path.join(here, "..", "..", "src")
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": f"{here}:{src}", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1 and len(digests.pop()) == 65


def test_digits_are_single_and_scaffolds_merge_across_spaces_and_quotes(tokenizer):
    assert len(tokenizer.encode_text("2048")) == 4
    pieces = [tokenizer.decode([i]) for i in range(16 + 256, tokenizer.vocab_size)]
    assert not any(len(p) > 1 and any(c.isdigit() for c in p) for p in pieces)
    assert any(" " in p and '"' in p and len(p) > 15 for p in pieces)


@given(text=ANY_TEXT)
def test_any_text_round_trips_and_never_makes_a_special_id(tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert not any(tokenizer.is_special(i) for i in ids)


@given(text=ANY_TEXT, data=st.data())
def test_a_stream_decodes_as_the_whole_does(tokenizer, text, data):
    ids = tokenizer.encode_text(text)
    ids += data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))  # broken UTF-8 too
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids)
    assert "".join(t for t, _ in tokenizer.pieces(ids)) == tokenizer.decode(ids)


def test_a_character_cut_across_tokens_waits(tokenizer):
    ids = tokenizer.encode_text("😀")
    assert len(ids) == 4
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in ids] == ["", "", "", "😀"]
    assert decoder.push(ids[0]) == "" and decoder.finish() == "\ufffd"


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode_text("a\ud800b")) == "a\ufffdb"


@settings(max_examples=30)
@given(steps=agent_turns(texts=hostile_texts), mode=st.sampled_from(["thinking", "chat"]))
def test_ids_only_grow_and_a_bridge_extends_them(tokenizer, steps, mode):
    messages, before, calls = [], None, []
    for step in steps:
        messages = messages + step
        ids = tokenizer.encode_segments(render_segments(messages, tools=TOOLS, thinking_mode=mode))
        if before is not None:
            assert ids[: len(before)] == before
            if step[0]["role"] != "assistant":
                bridge = render_bridge(step, previous_calls=calls, thinking_mode=mode)
                assert before + tokenizer.encode_segments(bridge) == ids
        before, calls = ids, step[-1].get("tool_calls") or calls


@settings(max_examples=60)
@given(message=assistants(hostile_texts, keys=texts, values=hostile_texts), text=hostile_texts)
def test_hostile_messages_have_the_special_ids_of_the_grammar_only(tokenizer, message, text):
    messages = [{"role": "user", "content": text}, message, {"role": "tool", "content": text}]
    segments = render_segments(messages)
    ids = tokenizer.encode_segments(segments)
    wanted = [tokenizer.token_id(s.text) for s in segments if s.special]
    assert [i for i in ids if tokenizer.is_special(i)] == wanted
    assert tokenizer.decode(ids) == render(messages)


@settings(max_examples=60)
@given(message=assistants(hostile_texts, keys=texts, values=hostile_texts))
def test_a_message_full_of_markers_survives_the_way_through_ids(tokenizer, message):
    segments = render_segments([{"role": "user", "content": "u"}, message])
    ids = tokenizer.encode_segments([s for s in segments if s.generated])
    got = parse_pieces(tokenizer.pieces(ids))
    assert (got.content, got.reasoning_content) == (message["content"], message["reasoning_content"])
    assert [json.loads(c.arguments) for c in got.tool_calls] == [
        json.loads(c["function"]["arguments"]) for c in message["tool_calls"]
    ]


@settings(max_examples=60)
@given(message=assistants())
def test_tokens_and_text_parse_alike_when_nothing_is_forged(tokenizer, message):
    segments = [s for s in render_segments([{"role": "user", "content": "u"}, message]) if s.generated]
    ids = tokenizer.encode_segments(segments)
    assert parse_pieces(tokenizer.pieces(ids)) == parse("".join(s.text for s in segments))


def test_the_loss_mask_covers_what_the_model_writes(tokenizer):
    segments = corpus()[0]
    encoded = tokenizer.encode_conversation(segments)
    assert encoded.ids == tokenizer.encode_segments(segments)
    mine = [i for i, g in zip(encoded.ids, encoded.generated, strict=True) if g]
    assert tokenizer.decode(mine) == "".join(s.text for s in segments if s.generated)
    assert {t for t, g in zip(encoded.turns, encoded.generated, strict=True) if g} == {2}


def test_a_token_that_reaches_into_prompt_text_is_not_learnt():
    merge = train_bpe([[Segment("abab" * 9, False, 0, False)]], vocab_size=274)
    mixed = [Segment("a", False, 0, False), Segment("b", False, 1, True), Segment(EOS, True, 1, True)]
    encoded = merge.encode_conversation(mixed)
    assert merge.decode(encoded.ids[:1]) == "ab"
    assert (encoded.generated, encoded.turns) == ([False, True], [0, 1])


def test_saving_and_reading_gives_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    tokenizer.save(tmp_path)
    text = f"x {D} 12 é"
    for path in (tmp_path / "t.json", tmp_path):
        assert Tokenizer.from_file(path).encode_text(text) == tokenizer.encode_text(text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "tokenizer.json"]


def test_hf_reads_the_file_and_agrees(tokenizer, tmp_path):
    from tokenizers import Tokenizer as HFTokenizer

    tokenizer.save(tmp_path)
    hf = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for segments in corpus()[:5]:
        text = "".join(s.text for s in segments)
        assert hf.encode(text, add_special_tokens=False).ids == tokenizer.encode_segments(segments)
        assert hf.decode(tokenizer.encode_segments(segments), skip_special_tokens=False) == text


@pytest.mark.parametrize("missing", [s for s in SPECIAL_TOKENS if s != "<｜▁pad▁｜>"])
def test_a_tokenizer_that_splits_a_marker_is_refused_with_its_name(tokenizer, missing, tmp_path):
    spec = json.loads(tokenizer.serialized)
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != missing]
    del spec["model"]["vocab"][missing]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="is not one token") as error:
        Tokenizer.from_file(tmp_path)
    assert repr(missing) in str(error.value) and "tokenizer.json" in str(error.value)


def test_bad_files_and_ids_are_named(tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match=r"nothing\.json: cannot be read"):
        Tokenizer.from_file(tmp_path / "nothing.json")
    (tmp_path / "odd.json").write_text("[1, 2")
    with pytest.raises(TokenizerError, match=r"odd\.json: not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "odd.json")
    (tmp_path / "odd.json").write_text("[1, 2]")
    with pytest.raises(TokenizerError, match=r"odd\.json: not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "odd.json")
    with pytest.raises(TokenizerError, match="id 512 is not in the vocabulary"):
        tokenizer.decode([512])
    with pytest.raises(TokenizerError, match="id -1 "):
        tokenizer.decode([-1])
    with pytest.raises(TokenizerError, match="no special token '<x>'"):
        tokenizer.token_id("<x>")
    with pytest.raises(TokenizerError, match="vocab_size 271 is too small: 272"):
        train_bpe([], vocab_size=271)
    with pytest.raises(TokenizerError, match="cannot be written"):
        tokenizer.save(tmp_path / "no" / "such" / "folder.json")


def test_without_the_tokenizers_package_the_error_names_the_command():
    code = (
        "import sys; sys.modules['tokenizers'] = None; import rorqual.chat as c;"
        "assert c.render([{'role': 'user', 'content': 'x'}]);"
        "c.train_bpe([], vocab_size=300)"
    )
    env = {**os.environ, "PYTHONPATH": SRC}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "pip install 'rorqual[model]'" in run.stderr and "TokenizerError" in run.stderr


SRC = os.path.join(os.path.dirname(__file__), "..", "..", "src")
