"""Writes a state in the official layout: experts one by one, FP8 and FP4 packed by the textbook.

Only for values that FP8 and FP4 hold exactly (`exact_values`), so that a reader must give back the same
numbers. Imports nothing of ours.
"""

import re

import torch

E2M1 = torch.tensor([s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
FP8_LINEARS = re.compile(r".*\.(wq_a|wq_b|wkv|wo_a|wo_b|e_proj|h_proj|shared_experts\.w[123])\.weight")
FP32 = re.compile(r".*(\.ape|attn_sink|gate\.bias|hc_\w+_(fn|base|scale))")


def exact_values(shape, generator):
    """Random e2m1 values times a power of two for each 32 along the last axis: exact in FP4, FP8 and BF16."""
    codes = torch.randint(0, 16, shape, generator=generator)
    blocks = -(-shape[-1] // 32)
    factor = 2.0 ** torch.randint(-6, -3, (*shape[:-1], blocks), generator=generator)
    return E2M1[codes] * factor.repeat_interleave(32, -1)[..., : shape[-1]]


def pack_fp4(weight):
    """[out, in] -> int8 [out, in / 2] (low nibble first) and e8m0 [out, in / 32]."""
    out, into = weight.shape
    blocks = weight.view(out, into // 32, 32)
    exponent = torch.log2(blocks.abs().amax(-1).clamp_min(2.0**-20) / 6).ceil()
    values = blocks / 2.0 ** exponent[..., None]
    codes = (values[..., None] == E2M1).float().argmax(-1).view(out, into)
    assert torch.equal(E2M1[codes].view_as(values), values), "not exact in FP4"
    raw = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return raw.view(torch.int8), (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def pack_fp8(weight):
    """[out, in] -> e4m3 [out, in] and e8m0 [ceil(out / 128), ceil(in / 128)], with unlike scales."""
    rows, columns = (-(-n // 128) for n in weight.shape)
    exponent = -4.0 - torch.arange(rows * columns).view(rows, columns) % 3
    factor = (2.0**exponent).repeat_interleave(128, 0).repeat_interleave(128, 1)
    values = weight / factor[: weight.shape[0], : weight.shape[1]]
    codes = values.to(torch.float8_e4m3fn)
    assert torch.equal(codes.float(), values), "not exact in FP8"
    return codes, (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def official(state, *, experts="fp4"):
    """Our state (experts stacked, fp32) under the official names, dtypes and packing."""
    out = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*\.ffn\.experts)\.(w[123])", name):
            for expert, weight in enumerate(tensor):
                stem = f"{match[1]}.{expert}.{match[2]}"
                pack = {"fp4": pack_fp4, "fp8": pack_fp8}.get(experts)
                if pack is None:
                    out[f"{stem}.weight"] = weight.contiguous()
                else:
                    out[f"{stem}.weight"], out[f"{stem}.scale"] = pack(weight)
        elif experts is not None and FP8_LINEARS.fullmatch(name) and ".compressor." not in name:
            out[name], out[name.removesuffix("weight") + "scale"] = pack_fp8(tensor)
        elif name.endswith("tid2eid") or experts is None or FP32.fullmatch(name):
            out[name] = tensor
        else:
            out[name] = tensor.to(torch.bfloat16)
    return out
