"""Which batches a roll-back leaves out."""

from __future__ import annotations

from distmerge.recovery.plan import batch_index, skip_around


def test_batches_are_left_out_once() -> None:
    assert skip_around(50, 10) == [(44, 10)]  # the batch of step 50 is number 49
    assert skip_around(3, 10) == [(0, 10)]
    assert skip_around(50, 0) == []
    assert [batch_index(step, [(3, 2)]) for step in range(5)] == [0, 1, 2, 5, 6]
    assert [batch_index(step, [(3, 2), (6, 10)]) for step in range(5)] == [0, 1, 2, 5, 16]
    assert [batch_index(step, [(6, 10), (3, 2)]) for step in range(5)] == [0, 1, 2, 5, 16]
