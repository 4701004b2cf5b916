"""Builds, loads and saves causal language models of transformers, and loads their tokenizers."""

from __future__ import annotations

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from distmerge.config.train import Model
from distmerge.data.sources import check_directory
from distmerge.errors import UserError
from distmerge.finite import finite, has_nan

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

READ = (".safetensors", ".json", ".model", ".txt", ".jinja")
"""Suffixes of the files that are read from a model directory."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name: "bytes" (one token per byte, needs no files), a directory or a hub id.

    Raises:
        UserError: if it cannot be loaded or needs code of its own.
    """
    if name == "bytes":
        return ByT5Tokenizer()
    check_directory("config.data.tokenizer", name)
    check_regular(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many types of errors for bad files
        refuse_code(name, error)
        raise UserError(
            f'config.data.tokenizer must be "bytes", a directory or a hub id, got {name}: {first_line(error)}'
        ) from None


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """The token ids of each text, int32, without special tokens."""
    if isinstance(tokenizer, ByT5Tokenizer):  # ids are bytes + 3; the tokenizer's own loop over characters takes minutes
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int32) + 3 for text in texts]
    return [np.asarray(row, dtype=np.int32) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]  # pyright: ignore


def build_model(section: Model, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """The model in float32 on the CPU. Weights that are not loaded are drawn from the seed and so are equal on all ranks.

    Raises:
        UserError: if the model cannot be built or loaded.
    """
    torch.manual_seed(seed)
    if section.path is not None:
        return load_model(section.path)
    assert section.config is not None
    model_config = build_config(dict(section.config), tokenizer)
    try:
        return AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"config.model.config does not describe a causal language model: {first_line(error)}") from None


def check_fits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
    """Refuse a tokenizer or a sequence length for which the model has too few token or position embeddings.

    Raises:
        UserError: naming the key.
    """
    rows: int = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    if rows < len(tokenizer):
        raise UserError(
            f"config.data.tokenizer must have at most {rows} tokens, the size of the model's embedding, got {len(tokenizer)}"
        )
    if positions is not None and sequence_length > positions:
        raise UserError(
            f"config.data.sequence_length must be <= {positions}, the model's number of positions, got {sequence_length}"
        )


def load_model(path: str) -> nn.Module:
    """Load a causal language model from a directory or hub id, in float32 on the CPU. No code from there is run.

    Raises:
        UserError: if the model cannot be loaded, if weights are missing or have other shapes than config.json says, or if one
            is not finite.
    """
    check_directory("config.model.path", path)
    check_regular(path)
    # transformers imports deepspeed if it is installed, which prints the device that it detects unless this is set.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_report refuses them with a better message
        )  # fmt: skip
    except Exception as error:  # transformers, safetensors and the architectures raise many types of errors for bad files
        if isinstance(error, MemoryError):
            raise
        refuse_code(path, error)
        raise UserError(f"cannot load a causal language model from {path}: {first_line(error)}") from None
    model, report = loaded
    check_report(path, report)
    check_finite(path, model)
    return model


def check_regular(path: str) -> None:
    """Refuse a directory in which a name to be read is not a regular file: opening a named pipe would block forever.

    Raises:
        UserError: naming the file.
    """
    for file in Path(path).iterdir() if Path(path).is_dir() else ():
        if file.suffix in READ and not file.is_file():
            raise UserError(f"{file} must be a regular file")


def refuse_code(name: str, error: Exception) -> None:
    """Replace the error that a model or tokenizer needs Python code of its own; other errors are ignored.

    Raises:
        UserError: naming auto_map.
    """
    if "trust_remote_code" in str(error):
        raise UserError(f"{name} needs Python code of its own (auto_map in its configuration), which is never run") from None


def check_report(path: str, report: dict[str, Any]) -> None:
    """Refuse a model some of whose weights transformers has initialized at random, and print how many weights it has ignored.

    Args:
        report: the loading report of ``from_pretrained``.

    Raises:
        UserError: naming the first weight that is missing or has another shape.
    """
    left = sorted(report["unexpected_keys"])
    if left and os.environ.get("RANK", "0") == "0":
        print(f"{path} holds {len(left)} weights that its architecture does not have, such as {left[0]}", file=sys.stderr)
    for key, problem in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has another shape than its config.json says of"),
    ):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        if names:
            more = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
            raise UserError(f"{path} {problem} {names[0]}{more}")


def check_finite(path: str, model: nn.Module) -> None:
    """Refuse a model with a weight that is not finite or a buffer that holds NaN.

    Raises:
        UserError: naming the first one.
    """
    unhealthy = [name for name, parameter in model.named_parameters() if not finite(parameter.detach())]
    unhealthy += [name for name, buffer in model.named_buffers() if has_nan(buffer)]
    if unhealthy:
        raise UserError(f"{path} holds NaN or infinity in {unhealthy[0]}")


def build_config(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """The transformers configuration for the keys of [model.config].

    Raises:
        UserError: for an unknown model_type, for an unknown key, which transformers would accept silently, and for values that
            are not valid.
    """
    model_type = keys.pop("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"config.model.config.model_type must be a string, got {model_type!r}")
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except ValueError:
        raise UserError(f'config.model.config.model_type must be one that transformers knows, got "{model_type}"') from None
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise UserError(f"config.model.config.{key} is not a known key of {model_type}{hint}")
    keys.setdefault("vocab_size", len(tokenizer))
    rows = keys["vocab_size"]
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < len(tokenizer):
        raise UserError(f"config.model.config.vocab_size must be >= {len(tokenizer)}, the tokenizer's, got {rows!r}")
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        return AutoConfig.for_model(model_type, **({key: ids[key] for key in ids if key in known} | keys))
    except (ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserError(f"config.model.config is not valid for {model_type}: {first_line(error)}") from None


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: str | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write an HF model directory.

    Args:
        dtype: dtype of the floating-point tensors in the files, such as "bfloat16"; by default the model's.
        state: the state_dict to write, if the model does not hold it whole.
    """
    given = model.state_dict() if state is None else state
    target = getattr(torch, dtype) if dtype else None
    # Copies, since safetensors refuses views of one vector. They are kept by address: tied weights stay tied, written once.
    copies: dict[int, Tensor] = {}
    for tensor in given.values():
        copy = tensor.detach().cpu().clone()
        copies[tensor.data_ptr()] = copy.to(target) if target and copy.is_floating_point() else copy
    state = {name: copies[tensor.data_ptr()].view(tensor.shape) for name, tensor in given.items()}
    model.save_pretrained(directory, state_dict=state)  # pyright: ignore[reportCallIssue]
    if dtype is not None:  # config.json must name the files' dtype, or transformers would load them in another
        written = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(written | {"dtype": dtype}, indent=2) + "\n")
    tokenizer.save_pretrained(directory)


def first_line(error: BaseException) -> str:
    """The first informative line of an error's message, for error messages of one line."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
    text = lines[0].strip() if lines else type(error).__name__
    return f"unknown key {text}" if isinstance(error, KeyError) else text
