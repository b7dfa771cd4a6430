"""openai-agents: its own loop with a function tool, over /v1/responses (its default) or chat completions."""

import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(True)
chat = os.environ["CLIENT_PREFIX"] == "chat"


@function_tool(strict_mode=not chat)
def look(place: str) -> str:
    """Look at a place."""
    return f"nothing in {place}"


client = AsyncOpenAI(base_url=os.environ["RORQUAL_URL"] + "/v1", api_key="none")
kind = OpenAIChatCompletionsModel if chat else OpenAIResponsesModel
agent = Agent(
    name="looker",
    instructions="You look.",
    tools=[look],
    model=kind("rorqual", client),
    model_settings=ModelSettings(max_tokens=300),
)
result = Runner.run_sync(agent, "What is in the boxes?", max_turns=15)
assert result.final_output == "Nothing is there.", result.final_output
