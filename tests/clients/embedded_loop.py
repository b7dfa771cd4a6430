"""The embedded model behind `rorqual serve`, really sampled: ten demanded calls of its own tools, over three protocols,
by a client that keeps reasoning and one that loses it. Run with the server's URL in RORQUAL_URL.

What the model calls is noise outside its tasks; that the next request finds all of the last one is the point.
"""

import json
import os
from itertools import pairwise

from openai import OpenAI

PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "bash", "description": "Run a command.", "parameters": PARAMETERS},
    }
]
CHOICE = {"type": "function", "function": {"name": "bash"}}


def loop(client, *, lossy):
    """(prompt, cached) of each request, and how many calls were made."""
    messages = [
        {"role": "system", "content": "Solve the task with the tools."},
        {"role": "user", "content": "Follow the files."},
    ]
    counts, calls = [], 0
    for turn in range(11):
        answer = client.chat.completions.create(
            model="rorqual-embedded",
            messages=messages,
            tools=TOOLS,
            tool_choice=CHOICE,
            max_tokens=150,
            seed=turn,
        )
        counts.append((answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens))
        said = answer.choices[0].message.model_dump(exclude_none=True)
        if lossy:
            said = {key: value for key, value in said.items() if not key.startswith("reasoning")}
            for call in said.get("tool_calls", ()):
                text = json.dumps(json.loads(call["function"]["arguments"]), indent=2)
                call["function"]["arguments"] = text
        messages.append(said if said.get("tool_calls") else {"role": "assistant", "content": "", **said})
        made = said.get("tool_calls", ())
        calls += len(made)
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": f"file {turn}"} for call in made]
        if not made:
            messages.append({"role": "user", "content": "Go on."})
    return counts, calls


with OpenAI(base_url=os.environ["RORQUAL_URL"] + "/v1", api_key="none") as client:
    for lossy in (False, True):
        counts, calls = loop(client, lossy=lossy)
        shares = [now[1] / before[0] for before, now in pairwise(counts)]
        print(
            f"lossy={lossy}: {calls} calls in 11 requests, cached at least {min(shares):.1%} of the prompt before"
        )
        assert min(shares) >= 0.95, counts
