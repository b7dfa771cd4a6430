"""The server that the clients of this folder are run against: the real one, on a tiny model with random weights and the
embedded model's tokenizer, whose answers are scripted: ten calls of `look`, each after a thought, then the end.

The embedded model itself cannot read some clients' first prompts: its context is 4,096 tokens. States, caches, queue
and protocols are the real ones. Run by scripts/clients.py as `python -m tests.clients.server LOG.json`; prints its
URL, and when it ends writes what it counted of each request.
"""

import json
import sys
from pathlib import Path

from tests.serve.scripted import scripted_rows

from rorqual import chat
from rorqual._cli.embedded import RAISED_DIR
from rorqual.engine import Engine
from rorqual.model import Config, Model
from rorqual.serve import ServeConfig, Server, Service, open_socket
from rorqual.serve.metrics import Metrics
from rorqual.serve.scheduler import Scheduler

TURNS = 10
MARK = "｜DSML｜"


def script_of(tokenizer):
    user = tokenizer.token_id("<｜User｜>")

    def call(name, key, value):
        return (
            f'invoke name="{name}">\n<{MARK}parameter name="{key}" string="true">{value}</{MARK}parameter>\n'
            f"</{MARK}invoke>\n</{MARK}tool_calls>"
        )

    def ids(text):
        first, *rest = text.split(MARK)
        out = tokenizer.encode_text(first)
        for piece in rest:
            out += [tokenizer.token_id(MARK), *tokenizer.encode_text(piece)]
        return out

    def script(prompt):
        turn = prompt.count(user)
        tail = tokenizer.decode(prompt[-40:])
        head = tokenizer.decode(prompt[:6000])
        shell = '"name": "bash"' in head  # mini-swe-agent: an answer is a command, too
        finals = shell or "final_answer" in head
        done = turn > TURNS
        if shell:
            command = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT" if done else f"echo box {turn}"
            made = call("bash", "command", command)
        elif done and finals:
            made = call("final_answer", "answer", "Nothing is there.")
        else:
            made = call("look", "place", f"box {turn}")
        thoughts = "I have seen all." if done else f"I look into box {turn}."
        out = [*ids(thoughts), tokenizer.token_id("</think>")] if tail.endswith("<think>") else []
        if done and not finals:
            return [*out, *ids("Nothing is there."), tokenizer.eos_id]
        return [*out, *ids(f"\n\n<{MARK}tool_calls>\n<{MARK}{made}"), tokenizer.eos_id]

    return script


def main():
    tokenizer = chat.Tokenizer.from_file(RAISED_DIR)
    config = Config.preset("tiny").replace(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=1 << 16, bos_token_id=0, eos_token_id=1
    )
    engine = Engine(Model(config).initialize(0))
    serve_config = ServeConfig(model_name="rorqual")
    metrics = Metrics("rorqual")
    rows = scripted_rows(script_of(tokenizer))
    scheduler = Scheduler(engine, serve_config, metrics, make_rows=rows)
    asked = []
    submit = scheduler.submit

    def counted(job):
        asked.append(job)
        submit(job)

    scheduler.submit = counted
    service = Service(engine, tokenizer, serve_config, scheduler=scheduler, metrics=metrics)
    with open_socket("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        Server(service, on_ready=lambda: print(json.dumps({"url": url}), flush=True)).run(sockets=[sock])
    turns = [{"prompt": len(job.prompt), "cached": job.cached_tokens} for job in asked]
    Path(sys.argv[1]).write_text(json.dumps(turns), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
