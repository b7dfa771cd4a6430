"""smolagents: a ToolCallingAgent, which demands a call each step and sends its history back as text."""

import os

from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def look(place: str) -> str:
    """Look at a place.

    Args:
        place: The place.
    """
    return f"nothing in {place}"


model = OpenAIServerModel(
    model_id="rorqual", api_base=os.environ["RORQUAL_URL"] + "/v1", api_key="none", max_tokens=300
)
agent = ToolCallingAgent(tools=[look], model=model, max_steps=15)
answer = agent.run("What is in the boxes?")
assert answer == "Nothing is there.", answer
