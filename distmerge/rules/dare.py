"""DARE in bfloat16 by compiled code: the numbers of ``TaskVectors``, to the bit, in a quarter of the time.

dare.c is compiled when distmerge is installed, if there is a C compiler. Without one, on a GPU, and for other dtypes and
variants than mergekit's, ``TaskVectors`` does the work.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from distmerge.rules import compiled
from distmerge.rules.compiled import all_at, at
from distmerge.rules.protocol import Block, Measured, folded
from distmerge.rules.sparsify import AtRandom
from distmerge.rules.task import Settled, TaskVectors
from distmerge.rules.torch_typed import to_list

FORM = 1
"""The version of the interface to dare.c, raised whenever its functions change. dare.c holds the same number."""

MOST = 1000
"""The largest number of members for which dare.c reserves room on its stack."""


class Dare(TaskVectors):
    """``TaskVectors`` with the sparsifier ``AtRandom``, run by compiled code where there is some for the block."""

    def measure(self, step: int, block: Block, state: Settled | None) -> Measured:
        fast = self.compiled(block)
        if fast is None:
            return super().measure(step, block, state)
        assert block.base is not None and isinstance(self.sparsifier, AtRandom)  # else there is no compiled code
        masks = self.sparsifier.kept(block.start, len(block.base))
        norms = torch.empty((len(block.members), 2), dtype=torch.float32, device="cpu")
        for row, member, keep in zip(norms, block.members, masks, strict=True):
            fast.dare_norms(len(member), at(block.base), at(member), at(keep), at(row))
        return Measured(kept={"norms": norms.T})

    def merge(self, block: Block, state: Settled | None) -> Tensor:
        fast = self.compiled(block)
        if fast is None:
            return super().merge(block, state)
        assert block.base is not None and isinstance(self.sparsifier, AtRandom)
        keep, ones = list(self.sparsifier.kept(block.start, len(block.base))), [1.0] * len(block.members)
        divisors = self.sparsifier.density if self.rescale == "inverse" else ones
        factors = ones if state is None or state.factors is None else state.factors
        weights = to_list(torch.tensor(self.weights, dtype=self.dtype))
        numbers = torch.tensor([divisors, factors, weights], dtype=torch.float32, device="cpu")
        out = torch.empty(len(block.base), dtype=torch.float32, device="cpu")
        fast.dare_merge(
            len(out), len(keep), at(block.base), all_at(block.members), all_at(keep), *map(at, numbers),
            self.combine.elect == "after", self.combine.scale, at(out),
        )  # fmt: skip
        return out

    def compiled(self, block: Block) -> ctypes.CDLL | None:
        """The compiled code if it handles a block like this one, else None."""
        combine = self.combine
        known = combine.elect in ("none", "after") and combine.on_cancel == "positive" and combine.divide == "none"
        known &= len(block.members) <= MOST
        for tensor in (block.base, *block.members):
            known &= (
                tensor is not None
                and tensor.device.type == "cpu"
                and tensor.dtype == self.dtype == torch.bfloat16
                and tensor.is_contiguous()
            )
        return library() if known else None

    def magnitude(self, delta: Tensor) -> Tensor:
        return folded(delta) if delta.dtype == torch.bfloat16 else super().magnitude(delta)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the compiled dare.c; None if it was not compiled."""
    many = POINTER(c_void_p)
    norms = (c_int64, c_void_p, c_void_p, c_void_p, c_void_p)
    merge = (c_int64, c_int64, c_void_p, many, many, c_void_p, c_void_p, c_void_p, c_int, c_float, c_void_p)
    return compiled.library("distmerge.rules._dare", "dare_form", FORM, {"dare_norms": norms, "dare_merge": merge})
