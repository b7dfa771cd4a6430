"""The embedded V4 model on a freshly drawn task, in a real container.   python examples/agent_embedded.py [SEED]

Needs `pip install 'rorqual[model]'`. `rorqual demo` shows the same, live.
"""

import asyncio
import sys
from pathlib import Path

import rorqual
from rorqual.agent import AsyncAgent, Budget, EmbeddedConfig, EmbeddedModel
from rorqual.chat import Tokenizer
from rorqual.engine import Engine, SamplingParams
from rorqual.rl import tasks
from rorqual.sandbox import AsyncSandbox

seed = int(sys.argv[1]) if len(sys.argv) > 1 else 1
weights = Path(rorqual.__file__).parent / "embedded"


async def main() -> None:
    task = tasks.sample("calc-tool", depth=1, seed=seed, split="test")
    model = EmbeddedModel(
        Engine(weights),
        Tokenizer.from_file(weights),
        EmbeddedConfig(seed=seed, max_tokens=256),
        make_params=SamplingParams,
    )
    async with await AsyncSandbox.create(workdir="/work", timeout=120, memory_mb=256) as sandbox:
        await tasks.setup(task, sandbox, "/work")
        agent = AsyncAgent(model=model, sandbox=sandbox, workdir="/work", budget=Budget(max_steps=8))
        result = await agent.run(task.prompt)
    print("task:", task.prompt)
    for event in result.events:
        if event.kind == "tool.intent":
            print("call:", event.data["name"], event.data["arguments"])
    print("answer:", result.answer, "solved:", tasks.grade(task, result.answer) == 1.0)


asyncio.run(main())
