"""V4 core attention, one query and head at a time, in plain loops (spec/model.md 2.5). Imports nothing of ours."""

import math


def attention(q, kv, entries, sink, *, window, visible):
    """q[t][h][d], kv[t][d], entries[s][d], sink[h], visible(t, s) -> out[t][h][d], plain lists."""
    out = []
    for t, heads in enumerate(q):
        keys = [kv[j] for j in range(max(0, t - window + 1), t + 1)]
        keys += [entry for s, entry in enumerate(entries) if visible(t, s)]
        row = []
        for h, head in enumerate(heads):
            logits = [
                sum(a * b for a, b in zip(head, key, strict=True)) / math.sqrt(len(head)) for key in keys
            ]
            top = max([*logits, sink[h]])
            weights = [math.exp(logit - top) for logit in logits]
            total = sum(weights) + math.exp(sink[h] - top)
            row.append(
                [
                    sum(w / total * key[d] for w, key in zip(weights, keys, strict=True))
                    for d in range(len(head))
                ]
            )
        out.append(row)
    return out
