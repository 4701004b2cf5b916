"""The judge of merges in memory: one model, into which they are put, and its loss on each of several texts.

    judge = Judge(model, texts_of({"code": ["code/*.py"]}, "bytes", 128, 256))
    judge.losses()                                  # of the model as it is
    judge.losses_of(holding(model, merged))         # of another state; afterwards every bit is as it was

What puts a merge into the model is a context: :func:`holding` for a state by names,
:meth:`distmerge.experts.adapt.Theta.holding` for a vector, :meth:`distmerge.theta.flat.FlatParameters.borrowed` to write in
place.
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
    """The losses of what is in a model, on texts.

    Args:
        texts: rows with ``input_ids``, by the text's name.
        batch_size: sequences of a forward pass.
        rank, world: with several ranks, every judgement is a collective over all of them, see
            :func:`distmerge.evaluate.evaluate`.
    """

    def __init__(
        self, model: nn.Module, texts: Mapping[str, datasets.Dataset], batch_size: int = 8, rank: int = 0, world: int = 1
    ):
        self.model, self.texts = model, dict(texts)
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def losses(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """The loss of the model as it is on the named texts, by default all of them; nats per token."""
        chosen = self.texts if names is None else names
        return {name: evaluate(self.model, self.texts[name], self.batch_size, self.rank, self.world).loss for name in chosen}

    def losses_of(
        self, held: contextlib.AbstractContextManager[object], names: Iterable[str] | None = None
    ) -> dict[str, float]:
        """The losses of what the model is inside the context ``held``, which puts back what was there."""
        with held:
            return self.losses(names)


@contextlib.contextmanager
def holding(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which the model computes with ``state``, tensors by the names of its state_dict. Afterwards every bit of
    the model is as it was."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model.load_state_dict(state)
        yield
    finally:
        model.load_state_dict(own)


def texts_of(
    files: Mapping[str, Sequence[str]], tokenizer: str, sequence_length: int, sequences: int, option: str = "--skill {name}"
) -> dict[str, datasets.Dataset]:
    """The sequences of each text that models are judged on.

    Args:
        files: globs of each text's files, by the text's name.
        tokenizer: as ``data.tokenizer``, see :func:`tokenizer_of`.
        sequence_length: tokens of a sequence.
        sequences: how many are drawn from each text.
        option: what the user gave the files by; errors name it.

    Raises:
        UserError: for a text that does not hold a single sequence.
    """
    texts: dict[str, datasets.Dataset] = {}
    for name, patterns in files.items():
        section = Data(tokenizer=tokenizer, sequence_length=sequence_length, source="files", files=list(patterns))
        texts[name] = sampled(packed_text(section), sequences)
        if len(texts[name]) == 0:
            raise UserError(f"{option.format(name=name)} must hold at least one sequence of {sequence_length} tokens")
    return texts


def tokenizer_of(directory: str) -> str:
    """What ``data.tokenizer`` must be for texts of a model: "bytes", or the directory that its tokenizer lies in."""
    from transformers import ByT5Tokenizer

    return "bytes" if isinstance(load_tokenizer(directory), ByT5Tokenizer) else directory
