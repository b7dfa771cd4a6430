"""anthropic: a tool loop over /v1/messages with strict response validation, streamed."""

import os

from anthropic import Anthropic

TOOLS = [
    {
        "name": "look",
        "description": "Look at a place.",
        "input_schema": {
            "type": "object",
            "properties": {"place": {"type": "string"}},
            "required": ["place"],
        },
    }
]
client = Anthropic(base_url=os.environ["RORQUAL_URL"], api_key="none", _strict_response_validation=True)
messages = [{"role": "user", "content": "What is in the boxes?"}]
for turn in range(1, 12):
    with client.messages.stream(model="rorqual", max_tokens=300, messages=messages, tools=TOOLS) as stream:
        answer = stream.get_final_message()
    messages.append({"role": "assistant", "content": answer.content})
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": f"nothing in box {turn}"}
        for block in answer.content
        if block.type == "tool_use"
    ]
    if results:
        messages.append({"role": "user", "content": results})
assert answer.content[-1].text == "Nothing is there.", answer
