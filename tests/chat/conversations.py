"""What several chat tests share: strategies for conversations and completions, ways to cut them."""

import json
from itertools import pairwise

from hypothesis import strategies as st

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
D = "｜DSML｜"
SPECIALS = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", D, "<｜latest_reminder｜>")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": "Run it.",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string"}, "timeout": {"type": "integer"}},
                "required": ["command"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


def param(key, value, flag="true"):
    return f'<{D}parameter name="{key}" string="{flag}">{value}</{D}parameter>'


def invoke(name, *params):
    return f'<{D}invoke name="{name}">\n' + "\n".join(params) + f"\n</{D}invoke>"


def block(*invokes):
    return f"\n\n<{D}tool_calls>\n" + "\n".join(invokes) + f"\n</{D}tool_calls>"


def merged(events):
    """Events with neighbouring deltas joined: what must not depend on how a stream was cut."""
    out = []
    for e in events:
        key = (e.kind, e.index, e.name, e.detail)
        if e.kind in ("reasoning", "content", "args") and out and out[-1][0] == key:
            out[-1] = (key, out[-1][1] + e.text)
        else:
            out.append((key, e.text))
    return out


# Texts that spell no marker, not even across a join with its neighbours.
alphabet = st.characters(exclude_categories=("Cs",), exclude_characters="｜<>")
texts = st.text(alphabet, max_size=20) | st.sampled_from(
    ["", "\n", "\n\n", " a b ", "é😀\u2028", 'q"\\', "1.50"]
)
# Any text, markers included.
hostile_texts = st.lists(
    st.sampled_from([*SPECIALS, "<tool_result>", f"</{D}parameter>", "\n", "<", "｜", "a"]) | texts,
    max_size=5,
).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
names = st.text("abcdefghijklmnopqrstuvwxyz_-0123456789", min_size=1, max_size=10)


def calls(keys=names, values=json_values, max_size=3):
    call = st.builds(
        lambda name, arguments: {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        names,
        st.dictionaries(keys, values, max_size=3),
    )
    return st.lists(call, max_size=max_size).map(
        lambda cs: [{"id": f"c{i}", "type": "function", "function": c} for i, c in enumerate(cs)]
    )


def assistants(texts=texts, **kwargs):
    return st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": texts,
            "reasoning_content": texts,
            "tool_calls": calls(**kwargs),
        }
    )


@st.composite
def agent_turns(draw, texts=texts):
    """A conversation with tools, as steps: each step is what one append adds. Results come all at once."""
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        steps.append([{"role": "user", "content": draw(texts)} for _ in range(draw(st.integers(1, 2)))])
        while True:
            turn = draw(assistants(texts, values=json_values | texts))
            steps.append([turn])
            if not turn["tool_calls"]:
                break
            results = [
                {"role": "tool", "tool_call_id": c["id"], "content": draw(texts)} for c in turn["tool_calls"]
            ]
            results = draw(st.permutations(results))
            if draw(st.booleans()):
                results.append({"role": "user", "content": draw(texts)})
            steps.append(results)
            if draw(st.booleans()):
                steps.append([draw(assistants(texts, max_size=0))])
                break
    return steps


MARKUP = [
    *(
        D,
        f"<{D}",
        f"</{D}",
        "<",
        "</",
        "｜",
        "｜DS",
        "ML｜",
        ">",
        "\n",
        "\n\n",
        " ",
        '">',
        "a",
        "é",
        "{",
        "}",
        "1",
    ),
    *("<think>", "</think>", "</thi", "nk>", EOS, EOS[:5], BOS, "<｜User｜>", "|DSML|", "｜｜DSML｜｜"),
    *(f"<{D}tool_calls>", f"\n\n<{D}tool_calls>\n", f"</{D}tool_calls>"),
    *(f"<{D}function_calls>", "<tool_calls>", "</invoke>", "</parameter>"),
    *(f'<{D}invoke name="bash">\n', f'<{D}invoke name="', '<invoke name="now">', f"</{D}invoke>"),
    *(f"\n</{D}invoke>\n", f'<{D}parameter name="command" string="true">', f"</{D}parameter>"),
    *(f'\n<{D}parameter name="timeout" string="false">', f'<{D}parameter name="input" string="true">'),
    *('<parameter name="x">', '{"a": 1}', '"', "\\", "\t", f"<{D} calls>", f'<{D} invoke name="now">'),
    *(invoke("bash", param("command", "ls")), block(invoke("now")), "tool_calls>", "text"),
]
hostile_completions = st.lists(st.sampled_from(MARKUP), max_size=25).map("".join)


@st.composite
def cuts(draw, text):
    """A list of pieces that join to `text`."""
    points = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    edges = [0, *points, len(text)]
    return [text[a:b] for a, b in pairwise(edges)]
