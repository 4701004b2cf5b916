"""The ledger's arithmetic; that it is what was really sent, test_diloco.py holds against a spy."""

from __future__ import annotations

import pytest

from distmerge.workers.ledger import Ledger


@pytest.mark.parametrize("peers", [1, 2, 3, 8])
def test_costs(peers: int) -> None:
    ledger = Ledger(peers)
    ledger.all_reduce(1000)
    assert ledger.bytes_sent == pytest.approx(2 * 1000 * (peers - 1) / peers)
    ledger.gather(600)
    assert ledger.bytes_sent == pytest.approx((2 * 1000 + 600) * (peers - 1) / peers)
    assert (ledger.collectives, ledger.payload_bytes) == (2, 1600)


def test_a_resumed_ledger_goes_on() -> None:
    ledger, resumed = Ledger(3), Ledger(3)
    ledger.all_reduce(1000)
    ledger.gather(10)
    resumed.load_state_dict(ledger.state_dict())
    assert resumed == ledger
    with pytest.raises(AssertionError, match="a ledger belongs to a number of peers"):
        Ledger(2).load_state_dict(ledger.state_dict())
