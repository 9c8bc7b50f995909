"""A folder of Hugging Face transformers with text as a task: no labels, the metric is the cosine to the network before.

The folder has ``config.json``, weights as safetensors, and the files of a tokenizer. Nothing is downloaded, and no
code of the folder is run.
"""

from __future__ import annotations

import copy
import functools
import gzip
import importlib
import json
import lzma
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from karikomi.errors import BadFile, InvalidArgument, Unavailable, Unsupported, check
from karikomi.tasks import Data, Recipe, Split, Task
from karikomi.tasks.metrics import cosine

WHERE = "encoder_folder"
FEWEST, MOST = 8, 64
"""Tokens of the sentences that are taken."""
SENTENCES = 2_000
CHOOSES = 1 / 3
"""The share of the sentences of a single file that choose; the others judge."""
_RATES = (6.0, 5.0, 4.4, 4.0, 3.7, 3.4, 3.0)
"""Bits per number that are tried: encoders give way between four and three."""

_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def encoder_task(
    folder: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    sentences: int = SENTENCES,
) -> Task:
    """Return the task of a folder: an encoder of sentences, and sentences of text files.

    `validation`: the file whose sentences choose, `test`: the one whose sentences judge; or `text` for both, of which
    a third chooses. Files are ``.txt`` (lines split at ``" . "``; headings, which begin with ``=``, are dropped) or
    ``.jsonl`` (the field ``text``), also as ``.xz`` and ``.gz``. The first `sentences` of 8 to 64 tokens of each are
    taken. The outputs are mean-pooled embeddings, the targets those of the folder's own weights, the metric their mean
    cosine. Nothing is trained.

    Raises `Unavailable` without transformers, `BadFile` for a folder or file that cannot be read,
    `InvalidArgument` for too few sentences, `Unsupported` for a network without states per token.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise BadFile("no folder of transformers: it has no config.json", where=str(folder))
    check(WHERE, (sentences >= 3, "too few sentences", sentences, ">= 3"))
    files = {"text": text, "validation": validation, "test": test}
    given = {name: Path(path) for name, path in files.items() if path is not None}
    good = set(given) in ({"text"}, {"validation", "test"})
    check(WHERE, (good, "text files", ", ".join(given) or None, "text, or validation and test"))
    weights = _Weights(folder)
    return Task(
        name=_word(folder),
        model=_Encoder(folder),
        data=_Sentences(folder, tuple(given.items()), sentences),
        loss="mean_squared_error",
        metric=cosine,
        goal="max",
        trains=False,
        about=f"sentence embeddings of {folder.name} without labels: cosine to those of the network before",
        recipe=Recipe(batch_size=32, entries=(64, 32, 16), rates=_RATES),
        weights=weights,
        command=_words(folder, given, sentences),
    )


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Makes the network of a folder, with its weights."""

    folder: Path

    def __call__(self) -> Any:
        return copy.deepcopy(_pooled(self.folder.resolve()))


@dataclass(frozen=True, slots=True)
class _Weights:
    """The arrays of the network of a folder."""

    folder: Path

    def __call__(self) -> Mapping[str, np.ndarray]:
        from karikomi.torch import to_arrays

        return to_arrays(_Encoder(self.folder)())


@dataclass(frozen=True, slots=True)
class _Sentences:
    """Tokens of sentences and the embeddings of the network before, as splits."""

    folder: Path
    files: tuple[tuple[str, Path], ...]
    most: int

    def __call__(self) -> Data:
        library = _transformers()
        tokenizer = _read(
            self.folder,
            lambda: library.AutoTokenizer.from_pretrained(self.folder, local_files_only=True),
        )
        found = {name: _tokens(tokenizer, path, self.most) for name, path in self.files}
        if "text" in found:
            rows = found["text"]
            order = np.random.default_rng(0).permutation(len(rows))
            cut = max(round(CHOOSES * len(rows)), 1)
            found = {
                "validation": [rows[k] for k in order[:cut]],
                "test": [rows[k] for k in order[cut:]],
            }
        pad = tokenizer.pad_token_id or 0
        length = max(len(row) for rows in found.values() for row in rows)
        model = _Encoder(self.folder)()
        splits = {name: _split(model, rows, length, pad) for name, rows in found.items()}
        return Data(splits["validation"], splits["validation"], splits["test"])


@functools.lru_cache(maxsize=1)
def _pooled(folder: Path) -> Any:
    """Return the network of a folder, read once: a search makes it many times."""
    library = _transformers()
    from karikomi.torch.tasks.mean_pooled import MeanPooled

    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    bars = library.utils.logging.is_progress_bar_enabled()
    library.utils.logging.disable_progress_bar()
    try:
        model = _read(folder, lambda: library.AutoModel.from_pretrained(folder, **options))
    finally:
        if bars:
            library.utils.logging.enable_progress_bar()
    return MeanPooled(model.float().eval()).eval()


def _split(model: Any, rows: list[list[int]], length: int, pad: int) -> Split:
    from karikomi.torch.tasks.training import outputs

    ids, mask = np.full((len(rows), length), pad, np.int64), np.zeros((len(rows), length), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    try:
        return Split(inputs, outputs(model, inputs))
    except Exception as error:
        raise Unsupported(
            "the network gives no states per token for ids and a mask",
            where=WHERE,
            got=f"{type(error).__name__}: {str(error)[:200]}",
            allowed="an encoder, such as BERT",
        ) from error


def _tokens(tokenizer: Any, path: Path, most: int) -> list[list[int]]:
    """Return the tokens of the first sentences of a file, each once."""
    found: dict[tuple[int, ...], None] = {}
    for sentence in _sentences(path):
        tokens = tokenizer(sentence)["input_ids"]
        if FEWEST <= len(tokens) <= MOST:
            found[tuple(tokens)] = None
        if len(found) == most:
            break
    if len(found) < 2:
        raise InvalidArgument(
            f"the file has too few sentences of {FEWEST} to {MOST} tokens",
            where=str(path),
            got=len(found),
        )
    return [list(tokens) for tokens in found]


def _sentences(path: Path) -> Iterator[str]:
    opener = _OPENERS.get(path.suffix, open)
    inner = path.with_suffix("") if path.suffix in _OPENERS else path
    read = _of_json if inner.suffix == ".jsonl" else _of_text
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            yield from read(lines, path)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise BadFile("the text cannot be read", where=str(path), got=error) from error


def _of_text(lines: Iterator[str], path: Path) -> Iterator[str]:
    for line in lines:
        if line.strip() and not line.lstrip().startswith("="):
            yield from line.strip().split(" . ")


def _of_json(lines: Iterator[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise BadFile("a line is no JSON", where=f"{path}:{number}", got=error) from error
        if row is None:
            continue
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise BadFile("a line has no text", where=f"{path}:{number}", allowed='{"text": "..."}')
        yield text


def _read(folder: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        raise BadFile(
            "transformers cannot read the folder",
            where=str(folder),
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        ) from error


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise Unavailable(
            f"transformers is not installed ({error})", where=WHERE, hint="pip install transformers"
        ) from error


def _words(folder: Path, files: Mapping[str, Path], sentences: int) -> tuple[str, ...]:
    options = {"text": "--text", "validation": "--valid", "test": "--test"}
    words = [word for name, path in files.items() for word in (options[name], str(path))]
    return (str(folder), *words, "--sentences", str(sentences))


def _word(folder: Path) -> str:
    name = folder.resolve().name
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    return kept.lstrip("._-") or "encoder"
