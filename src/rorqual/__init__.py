"""Rorqual: the open agent stack of the DeepSeek-V4 blueprint.

Rooms: `chat`, `sandbox`, `agent` (light), `model`, `engine`, `rl` (need torch: pip install 'rorqual[model]').
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
