"""C code that is compiled when distmerge is installed, where there is a C compiler; torch computes the same bytes elsewhere."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from ctypes import c_int, c_void_p
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def library(module: str, form_name: str, form: int, functions: Mapping[str, Iterable[Any]]) -> ctypes.CDLL | None:
    """The compiled functions; None if they were not compiled, or if their interface has another version than the caller's.

    The interpreter lock is released while one of them runs.

    Args:
        module: its name as an extension module, such as "distmerge.rules._dare".
        form_name, form: the name and value of the version number in the C code, raised whenever its functions change.
        functions: the types of each function's arguments; they return nothing.
    """
    found = find_spec(module)
    if found is None or found.origin is None:
        return None
    try:
        compiled = ctypes.CDLL(found.origin)
        theirs = c_int.in_dll(compiled, form_name).value
    except (OSError, ValueError):  # compiled for another machine, or an incomplete file
        return None
    if theirs != form:
        return None
    for name, types in functions.items():
        function = getattr(compiled, name)
        function.argtypes, function.restype = tuple(types), None
    return compiled


def at(tensor: Tensor) -> c_void_p:
    """The address of a contiguous tensor's elements."""
    assert tensor.is_contiguous()
    return c_void_p(tensor.data_ptr())


def all_at(tensors: Sequence[Tensor]) -> ctypes.Array[c_void_p]:
    """Where each tensor's elements lie."""
    return (c_void_p * len(tensors))(*map(at, tensors))
