"""The wire: the formats in which values are sent between workers.

A format turns float32 values into bytes and back. The integer formats quantise blocks of 64 values to their largest
magnitude, with one float32 scale each and rounding to nearest even. The result is deterministic and does not
depend on other blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WireName = Literal["fp32", "bf16", "int8", "int4"]
BLOCK = 64


@dataclass(frozen=True)
class Wire:
    """A format for vectors whose length is a multiple of 64.

    Attributes:
        levels: the largest integer magnitude; 0 for floating point formats.
    """

    name: WireName
    levels: int = 0

    def size_bytes(self, numel: int) -> int:
        """Bytes that ``numel`` values take."""
        if self.name == "fp32":
            return 4 * numel
        if self.name == "bf16":
            return 2 * numel
        return numel // BLOCK * 4 + (numel if self.name == "int8" else numel // 2)

    def encode(self, values: Tensor) -> Tensor:
        """``[..., n]`` float32 to ``[..., size_bytes(n)]`` uint8."""
        assert values.shape[-1] % BLOCK == 0
        if self.name in ("fp32", "bf16"):
            dtype = torch.float32 if self.name == "fp32" else torch.bfloat16
            return values.to(dtype).contiguous().view(torch.uint8)
        blocks = in_blocks(values)
        scale = blocks.abs().amax(-1, keepdim=True) / self.levels
        # The clamp matters only if the scale is a subnormal number, which has few bits.
        whole = (blocks / torch.where(scale > 0, scale, 1)).round_().clamp_(-self.levels, self.levels)
        whole = whole.to(torch.int8).flatten(-2)
        if self.name == "int4":
            nibbles = (whole + 8).view(torch.uint8)
            whole = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
        return torch.cat([scale.squeeze(-1).contiguous().view(torch.uint8), whole.view(torch.uint8)], dim=-1)

    def decode(self, message: Tensor, numel: int) -> Tensor:
        """``[..., size_bytes(numel)]`` uint8 back to ``[..., numel]`` float32."""
        if self.name in ("fp32", "bf16"):
            dtype = torch.float32 if self.name == "fp32" else torch.bfloat16
            return message.contiguous().view(dtype).float()
        scales = message[..., : numel // BLOCK * 4].contiguous().view(torch.float32)
        body = message[..., numel // BLOCK * 4 :]
        if self.name == "int4":
            whole = torch.stack([body & 15, body >> 4], dim=-1).flatten(-2).view(torch.int8) - 8
        else:
            whole = body.contiguous().view(torch.int8)
        return (in_blocks(whole).float() * scales.unsqueeze(-1)).flatten(-2)


def in_blocks(values: Tensor) -> Tensor:
    """``[..., n]`` as ``[..., n / 64, 64]``, in the same memory."""
    return values.view(*values.shape[:-1], values.shape[-1] // BLOCK, BLOCK)


WIRES: dict[str, Wire] = {
    "fp32": Wire("fp32"),
    "bf16": Wire("bf16"),
    "int8": Wire("int8", levels=127),
    "int4": Wire("int4", levels=7),
}
