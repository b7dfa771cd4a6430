"""Draws results/sandbox.png from results/sandbox.json: python benchmarks/sandbox_plot.py [JSON [PNG]]."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

OURS, PEER, GOAL = "#1f5f8b", "#b9b9b9", "#c0392b"
PEERS = ("fork+exec", "crun ", "runc ", "runsc ", "bwrap", "podman", "a terminal of the host")
"""How the names of what is not ours begin."""


def bars(
    axis: Any, title: str, rows: dict[str, Any], *, key: str = "p50", top: str = "p99", unit: str = "ms"
) -> None:
    names = sorted(rows, key=lambda name: rows[name][key], reverse=unit == "ms")
    middle = [rows[name][key] for name in names]
    high = [max(0.0, rows[name][top] - rows[name][key]) for name in names]
    colours = [PEER if name.startswith(PEERS) else OURS for name in names]
    axis.barh(range(len(names)), middle, color=colours, height=0.62)
    axis.errorbar(
        middle,
        range(len(names)),
        xerr=[[0] * len(names), high],
        fmt="none",
        ecolor="#333333",
        elinewidth=0.8,
        capsize=2,
    )
    for number, name in enumerate(names):
        if "goal" in rows[name]:
            axis.plot([rows[name]["goal"]] * 2, [number - 0.42, number + 0.42], color=GOAL, linewidth=2)
        text = f"{middle[number]:.0f}" if middle[number] >= 100 else f"{middle[number]:.3g}"
        place = (middle[number] + high[number], number)
        axis.annotate(text, place, xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(min(middle) / 3.0, max(m + h for m, h in zip(middle, high, strict=True)) * 2.5)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title(f"{title}, {unit}", fontsize=9, loc="left", fontweight="bold")
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def draw(document: dict[str, Any], path: Path) -> None:
    panels = [
        ("create to first command", document["create_ms"]),
        ("one command in a live sandbox", document["round_trip_ms"]),
        ("echo of a byte typed at a terminal", document["pty_echo_ms"]),
        *document["state_ms"].items(),
    ]
    figure, axes = plt.subplots(
        5, 2, figsize=(12, 16), gridspec_kw={"height_ratios": [1.9, 1.2, 1.0, 1.0, 1.5]}
    )
    flat = list(axes.flat)
    order = [flat[0], flat[1], flat[3], flat[4], flat[5], flat[6], flat[7], flat[8]]
    for axis, (title, rows) in zip(order, panels, strict=True):
        bars(axis, title, rows)
    bars(flat[2], "a file of 64 MB", document["files_mb_per_s"], key="median", top="max", unit="MB/s")
    flat[9].axis("off")
    load = f"{document['load_at_start'][0]} at the start, {document.get('load_at_end', ['?'])[0]} at the end"
    text = (
        "bar: p50; whisker: to p99 (files: median, fastest)\n"
        "blue: ours; grey: peers and floors of the same run\n"
        "red: the goal that was set\n\n"
        f"{document['cpu']}, {document['cpus']} CPUs, Linux {document['kernel']}\n"
        f"load {load}\n"
        f"microVMs here are emulated; {document['rounds']} rounds; commit {document['commit']}"
    )
    flat[9].text(0.0, 0.95, text, fontsize=9, va="top", family="monospace")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results/sandbox.json")
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    draw(json.loads(source.read_text(encoding="utf-8")), target)
