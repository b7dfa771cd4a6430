"""Bytes, FLOPs and parameters that a configuration costs. Torch-free."""


def entry_bytes(head_dim: int, rope_dim: int, *, block: int = 64) -> int:
    """Bytes of a packed main entry."""
    nope = head_dim - rope_dim
    scales = -(-nope // block)
    return nope + 2 * rope_dim + -(-scales // 8) * 8


def index_key_bytes(index_head_dim: int, *, block: int = 32) -> int:
    """Bytes of a packed index key."""
    return -(-index_head_dim // 2) + -(-index_head_dim // block)
