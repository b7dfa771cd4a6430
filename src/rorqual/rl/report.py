"""Report of an RL run: one self-contained `report.html` with the curve, and the figures as tables.

Owns the page. Reads what grpo.py wrote: rl.jsonl, before.json, after.json, control.json.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import Any

from rorqual.rl import saves

__all__ = ["write"]

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b2733}
h1{font-size:1.5rem} h2{font-size:1.1rem;margin-top:2rem} img{max-width:100%}
table{border-collapse:collapse;margin:.5rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #d5dde3;text-align:right}
td:first-child,th:first-child{text-align:left} .note{color:#5a6b78}
"""


def write(out: Path) -> Path:
    """Writes `report.html` into the run directory `out` and returns its path. Needs matplotlib."""
    history = saves.read_lines(out / "rl.jsonl")
    results = {name: _read(out / f"{name}.json") for name in ("before", "after", "control")}
    training = _read(out / "training.json") or {}
    parts = [
        "<!doctype html><meta charset=utf-8><title>Rorqual RL report</title>",
        f"<style>{STYLE}</style><h1>Reinforcement learning in real sandboxes</h1>",
    ]
    if history:
        last = history[-1]
        seconds, episodes = last["seconds"], sum(sum(row["statuses"].values()) for row in history)
        parts.append(
            f"<p>{last['step']} steps, {episodes} episodes, {sum(row['tokens'] for row in history):,} sampled "
            f"tokens, {seconds / 60:.1f} minutes. Every episode acted in a container; answers were graded outside.</p>"
        )
        picture = _plot(history, results["before"])
        parts.append(f'<img alt="reward and held-out success by step" src="data:image/png;base64,{picture}">')
    parts.append("<h2>Held-out success</h2>")
    parts += [_table(kind, results) for kind in ("sampled", "greedy")]
    if history:
        parts.append("<h2>Health of the run</h2>" + _health(history))
    parts.append(
        f"<h2>Recipe</h2><pre class=note>{html.escape(json.dumps(training.get('config', {}), indent=1))}</pre>"
    )
    path = out / "report.html"
    temporary = path.with_name(".report.html.tmp")
    temporary.write_text("\n".join(parts), encoding="utf-8")
    temporary.replace(path)
    return path


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else None


def _plot(history: list[dict[str, Any]], before: dict[str, Any] | None) -> str:
    """The curve as base64 PNG; held-out success starts with the measurement before the first step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 6), height_ratios=(2, 1), sharex=True)
    steps = [row["step"] for row in history]
    top.plot(
        steps, [row["reward"] for row in history], color="#7aa6c2", linewidth=1, label="training reward (T=1)"
    )
    measured = [row for row in history if "held_out" in row]
    for family in sorted({name for row in measured for name in row["held_out"]["solved"]}):
        points = [(row["step"], _rate(row["held_out"]["solved"][family])) for row in measured]
        if before is not None:
            points.insert(0, (0, _rate(before["sampled"]["solved"][family])))
        top.plot(*zip(*points, strict=True), marker="o", label=f"held-out {family} (T=1)")
    top.set_ylim(-0.02, 1.02)
    top.set_ylabel("share solved")
    top.grid(alpha=0.3)
    top.legend(loc="lower right")
    bottom.plot(
        steps, [row["zero_groups"] for row in history], color="#b9772f", label="groups without spread"
    )
    bottom.plot(steps, [row["entropy"] for row in history], color="#4d8b57", label="entropy (nats)")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    bottom.legend(loc="center right")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _rate(solved: dict[str, float]) -> float:
    """Mean over depths."""
    return math.fsum(solved.values()) / len(solved)


def _table(kind: str, results: dict[str, dict[str, Any] | None]) -> str:
    """Family and depth by model; the number of tasks stands beside each rate."""
    present = {name: result[kind] for name, result in results.items() if result and kind in result}
    if not present:
        return ""
    title = "T=1" if kind == "sampled" else "Greedy"
    names = {"before": "before", "after": "after RL", "control": "control: more SFT, same time"}
    head = "".join(f"<th>{names[name]}</th>" for name in present)
    rows = []
    first = next(iter(present.values()))
    for family, by_depth in first["solved"].items():
        for depth in by_depth:
            cells = "".join(
                f"<td>{100 * result['solved'][family][depth]:.0f}% of {result['counted'][family][depth]}</td>"
                for result in present.values()
            )
            rows.append(f"<tr><td>{html.escape(family)}, depth {depth}</td>{cells}</tr>")
    return f"<h3>{title}</h3><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _health(history: list[dict[str, Any]]) -> str:
    last = history[-10:]

    def mean(name: str) -> float:
        return math.fsum(row[name] for row in last) / len(last)

    failed = sum(row["statuses"].get("infra_error", 0) for row in history)
    total = sum(sum(row["statuses"].values()) for row in history)
    rows = [
        ("rollout, seconds a step", f"{mean('rollout_seconds'):.1f}"),
        ("update, seconds a step", f"{mean('update_seconds'):.1f}"),
        ("tokens an episode", f"{mean('length'):.0f}"),
        ("|log-probability gap| between sampling and training", f"{mean('log_gap'):.1e}"),
        ("tokens clipped", f"{100 * mean('clip_share'):.2f}%"),
        ("infrastructure failures (excluded, all steps)", f"{failed} of {total}"),
    ]
    body = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{body}</table><p class=note>Means of the last {len(last)} steps.</p>"
