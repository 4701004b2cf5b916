"""Evaluates merges in memory: each is put into one model, whose loss is taken on each of several texts.

    judge = Judge(model, texts_of({"code": ["code/*.py"]}, "bytes", 128, 256))
    judge.losses()                                  # of the model in its present state
    judge.losses_of(holding(model, merged))         # of another state; the previous one is restored bit for bit

A context puts a merge into the model: :func:`holding` a state_dict, :meth:`distmerge.experts.adapt.Theta.holding` a vector, and
in :meth:`distmerge.theta.flat.FlatParameters.borrowed` the caller writes it in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import datasets
from torch import Tensor, nn

from distmerge.config.train import Data
from distmerge.data.packed import packed_text, sampled
from distmerge.errors import UserError
from distmerge.evaluate import evaluate
from distmerge.model import load_tokenizer


class Judge:
    """The losses of a model on several texts.

    Args:
        texts: rows with ``input_ids``, by the name of the text.
        batch_size: sequences per forward pass.
        rank, world: this rank, and the number of ranks. With several, each evaluation is a collective over all of them, see
            :func:`distmerge.evaluate.evaluate`.
    """

    def __init__(
        self, model: nn.Module, texts: Mapping[str, datasets.Dataset], batch_size: int = 8, rank: int = 0, world: int = 1
    ):
        self.model, self.texts = model, dict(texts)
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def losses(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """The model's loss on each of the named texts, by default on all of them, in nats per token."""
        chosen = self.texts if names is None else names
        return {name: evaluate(self.model, self.texts[name], self.batch_size, self.rank, self.world).loss for name in chosen}

    def losses_of(
        self, held: contextlib.AbstractContextManager[object], names: Iterable[str] | None = None
    ) -> dict[str, float]:
        """The losses of the state that the context ``held`` puts into the model, as from :meth:`losses`."""
        with held:
            return self.losses(names)


@contextlib.contextmanager
def holding(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which the model has the state_dict ``state``. At its end the previous state is restored bit for bit."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model.load_state_dict(state)
        yield
    finally:
        model.load_state_dict(own)


def texts_of(
    files: Mapping[str, Sequence[str]], tokenizer: str, sequence_length: int, sequences: int, option: str = "--skill {name}"
) -> dict[str, datasets.Dataset]:
    """Draw the sequences of each text on which models are evaluated.

    Args:
        files: globs of each text's files, by the name of the text.
        tokenizer: as the key ``data.tokenizer``, see :func:`tokenizer_of`.
        sequence_length: tokens per sequence.
        sequences: number of sequences to draw from each text.
        option: the option by which the user gave the files, for errors.

    Raises:
        UserError: for a text that is shorter than one sequence.
    """
    texts: dict[str, datasets.Dataset] = {}
    for name, patterns in files.items():
        section = Data(tokenizer=tokenizer, sequence_length=sequence_length, source="files", files=list(patterns))
        texts[name] = sampled(packed_text(section), sequences)
        if len(texts[name]) == 0:
            raise UserError(f"{option.format(name=name)} must hold at least one sequence of {sequence_length} tokens")
    return texts


def tokenizer_of(directory: str) -> str:
    """The value of ``data.tokenizer`` that stands for a model's own tokenizer: "bytes" or the model's directory."""
    from transformers import ByT5Tokenizer

    return "bytes" if isinstance(load_tokenizer(directory), ByT5Tokenizer) else directory
