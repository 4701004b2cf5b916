"""Streams: who reads what, in which order, what is held out, and that a resume goes on with the same bits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from distmerge.data.streaming import StreamBatches, held_out, stream_held_out
from distmerge.errors import UserError
from tests.test_data import DOCUMENTS, LENGTH, rows_of, section, text_of

SHARES = {"streaming": True, "eval_fraction": 0.1, "shuffle_buffer": 8}


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The documents in four files; a glob."""
    for part in range(4):
        rows = [json.dumps({"text": document}) for document in DOCUMENTS[part * 20 : part * 20 + 20]]
        (tmp_path / f"part-{part}.jsonl").write_text("\n".join(rows))
    return tmp_path / "part-*.jsonl"


def stream(path: Path, rank: int = 0, world: int = 1, seed: int = 0, **keys: Any) -> StreamBatches:
    return StreamBatches(section(path, **SHARES | keys), seed, rank, world, 1, 1)


def tokens(batches: StreamBatches, steps: range) -> list[int]:
    return [int(token) for step in steps for token in batches.batch(step).flatten()]


def epoch_of(batches: StreamBatches) -> list[str]:
    """This rank's documents of one epoch, in order."""
    texts: list[str] = []
    for text in batches.texts:
        if batches.epoch:
            return texts
        texts.append(text)
    return texts


TRAINED = [document for document in DOCUMENTS if not held_out(document, 0.1)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("files", ["jsonl", "shards"])
def test_the_ranks_share_out_an_epoch(request: pytest.FixtureRequest, files: str, world: int) -> None:
    """Every document of the training text once, whether or not the files divide evenly."""
    path = request.getfixturevalue(files)
    parts = [epoch_of(stream(path, rank, world)) for rank in range(world)]
    assert sorted(itertools.chain(*parts)) == sorted(TRAINED)
    assert max(map(len, parts)) - min(map(len, parts)) <= (4 if files == "shards" else 1)


def test_shards_and_documents_are_shuffled_by_seed_and_epoch(shards: Path) -> None:
    first, again, other = (epoch_of(stream(shards, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert sorted(first) == sorted(other) and first != other
    assert first != TRAINED
    batches = stream(shards)
    assert epoch_of(batches) == first
    second = list(itertools.islice(batches.texts, len(first) - 1))  # epoch_of has taken its first
    assert set(second) < set(first) and second != first[1:]
    numbers = [DOCUMENTS.index(text) // 20 for text in first[:8]]
    assert len(set(numbers)) == 4, "a block mixes the files"


def test_a_buffer_of_one_keeps_a_files_order(jsonl: Path) -> None:
    assert epoch_of(stream(jsonl, shuffle_buffer=1)) == TRAINED


def test_what_a_stream_holds_out_is_never_trained_on(jsonl: Path) -> None:
    sequences = stream_held_out(section(jsonl, **SHARES), 1000)
    held = [document for document in DOCUMENTS if held_out(document, 0.1)]
    text = "\n".join(held) + "\n"
    assert sorted(rows_of(sequences)) == sorted([c + 3 if c != 10 else 1 for c in text.encode()][at : at + LENGTH]
        for at in range(0, len(text) // LENGTH * LENGTH, LENGTH))  # fmt: skip
    trained = text_of([tokens(stream(jsonl), range(300))])
    assert not [document for document in held if document in trained]


def test_a_streams_judged_sequences_come_from_all_of_its_files(tmp_path: Path) -> None:
    """They were its first documents; and a larger sample holds a smaller one."""
    for part, letter in enumerate("abcd"):
        rows = [json.dumps({"text": f"{letter * 30}{index}"}) for index in range(400)]
        (tmp_path / f"part-{part}.jsonl").write_text("\n".join(rows))
    sequences = stream_held_out(section(tmp_path / "part-*.jsonl", **SHARES), 40)
    assert len(sequences) == 40
    seen = text_of(rows_of(sequences))
    assert all(seen.count(letter) > 40 for letter in "abcd")
    larger = stream_held_out(section(tmp_path / "part-*.jsonl", **SHARES), 80)
    assert len(larger) == 80 and {tuple(row) for row in rows_of(sequences)} < {tuple(row) for row in rows_of(larger)}
    assert list(sequences["bytes"]) == [sum(token != 1 for token in row[1:]) for row in rows_of(sequences)]


def test_a_look_through_a_large_stream_ends(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(stream_held_out(section(shards, **SHARES), 1000))
    monkeypatch.setattr("distmerge.data.streaming.SCAN_CHARACTERS", sum(map(len, DOCUMENTS)) // 2)
    assert 0 < len(stream_held_out(section(shards, **SHARES), 1000)) < whole


@pytest.mark.parametrize(
    ("kind", "world"), [("jsonl", 1), ("jsonl", 3), ("jsonl", 4), ("parquet", 1), ("parquet", 2), ("txt", 1), ("txt", 3)]
)
@pytest.mark.parametrize("stop", [0, 1, 60, 150, 299])
def test_a_stream_resumes_exactly(tmp_path: Path, stop: int, world: int, kind: str) -> None:
    """Also after some epochs, in the middle of a shuffled block, and the state goes through a checkpoint's file."""
    for part in range(4):
        rows = datasets.Dataset.from_dict({"text": DOCUMENTS[part * 20 : part * 20 + 20]})
        if kind == "parquet":
            rows.to_parquet(tmp_path / f"{part}.parquet", batch_size=7)
        elif kind == "jsonl":
            rows.to_json(tmp_path / f"{part}.jsonl")
        else:
            for index, text in enumerate(rows["text"]):
                (tmp_path / f"{part}-{index:02}.txt").write_text(text)
    path = tmp_path / f"*.{kind}"
    uninterrupted = tokens(stream(path, world - 1, world), range(310))
    found, batches = [], stream(path, world - 1, world)
    for steps in (range(stop), range(stop, stop), range(stop, stop + 3), range(stop + 3, 310)):
        found += tokens(batches, steps)
        torch.save(batches.state_dict(), tmp_path / "state.pt")
        batches = stream(path, world - 1, world)
        batches.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert found == uninterrupted


@pytest.mark.parametrize("buffer", [1, 3, 7, 50])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_stream_that_is_cut_off_again_and_again_goes_on_exactly(tmp_path: Path, buffer: int, kind: str) -> None:
    """Also where a shard was opened and not yet read from; and with shards of other lengths."""
    bounds = [0, 1, 3, 20, 44, 45, 80]
    for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
        rows: Any = datasets.Dataset.from_dict({"text": DOCUMENTS[start:stop]})
        rows.to_parquet(tmp_path / f"{part}.parquet", batch_size=7) if kind == "parquet" else rows.to_json(
            tmp_path / f"{part}.jsonl"
        )
    path = tmp_path / f"*.{kind}"
    uninterrupted = tokens(stream(path, shuffle_buffer=buffer), range(300))
    found: list[int] = []
    state: dict[str, Any] = stream(path, shuffle_buffer=buffer).state_dict()
    for step in range(300):
        if step % 3 == 0:
            batches = stream(path, shuffle_buffer=buffer)
            batches.load_state_dict(state)
        found += tokens(batches, range(step, step + 1))
        state = batches.state_dict()
    assert found == uninterrupted


def test_a_streams_state_holds_no_documents(shards: Path) -> None:
    batches = stream(shards)
    tokens(batches, range(20))
    assert not [document for document in DOCUMENTS if document in str(batches.state_dict())]


def test_after_its_last_document_a_stream_begins_again(jsonl: Path) -> None:
    text = text_of([tokens(stream(jsonl), range(400))])
    documents = text.split("\n")[:-1]
    assert len(documents) > 2 * len(TRAINED)
    assert sorted(documents[: len(TRAINED)]) == sorted(documents[len(TRAINED) : 2 * len(TRAINED)]) == sorted(TRAINED)


def test_a_stream_without_training_text(tmp_path: Path) -> None:
    held = next(document for document in map(str, range(1000)) if held_out(document, 0.1))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": held}) for _ in range(90)))
    with pytest.raises(UserError, match="holds no training document"):
        stream(tmp_path / "a.jsonl").batch(0)


def test_held_out_shares() -> None:
    share = np.mean([held_out(f"document {index}", 0.2) for index in range(5000)])
    assert 0.17 < share < 0.23
