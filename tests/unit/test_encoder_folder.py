"""A folder of transformers with text into `compress`: what is read, what is refused, what comes out."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import karikomi as kk  # noqa: E402
from karikomi.cli.app import main  # noqa: E402
from karikomi.errors import BadFile, InvalidArgument, KarikomiError  # noqa: E402
from karikomi.plugins import encoder_folder  # noqa: E402
from karikomi.plugins.encoder_folder import encoder_task  # noqa: E402
from karikomi.torch.tasks.mean_pooled import MeanPooled  # noqa: E402

WORDS = [f"w{k}" for k in range(40)]


def lines(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 12 + k % 20)) for k in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small BERT and a tokenizer of words, both made here."""
    path = tmp_path_factory.mktemp("encoder") / "tiny-bert"
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]"
    )
    made.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=42,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return two files: WikiText's form, compressed, and JSON lines."""
    path = tmp_path_factory.mktemp("text")
    with lzma.open(path / "valid.txt.xz", "wt", encoding="utf-8") as file:
        file.write(
            "\n".join([f" = {lines(1, 8)[0]} = ", "", *lines(60, 0), " . ".join(lines(3, 9))])
        )
    with gzip.open(path / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in [*lines(90, 1), "w1 w2"]))
    return {"validation": path / "valid.txt.xz", "test": path / "test.jsonl.gz"}


def test_a_folder_becomes_smaller_without_labels(
    folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text("rates = [5.0]\nentries = [16]\n")
    words = ["compress", folder, "--valid", texts["validation"], "--test", texts["test"]]
    words += ["--sentences", 62, "--max-drop", 0.05, "--out", tmp_path / "run", "--quiet", "--json"]
    done = CliRunner().invoke(main, [*map(str, words), "--config", str(tmp_path / "recipe.toml")])
    assert done.exit_code in (0, 3), done.output
    result = json.loads(done.stdout)
    assert (result["metric"], result["goal"], result["training"]) == ("cosine", "max", False)
    assert result["metric_before"] == pytest.approx(1) and result["drop"] < 0.05
    assert result["verified"] and result["ratio"] > 3
    assert result["examples"] == {"train": 62, "validation": 62, "test": 62}
    steps = [row for row in kk.record.read(result["record"]) if row["event"] == "step"]
    assert steps == [], "nothing is trained"
    small = kk.load(result["file"], into=encoder_task(folder, text=texts["test"]).model())
    assert isinstance(small, MeanPooled) and type(small.encoder).__name__ == "BertModel"
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"karikomi compress {folder} --valid {texts['validation']}" in card
    (tmp_path / "run" / "model.safetensors").unlink()
    export = ["export", str(tmp_path / "run"), "--forms", "safetensors", "--json"]
    written = CliRunner().invoke(main, export)
    assert written.exit_code == 0, written.output
    (row,) = json.loads(written.stdout)["exports"]
    assert row["difference"] == 0 and (tmp_path / "run" / "model.safetensors").is_file()


def test_headings_and_short_sentences_are_dropped(folder: Path, texts: dict[str, Path]) -> None:
    data = encoder_task(folder, **texts).data()
    # 60 lines, and one that is three sentences; two words are too few.
    assert len(data.validation) == 63 and len(data.test) == 90
    ids = data.validation.inputs["input_ids"]
    mask = data.validation.inputs["attention_mask"]
    assert ids.shape == mask.shape and not ids[mask == 0].any() and mask.sum(1).min() >= 8
    with torch.no_grad():
        whole = transformers.AutoModel.from_pretrained(folder).eval()
        row = torch.from_numpy(ids[:1, : mask[0].sum()])
        wanted = whole(input_ids=row, attention_mask=torch.ones_like(row))[0].mean(1)
    assert np.allclose(data.validation.targets[0], wanted[0], atol=1e-5)


def test_of_one_file_a_third_chooses(folder: Path, texts: dict[str, Path]) -> None:
    data = encoder_task(folder, text=texts["test"], sentences=30).data()
    assert (len(data.validation), len(data.test)) == (10, 20)
    rows = {tuple(row) for row in data.validation.inputs["input_ids"]}
    assert not rows & {tuple(row) for row in data.test.inputs["input_ids"]}


def test_rows_of_like_length_give_the_same_embeddings(folder: Path) -> None:
    net = MeanPooled(transformers.AutoModel.from_pretrained(folder)).eval()
    random = np.random.default_rng(0)
    lengths = random.integers(1, 30, 70)
    mask = torch.from_numpy((np.arange(30) < lengths[:, None]).astype(np.int64))
    ids = torch.from_numpy(random.integers(2, 42, (70, 30))) * mask
    with torch.no_grad():
        assert torch.allclose(net(ids, mask), net._pooled(ids, mask), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({}, InvalidArgument, "text files"),
        ({"text": "a.txt", "test": "b.txt"}, InvalidArgument, "text files.*got text, test"),
        ({"text": "missing.txt"}, BadFile, "text cannot be read"),
        ({"text": "few.txt"}, InvalidArgument, "too few sentences of 8 to 64"),
        ({"text": "bad.jsonl"}, BadFile, "bad.jsonl:2: a line is no JSON"),
        ({"text": "other.jsonl"}, BadFile, "a line has no text"),
        ({"text": "bytes.txt.xz"}, BadFile, "text cannot be read"),
        ({"text": "few.txt", "sentences": 1}, InvalidArgument, "too few sentences"),
    ],
)
def test_what_is_refused(
    change: dict[str, Any], error: type[Exception], said: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text(lines(1, 0)[0])
    (tmp_path / "bad.jsonl").write_text(f'"{lines(1, 0)[0]}"\n{{no')
    (tmp_path / "other.jsonl").write_text('{"body": "x"}')
    (tmp_path / "bytes.txt.xz").write_bytes(b"no xz")
    given = {k: tmp_path / v if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(error, match=said):
        encoder_task(folder, **given).data()


def test_a_folder_that_is_none_is_refused(tmp_path: Path, texts: dict[str, Path]) -> None:
    with pytest.raises(BadFile, match=r"no config\.json"):
        encoder_task(tmp_path, **texts)
    (tmp_path / "config.json").write_text("{}")
    encoder_folder._pooled.cache_clear()
    with pytest.raises(KarikomiError, match="transformers cannot read the folder"):
        encoder_task(tmp_path, **texts).data()
