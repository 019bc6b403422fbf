import pytest
import torch
import torch.distributed as dist

import measure
import zero
from tools.oracle import launch

SIZES = [(3, 5), (7,), (2, 2), (1,), (11, 3)]  # sums that no d divides


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    made = [
        (f"p{i}", torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))
        for i, shape in enumerate(SIZES)
    ]
    made[2][1].tied_name = "p2"
    return made


def pieces_and_step(stage: int, bucket_bytes: int):
    group, named = dist.group.WORLD, parameters()
    before = {n: p.detach().clone() for n, p in named}
    sync = zero.STAGES[stage](named, group, accumulations=2, bucket_bytes=bucket_bytes)
    for n, p in named:
        assert torch.equal(p, before[n]), "moving into the flat buffer changed a weight"
    tied = [b for b in sync.buckets if any(n == "p2" for n, *_ in b.pieces)]
    assert all({n for n, *_ in b.pieces} == {"p2"} for b in tied), "a tied matrix travels alone"
    with measure.Collectives({"dp": group}) as seen:
        for _ in range(2):
            sync.start()
            for i in range(2):
                loss = sum(((group.rank() + i + 1) * p).sum() for _, p in named)
                loss.backward()
            sync.finish()
            held = measure.bytes_held(piece.grad for _, piece, _, _ in sync.pieces())
            assert stage == 1 or all(p.grad is None for _, p in named)
            for _, piece, _, _ in sync.pieces():
                piece.data -= 0.1 * piece.grad
            sync.after_step()
    d = group.size()
    gradient = sum(rank + i + 1 for rank in range(d) for i in range(2))
    for n, p in named:
        expected = before[n] - 0.1 * gradient - 0.1 * gradient
        torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=0)
    numels = [b.parameters.numel() for b in sync.buckets]
    return {
        "pieces": [(n, start, t.numel()) for n, t, _, start in sync.pieces()],
        "buckets": [sum(p.numel() for p in sync.bucket_of if sync.bucket_of[p] == i)
                    for i in range(len(numels))],
        "held": held,
        "seen": {op: seen.total("dp", op) for op in ("reduce_scatter", "all_gather")},
    }  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**6])
@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_pieces_own_every_element_once_and_padding_never(d, bucket_bytes, stage):
    results = launch(d, pieces_and_step, stage, bucket_bytes)
    for name, p in parameters():
        owned = [0] * p.numel()
        for result in results:
            for n, start, length in result["pieces"]:
                if n == name:
                    for i in range(start, start + length):
                        owned[i] += 1
        assert owned == [1] * p.numel(), name
    for rank, result in enumerate(results):
        numels = result["buckets"]
        predicted = zero.predicted_payload(numels, d, stage, accumulations=2)
        for operation, payload in predicted.items():
            rounds = 2 if stage == 2 and operation == "reduce_scatter" else 1
            assert result["seen"][operation] == (2 * rounds * len(numels), 2 * payload)
        owned = sum(length for _, _, length in result["pieces"])
        held = zero.predicted_bytes(numels, d, rank, itemsize=8, stage=stage)
        # a bucket that gives this rank no piece holds a shard of padding, which nobody reads
        assert held["gradients"] >= result["held"] >= held["optimizer"] // 2
        assert held["optimizer"] == 2 * 8 * owned
        assert held["parameters"] == 8 * sum(zero.padded(n, d) for n in numels)


def test_the_state_that_is_sharded_shrinks_by_d():
    numels = [10**6 + 3]
    one = zero.predicted_bytes(numels, 1, 0, 4)["optimizer"]
    for d in (2, 4, 8):
        ranks = [zero.predicted_bytes(numels, d, r, 4)["optimizer"] for r in range(d)]
        assert sum(ranks) == one and max(ranks) == 8 * zero.padded(numels[0], d) // d


def test_both_halves_move_what_an_all_reduce_moves():
    import ddp

    for d in (2, 4, 8):
        assert zero.predicted_wire_bytes([1024], d, 4) == ddp.predicted_wire_bytes(1024, d, 4)
