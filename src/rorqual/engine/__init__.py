"""Engine: generation with a V4 model: cached, streamed, one sequence or many. Needs 'rorqual[model]'."""

from rorqual.engine.batch import Batch, BatchEvent, BatchFound
from rorqual.engine.engine import Engine, FinishReason, KVUsage, Located, Pinned, SequenceState, TokenEvent
from rorqual.engine.errors import CacheFull, ContextOverflow, EngineError, PromptError, SequenceFileError
from rorqual.engine.sampler import Allowed, SamplingParams, TokenGuide
from rorqual.engine.store import StoreConfig, WindowStrategy

__all__ = [
    "Allowed",
    "Batch",
    "BatchEvent",
    "BatchFound",
    "CacheFull",
    "ContextOverflow",
    "Engine",
    "EngineError",
    "FinishReason",
    "KVUsage",
    "Located",
    "Pinned",
    "PromptError",
    "SamplingParams",
    "SequenceFileError",
    "SequenceState",
    "StoreConfig",
    "TokenEvent",
    "TokenGuide",
    "WindowStrategy",
]
