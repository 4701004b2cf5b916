"""Models: a causal language model of transformers, from a configuration or a directory. Saving one so that it loads."""

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
"""Suffixes of what a model's directory holds."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """``bytes`` (a token per byte, no files needed), or the tokenizer in a directory or of a hub id."""
    if name == "bytes":
        return ByT5Tokenizer()
    check_directory("config.data.tokenizer", name)
    check_regular(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a bad file makes transformers and tokenizers raise many kinds
        refuse_code(name, error)
        raise UserError(
            f'config.data.tokenizer must be "bytes", a directory or a hub id, got {name}: {first_line(error)}'
        ) from None


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """The int32 ids of each text, without special tokens."""
    if isinstance(tokenizer, ByT5Tokenizer):  # ids are bytes + 3; its own loop over characters takes minutes
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int32) + 3 for text in texts]
    return [np.asarray(row, dtype=np.int32) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]  # pyright: ignore


def build_model(section: Model, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """The model in float32 on the CPU; weights that are not loaded are drawn from the seed, the same on all ranks."""
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
    """Refuse token ids or positions that the model has no embedding for."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    if rows < len(tokenizer):
        raise UserError(f"config.data.tokenizer must have at most {rows} tokens, as the model has, got {len(tokenizer)}")
    if positions is not None and sequence_length > positions:
        raise UserError(f"config.data.sequence_length must be <= {positions}, the model's positions, got {sequence_length}")


def load_model(path: str) -> nn.Module:
    """The causal language model of a directory or hub id, in float32 on the CPU. No code from there is run.

    Raises:
        UserError: when it cannot be loaded, its files lack weights or have others than its config.json says, or one is NaN or
            infinite.
    """
    check_directory("config.model.path", path)
    check_regular(path)
    # transformers imports deepspeed where it is installed, and that says on standard output which device it found.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )  # fmt: skip
    except Exception as error:  # a bad file makes transformers, safetensors and each architecture raise many kinds
        if isinstance(error, MemoryError):
            raise
        refuse_code(path, error)
        raise UserError(f"cannot load a causal language model from {path}: {first_line(error)}") from None
    model, report = loaded
    check_report(path, report)
    check_finite(path, model)
    return model


def check_regular(path: str) -> None:
    """Refuse a directory in which something that would be read is no file: to open a pipe would wait for ever."""
    for file in Path(path).iterdir() if Path(path).is_dir() else ():
        if file.suffix in READ and not file.is_file():
            raise UserError(f"{file} must be a regular file")


def refuse_code(name: str, error: Exception) -> None:
    """Where ``error`` is that a model or tokenizer needs code of its own: say so in our words.

    Raises:
        UserError: naming auto_map.
    """
    if "trust_remote_code" in str(error):
        raise UserError(f"{name} needs Python code of its own (auto_map in its configuration), which is never run") from None


def check_report(path: str, report: dict[str, Any]) -> None:
    """Refuse a model of which transformers has drawn weights at random, by its report on the loading; say what it left out.

    Raises:
        UserError: naming the first such weight.
    """
    left = sorted(report["unexpected_keys"])
    if left and os.environ.get("RANK", "0") == "0":
        print(f"{path} holds {len(left)} weights that its architecture has no place for, such as {left[0]}", file=sys.stderr)
    for key, said in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has another shape than its config.json says of"),
    ):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        if names:
            more = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
            raise UserError(f"{path} {said} {names[0]}{more}")


def check_finite(path: str, model: nn.Module) -> None:
    """Refuse a model with a weight that is NaN or infinite, or a buffer that is NaN, by its name."""
    sick = [name for name, parameter in model.named_parameters() if not finite(parameter.detach())]
    sick += [name for name, buffer in model.named_buffers() if has_nan(buffer)]
    if sick:
        raise UserError(f"{path} holds NaN or infinity in {sick[0]}")


def build_config(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """transformers takes any key in silence; here an unknown one is refused."""
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
    """Write an HF model directory. The parameters may be views of one vector, so copies of them are written.

    Args:
        dtype: of the floating-point tensors in the files, such as "bfloat16"; by default the model's.
        state: what to write, where the model does not hold it whole.
    """
    given = model.state_dict() if state is None else state
    target = getattr(torch, dtype) if dtype else None
    copies: dict[int, Tensor] = {}  # by address: tied weights stay tied, and are written once
    for tensor in given.values():
        copy = tensor.detach().cpu().clone()
        copies[tensor.data_ptr()] = copy.to(target) if target and copy.is_floating_point() else copy
    state = {name: copies[tensor.data_ptr()].view(tensor.shape) for name, tensor in given.items()}
    model.save_pretrained(directory, state_dict=state)  # pyright: ignore[reportCallIssue]
    if dtype is not None:  # say what the files hold, so that a reader does not widen them
        written = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(written | {"dtype": dtype}, indent=2) + "\n")
    tokenizer.save_pretrained(directory)


def first_line(error: BaseException) -> str:
    """An error's first line that says something, for messages that must be one."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
    text = lines[0].strip() if lines else type(error).__name__
    return f"unknown key {text}" if isinstance(error, KeyError) else text
