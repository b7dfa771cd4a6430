"""Do CSA and HCA carry information? Recall on held-out expert traces with compressed branches hidden.

Question: how much of what must be recalled from beyond the window comes through CSA, through HCA, through neither?
Peer: the same model with all branches. Physical bound: a window of W tokens over L layers reaches L*(W-1) tokens back,
and guessing a digit is right one time in ten.
Probes (teacher-forced, greedy): `box` the digits of the box number, named only in the goal; `expression` digits of the
command's expression; `other` everything else the model writes.

    python benchmarks/ablation.py [MODEL_DIR]
"""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rorqual._cli.embedded import EMBEDDED_DIR
from rorqual.chat import Tokenizer
from rorqual.model import AttentionMode, Model
from rorqual.rl import samples, traces

TRACES = 400
VARIANTS = {"all": (), "no HCA": ("hca",), "no CSA": ("csa",), "window only": ("csa", "hca")}
RESULT = Path(__file__).parent / "results" / "ablation.json"


def probe_of(text: str, token: str, family: str) -> str:
    """Which probe a generated token belongs to, from the text before it."""
    if token.strip().isdigit():
        if text.endswith("box is ") or text[:-1].endswith("box is "):
            return "box"
        if family == "calc-tool" and "print(" in text[-40:]:
            return "expression"
    return "other"


def measure(model: Model, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Variant -> probe -> share right and count; and the loss."""
    drawn = list(itertools.islice(traces.stream("test", seed=5, style="expert"), TRACES))
    encoded = [samples.encode(trace, tokenizer) for trace in drawn]
    places: list[list[tuple[int, str]]] = []  # per trace: position, probe
    for trace, sample in zip(drawn, encoded, strict=True):
        row, text = [], ""
        for position, token in enumerate(sample.ids):
            piece = tokenizer.decode([token])
            if sample.mask[position]:
                row.append((position, probe_of(text, piece, trace.task.family)))
            text += piece
        places.append(row)
    out: dict[str, dict[str, Any]] = {}
    for name, hidden in VARIANTS.items():
        right: dict[str, list[bool]] = {}
        losses = []
        for first in range(0, TRACES, 50):
            batch = samples.batch(encoded[first : first + 50], pad_id=2, multiple=16)
            with torch.no_grad():
                mode = AttentionMode(without=frozenset(hidden))
                table = torch.log_softmax(model.logits(model.train_pass(batch.ids, mode=mode).hidden), -1)
            best = table.argmax(-1)
            for row, sample in enumerate(encoded[first : first + 50]):
                for position, probe in places[first + row]:
                    right.setdefault(probe, []).append(bool(best[row, position - 1] == sample.ids[position]))
                    losses.append(-float(table[row, position - 1, sample.ids[position]]))
        out[name] = {
            probe: {"right": sum(hits) / len(hits), "count": len(hits)} for probe, hits in right.items()
        }
        out[name]["loss"] = sum(losses) / len(losses)
    return out


def main() -> None:
    """Measures, prints a table, writes JSON."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else EMBEDDED_DIR
    torch.set_num_threads(1)
    model, tokenizer = Model.from_pretrained(directory), Tokenizer.from_file(directory)
    config = model.config
    results = measure(model, tokenizer)
    table = Table(title=f"{directory}: tokens predicted right, {TRACES} held-out expert traces")
    for column in ("variant", "box (from the goal)", "expression", "other", "loss"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, probes in results.items():
        cells = [f"{100 * probes[probe]['right']:.1f}%" for probe in ("box", "expression", "other")]
        table.add_row(name, *cells, f"{probes['loss']:.4f}")
    Console().print(table)
    reach = config.num_hidden_layers * (config.sliding_window - 1)
    facts = {
        "model": str(directory),
        "window": config.sliding_window,
        "window_reach_tokens": reach,
        "compress_ratios": config.compress_ratios,
        "host": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "results": results,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
