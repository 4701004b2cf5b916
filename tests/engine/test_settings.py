"""What an engine's settings may not say: one line, with both values."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from distmerge.cli import main
from distmerge.config import toml
from distmerge.engine.deepspeed import deepspeed_table
from distmerge.engine.ops import import_deepspeed
from distmerge.errors import UserError

BASE: dict[str, Any] = {"run_dir": "run", "model": {"config": {"model_type": "llama"}}}
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 2}}


def refused(**sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        toml.validate(BASE | sections)
    return str(caught.value)


def deepspeed(**table: Any) -> dict[str, Any]:
    return {"kind": "deepspeed", "config": ZERO | table}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping must be 1.0, as train.gradient_clip is, got 0.5"),
        ({"train_micro_batch_size_per_gpu": 3},
         "train_micro_batch_size_per_gpu must be 8, as train.batch_size is, got 3"),
        ({"gradient_accumulation_steps": 4},
         "gradient_accumulation_steps must be 1, as train.gradient_accumulation is, got 4"),
        ({"bf16": {"enabled": True}}, "bf16.enabled must be false, as train.precision is float32, got true"),
        ({"fp16": {"enabled": True}}, "fp16.enabled must be false, as train.precision is float32, got true"),
        ({"optimizer": {"type": "Adam"}},
         "optimizer must not be given, since [optimizer] decides, got {'type': 'Adam'}"),
        ({"zero_optimization": 2}, "zero_optimization must be a table, got 2"),
        ({"bf16": True}, "bf16 must be a table, got True"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer must be a table, got 'cpu'"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be one of 0, 1, 2, 3, got 4"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            'zero_optimization.offload_optimizer.device must be "none" or "cpu", where merges reach, got "nvme"',
        ),
    ],
)  # fmt: skip
def test_a_contradiction_names_both_values(table: dict[str, Any], message: str) -> None:
    assert refused(engine=deepspeed(**table)) == f"config.engine.config.{message}"


def test_what_says_the_same_is_taken() -> None:
    table = {"gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}
    assert toml.validate(BASE | {"engine": deepspeed(**table)}).engine.stage == 2


def test_the_batch_of_a_worker() -> None:
    class TwoRanks:
        shards = 2

    config = toml.validate(BASE | {"engine": deepspeed(train_batch_size=24)})
    with pytest.raises(UserError) as caught:
        deepspeed_table(config, TwoRanks())  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == (
        "config.engine.config.train_batch_size must be 16, which is train.batch_size x gradient_accumulation x 2 ranks per "
        "worker, got 24"
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"kind": "fsdp", "config": ZERO}},
         "config must not be given if kind is not \"deepspeed\", got ['zero_optimization'] with fsdp"),
        ({"engine": {"reshard_after_forward": False}},
         'reshard_after_forward must be true if kind is not "fsdp", got false with torch'),
    ],
)  # fmt: skip
def test_keys_of_another_engine(sections: dict[str, Any], message: str) -> None:
    assert refused(**sections) == f"config.engine.{message}"


def test_what_wants_the_torch_engine() -> None:
    fsdp = {"kind": "fsdp"}
    window = 'engine.kind must be "torch" with a [window], which reads whole parameters on each rank, got "fsdp"'
    assert refused(engine=fsdp, window={"every": 10}) == f"config.{window}"
    assert "with recovery.enabled" in refused(engine=fsdp, recovery={"enabled": True})
    assert "optimizer.name must be" in refused(engine=fsdp, optimizer={"name": "muon"})
    assert 'train.compile must be false if engine.kind is "fsdp"' in refused(engine=fsdp, train={"compile": True})


def test_a_file_is_read_into_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(ZERO | {"communication_data_type": None}))
    config = toml.validate(BASE | {"engine": {"kind": "deepspeed", "config": str(path)}})
    assert config.engine.config == ZERO
    path.write_text("[1]")
    assert refused(engine={"kind": "deepspeed", "config": str(path)}).endswith(f"must be a JSON object, got list in {path}")
    missing = refused(engine={"kind": "deepspeed", "config": "nowhere.json"})
    assert missing == "config.engine.config cannot be read from nowhere.json: No such file or directory"


def test_deepspeed_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = 'config.engine.kind "deepspeed" needs DeepSpeed: pip install distmerge[deepspeed]'
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError) as caught:
        import_deepspeed("cpu")
    assert str(caught.value) == message
    arguments = ["train", "configs/quickstart.toml", "--run-dir", str(tmp_path / "run"), "--engine.kind", "deepspeed"]
    with pytest.raises(UserError) as caught:
        main.run(arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("path", sorted(Path("configs/deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_deepspeed_configurations_are_taken(path: Path) -> None:
    assert toml.validate(BASE | {"engine": {"kind": "deepspeed", "config": str(path)}}).engine.stage in (2, 3)
