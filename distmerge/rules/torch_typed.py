"""Functions of torch whose stubs leave their types open, under the types that they have. Nothing is added to them.

This is the one place where the checker is told what it cannot read, so that the rules themselves are checked without exception.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class VectorNorm(Protocol):
    def __call__(
        self, x: Tensor, /, *, dim: int | None = None, keepdim: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor: ...


class FromNumpy(Protocol):
    def __call__(self, array: NDArray[np.generic], /) -> Tensor: ...


class QR(Protocol):
    def __call__(self, a: Tensor, /) -> tuple[Tensor, Tensor]: ...


class SVD(Protocol):
    def __call__(self, a: Tensor, /, *, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]: ...


vector_norm = cast(VectorNorm, cast(Any, torch.linalg).vector_norm)
qr = cast(QR, cast(Any, torch.linalg).qr)
svd = cast(SVD, cast(Any, torch.linalg).svd)
from_numpy = cast(FromNumpy, cast(Any, torch).from_numpy)


def to_list(x: Tensor) -> Any:
    """Python's numbers: of a scalar one number, of ``[n]`` a list of n, of ``[m, n]`` a list of m such lists."""
    return cast(Any, x).tolist()
