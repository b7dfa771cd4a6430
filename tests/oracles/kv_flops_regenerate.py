"""Regenerates kv_flops.json from the research script kv_flops.py, which imports nothing of ours.

python tests/oracles/kv_flops_regenerate.py PATH/TO/kv_flops.py
"""

import json
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

CONTEXTS = (0, 1, 3, 4, 127, 128, 1000, 4096, 65536, 131072, 1 << 20)


def main(script: str) -> None:
    with redirect_stdout(StringIO()):
        sys.argv = [script]
        s = runpy.run_path(script)
    out = {"source": "shared/spec/kv_flops.py", "contexts": {}, "models": {}}
    for key, c in (("pro", s["PRO"]), ("flash", s["FLASH"])):
        total, active, active_no_embedding, mtp = s["totals"](c)
        out["models"][key] = {
            "total": total,
            "active": active,
            "active_without_embedding": active_no_embedding,
            "mtp": mtp,
            "state_bytes": s["v4_state_bytes"](c),
        }
    for n in CONTEXTS:
        row = {"v32_flops": s["v32_flops"](n), "v32_kv": 61 * n * (s["V32_KV"] + s["V32_IDX"])}
        for key, c in (("pro", s["PRO"]), ("flash", s["FLASH"])):
            row[key] = {
                "kv": s["v4_kv"](c, n, s["FP8_KV"], s["FP4_IDX"]),
                "flops": s["v4_flops"](c, n),
                "flops_plain": s["v4_flops"](c, n, bf16=1.0, fp4=1.0),
            }
        out["contexts"][n] = row
    Path(__file__).with_name("kv_flops.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
