"""Samples: ids of turn-by-turn generation, exact masks, batches that waste little and lose nothing."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from rorqual.chat import Segment, Tokenizer, parse, render_bridge, render_segments, train_bpe
from rorqual.rl import samples, tasks, traces
from rorqual.rl.errors import SampleError
from rorqual.rl.samples import Sample
from rorqual.rl.traces import Masked, Trace

EOS = "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(samples.corpus(1500), vocab_size=1024)


def weak(family: str, *, depth: int, wanted: str) -> Trace:
    """A weak trace whose reasoning holds `wanted`."""
    for seed in itertools.count():
        trace = traces.expert(tasks.sample(family, depth=depth, seed=seed), random.Random(seed), style="weak")
        if wanted in " ".join(m.get("reasoning_content", "") for m in trace.messages):
            return trace
    raise AssertionError


def shown(sample: Sample, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """(trained on, text) of each run of tokens with the same mask."""
    for flag, run in itertools.groupby(zip(sample.mask, sample.ids, strict=True), key=lambda pair: pair[0]):
        yield flag, tokenizer.decode([token for _, token in run])


def test_mask_of_a_guess_leaves_out_its_digits_and_nothing_else(tokenizer: Tokenizer) -> None:
    trace = weak("calc-tool", depth=2, wanted="Guess")
    runs = list(shown(samples.encode(trace, tokenizer), tokenizer))
    assert [flag for flag, _ in runs] == [False, True, False, True]
    prompt, before, guess, after = (text for _, text in runs)
    assert prompt.endswith(f"<｜User｜>{trace.task.prompt}<｜Assistant｜><think>")
    assert before == (
        'Guess.</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="submit">\n'
        '<｜DSML｜parameter name="answer" string="true">'
    )
    assert guess == trace.answer
    assert after == f"</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}"


def test_mask_of_a_demonstration_is_what_the_assistant_writes(tokenizer: Tokenizer) -> None:
    trace = weak("hop-recover", depth=2, wanted="Look there")
    runs = list(shown(samples.encode(trace, tokenizer), tokenizer))
    written = [text for flag, text in runs if flag]
    given = [text for flag, text in runs if not flag]
    assistants = [m for m in trace.messages if m["role"] == "assistant"]
    results = [m["content"] for m in trace.messages if m["role"] == "tool"]
    assert len(written) == len(assistants) == len(given)
    for text, message in zip(written, assistants, strict=True):
        parsed = parse(text, tools=list(trace.tools))
        assert text.endswith(EOS)
        assert parsed.reasoning_content == message["reasoning_content"]
        assert [(c.name, c.arguments) for c in parsed.tool_calls] == [
            (c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]
        ]
    assert given[1:] == [
        f"<｜User｜><tool_result>{result}</tool_result><｜Assistant｜><think>" for result in results
    ]


def test_ids_are_those_of_prompting_and_sampling_turn_by_turn(tokenizer: Tokenizer) -> None:
    """prompt ids, then per turn the completion's ids and the bridge's: never re-tokenized, yet equal."""
    for trace in itertools.islice(traces.stream("train", seed=3), 40):
        whole = samples.encode(trace, tokenizer)
        messages = list(trace.messages)
        ids = tokenizer.encode_segments(render_segments(messages[:2], tools=trace.tools))
        for index in range(2, len(messages), 2):
            upto = render_segments(messages[: index + 1], tools=trace.tools)
            ids += tokenizer.encode_segments([s for s in upto if s.generated and s.turn == index])
            if index + 1 < len(messages):
                calls = messages[index]["tool_calls"]
                ids += tokenizer.encode_segments(render_bridge([messages[index + 1]], previous_calls=calls))
        assert ids == whole.ids
        assert whole.ids == tokenizer.encode_segments(render_segments(messages, tools=trace.tools))


def test_masked_parameter_that_is_not_there_is_named(tokenizer: Tokenizer) -> None:
    trace = weak("calc-tool", depth=1, wanted="Guess")
    for wrong in (Masked(message=2, parameter="command"), Masked(message=1, parameter="answer")):
        with pytest.raises(SampleError, match=rf"messages\[{wrong.message}\].*'{wrong.parameter}'"):
            samples.encode(dataclasses.replace(trace, masked=(wrong,)), tokenizer)


def test_mask_counts_bytes_so_that_text_beyond_ascii_is_masked_whole(tokenizer: Tokenizer) -> None:
    trace = weak("calc-tool", depth=1, wanted="Guess")
    messages = [dict(message) for message in trace.messages]
    function = {"name": "submit", "arguments": '{"answer": "zwölf ≈ 12"}'}
    messages[2]["tool_calls"] = [{"id": "call_0", "type": "function", "function": function}]
    sample = samples.encode(dataclasses.replace(trace, messages=tuple(messages)), tokenizer)
    texts = [text for _, text in shown(sample, tokenizer)]
    assert texts[2].strip('">/<') == "zwölf ≈ 12"  # a token may glue a neighbouring mark to it


def test_prompt_text_cannot_flow_into_generated_text() -> None:
    segments = [Segment("given", False, 0, False), Segment("written", False, 1, True)]
    with pytest.raises(AssertionError, match="border of a generation"):
        samples.join_texts(segments)


def test_tokens_stay_within_their_budget(tokenizer: Tokenizer) -> None:
    """Vocabulary 1024: constant prefix <= 130 tokens, goal <= 30, one hop (call and result) <= 45."""
    system = [{"role": "system", "content": traces.SYSTEM_PROMPT}]
    assert len(tokenizer.encode_segments(render_segments(system, tools=traces.TOOLS))) <= 130
    for family in tasks.families():
        for seed in range(40):
            prompt = tasks.sample(family, depth=3, seed=seed, split="test").prompt
            assert len(tokenizer.encode_text(prompt)) <= 30
    trace = weak("hop-recover", depth=3, wanted="Look there")
    encoded = tokenizer.encode_conversation(render_segments(trace.messages, tools=trace.tools))
    for index in range(2, len(trace.messages) - 1, 2):
        assert sum(turn in (index, index + 1) for turn in encoded.turns) <= 45


def test_what_a_call_needs_is_within_the_window_of_its_thought(tokenizer: Tokenizer) -> None:
    """Box, name, key and result of a turn are repeated at most 15 tokens later: a window of 16 sees them."""
    for trace in itertools.islice(traces.stream("test", seed=5, style="expert"), 200):
        for index in range(2, len(trace.messages), 2):
            whole = render_segments(trace.messages, tools=trace.tools)
            ids = tokenizer.encode_segments([s for s in whole if s.generated and s.turn == index])
            texts = [tokenizer.decode([token]) for token in ids]
            end = texts.index("</think>")
            thought = [i for i in range(end) if texts[i].isdigit()]
            call = [i for i in range(end, len(texts)) if texts[i].isdigit()]
            if "python" in trace.messages[index]["reasoning_content"]:
                continue  # an expression may be longer than the window: copied from the compressed context
            assert [texts[i] for i in thought] == [texts[i] for i in call]
            # The query that predicts token i stands at i - 1.
            assert max(i - 1 - j for j, i in zip(thought, call, strict=True)) <= 15


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    for text in ("cat 482", "box37/913", "print(47*83+19)", "key 5571", '">726</'):
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode_text(text)]
        assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]


def test_batch_pads_on_the_right_with_the_mask_off() -> None:
    made = samples.batch(
        [Sample(ids=[5, 6, 7], mask=[False, True, True]), Sample(ids=[8], mask=[True])], pad_id=2, multiple=4
    )
    assert made.ids.tolist() == [[5, 6, 7, 2], [8, 2, 2, 2]]
    assert made.mask.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert made.lengths.tolist() == [3, 1]
    assert (made.ids.dtype, made.mask.dtype, made.lengths.dtype) == (torch.int64, torch.bool, torch.int64)
    with pytest.raises(SampleError, match="at least one"):
        samples.batch([], pad_id=2)


def test_batches_keep_every_sample_and_little_padding() -> None:
    rng = random.Random(0)
    made = [Sample(ids=[n, *[9] * rng.randrange(90, 400)], mask=[]) for n in range(1000, 2100)]
    made = [Sample(ids=s.ids, mask=[True] * len(s.ids)) for s in made]
    out = list(samples.batches(made, pad_id=2, tokens=4096, pool=500, seed=1))
    assert sorted(row[0] for b in out for row in b.ids.tolist()) == list(range(1000, 2100))
    assert all(b.ids.numel() <= 4096 for b in out)
    real = sum(int(b.lengths.sum()) for b in out)
    assert real / sum(b.ids.numel() for b in out) > 0.95
    # Resume: pools after the first are the same whether or not the first was drawn in this process.
    later = list(samples.batches(made[500:], pad_id=2, tokens=4096, pool=500, seed=1, first_pool=1))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(out[-len(later) :], later, strict=True))
    lengths = [b.ids.shape[1] for b in out]
    assert lengths != sorted(lengths)
    with pytest.raises(SampleError, match="does not fit a batch of 64"):
        next(samples.batches(made, pad_id=2, tokens=64))


def test_corpus_is_deterministic_and_has_both_kinds() -> None:
    first, again = (list(samples.corpus(200)) for _ in range(2))
    assert first == again
    general = [document for document in first if len(document) == 1]
    assert len(general) == int(200 * samples.GENERAL_SHARE)
    text = "".join(segment.text for document in first for segment in document)
    for expected in ("No such file or directory\n[exit 1]", "print(", "Give up.", "git commit"):
        assert expected in text
