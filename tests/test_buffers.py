"""What becomes of buffers: the policies of those that are known, and words for those that are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distmerge.errors import UserError
from distmerge.theta.buffers import Policy, buffer_policies


class Holder(nn.Module):
    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def test_known_ones() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), Holder(inv_freq=torch.ones(2)))
    assert buffer_policies(model) == {
        "1.running_mean": "mean", "1.running_var": "mean", "1.num_batches_tracked": "last", "2.inv_freq": "equal",
    }  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mistral", "gemma2", "gpt_neox", "olmo3", "gptj"])
def test_causal_language_models_need_no_policies(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    assert set(buffer_policies(model).values()) <= {"equal"}


def test_constants_that_a_model_computes_must_be_equal() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.ones(2), persistent=False)
    assert buffer_policies(model) == {"table": "equal"}
    assert buffer_policies(model, {"table": "last"}) == {"table": "last"}


def test_given_ones_come_first_by_full_name_or_last_part() -> None:
    model = nn.ModuleDict({"a": Holder(x=torch.zeros(1)), "b": Holder(x=torch.zeros(1), running_mean=torch.zeros(1))})
    given: dict[str, Policy] = {"x": "mean", "b.x": "last", "running_mean": "equal"}
    assert buffer_policies(model, given) == {"a.x": "mean", "b.x": "last", "b.running_mean": "equal"}


def test_mistakes() -> None:
    model = nn.ModuleDict({"a": Holder(count=torch.zeros(1, dtype=torch.int64))})
    with pytest.raises(
        UserError, match=r"buffer a.count has no merge policy; pass buffers=\{'a.count': 'mean' \| 'last' \| 'equal'\}"
    ):
        buffer_policies(model)
    with pytest.raises(UserError, match=r"buffer a.count is torch.int64, so its policy must be last or equal, got mean"):
        buffer_policies(model, {"count": "mean"})
    with pytest.raises(UserError, match=r"buffers\['count'\] must be one of mean, last, equal, got 'first'"):
        buffer_policies(model, {"count": "first"})  # pyright: ignore[reportArgumentType]
