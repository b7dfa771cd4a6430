"""deepagents over langchain-openai: nine tools of its own, and reasoning that never comes back."""

import os

from deepagents import create_deep_agent
from langchain_openai import ChatOpenAI


def look(place: str) -> str:
    """Look at a place."""
    return f"nothing in {place}"


model = ChatOpenAI(
    model="rorqual", base_url=os.environ["RORQUAL_URL"] + "/v1", api_key="none", max_tokens=300
)
agent = create_deep_agent(model=model, tools=[look], system_prompt="You look.")
result = agent.invoke(
    {"messages": [{"role": "user", "content": "What is in the boxes?"}]}, {"recursion_limit": 100}
)
assert result["messages"][-1].content == "Nothing is there.", result["messages"][-1]
