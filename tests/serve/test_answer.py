"""Answers: stop strings however the text is cut, counts, the end behind a block of calls."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.serve.answer import ChatAnswer, RawAnswer, StopStrings

from .conftest import TOOLS

letters = st.text("ab", max_size=30)


def until_first_stop(text, stops):
    """Oracle: reads character by character, stops as soon as the text ends in a stop string."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


@settings(deadline=None)
@given(text=letters, stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), data=st.data())
def test_stop_strings_do_not_depend_on_the_cuts(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    search, said, hit = StopStrings(stops), "", False
    for piece in pieces:
        out, hit = search.push(piece)
        said += out
        # Nothing is held back that can no longer become a stop string.
        assert len(search._held) < max(map(len, stops), default=1)
        if hit:
            break
    said += "" if hit else search.flush()
    assert (said, hit) == until_first_stop(text, stops)


def feed(answer, ids, last="stop"):
    events = []
    for number, token in enumerate(ids):
        events += answer.push(token, last if number == len(ids) - 1 else None)
        if answer.finished:
            break
    return events


def test_a_chat_answer_is_parsed_and_counted(tokenizer, answer_ids):
    ids = answer_ids(reasoning_content="I know.", content="There is a whale.")
    answer = ChatAnswer(tokenizer, thinking=True, tools=[])
    events = feed(answer, ids)
    assert events[-1].kind == "end" and events[-1].text == "stop" and answer.ended
    assert (answer.message.reasoning_content, answer.message.content) == ("I know.", "There is a whale.")
    assert answer.reasoning_tokens == len(tokenizer.encode_text("I know."))
    assert answer.ids == ids


def test_generation_ends_behind_the_block_of_calls(tokenizer, answer_ids, call):
    ids = answer_ids(reasoning_content="I look.", tool_calls=[call("box 1"), call("box 2")])
    answer = ChatAnswer(tokenizer, thinking=True, tools=TOOLS)
    feed(answer, [*ids[:-1], *tokenizer.encode_text(" and so on")], last="length")
    assert answer.finished and answer.ended and answer.ids == ids[:-1]
    assert [one.arguments for one in answer.message.tool_calls] == [
        '{"place": "box 1"}',
        '{"place": "box 2"}',
    ]
    assert answer.message.finish_reason == "tool_calls"


def test_a_cut_answer_is_length(tokenizer, answer_ids):
    ids = answer_ids(reasoning_content="I know.", content="There is a whale.")[:-3]
    answer = ChatAnswer(tokenizer, thinking=True, tools=[])
    assert feed(answer, ids, last="length")[-1].text == "length" and not answer.ended


def test_stop_strings_look_at_content_alone(tokenizer, answer_ids, call):
    ids = answer_ids(reasoning_content="a whale, I know", content="There is a whale.")
    answer = ChatAnswer(tokenizer, thinking=True, tools=[], stop=["whale"])
    feed(answer, ids)
    assert answer.message.content == "There is a " and answer.message.reasoning_content == "a whale, I know"
    assert answer.message.finish_reason == "stop" and not answer.ended

    ids = answer_ids(content="So.", tool_calls=[call("whale")], reasoning_content="r")
    answer = ChatAnswer(tokenizer, thinking=True, tools=TOOLS, stop=["whale", ". And"])
    feed(answer, ids)
    assert answer.message.content == "So." and answer.message.tool_calls[0].arguments == '{"place": "whale"}'


def test_what_was_held_back_goes_out_before_a_call(tokenizer, answer_ids, call):
    ids = answer_ids(content="So.", tool_calls=[call("x")], reasoning_content="r")
    answer = ChatAnswer(tokenizer, thinking=True, tools=TOOLS, stop=["So. And"])
    kinds = [event.kind for event in feed(answer, ids)]
    assert kinds.index("content") < kinds.index("call_start") and answer.message.content == "So."


def test_a_raw_answer_is_text_without_eos(tokenizer):
    ids = tokenizer.encode_text("a whale é")
    answer = RawAnswer(tokenizer)
    feed(answer, [*ids, tokenizer.eos_id])
    assert answer.text == "a whale é" and answer.finish_reason == "stop"
    answer = RawAnswer(tokenizer)
    feed(answer, ids[:-1], last="length")
    assert answer.text == "a whale \ufffd" and answer.finish_reason == "length"


def test_a_token_outside_the_tokenizer_is_a_replacement_character(tokenizer):
    answer = ChatAnswer(tokenizer, thinking=False, tools=[])
    feed(answer, [tokenizer.vocab_size + 5, tokenizer.eos_id])
    assert answer.message.content == "\ufffd"
