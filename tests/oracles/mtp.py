"""The MTP head and its block, one token and one stream at a time, from official names (spec/model.md 2, 4, 5, 6.1).

Plain float64 on nested loops where order matters. Imports nothing of ours. `p`: tensors without the `mtp.0.` prefix,
`c`: the configuration's numbers. Shapes: T tokens, N streams, D width.
"""

import torch


def rms(x, eps, weight=1.0):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, position, c, sign=1.0):
    """The last dims of x as complex numbers (2i, 2i+1), turned by position * base^(-2i/R)."""
    size = c["qk_rope_head_dim"]
    angle = sign * position * c["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    pairs = torch.view_as_complex(x[..., -size:].reshape(*x.shape[:-1], -1, 2).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    return torch.cat((x[..., :-size], turned), -1)


def connect(streams, site, p, c, sublayer):
    """One mHC site over streams [T, N, D]: read, run the sublayer, merge with comb transposed."""
    count, eps = streams.shape[1], c["hc_eps"]
    flat = streams.flatten(1)
    mix = rms(flat, c["rms_norm_eps"]) @ p[f"{site}_fn"].T
    base, scale = p[f"{site}_base"], p[f"{site}_scale"]
    pre = torch.sigmoid(scale[0] * mix[:, :count] + base[:count]) + eps
    post = 2 * torch.sigmoid(scale[1] * mix[:, count : 2 * count] + base[count : 2 * count])
    comb = (scale[2] * mix[:, 2 * count :] + base[2 * count :]).view(-1, count, count).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(c["hc_sinkhorn_iters"] - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    out = sublayer(torch.einsum("tn,tnd->td", pre, streams))
    return post[:, :, None] * out[:, None] + torch.einsum("tjk,tjd->tkd", comb, streams)


def attention(x, p, c):
    heads, width, eps = c["num_attention_heads"], c["head_dim"], c["rms_norm_eps"]
    x = rms(x, eps, p["attn_norm.weight"])
    low = rms(x @ p["attn.wq_a.weight"].T, eps, p["attn.q_norm.weight"])
    q = rms((low @ p["attn.wq_b.weight"].T).view(-1, heads, width), eps)
    kv = rms(x @ p["attn.wkv.weight"].T, eps, p["attn.kv_norm.weight"])
    q = torch.stack([rotate(row, t, c) for t, row in enumerate(q)])
    kv = torch.stack([rotate(row, t, c) for t, row in enumerate(kv)])
    out = []
    for t in range(len(x)):
        keys = kv[max(0, t - c["sliding_window"] + 1) : t + 1]
        logits = torch.cat((q[t] @ keys.T / width**0.5, p["attn.attn_sink"][:, None]), 1)
        out.append(rotate(logits.softmax(-1)[:, :-1] @ keys, t, c, -1.0))
    grouped = torch.stack(out).view(len(x), c["o_groups"], -1)
    down = p["attn.wo_a.weight"].view(c["o_groups"], c["o_lora_rank"], -1)
    return torch.einsum("tgi,gri->tgr", grouped, down).flatten(1) @ p["attn.wo_b.weight"].T


def experts(x, p, c):
    limit, x = c["swiglu_limit"], rms(x, c["rms_norm_eps"], p["ffn_norm.weight"])

    def expert(row, w1, w3, w2):
        gate, up = (w1 @ row).clamp(max=limit), (w3 @ row).clamp(-limit, limit)
        return w2 @ (torch.nn.functional.silu(gate) * up)

    out = []
    for row in x:
        scores = torch.nn.functional.softplus(p["ffn.gate.weight"] @ row).sqrt()
        picked = (scores + p["ffn.gate.bias"]).topk(c["num_experts_per_tok"]).indices
        total = expert(row, *(p[f"ffn.shared_experts.{w}.weight"] for w in ("w1", "w3", "w2")))
        for e in picked:
            share = scores[e] / scores[picked].sum() * c["routed_scaling_factor"]
            total = total + share * expert(row, *(p[f"ffn.experts.{w}"][e] for w in ("w1", "w3", "w2")))
        out.append(total)
    return torch.stack(out)


def hidden(streams, embedded, p, c):
    """Streams [T, N, D] at t and the embedding [T, D] of token t+1 to the head's normed hidden [T, D]."""
    eps = c["rms_norm_eps"]
    token = rms(embedded, eps, p["enorm.weight"]) @ p["e_proj.weight"].T
    streams = token[:, None] + rms(streams, eps, p["hnorm.weight"]) @ p["h_proj.weight"].T
    streams = connect(streams, "hc_attn", p, c, lambda x: attention(x, p, c))
    streams = connect(streams, "hc_ffn", p, c, lambda x: experts(x, p, c))
    mix = rms(streams.flatten(1), eps) @ p["hc_head_fn"].T
    pre = torch.sigmoid(p["hc_head_scale"] * mix + p["hc_head_base"]) + c["hc_eps"]
    return rms(torch.einsum("tn,tnd->td", pre, streams), eps, p["norm.weight"])
