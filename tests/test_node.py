"""The report of make node, on CPU ranks: it works there, and says nothing of GPUs."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gpt
from tools.bench import gpu_check, node
from tools.verify import oracle

TINY = "--n-layer 2 --n-head 2 --n-embd 32 --seq-len 16 --vocab-size 64 --untied"


def able(n: int) -> set[str]:
    """Without those rows that differ from another in their environment only."""
    rows = (node.trainer_rows(n) | node.torch_rows(n)).items()
    return {row for row, how in rows if how is not None and node.PRIORITY not in row}


def trained(n: int, rows: list[str]) -> dict[str, tuple]:
    """By row: (tokens read in a timed step, what on_rank returns). The time of a step is set to
    rank + 1 seconds, and rank + 2 free-running."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for row in rows:
            read = []

            def seconds(loops, steps, device, read=read):
                (loop,) = loops
                plain = loop.read
                loop.read = lambda *at: read.append(plain(*at)) or read[-1]
                loop.step(0)
                return [dist.get_rank() + 1.0]

            patch.setattr(gpu_check, "seconds", seconds)
            free = dist.get_rank() + 2.0
            patch.setattr(gpu_check, "free_running_seconds", lambda *_, free=free: [free])
            told = node.on_rank(row, n, TINY, 1, torch.device("cpu"))
            found[row] = read[0][0].numel(), told
    return found


def train_rows(n: int, rows: list[str]) -> list[dict[str, tuple]]:
    """What `trained` returns, by rank. This repository's rows and PyTorch's are launched apart.
    PyTorch's DTensor over gloo was once seen to abort with a corrupted heap, so its rows are
    launched again if a signal ended a rank."""
    theirs = [row for row in rows if row.startswith("torch")]
    ours = oracle.launch(n, trained, n, [row for row in rows if row not in theirs])
    try:
        found = oracle.launch(n, trained, n, theirs)
    except RuntimeError as error:
        if "died with exit code -" not in str(error):
            raise
        found = oracle.launch(n, trained, n, theirs)
    return [a | b for a, b in zip(ours, found, strict=True)]


def check_rows(ranks: list[dict[str, tuple]], replicas: dict) -> None:
    """All rows have the same losses, on every rank, and they fall; every row takes as many tokens
    per rank; the slowest rank's time is told."""
    n, found = len(ranks), ranks[0]
    for row, (tokens, told) in found.items():
        assert told["tokens"] == 16 * 16 == tokens * replicas.get(row, n) / n, row
        assert (told["seconds"], told["free"]) == (n, n + 1), row
        assert all(told["losses"] == rank[row][1]["losses"] for rank in ranks), row
    losses = torch.tensor([told["losses"] for _, told in found.values()])
    assert node.check_losses({row: [told] for row, (_, told) in found.items()}), losses
    assert (losses[:, :-1] - losses[:, 1:]).min() > 0.02, losses


@pytest.mark.slow
def test_every_row_of_two_ranks_trains_alike():
    """Ranks that share one batch read twice as many rows as replicas do."""
    shared = ["TP", "TP+SP", "PP, 1f1b", "torch DTensor TP", "torch DTensor TP+SP",
              "torch pipelining, 1F1B"]  # fmt: skip
    rows = sorted(able(2) | {node.BARE})
    assert {*shared} < {*rows} and len(rows) == 16
    check_rows(train_rows(2, rows), dict.fromkeys(shared, 1))


@pytest.mark.slow
def test_two_by_two_by_two():
    assert able(8) | {node.BARE} < set(node.names(8))
    rows = [node.BARE, "2 x 2 x d", "torch 2 x 2 x d"]
    check_rows(train_rows(8, rows), dict.fromkeys(rows[1:], 2))


def without_sums() -> dict[str, list]:
    device = torch.device("cpu")
    found = {row: [node.on_rank(row, 2, TINY, 1, device)] for row in (node.BARE, "DDP", "PP, 1f1b")}
    never = property(lambda self: False, lambda self, value: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedDataParallel, "require_backward_grad_sync", never, raising=False)
        found["torch DDP"] = [node.on_rank("torch DDP", 2, TINY, 1, device)]
    return found


def test_a_row_that_sums_no_gradients_has_other_losses():
    for found in oracle.launch(2, without_sums):
        assert not node.check_losses(found)
        (line,) = found.pop("torch DDP")
        assert line.startswith("WRONG: losses (median of all rows): 4.3"), line
        assert all(x["difference"] < node.TOLERANCE / 4 for (x,) in found.values()), found


def test_a_loss_that_is_nan_is_wrong():
    found = {row: [{"losses": [4.0, 3.0]}] * 2 for row in ("DDP", "TP", "PP")}
    found |= {"TP": [{"losses": [4.0, 3.0]}, {"losses": [4.0, math.nan]}], "ZeRO-1": ["lost"]}
    assert not node.check_losses(found)
    assert found["TP"] == ["WRONG: losses (median of all rows): 4.0000 (4.0000), nan (3.0000)"]
    assert found["ZeRO-1"] == ["lost"] and found["PP"][1]["difference"] == 0
    assert node.check_losses({"DDP": ["lost"]})


def optimizers() -> dict[str, torch.optim.Optimizer]:
    found = {}
    for row in (node.BARE, "DDP", "ZeRO-3", "torch DDP", "torch fully_shard, MixedPrecisionPolicy"):
        plain = torch.optim.AdamW.step
        with pytest.MonkeyPatch.context() as patch:
            def step(self, row=row, plain=plain):
                found[row] = [({k: group[k] for k in node.SETTINGS | {"fused": 0}},
                               {p.dtype for p in group["params"]}) for group in self.param_groups]
                return plain(self)

            patch.setattr(torch.optim.AdamW, "step", step)
            loop, _ = node.loop_of(row, 2, TINY, torch.device("cpu"))
            loop.step(0)
    return found


def test_every_row_has_the_same_fused_adamw_on_fp32():
    settings = node.SETTINGS | {"fused": True}
    for found in oracle.launch(2, optimizers):
        assert len(found) == 5
        for row, groups in found.items():
            assert all(group == (settings, {torch.float32}) for group in groups), (row, groups)


def test_a_row_of_the_batch_has_the_same_tokens_on_every_rank():
    read = gpu_check.reader(gpt.GPTConfig(2, 2, 32, 64, 16))
    for full, half in zip(read(3, range(32)), read(3, range(16, 32)), strict=True):
        assert full[16:].equal(half) and not full[:16].equal(half)


def bytes_reduced() -> list[int]:
    sent = []
    for row in ("DDP", "torch DDP"):
        loop, _ = node.loop_of(row, 2, TINY, torch.device("cpu"))
        loop.step(0)  # torch's buckets are those of the next step
        with torch.profiler.profile(record_shapes=True) as seen:
            loop.step(1)
        sent.append(sum(math.prod(shapes[0]) for event in seen.events()
                        if event.name == "gloo:all_reduce" and (shapes := event.input_shapes)))
    return sent


def test_neither_ddp_sends_a_gradient_twice():
    """A step of ROWS microbatches reduces gradients once. ddp.py also sums a count and a norm."""
    psi = sum(p.numel() for p in gpt.GPT(gpt.GPTConfig(2, 2, 32, 64, 16, tied=False)).parameters())
    for here, torch_s in oracle.launch(2, bytes_reduced):
        assert torch_s == psi and psi <= here < psi + 16


def masters():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = node.Masters([p])
    for _ in range(20):  # 1 changes by 1e-3: bf16 without fp32 masters would lose it
        optimizer.zero_grad()
        p.sum().backward()
        optimizer.step()
    return p.detach().float().tolist()


def test_small_updates_of_theirs_add_up():
    (found,) = oracle.launch(1, masters)
    assert found == pytest.approx([0.98] * 4, abs=0.004)


def report(monkeypatch, tmp_path, *arguments: str) -> tuple[str, int]:
    out = tmp_path / "report.md"
    line = ["node", "--nproc", "2", "--device", "cpu", "--out", str(out), "--steps", "1",
            "--rounds", "1", f"--model={TINY}", *arguments]  # fmt: skip
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # main() sets it; put back afterwards
    with pytest.raises(SystemExit) as end:
        node.main()
    return out.read_text(), int(end.value.code)


@pytest.mark.slow
def test_the_report(monkeypatch, tmp_path):
    said, code = report(monkeypatch, tmp_path, "--rows", "bare loop", "ZeRO-3", "2 x 2 x d")
    assert code == 0, said
    for what in ("# 2 ranks on one machine", "says nothing about GPUs", "| 2 | all_reduce |",
                 "| t=2 p=1 d=1, ZeRO-0, 1f1b, SP |", "All within 1e-12",
                 "`python -m tools.bench.node",
                 "| 2 x 2 x d | not possible with 2 ranks |"):  # fmt: skip
        assert what in said, what
    rows = {line.split(" | ")[0]: line.split(" | ") for line in said.splitlines()}
    for row in ("| bare loop", "| ZeRO-3"):  # milliseconds, and no error
        assert all(re.fullmatch(r"\d+\.\d", ms) for ms in rows[row][1:3]), rows[row]


def test_the_table_of_speeds():
    """From known seconds of three rounds: their median, lowest, highest and number, tokens,
    TFLOP/s, MFU, share, GB and losses. Rates are of free-running steps."""
    def step(free: float) -> dict:
        return {"seconds": 2 * free, "free": free, "peak": 3e9, "tokens": 100, "tflop": 0.5,
                "difference": free / 1e3}  # fmt: skip

    found = {node.BARE: [step(0.2), step(0.25), step(0.5)], "DDP": [step(0.5)], "TP": ["lost"]}
    assert node.speed_table(list(found), found, peak=4.0)[2:] == [
        "| bare loop | 500.0 | 250.0 | 200.0 to 500.0 | 3 | 400 | 2 | 50.0 % | 1.000 | 3.00 | "
        "5e-04 |",
        "| DDP | 1000.0 | 500.0 | 500.0 to 500.0 | 1 | 200 | 1 | 25.0 % | 0.500 | 3.00 | 5e-04 |",
        "| TP | lost | | | | | | | | | |",
    ]


def test_every_second_round_is_reversed_and_other_losses_end_with_1(monkeypatch, tmp_path):
    launched = []

    def launch(row, args):
        if row == node.PARITY:
            return {"parity": {"t=2": 0.0}}
        launched.append(row)
        losses = [4.0, 3.9 if row == "TP" and len(launched) > 6 else 3.8]
        seconds = {"seconds": 2.0, "free": float(len(launched)), "tokens": 1, "tflop": 1.0}
        return seconds | {"losses": losses, "peak": 0.0}

    monkeypatch.setattr(node, "launch", launch)
    monkeypatch.setattr(node, "links_table", lambda n, device: [])
    rows, rounds = ["DDP", "TP", "ZeRO-1"], ["--rounds", "3"]
    said, code = report(monkeypatch, tmp_path, *rounds, "--rows", *rows)
    assert launched == [*rows, *rows[::-1], *rows]
    assert "| DDP | 2000.0 | 6000.0 | 1000.0 to 7000.0 | 3 |" in said and code == 1
    wrong = "| TP | WRONG: losses (median of all rows): 4.0000 (4.0000), 3.9000 (3.8000) |"
    assert wrong in said, said
    launched.clear()
    said, code = report(monkeypatch, tmp_path, *rounds, "--rows", "DDP", "ZeRO-1")
    assert code == 0 and "WRONG" not in said


def test_microbatches_have_4_rows_or_8_under_tp():
    microbatch = {}
    for row in node.names(8):
        microbatch.setdefault(node.microbatch(row), []).append(row)
    assert microbatch == {
        4: ["bare loop", "DDP", "DDP, NCCL at high priority", "ZeRO-1", "ZeRO-2", "ZeRO-3",
            "PP, 1f1b", "torch DDP", "torch fully_shard",
            "torch fully_shard, MixedPrecisionPolicy", "torch fully_shard, kept",
            "torch fully_shard, kept, MixedPrecisionPolicy", "torch pipelining, 1F1B"],
        8: ["TP", "TP+SP", "TP+SP, NCCL at high priority", "2 x 2 x d", "torch DTensor TP",
            "torch DTensor TP+SP", "torch 2 x 2 x d"],
    }  # fmt: skip


def test_nccl_at_high_priority_is_a_row_of_its_own(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        node, "torchrun", lambda ranks, command, **variables: asked.update(variables) or "stopped"
    )
    args = node.parser().parse_args(["--nproc", "2"])
    for row in node.trainer_rows(2):
        asked.clear()
        assert node.launch(row, args) == "stopped"
        assert asked == ({"TORCH_NCCL_HIGH_PRIORITY": "1"} if "high" in row else {})
    rows = node.trainer_rows(8)
    for row in ("DDP", "TP+SP"):
        assert rows[row] == rows[row + node.PRIORITY]


def test_the_variables_of_a_row_are_given_to_torchrun(monkeypatch):
    seen = {}
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda line, **how: seen.update(how["env"]) or done)
    assert node.torchrun(2, ["script.py"], TORCH_NCCL_HIGH_PRIORITY="1") is None
    assert seen["TORCH_NCCL_HIGH_PRIORITY"] == "1" and seen["PATH"] == os.environ["PATH"]


@pytest.mark.slow
def test_what_fails_says_so_and_the_report_goes_on(monkeypatch, tmp_path):
    plain = node.launch

    def launch(row, args):
        if row == node.PARITY:
            return {"parity": {"t=2": 1e-3}}
        args.model = TINY.replace("--n-head 2", "--n-head 7")
        return plain(row, args)

    monkeypatch.setattr(node, "launch", launch)
    monkeypatch.setattr(node, "links_table", lambda n, device: [])
    said, code = report(monkeypatch, tmp_path, "--rows", "DDP", "torch DDP")
    assert code == 1 and "MISMATCH: not all within 1e-12" in said
    message = "--n-embd 32 is not divisible by --n-head 7: make it a multiple of 7"
    assert f"| DDP | ValueError: {message} |" in said
    assert "| torch DDP | ValueError: --n-embd" in said


def broken():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "STEPS", 2)
        patch.setattr(node.parity, "cases", lambda n, n_head: [oracle.Case(d=2, m=1, steps=1)])
        whole = node.check_layouts(2, torch.device("cpu"))["parity"]
        patch.setattr("ddp.global_count", lambda y, group: (y >= 0).sum())
        return whole, node.check_layouts(2, torch.device("cpu"))["parity"]


def test_parity_sees_a_bug():
    for whole, wrong in oracle.launch(2, broken):
        assert max(whole.values()) < 1e-12 and max(wrong.values()) > 1e-3


def groups_not_given_back() -> tuple[int, int]:
    """(groups while a layout runs, groups afterwards), without those that were there before."""
    groups, plain, most = dist.distributed_c10d._world.pg_map, oracle.layout, []
    before = len(groups)

    def layout(*args):
        found = plain(*args)
        most.append(len(groups))
        return found

    with pytest.MonkeyPatch.context() as patch:
        case = oracle.Case(t=2, d=2, m=1, steps=1)
        patch.setattr(node.parity, "cases", lambda n, n_head: [case, case])
        patch.setattr(oracle, "layout", layout)
        node.check_layouts(4, torch.device("cpu"))
    return max(most) - before, len(groups) - before


def test_parity_gives_its_groups_back():
    for most, left in oracle.launch(4, groups_not_given_back):
        assert most >= 2 and left == 0


@pytest.mark.parametrize(
    "arguments, message",
    [("--nproc 1", "must be at least 2, got 1"), ("--rows DPP", "'DPP' is not one of 'bare loop'"),
     ("--nproc 2 --device cuda", "2 local ranks and 0 GPUs"),
     ("--out /nowhere/x", "--out /nowhere/x cannot be written")],
)  # fmt: skip
def test_bad_input_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["node", *arguments.split()])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(SystemExit) as end:
        node.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said.splitlines()[-1], said
