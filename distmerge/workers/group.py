"""The group of workers that merge with each other, and the collectives over it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distmerge.errors import UserError
from distmerge.theta.buffers import Policy
from distmerge.theta.flat import FlatParameters, fingerprint
from distmerge.workers.collectives import all_gather, all_reduce, begin_all_reduce, floats
from distmerge.workers.ledger import Ledger

exchanges: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
"""Exchanges that were begun over each group."""


class WorkerGroup:
    """The ranks, one of each worker, that hold the same shard of theta.

    Attributes:
        size: the number of workers.
        rank: this worker's number among them.
        ledger: counts what the collectives of this group have moved.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not dist.is_available() or not dist.is_initialized():
            raise UserError("merging needs process groups: call torch.distributed.init_process_group() first")
        world = group or dist.group.WORLD
        assert world is not None, "there is a default group once process groups are initialised"
        self.group: dist.ProcessGroup = world
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.ledger = Ledger(self.size)

    def next_tag(self) -> int:
        """A tag for the two messages of an exchange (this number and the next), the same on all workers. Exchanges may then
        send in any order, also those of several mergers over one group; a backend that sends in order, such as NCCL, ignores
        tags."""
        number = exchanges[self.group] = exchanges.get(self.group, 0) + 1
        return 2 * (number % (1 << 20))

    def total(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the workers, in place; all of them end with the same bits."""
        self.ledger.all_reduce(x.numel() * x.element_size())
        all_reduce(x, self.group)
        return x

    def begin_total(self, x: Tensor) -> dist.Work | None:
        """Begin :meth:`total`; ``x`` is the sum once the work is waited for."""
        self.ledger.all_reduce(x.numel() * x.element_size())
        return begin_all_reduce(x, self.group)

    def start_equal(self, flat: FlatParameters) -> None:
        """Give every worker the first one's parameters, including frozen ones, and buffers, and verify that they are equal.

        Raises:
            UserError: when the workers' models differ in names or shapes. It is raised on all of them.
        """
        device = flat.vector.device
        self._compare("the names and shapes of the parameters and buffers", torch.tensor(flat.manifest, device=device))
        flat.pull()
        source = dist.get_global_rank(self.group, 0)
        dist.broadcast(flat.vector, source, group=self.group)
        flat.push()
        for tensor in (*flat.model.buffers(), *self._differing(frozen_tensors(flat.model))):
            dist.broadcast(tensor, source, group=self.group)
        self._compare("the bits of the parameters after a broadcast", fingerprint(flat.vector))

    def _differing(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that are not the same on all workers. A base model under adapters is large and usually equal already,
        so it is not sent without need."""
        if not tensors:
            return []
        low = torch.stack([fingerprint(tensor) for tensor in tensors])
        high = low.clone()
        all_reduce(low, self.group, dist.ReduceOp.MIN)
        all_reduce(high, self.group, dist.ReduceOp.MAX)
        return [tensor for tensor, differs in zip(tensors, floats(low != high), strict=True) if differs]

    def merge_buffers(self, flat: FlatParameters, policies: dict[str, Policy], full: bool, counts: bool = True) -> None:
        """Merge the model's buffers by their policies. Buffers that must be equal are compared only in a ``full`` merge.

        The ranks of a worker have seen different data, so they take part too: all ranks of all workers end with the same.

        Args:
            counts: whether this worker's buffers count. Otherwise they do not reach any other worker, finite or not.
        """
        by_policy: dict[str, list[Tensor]] = {"mean": [], "last": [], "equal": []}
        for name, buffer in flat.model.named_buffers():
            by_policy[policies[name]].append(buffer)
        if by_policy["mean"]:
            self._average(by_policy["mean"], flat, counts)
        if by_policy["last"]:
            self._take_first(by_policy["last"], flat, counts)
        if by_policy["equal"] and full:
            digests = torch.stack([fingerprint(buffer) for buffer in by_policy["equal"]])
            self.ledger.gather(digests.numel() * digests.element_size() * self.size)
            self._compare(f"the buffers {[n for n, p in policies.items() if p == 'equal']}, which must be equal", digests)

    def _average(self, buffers: list[Tensor], flat: FlatParameters, counts: bool) -> None:
        packed = torch.cat([*(buffer.detach().float().view(-1) for buffer in buffers), flat.vector.new_ones(1)])
        if not counts:
            packed.zero_()
        self.total(packed)
        packed = packed[:-1] / packed[-1]
        if flat.inside is not None:
            all_reduce(packed, flat.inside)
            packed /= dist.get_world_size(flat.inside)
        for buffer, part in zip(buffers, packed.split_with_sizes([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view(buffer.shape))

    def _take_first(self, buffers: list[Tensor], flat: FlatParameters, counts: bool) -> None:
        """Copy the buffers of the first worker that counts to all workers."""
        packed = torch.cat([buffer.detach().contiguous().view(-1).view(torch.uint8) for buffer in buffers])
        first = torch.tensor([self.rank if counts else self.size], device=packed.device)
        self.ledger.all_reduce(first.element_size())
        all_reduce(first, self.group, dist.ReduceOp.MIN)
        self.ledger.gather(packed.numel())
        dist.broadcast(packed, dist.get_global_rank(self.group, int(first.item())), group=self.group)
        if flat.inside is not None:
            dist.broadcast(packed, dist.get_global_rank(flat.inside, 0), group=flat.inside)
        sizes = [buffer.numel() * buffer.element_size() for buffer in buffers]
        for buffer, part in zip(buffers, packed.split_with_sizes(sizes), strict=True):
            buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))

    def _compare(self, what: str, value: Tensor) -> None:
        """Raise on every worker if ``value`` is not the same on all of them."""
        value = value.reshape(-1)
        theirs = [torch.empty_like(value) for _ in range(self.size)]
        all_gather(theirs, value, self.group)
        for peer, other in enumerate(theirs):
            if not torch.equal(other, theirs[0]):
                raise UserError(f"all workers must agree on {what}: worker {peer} differs from worker 0")


def frozen_tensors(model: nn.Module) -> list[Tensor]:
    """What this rank holds of the parameters that are not trained and therefore never merged."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p) for p in frozen]
    return [tensor.detach() for tensor in local]
