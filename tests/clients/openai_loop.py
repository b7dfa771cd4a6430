"""openai: a tool loop over chat completions with strict response validation; `lossy` sends no reasoning back."""

import json
import os

from openai import OpenAI

PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
FUNCTION = {"name": "look", "description": "Look at a place.", "parameters": PARAMETERS}
client = OpenAI(base_url=os.environ["RORQUAL_URL"] + "/v1", api_key="none", _strict_response_validation=True)
way = os.environ["CLIENT_PREFIX"]
items = [{"role": "user", "content": "What is in the boxes?"}]
for turn in range(1, 12):
    result = {"call_id": "", "output": f"nothing in box {turn}", "type": "function_call_output"}
    if way == "responses":
        tools = [{"type": "function", **FUNCTION, "strict": False}]
        answer = client.responses.create(model="rorqual", input=items, tools=tools, max_output_tokens=300)
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        calls = [item for item in answer.output if item.type == "function_call"]
        items += [{**result, "call_id": call.call_id} for call in calls]
        text = answer.output_text
    else:
        tools = [{"type": "function", "function": FUNCTION}]
        answer = client.chat.completions.create(model="rorqual", messages=items, tools=tools, max_tokens=300)
        message = answer.choices[0].message
        said = message.model_dump(exclude_none=True)
        if way == "lossy":
            said = {key: said[key] for key in ("role", "content", "tool_calls") if key in said}
        items.append(said)
        for call in message.tool_calls or ():
            assert json.loads(call.function.arguments) == {"place": f"box {turn}"}
            items.append({"role": "tool", "tool_call_id": call.id, "content": result["output"]})
        text = message.content
assert text == "Nothing is there.", text
