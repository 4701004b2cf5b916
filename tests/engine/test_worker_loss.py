"""What a step tells is its worker's, not its rank's, on every engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import cross_entropy

from distmerge.data.loss_mask import IGNORED, ids_and_labels
from tests.engine.cases import ENGINES, first_step, many, tiny_model
from tests.ranks import Ranks

pytest.importorskip("deepspeed")

CASES = [(name, False) for name in ENGINES] + [("torch", True), ("fsdp", True)]


@pytest.fixture(scope="module")
def told() -> Iterator[dict[tuple[str, bool], list]]:
    """What each of four ranks, in two workers, said in each case."""
    ranks = Ranks()
    cases = [(first_step, (ENGINES[name], uneven)) for name, uneven in CASES]
    by_rank = ranks.run(4, many, cases, group=False, seconds=900)
    yield {case: [results[index] for results in by_rank] for index, case in enumerate(CASES)}
    ranks.close()


@pytest.mark.parametrize(("engine", "uneven"), CASES)
def test_the_loss_of_a_step_is_the_mean_over_its_workers_tokens(told: dict, engine: str, uneven: bool) -> None:
    """Whatever the ranks' shares of the tokens that count."""
    found = told[engine, uneven]
    norms = []
    for worker in (0, 1):
        tokens = torch.cat([rank[3].flatten(0, 1) for rank in found if rank[0] == worker])
        ids, labels = ids_and_labels(tokens)
        model = tiny_model()
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None).item())
        assert [rank[1] for rank in found if rank[0] == worker] == pytest.approx([loss.item()] * 2, rel=1e-5)
    assert [rank[2] for rank in found] == pytest.approx([norms[0]] * 2 + [norms[1]] * 2, rel=1e-4)
