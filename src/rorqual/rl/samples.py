"""Samples: traces as token ids and loss masks, batches of them, and the corpus the tokenizer is trained on.

mask[t] is True iff ids[t] is written by the model itself and trained on: reasoning, `</think>`, calls, EOS
of assistant turns, minus `Trace.masked`. The `<think>` cue, prompts and tool results are False. ids[t] is
predicted from ids[:t], so a loss compares logits[t-1] with ids[t] where mask[t].
Owns the alignment of masks and tokens. Rendering is chat's; what a trace says is traces.py's.
Shapes: B sequences, T tokens of the longest one, rounded up to `multiple`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pydoc_data import topics  # prose about Python that every installation has: nothing is downloaded
from typing import Final, Protocol

import torch

from rorqual.chat import Segment, render_segments
from rorqual.rl import traces
from rorqual.rl.errors import SampleError
from rorqual.rl.traces import Trace

__all__ = ["GENERAL_SHARE", "Batch", "Sample", "TokenizerLike", "batch", "batches", "corpus", "encode"]

GENERAL_SHARE: Final = 0.35
"""Share of corpus documents that are general English, shell and Python text. At vocabulary 1024, 0.5 costs
the demonstrations 3% more tokens than 0.2; general text goes from 2.1 to 2.3 characters a token."""


class TokenizerLike(Protocol):
    """The part of `rorqual.chat.Tokenizer` used here."""

    def encode_segments(self, segments: Sequence[Segment], /) -> list[int]:
        """Ids of a rendered conversation; a special segment is one id."""
        ...

    def decode_bytes(self, ids: Sequence[int], /) -> bytes:
        """Bytes of the ids."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One training sequence."""

    ids: list[int]
    mask: list[bool]
    """Same length as `ids`: True where the token is a training target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences padded on the right."""

    ids: torch.Tensor
    """[B, T] int64"""
    mask: torch.Tensor
    """[B, T] bool, False on padding"""
    lengths: torch.Tensor
    """[B] int64"""


def encode(trace: Trace, tokenizer: TokenizerLike) -> Sample:
    """Ids and loss mask of a trace: the same ids that prompting and sampling turn by turn would give.

    Raises:
        SampleError: a masked parameter does not occur in its message.
    """
    segments = join_texts(render_segments(trace.messages, tools=trace.tools))
    masked = {(entry.message, entry.parameter): False for entry in trace.masked}
    ids: list[int] = []
    mask: list[bool] = []
    for (generated, turn), group in groupby(segments, key=lambda s: (s.generated, s.turn)):
        run = list(group)
        parameters = [name for message, name in masked if message == turn] if generated else []
        if not parameters:
            new = tokenizer.encode_segments(run)
            ids += new
            mask += [generated] * len(new)
            continue
        for segment in run:
            new = tokenizer.encode_segments([segment])
            keep = [True] * len(new)
            for name in parameters:
                span = None if segment.special else _value_span(segment.text, name)
                if span is not None:
                    masked[turn, name] = True
                    keep = _outside(new, span, tokenizer, keep)
            ids += new
            mask += keep
    for (message, name), found in masked.items():
        if not found:
            raise SampleError(
                f"messages[{message}]: no call with a parameter {name!r} to leave out of the loss"
            )
    return Sample(ids=ids, mask=mask)


def join_texts(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbouring texts of one turn as one segment, so that no token is lost at an inner seam.

    What the model writes and what it is given meet only at special tokens; if a text ever spanned that
    border, no mask over tokens could be right.
    """
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last is None or last.special or segment.special:
            joined.append(segment)
            continue
        assert last.generated == segment.generated, (
            f"text crosses the border of a generation: {segment.text!r}"
        )
        joined[-1] = Segment(last.text + segment.text, False, segment.turn, segment.generated)
    return joined


def _value_span(text: str, parameter: str) -> tuple[int, int] | None:
    """UTF-8 bytes of VALUE in `parameter name="NAME" string="...">VALUE</`, the text between two markers."""
    if not text.startswith(f'parameter name="{parameter}" string="'):
        return None
    head, _, rest = text.partition('">')
    start = len(head.encode()) + 2
    return start, start + len(rest.encode()) - len("</")


def _outside(
    ids: Sequence[int], span: tuple[int, int], tokenizer: TokenizerLike, keep: list[bool]
) -> list[bool]:
    """`keep` with every token that touches the span switched off."""
    position, kept = 0, []
    for token, flag in zip(ids, keep, strict=True):
        end = position + len(tokenizer.decode_bytes([token]))
        kept.append(flag and (end <= span[0] or position >= span[1]))
        position = end
    return kept


def batch(samples: Sequence[Sample], *, pad_id: int, multiple: int = 8) -> Batch:
    """Pad `samples` to the longest, rounded up to `multiple`.

    Raises:
        SampleError: no samples.
    """
    if not samples:
        raise SampleError("a batch needs at least one sample")
    longest = max(len(sample.ids) for sample in samples)
    width = -(-longest // multiple) * multiple
    ids = torch.full((len(samples), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(samples), width), dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids, dtype=torch.int64)
        mask[row, : len(sample.mask)] = torch.tensor(sample.mask, dtype=torch.bool)
    return Batch(ids=ids, mask=mask, lengths=torch.tensor([len(s.ids) for s in samples], dtype=torch.int64))


def batches(
    samples: Iterable[Sample],
    *,
    pad_id: int,
    tokens: int,
    pool: int = 512,
    seed: int = 0,
    multiple: int = 8,
    first_pool: int = 0,
) -> Iterator[Batch]:
    """Batches of at most `tokens` padded tokens each, of similar lengths, so that little is padding.

    Takes `pool` samples at a time, sorts them by length, cuts, and shuffles the batches: pool p depends only
    on its samples, `seed` and p. To resume after p whole pools, skip p * pool samples and pass first_pool=p.

    Raises:
        SampleError: a single sample is longer than `tokens`.
    """
    source = iter(samples)
    number = first_pool
    while chunk := list(islice(source, pool)):
        chunk.sort(key=lambda sample: len(sample.ids))
        groups: list[list[Sample]] = [[]]
        for sample in chunk:
            width = -(-len(sample.ids) // multiple) * multiple
            if width > tokens:
                raise SampleError(f"a sample of {len(sample.ids)} tokens does not fit a batch of {tokens}")
            if width * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(sample)
        random.Random(f"{seed}|{number}").shuffle(groups)
        for group in groups:
            yield batch(group, pad_id=pad_id, multiple=multiple)
        number += 1


# ---- what the tokenizer is trained on ----

_SHELL: Final = """\
ls -la /home/user && cd src; pwd
grep -rn "TODO" --include='*.py' . | head -20
find . -name '*.txt' -type f -size +10k -exec wc -l {} +
cat README.md | sort | uniq -c | sort -rn > out.txt 2>&1
mkdir -p build && cp -r data/*.json build/ && rm -rf tmp
git status; git diff --stat; git add -A && git commit -m "Fix the failing test"; git log --oneline -5
python3 -m pytest tests/ -x -q
python3 -c 'import sys; print(sys.version)'
pip install -r requirements.txt
echo "$HOME" "${PATH}"; export NAME=value; chmod +x run.sh; ./run.sh --help
for f in *.log; do echo "$f"; tail -n 3 "$f"; done
if [ -f config.json ]; then sed -i 's/old/new/g' config.json; fi
awk -F, '{ sum += $2 } END { print sum }' table.csv
curl -s http://localhost:8000/health | python3 -m json.tool
tar czf backup.tar.gz docs/ && du -sh backup.tar.gz; ps aux | grep python; kill -9 123
bash: foo: command not found
ls: cannot access 'missing': No such file or directory
Permission denied
"""
_REQUESTS: Final = """\
Please write a Python function that reads a file and returns the number of lines.
Find all files that are larger than one megabyte and list them by size.
Fix the bug in main.py so that the tests pass, then explain what was wrong.
What is the difference between these two files? Summarize it in three sentences.
Create a new directory called results and move every image into it.
Why does the program stop with an error? Look at the log and tell me.
Let me check the output first. The file does not exist, so I will create it.
I need to look at the error message. It says that the module could not be found.
The answer is in the last line. Let me run the command again to verify the result.
Count how many times each word appears in the text and show the ten most common.
"""


def corpus(n: int, *, seed: int = 0) -> Iterator[list[Segment]]:
    """`n` documents for `train_bpe`: demonstrations of the train split, and a share of general text.

    The general text is Python's own documentation and a few lines of shell and requests, so that a user's own
    task also tokenizes decently; it depends on the Python version, and only on it.
    """
    general = _general_texts()
    demonstrations = (
        traces.stream("train", seed=seed, style="expert"),
        traces.stream("train", seed=seed + 1, style="weak"),
    )
    given = 0
    for index in range(n):
        if int((index + 1) * GENERAL_SHARE) > given:
            yield [Segment(general[given % len(general)], False, -1, False)]
            given += 1
        else:
            trace = next(demonstrations[index % 2])
            yield join_texts(render_segments(trace.messages, tools=trace.tools))


def _general_texts() -> list[str]:
    """Chunks of up to 600 characters, cut at blank lines, prose and code mixed in a fixed order."""
    prose: dict[str, str] = topics.topics
    texts: list[str] = []
    for name in sorted(prose):
        chunk = ""
        for paragraph in prose[name].split("\n\n"):
            if chunk and len(chunk) + len(paragraph) > 600:
                texts.append(chunk)
                chunk = ""
            chunk += paragraph[:600] + "\n\n"
        texts.append(chunk)
    random.Random(0).shuffle(texts)
    # The two written lists are short: repeated, they weigh something beside 700 kB of documentation.
    mixed: list[str] = []
    for index, text in enumerate(texts):
        mixed += [text, _SHELL, _REQUESTS] if index % 20 == 0 else [text]
    return mixed
