"""The data: what is held out, how it is packed, who sees what, and which files are refused."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from distmerge.config.train import Data
from distmerge.data.packed import (
    PIECE_CHARACTERS,
    IndexedBatches,
    bytes_of_tokens,
    cut,
    load_documents,
    open_corpus,
    packed_text,
    sampled,
    tokenize,
)
from distmerge.data.sources import SAMPLE_BYTES, data_files, stdlib_files
from distmerge.errors import UserError
from distmerge.model import load_tokenizer
from tests.byte_pairs import byte_pairs

LENGTH = 16
DOCUMENTS = [f"<{index}>" + "abcdefghij"[index % 10] * (20 + index % 7) for index in range(80)]


def rows_of(data: datasets.Dataset) -> list[list[int]]:
    return [list(map(int, row)) for row in data[:]["input_ids"]] if len(data) else []


def text_of(rows: list[list[int]]) -> str:
    """Bytes + 3, with a line end for each end of text."""
    return "".join("\n" if token == 1 else chr(token - 3) for row in rows for token in row)


def section(path: Path | str, **keys: Any) -> Data:
    return Data(source="files", files=[str(path)], sequence_length=LENGTH, **keys)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": document, "other": 1}) for document in DOCUMENTS))
    return path


# ---- reading


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
def test_formats_give_the_same_tokens(tmp_path: Path, suffix: str) -> None:
    if suffix == "jsonl":
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    elif suffix == "parquet":
        datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(tmp_path / "a.parquet")
    else:
        for index, document in enumerate(DOCUMENTS):
            (tmp_path / f"{index:03}.txt").write_text(document)
    whole = "\n".join(DOCUMENTS) + "\n"
    text = text_of(rows_of(packed_text(section(tmp_path / f"*.{suffix}"))))
    assert text == whole[: len(whole) // LENGTH * LENGTH]


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": d, "text": "no"}) for d in DOCUMENTS))
    assert text_of(rows_of(packed_text(section(tmp_path / "a.jsonl", column="body")))).startswith(DOCUMENTS[0])


def test_globs_are_sorted_and_named_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    patterns = [f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt"]
    loader, files = data_files(Data(source="files", files=patterns))
    assert loader == "text"
    assert [Path(file).relative_to(tmp_path).as_posix() for file in files] == ["a.txt", "b.txt", "deep/c.txt"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a[1].txt", "b*.txt", "c?.jsonl", "d{1,2}.txt", "deep[x]/e.txt", "f g.txt"])
def test_a_file_with_any_name_is_read_and_no_other(tmp_path: Path, name: str, streaming: bool) -> None:
    """Brackets and stars are taken for patterns on the way, by glob and by ``datasets``."""
    for other in (name, "a1.txt", "bb.txt", "cc.jsonl", "deepx/e.txt"):
        path = tmp_path / other
        path.parent.mkdir(exist_ok=True)
        text = f"{'this' if other == name else 'other'} " * 40
        path.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(2)) if path.suffix == ".jsonl" else text)
    documents = load_documents(section(tmp_path / name, streaming=streaming), streaming=streaming)
    assert {word for row in documents for word in row["text"].split()} == {"this"}


NO_TEXT = {
    "compressed with gzip": gzip.compress(b"plain text"),
    "in UTF-16": "plain text".encode("utf-16"),
    "in UTF-32": "plain text".encode("utf-32"),
    "binary, or in UTF-16": "plain text".encode("utf-16-le"),
    "Parquet": b"PAR1 and more",
    "a zip archive": b"PK\x03\x04 and more",
    "compressed with zstd": b"\x28\xb5\x2f\xfd and more",
    "compressed with xz": lzma.compress(b"plain text"),
    "not in UTF-8": "Äpfel, Öl, Übel und ähnliches Größenwahnsinniges ".encode("latin-1") * 9,
}


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize("kind", NO_TEXT)
def test_files_that_are_no_text_are_refused_by_name(tmp_path: Path, kind: str, suffix: str) -> None:
    """Whatever their names say; they were trained on."""
    (tmp_path / f"a.{suffix}").write_text('{"text": "plain"}\n' * 90)
    (tmp_path / f"b.{suffix}").write_bytes(NO_TEXT[kind])
    with pytest.raises(UserError, match=rf"^config.data.files must be text in UTF-8, got .*b\.{suffix}, which is {kind}$"):
        open_corpus(section(tmp_path / f"*.{suffix}"))


def test_a_byte_that_is_not_utf8_now_and_then_is_common(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(("Many words, é, and one " * 90).encode() + b"\xe9 of another encoding.")
    (tmp_path / "long.txt").write_bytes(b"a" + "é".encode() * SAMPLE_BYTES)  # the sample ends in the middle of a character
    assert len(packed_text(section(tmp_path / "*.txt"))) > 90


def test_the_standard_library_is_corpus_enough() -> None:
    files = stdlib_files()
    assert len(files) > 300
    assert not [file for file in files if "/test/" in file or "site-packages" in file]


def test_bytes_are_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é–\N{GRINNING FACE}" * 10)
    rows = rows_of(packed_text(section(tmp_path / "a.txt")))
    data = bytes(token - 3 for row in rows for token in row)
    assert ("é–\N{GRINNING FACE}" * 10).encode().startswith(data)


def test_a_tokenizer_of_words(tmp_path: Path, jsonl: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[unk]", "</s>", "one", "two"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="[unk]").save_pretrained(tmp_path / "t")
    (tmp_path / "a.txt").write_text("one two two " * 8)
    rows = rows_of(packed_text(section(tmp_path / "a.txt", tokenizer=str(tmp_path / "t"))))
    assert rows == [[2, 3, 3] * 5 + [2]]


# ---- cutting and holding out


def test_long_documents_are_cut_at_line_ends() -> None:
    line = "x" * 999 + "\n"
    document = line * 200 + "y" * (2 * PIECE_CHARACTERS) + "\n" + line
    pieces = cut({"text": [document, "short", ""]}, "text", 1)
    assert "".join(pieces["text"]) == document + "short"
    assert pieces["ends"] == [False] * (len(pieces["ends"]) - 3) + [True, True, True]
    for piece in pieces["text"][:-3]:
        assert piece.endswith("\n")
        assert len(piece) <= PIECE_CHARACTERS or "\n" not in piece[:-1], "only a longer line makes a longer piece"


def test_held_out_by_document(jsonl: Path) -> None:
    """A document is in one part, whole; the parts are the whole."""
    parts = [text_of(rows_of(part)) for part in open_corpus(section(jsonl, eval_fraction=0.25))]
    numbers = [
        {piece.split("<")[1].split(">")[0] for piece in part.split("\n") if "<" in piece and ">" in piece} for part in parts
    ]
    assert not numbers[0] & numbers[1]
    assert len(numbers[1]) in (19, 20), "a quarter of 80; the last may be cut off by the last whole sequence"
    assert len(numbers[0]) in (59, 60)


def test_one_file_is_corpus_enough(tmp_path: Path) -> None:
    lines = [f"line {index} of the text\n" for index in range(3 * PIECE_CHARACTERS // 20)]
    (tmp_path / "a.txt").write_text("".join(lines))
    corpus = open_corpus(section(tmp_path / "a.txt", eval_fraction=0.01))
    assert len(corpus.held_out) > 0, "at least one piece"
    held, train = (set(text_of(rows_of(part)).split("\n")) for part in (corpus.held_out, corpus.train))
    shared = held & train
    assert all(not line.startswith("line") or not line.endswith("of the text") for line in shared)


def test_the_seed_of_a_run_does_not_move_the_held_out_text(jsonl: Path) -> None:
    first, second = (rows_of(open_corpus(section(jsonl)).held_out) for _ in range(2))
    assert first == second


# ---- dealing to ranks


def numbered(count: int) -> datasets.Dataset:
    data = datasets.Dataset.from_dict({"input_ids": [[index, index] for index in range(count)]})
    return data.with_format("numpy")


def seen(count: int, seed: int, world: int, micro_steps: int, batch_size: int, steps: int) -> list[list[int]]:
    """The sequences that each rank sees, in order."""
    ranks = [IndexedBatches(numbered(count), seed, rank, world, micro_steps, batch_size) for rank in range(world)]
    return [[int(n) for step in range(steps) for n in batches.batch(step)[..., 0].flatten()] for batches in ranks]


@pytest.mark.parametrize(
    ("count", "world", "micro_steps", "batch_size"), [(50, 2, 1, 3), (64, 4, 2, 2), (13, 3, 1, 4), (7, 1, 1, 2)]
)
def test_no_two_ranks_see_the_same_sequence_in_an_epoch(count: int, world: int, micro_steps: int, batch_size: int) -> None:
    together = world * micro_steps * batch_size
    per_epoch = count // together
    ranks = seen(count, 3, world, micro_steps, batch_size, 3 * per_epoch)
    own = per_epoch * micro_steps * batch_size
    epochs = [[n for rank in ranks for n in rank[epoch * own : (epoch + 1) * own]] for epoch in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == per_epoch * together
    assert epochs[0] != epochs[1]
    if per_epoch * together < count:
        assert set().union(*map(set, epochs)) > set(epochs[0]), "what one epoch leaves over, another takes"


def test_the_position_is_a_function_of_seed_step_and_mesh() -> None:
    data = numbered(40)
    forward = IndexedBatches(data, 5, 1, 2, 2, 3)
    batches = [forward.batch(step) for step in range(20)]
    fresh = IndexedBatches(data, 5, 1, 2, 2, 3)
    for step in (19, 3, 7, 0, 12):
        assert torch.equal(fresh.batch(step), batches[step])
    assert fresh.state_dict() == {}
    assert batches[0].shape == (2, 3, 2)
    assert batches[0].dtype == torch.int64
    other = IndexedBatches(data, 6, 1, 2, 2, 3)
    assert any(not torch.equal(other.batch(step), batches[step]) for step in range(3))


def test_gradient_accumulation_is_the_same_data_in_other_pieces() -> None:
    assert seen(64, 0, 2, 4, 2, 5) == seen(64, 0, 2, 2, 4, 5) == seen(64, 0, 2, 1, 8, 5)


def test_a_corpus_shorter_than_a_batch() -> None:
    with pytest.raises(UserError, match=r"at least one batch, 12 sequences \(2 ranks x 2 micro steps x 3\), got 11"):
        IndexedBatches(numbered(11), 0, 0, 2, 2, 3)


def test_corpora_that_are_too_small(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one piece")
    with pytest.raises(UserError, match="at least 2 pieces of text, one of them held out, got 1"):
        open_corpus(section(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(UserError, match=r"must hold out at least one sequence of 16 tokens, got 0\.02 of 2 pieces"):
        open_corpus(section(tmp_path / "?.txt"))


# ---- what a model is judged on


def test_the_judged_sequences_come_from_anywhere_in_the_held_out_text(tmp_path: Path) -> None:
    """Not from its beginning; the same ones for everybody, and a larger sample holds a smaller one."""
    rows = numbered(1000)
    drawn = [int(row[0]) for row in sampled(rows, 100)[:]["input_ids"]]
    assert len(set(drawn)) == 100
    assert [sum(low <= n < low + 250 for n in drawn) for low in range(0, 1000, 250)] == pytest.approx([25] * 4, abs=12)
    assert drawn == [int(row[0]) for row in sampled(rows, 100)[:]["input_ids"]]
    assert set(drawn) < {int(row[0]) for row in sampled(rows, 101)[:]["input_ids"]}
    assert len(sampled(rows, 1001)) == 1000


@pytest.fixture
def bpe(tmp_path: Path) -> str:
    byte_pairs(["the words of the text that it learns"]).save_pretrained(tmp_path / "bpe")
    return str(tmp_path / "bpe")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokens_stand_for_all_bytes_of_their_text(bpe: str, kind: str) -> None:
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else bpe)
    texts = ["the words  é–\N{GRINNING FACE} of\n\tthe text ", "", "\N{GRINNING FACE}", "plain"]
    ids = tokenize(tokenizer, texts, [True, True, False, True])
    counts = bytes_of_tokens(tokenizer, texts, [True, True, False, True])
    assert len(counts) == len(ids)
    assert counts.sum() == sum(len(text.encode()) for text in texts)
    assert all(count == 0 for count, token in zip(counts, ids, strict=True) if token == tokenizer.eos_token_id)
    words = [str(tokenizer.decode([token])) for token in ids]
    spelled = [(word, count) for word, count in zip(words, counts, strict=True) if word and word.isascii() and word != "</s>"]
    assert all(count == len(word) for word, count in spelled) and len(spelled) > 8


def test_rows_know_their_bytes(tmp_path: Path, bpe: str) -> None:
    (tmp_path / "a.txt").write_text("the words of the text é " * 40)
    rows = packed_text(section(tmp_path / "a.txt", tokenizer=bpe))
    tokenizer: Any = load_tokenizer(bpe)
    assert [len(tokenizer.decode(row[1:]).encode()) for row in rows_of(rows)] == list(rows["bytes"])
