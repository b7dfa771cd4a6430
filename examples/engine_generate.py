"""Cached generation with a V4 model: stream, fork, rewind.   python examples/engine_generate.py [MODEL_DIR]

Without a directory it makes a small random model: its tokens mean nothing, its cache is the real one.
"""

import sys

from rorqual.engine import Engine, SamplingParams
from rorqual.model import Config, Model

model = sys.argv[1] if len(sys.argv) > 1 else Model(Config.preset("tiny")).initialize(0)
engine = Engine(model)
prompt = list(range(3, 131))  # 128 tokens: 32 CSA entries and one HCA entry

params = SamplingParams(temperature=1.0, seed=7, max_tokens=8)
print("sampled:", [event.token_id for event in engine.generate(prompt, params)])

usage = engine.usage()
print(f"{usage.tokens} tokens hold {usage.held_bytes} bytes; GQA8 in bf16 would hold {usage.gqa8_bytes}")

sequence = engine.open(prompt)
twin = sequence.fork()
twin.append([5, 6])
twin.rewind(128)
greedy = SamplingParams(temperature=0.0, max_tokens=4)
same = [e.token_id for e in sequence.generate(greedy)] == [e.token_id for e in twin.generate(greedy)]
print("a rewound twin goes on the same:", same)
