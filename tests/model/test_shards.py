"""Headers of safetensors files: read as the format's own library reads them, and nothing hostile is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rorqual.model import CheckpointError, shards, survey
from rorqual.model.shards import DTYPES, read_shard

QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_of_the_library_is_read_to_the_byte(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "b": torch.arange(5, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "c": torch.tensor(3.5),
        "d": torch.arange(4),
        "empty": torch.zeros(0, 7),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"who": "me"})
    shard = read_shard(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert shard.metadata == {"who": "me"} and shard.size == len(content)
    assert set(shard.by_name) == set(tensors)
    for name, tensor in tensors.items():
        stored = shard.by_name[name]
        flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
        assert content[stored.begin : stored.end] == bytes(flat.tolist())
        assert stored.shape == tuple(tensor.shape)


@pytest.mark.parametrize(
    "header, data, match",
    [
        (b"{", b"", "its header is no JSON"),
        (b"[" * 100_000, b"", "its header is no JSON"),
        (b"\xff\xfe", b"", "its header is no JSON"),
        (b"[]", b"", "no JSON object"),
        (b'{"a": NaN}', b"", "NaN is no JSON number"),
        (b'{"a": {"dtype": "U8", "dtype": "I8"}}', b"", "'dtype' is given twice"),
        ({"a": 3}, b"", "a: its entry is no object"),
        ({"a": entry("F7", [1], 0, 1)}, b"x", "a: unknown dtype 'F7'"),
        ({"a": entry(["U8"], [1], 0, 1)}, b"x", "unknown dtype"),
        ({"a": entry("U8", [-1], 0, 1)}, b"x", "is no list of up to 8 sizes"),
        ({"a": entry("U8", [True], 0, 1)}, b"x", "is no list of up to 8 sizes"),
        ({"a": entry("U8", [1.0], 0, 1)}, b"x", "is no list of up to 8 sizes"),
        ({"a": entry("U8", [1] * 9, 0, 1)}, b"x", "is no list of up to 8 sizes"),
        ({"a": entry("U8", "1", 0, 1)}, b"x", "is no list of up to 8 sizes"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x", "are no two positions"),
        ({"a": entry("U8", [1], 1, 0)}, b"x", "takes 1 bytes, data_offsets give -1"),
        ({"a": entry("F32", [2], 0, 4)}, b"xxxx", r"F32 \[2\] takes 8 bytes, data_offsets give 4"),
        ({"a": entry("U8", [1 << 62, 1 << 62], 0, 1)}, b"x", "takes"),
        ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 0, 1)}, b"x", "b overlaps the tensor before it"),
        ({"a": entry("U8", [1], 1, 2)}, b"xx", "a leaves a hole before it"),
        ({"a": entry("U8", [1], 0, 1)}, b"", "its header describes"),
        ({"a": entry("U8", [1], 0, 1)}, b"xx", "its header describes"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ is no table of texts"),
        ({"__metadata__": []}, b"", "__metadata__ is no table of texts"),
    ],
)
def test_a_header_that_lies_is_named(tmp_path: Path, header: object, data: bytes, match: str) -> None:
    file = raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_shard(file)
    assert str(caught.value).startswith(str(file)) and len(str(caught.value)) < 400


def test_a_header_longer_than_the_file_or_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="hold no header of"):
        read_shard(file)
    with file.open("wb") as stream:
        stream.write((200 << 20).to_bytes(8, "little"))
        stream.truncate(300 << 20)  # sparse
    with pytest.raises(CheckpointError, match="expected at most 104857600"):
        read_shard(file)


sizes = st.one_of(st.integers(0, 6), st.integers(-2, 1 << 64), st.floats(), st.booleans(), st.none())
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", "", "f32"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(sizes, max_size=3),
        "more": st.just(1),
    },
)


@QUICK
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries), data=st.binary(max_size=24)
)
def test_what_we_accept_the_library_accepts(tmp_path: Path, header: dict[str, object], data: bytes) -> None:
    file = raw(tmp_path / "x.safetensors", header, data)
    try:
        shard = read_shard(file)
    except CheckpointError:
        return
    with safe_open(file, framework="pt") as handle:
        assert set(handle.keys()) == set(shard.by_name)


@QUICK
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=4
    ),
    cut=st.integers(-3, 3),
    swap=st.booleans(),
)
def test_what_the_library_accepts_we_accept(
    tmp_path: Path, shapes: list[tuple[str, list[int]]], cut: int, swap: bool
) -> None:
    header, at = {}, 0
    for i, (dtype, shape) in enumerate(shapes):
        count = DTYPES[dtype] * int(torch.tensor(shape).prod()) if shape else DTYPES[dtype]
        header[f"t{i}"] = entry(dtype, shape, at, at + count)
        at += count
    if swap:
        header = dict(reversed(header.items()))
    file = raw(tmp_path / "x.safetensors", header, bytes(max(0, at + cut)))
    try:
        with safe_open(file, framework="pt"):
            good = True
    except SafetensorError:
        good = False
    if good:
        assert len(read_shard(file).tensors) == len(shapes)
    else:
        with pytest.raises(CheckpointError):
            read_shard(file)


@QUICK
@given(content=st.binary(max_size=64))
def test_any_bytes_are_refused_or_read_but_never_crash(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    try:
        read_shard(file)
    except CheckpointError as error:
        assert "is not a whole safetensors file" in str(error)


def test_all_lists_every_public_name() -> None:
    for module in (shards, survey):
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        }
        constants = {name for name in module.__all__ if name.isupper()}  # they know no module
        assert public | constants == set(module.__all__)
