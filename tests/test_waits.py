"""What waits on the streams of a GPU add to a bubble: the simulator, and what docs/gpu.md says."""

import statistics

import pytest

import schedules
from tests.commands import ROOT
from tools.verify import waits

NAMES = {"1f1b": "1F1B", "interleaved": "interleaved", "zb-h1": "ZB-H1", "zb-v": "ZB-V"}


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_without_transfer_times_no_wait_costs(name, p):
    schedule = schedules.SCHEDULES[name](p, 2 * p)
    expected = schedules.bubble(schedules.simulate(schedule))
    for one_handle in (False, True):
        for sends in (False, True):
            found = waits.bubble(schedule, 0.0, one_handle, sends)
            assert found == pytest.approx(expected, abs=1e-12)


def test_waits_by_hand():
    """2 ranks. One microbatch: F, transfer, F B, transfer, B. Two, and transfers of 3: rank 1 has
    F0 from 4 to 5, then starts to receive F1, has F1 from 8 to 9, B0 to 11, B1 to 13; rank 0 has B0
    from 14 to 16, then starts to receive B1, has B1 from 19 to 21."""
    assert 3 * (1 + waits.bubble(schedules.gpipe(2, 1), 0.25)) == 6.5
    assert 6 * (1 + waits.bubble(schedules.gpipe(2, 2), 3.0)) == 21


def test_the_costs_in_the_docs():
    said = " ".join((ROOT / "docs" / "gpu.md").read_text().split())
    batches, several = waits.batches(schedules.one_f_one_b(8, 16))
    assert f"{several} of the {batches} batches of 1F1B at p = 8, m = 16" in said
    of_sends, of_handles = [], {}
    for name, label in NAMES.items():
        for p in (4, 8):
            schedule = schedules.SCHEDULES[name](p, 2 * p)
            sends = [waits.bubble(schedule, 0.1, True, wait) for wait in (False, True)]
            assert sends[0] == pytest.approx(sends[1], abs=1e-12)
            handles = [waits.bubble(schedule, 0.1, wait) for wait in (False, True)]
            if name == "1f1b":
                assert handles[0] == pytest.approx(handles[1], abs=1e-12)
            elif p == 8:
                assert f"{label} from {handles[0]:.3f} to {handles[1]:.3f}" in said
        times = [waits.vary(schedule, 0.2, seed) for seed in range(10)]  # p = 8
        alone, with_sends, both = (
            statistics.mean(waits.bubble(schedule, 0.1, *how, time) for time in times)
            for how in ((False, False), (False, True), (True, True))
        )
        of_sends.append(with_sends - alone)
        of_handles[label] = both - with_sends
    assert 0 < max(of_sends) < 0.001 and "times varied by 20 %, at most 0.001" in said
    worst = max(of_handles, key=of_handles.get)
    assert f"by at most {of_handles[worst]:.3f} ({worst})" in said
