"""Runs real clients, unmodified, each in an environment of its own under build/clients, against
tests/clients/server.py, and writes docs/compat.md.

A client passes if its loop of ten calls ends as scripted, and if from the second request on at least 95% of the prompt
before came from the cache. What was cached is what the server counted, not what the client read.

    .venv/bin/python scripts/clients.py [NAME ...] [--no-write]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOOPS = ROOT / "tests" / "clients"
CLIENTS = {
    # row: (packages, the one whose version counts, loop, variant)
    "openai, chat": (["openai"], "openai", "openai_loop", "chat"),
    "openai, chat, no reasoning back": (["openai"], "openai", "openai_loop", "lossy"),
    "openai, responses": (["openai"], "openai", "openai_loop", "responses"),
    "anthropic, streamed": (["anthropic"], "anthropic", "anthropic_loop", ""),
    "litellm, openai/": (["litellm", "mcp"], "litellm", "litellm_loop", "openai/"),
    "litellm, deepseek/": (["litellm", "mcp"], "litellm", "litellm_loop", "deepseek/"),
    "litellm, hosted_vllm/": (["litellm", "mcp"], "litellm", "litellm_loop", "hosted_vllm/"),
    "openai-agents, responses": (["openai-agents"], "openai-agents", "openai_agents_loop", "responses"),
    "openai-agents, chat": (["openai-agents"], "openai-agents", "openai_agents_loop", "chat"),
    "smolagents": (["smolagents[openai]"], "smolagents", "smolagents_loop", ""),
    "mini-swe-agent": (["mini-swe-agent", "mcp"], "mini-swe-agent", "mini_swe_agent_loop", ""),
    "deepagents": (["deepagents", "langchain-openai"], "deepagents", "deepagents_loop", ""),
}


def environment(name: str, packages: list[str]) -> Path:
    """The client's interpreter; made on the first call."""
    folder = ROOT / "build" / "clients" / name
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        (folder / ".installed").touch()
    return python


def version_of(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(name: str, report: list[tuple[str, str, int, float, str]]) -> bool:
    packages, package, loop, variant = CLIENTS[name]
    python = environment(package, packages)
    log = ROOT / "build" / "clients" / f"{loop}-{variant.strip('/') or 'default'}.json"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.clients.server", str(log)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdout is not None
    try:
        url = json.loads(server.stdout.readline())["url"]
        env = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ["HOME"],
            "RORQUAL_URL": url,
            "CLIENT_PREFIX": variant,
        }
        env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
        done = subprocess.run(
            [python, LOOPS / f"{loop}.py"],
            env=env,
            cwd=LOOPS,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    finally:
        server.terminate()
        server.wait(60)
        server.stdout.close()
    turns = json.loads(log.read_text())
    shares = [turn["cached"] / before["prompt"] for before, turn in itertools.pairwise(turns)]
    least = min(shares, default=0.0)
    verdict = "passes"
    if done.returncode:
        verdict = "fails: " + (done.stderr.strip().split("\n") or ["?"])[-1][:160]
    elif len(turns) < 11 or least < 0.95:
        verdict = f"fails: {len(turns)} requests, cached {least:.1%} of the prompt before at least"
    report.append((name, version_of(python, package), len(turns), least, verdict))
    print(f"{name}: {verdict} ({len(turns)} requests, cached >= {least:.1%})", flush=True)
    return verdict == "passes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="rows to run; default: all")
    parser.add_argument("--no-write", action="store_true", help="do not write docs/compat.md")
    chosen = parser.parse_args()
    report: list[tuple[str, str, int, float, str]] = []
    passed = [run(name, report) for name in chosen.names or CLIENTS]
    if not chosen.no_write and not chosen.names:
        rows = [
            f"| {name} | {version} | {count} | {least:.1%} | {verdict} |"
            for name, version, count, least, verdict in report
        ]
        text = (ROOT / "docs" / "compat.md").read_text("utf-8")
        head = text.split("| client |")[0]
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        head = head.split("Run on ")[0] + f"Run on {date}.\n\n"
        table = ["| client | version | requests | cached, least | |", "|---|---|---|---|---|", *rows]
        (ROOT / "docs" / "compat.md").write_text(head + "\n".join(table) + "\n", "utf-8")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
