"""litellm: a tool loop over chat completions, its messages sent back as it made them."""

import json
import os

import litellm

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}},
                "required": ["place"],
            },
        },
    }
]
messages = [{"role": "user", "content": "What is in the boxes?"}]
for turn in range(1, 12):
    answer = litellm.completion(
        model=os.environ["CLIENT_PREFIX"] + "rorqual",
        api_base=os.environ["RORQUAL_URL"] + "/v1",
        api_key="none",
        messages=messages,
        tools=TOOLS,
        max_tokens=300,
    )
    message = answer.choices[0].message
    messages.append(message)
    for call in message.tool_calls or ():
        assert json.loads(call.function.arguments) == {"place": f"box {turn}"}
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"nothing in box {turn}"})
assert message.content == "Nothing is there.", message
