"""mini-swe-agent: its own agent, prompts and bash tool over litellm; its commands run in a temporary folder."""

import os
import tempfile
from pathlib import Path

import minisweagent
import yaml
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel

config = yaml.safe_load((Path(minisweagent.__file__).parent / "config" / "mini.yaml").read_text())
model = LitellmModel(
    model_name="openai/rorqual",
    cost_tracking="ignore_errors",
    model_kwargs={"api_base": os.environ["RORQUAL_URL"] + "/v1", "api_key": "none", "max_tokens": 300},
)
with tempfile.TemporaryDirectory() as folder:
    templates = {key: config["agent"][key] for key in ("system_template", "instance_template")}
    agent = DefaultAgent(model, LocalEnvironment(cwd=folder), **templates, step_limit=15, cost_limit=0.0)
    result = agent.run("What is in the boxes?")
assert result["exit_status"] == "Submitted", result
assert (
    sum("box 10" in str(message.get("content")) for message in agent.messages if message["role"] == "tool")
    == 1
)
