"""Applies known bugs, one by one, to a copy of the repository and checks that a test fails.

    make mutants                     all bugs
    make mutants ARGS="--only 9"     by number, or by a word of the name

The bugs are mistakes that similar projects have made; docs/bugs.md describes each. A bug consists
of a patch (old text -> new text), the test that must fail, and a regular expression for its error.

It prints one line per bug with a verdict. "killed": the test fails as expected. "test-all": only a
slow test does, so that `make test` would miss the bug. "SURVIVED": the test passes, fails in
another way, or hangs although that is not expected; then the exit code is 1. All tests are first
run without a bug, and must pass. A patch whose old text does not occur exactly once is an error.
"""

import argparse
import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = (".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "checkpoints*")
LIMIT = 150  # seconds per test


class Bug(NamedTuple):
    """A bug and the test that finds it."""

    number: int  # section in docs/bugs.md; several bugs may belong to one section
    name: str
    edits: list[tuple[str, str, str]]  # (file, old text, new text)
    test: str  # arguments of pytest
    failure: str  # regular expression that the error of the test must match, or HANG


HANG = "the test hangs"
NUMBERS = r"Errors\(.*where='(gradient|parameter) "  # largest error: a gradient or parameter
NORM = r"Errors\(.*norm=\d+\.\d+,"  # an error printed without exponent is at least 1e-4
LAYOUTS = "tests/test_layouts.py::test_layout_equals_one_process"
CONTEXT = "tests/test_context_parallel.py::test_training_equals_one_process"
ATTENTION = "tests/test_context_parallel.py::test_attention_and_its_gradients_equal_one_process"
PARTIAL = """y = reduce_output(self.multiply(x, None), self.group, self.sequence)
        return y if self.bias is None else y.add_(self.bias)"""
WAIT_D_X = "wait_d_x = start(d_x, ctx.group, async_op=need_weight)"
G_BACKWARD = """return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None"""
MOMENTS = 'slices += slices_of(f"{key}/{name}", value, parameter, offset)'
SENT = "events.append(((end, 0, n), (rank, dst), Transfer(action, rank, dst)))"

ZOO = [
    Bug(1, "all tp ranks draw the same shard from one seed", [
        ("gpt.py", 'how = getattr(old, "distribution", None)', "how = None")],
        "tests/test_tensor_parallel.py::test_shards_differ_and_replicas_do_not",
        r"AssertionError: h\.0\.attn\.c_attn\.weight"),
    Bug(2, "only the logged loss is divided by m, not the gradient", [
        ("train_3d.py", "return total / count", "return total / count * self.m"),
        ("train_3d.py", "return self.pipe.run(program, x.split(b), loss_of, shape, before)",
         "return self.pipe.run(program, x.split(b), loss_of, shape, before) / self.m")],
        LAYOUTS, NUMBERS),
    Bug(3, "the hook reduces the parameter, not its gradient", [
        ("ddp.py", "sent = flat.to(dtype)",
         "both = zip(self.parameters, self.bucket_of)\n"
         "        sent = torch.cat([p.data.flatten() for (_, p), b in both\n"
         "                          if b == len(self.launched)])")],
        "tests/test_ddp.py::test_bucketed_equals_naive_and_leaves_during_the_last_backward",
        r"assert torch\.equal\(a\.grad"),
    Bug(4, "all stages draw the same initial values", [
        ("gpt.py", '{seed} {name}".encode()', '{seed} {len(new)}".encode()')],
        "tests/test_layouts.py::test_layout_equals_one_process", NUMBERS),
    Bug(5, "a fused qkv matrix sharded as one matrix", [
        ("gpt.py", '"h.*.attn.c_attn": ("column", (1, 1, 1))',
         '"h.*.attn.c_attn": "column"')],
        LAYOUTS, r"where='gradient h\.\d\.attn\.c_attn"),
    Bug(6, "three all-reduces in backward instead of one", [
        ("tensor_parallel.py", WAIT_D_X,
         "thirds = zip(grad.chunk(3, -1), weight.chunk(3, 0), strict=True)\n"
         "        waits = [start(g @ w, ctx.group, need_weight) for g, w in thirds]\n"
         "        wait_d_x = lambda: sum(wait() for wait in waits)")],
        "tests/test_tensor_parallel.py::test_collectives_of_a_block_and_what_hides_them",
        r"\('backward', 'all_reduce'\): \(9, \d+\)"),
    Bug(7, "LayerNorm gradients not summed over tp", [
        ("tensor_parallel.py",
         "if sequence and not p.distribution.is_split_over(group):", "if False:")],
        LAYOUTS, r"where='gradient ((h\.\d\.)?ln_|wpe)"),
    Bug(8, "in-place all-reduce without mark_dirty", [
        ("tensor_parallel.py", "ctx.mark_dirty(x)  #", "#")],
        "tests/test_tensor_parallel.py::test_conjugates", "DID NOT RAISE"),
    Bug(8, "logits overwritten in place", [
        ("tensor_parallel.py", "shifted = logits - highest.unsqueeze(-1)",
         "shifted = logits.sub_(highest.unsqueeze(-1))")],
        "tests/test_tensor_parallel.py::test_vocabulary_parallel_loss",
        "the logits were overwritten"),
    Bug(9, "the gradient norm is not summed over ranks", [
        ("train_3d.py", "dist.all_reduce(stats)  # payload: 3 elements, over the world",
         "here = stats[1].clone()\n        dist.all_reduce(stats)\n        stats[1] = here")],
        LAYOUTS, NORM),
    Bug(9, "replicated parameters counted t times in the norm", [
        ("train_3d.py", "sharded = p.distribution.is_split_over(self.tp_group)", "sharded = True")],
        LAYOUTS, NORM),
    Bug(9, "a tied matrix counted twice in the norm", [
        ("train_3d.py", 'duplicate = hasattr(p, "tied_name") and 0 not in self.stages',
         "duplicate = False")],
        LAYOUTS, NORM),
    Bug(9, "replicas counted d/k times in the norm", [
        ("train_3d.py", "and (replicas is None or replicas.rank() == 0)", "")],
        LAYOUTS, NORM),
    Bug(10, "gradients of the tied embedding not all-reduced", [
        ("train_3d.py", "pipeline.all_reduce_tied(tied, self.tied_group)",
         "pipeline.all_reduce_tied([g.clone() for g in tied], self.tied_group)")],
        LAYOUTS, NUMBERS),
    Bug(11, "gradients reduced after the first microbatch", [
        ("ddp.py", "if self.missing[i] > 0:", "if self.missing[i] + 1 < self.accumulations[i]:")],
        "tests/test_ddp.py::test_bucketed_equals_naive_and_leaves_during_the_last_backward",
        "met too early"),
    Bug(11, "ZeRO-1 reduces after every microbatch", [
        ("zero.py", "one_round = self.stage == 1 or not overlap",
         "one_round = not overlap")],
        "tests/test_zero.py::test_pieces_own_every_element_once_and_padding_never",
        r"AssertionError: 0\.params\.0"),
    Bug(12, "the loss is a mean of the ranks' means", [
        ("ddp.py", "dist.all_reduce(count, group=group)  # payload: 1", "count *= group.size()")],
        "tests/test_ddp.py::test_the_count_is_of_tokens_and_not_a_mean_of_ranks",
        r"\[12, 2\] == \[7, 7\]"),
    Bug(13, "a row-parallel bias added t times", [
        ("tensor_parallel.py", PARTIAL,
         "y = self.multiply(x, self.bias)\n"
         "        return reduce_output(y, self.group, self.sequence)")],
        LAYOUTS, r"where='gradient h\.\d\."),
    Bug(14, "recomputation draws new dropout masks", [
        ("activation_ckpt.py", "cuda_autocast, restore_rng():", "cuda_autocast:")],
        "tests/test_activation_ckpt.py::test_the_same_gradients_and_masks_bitwise",
        r"AssertionError: wte\.weight"),
    Bug(14, "recomputation masks the documents of another microbatch", [
        ("gpt.py", "self.at(*saved)\n", "self.at(*saved[:2], self.starts)\n")],
        "tests/test_documents.py::test_layouts", NUMBERS),
    Bug(15, "replicated dropout differs between tp ranks", [
        ("tensor_parallel.py", '"tokens", group) if sequence else module',
         '"tokens", group) if sequence or hasattr(module, "draws") else module')],
        LAYOUTS, NUMBERS),
    Bug(15, "sharded dropout is equal on all tp ranks", [
        ("tensor_parallel.py", ".chunk(group.rank(), group.size())", ".chunk(0, group.size())")],
        LAYOUTS, NUMBERS),
    Bug(16, "a short microbatch for a receive of fixed shape", [
        ("pipeline.py", "if found != (self.shape, self.dtype):", "if False:")],
        "tests/test_pipeline.py::test_a_short_last_microbatch_is_refused_where_it_is_made",
        "Regex pattern did not match"),
    Bug(17, "a resumed run reads the data from the start", [
        ("train_3d.py", "first = resume(trainer, found, disk.group, run, logger) if args.resume",
         "first = 0 * resume(trainer, found, disk.group, run, logger) if args.resume")],
        "tests/test_checkpoint.py::test_a_run_in_three_parts_and_three_layouts",
        r"\[2, 2, 2, 1, 1, 1\] == \[1, 1, 2, 1, 1, 1\]"),
    Bug(17, "the optimizer's step count restarts on resume", [
        ("checkpoint.py", "torch.tensor(value, device=", "torch.tensor(0 * value, device=")],
        "tests/test_checkpoint.py -k undisturbed", NUMBERS),
    Bug(17, "the optimizer's moments are lost on resume", [
        ("checkpoint.py", MOMENTS, "pass")],
        "tests/test_checkpoint.py -k undisturbed", NUMBERS),
    Bug(18, "sends and receives wait for each other", [
        ("pipeline.py", SENT,
         "need = {s.action: s.start for s in simulate(schedule)}[consumer(action)]\n"
         "            events.append(((end, 0, n), (rank,), Transfer(action, rank, dst)))\n"
         "            events.append(((need, 0, n), (dst,), Transfer(action, rank, dst)))"),
        ("pipeline.py", "program[-1] += (event,)", "program.append((event,))")],
        "tests/test_pipeline.py -k never_deadlock", "ValueError: deadlock: rank"),
    Bug(19, "bf16 weights without an fp32 copy", [
        ("ddp.py", "p.detach().float().requires_grad_()", "p.detach().clone().requires_grad_()")],
        "tests/test_zero.py::test_small_updates_of_bf16_weights_add_up",
        r"\[\[1\.0\], \[1\.0\]\] == \[\[0\.9375\]"),
    Bug(19, "bf16 shards without an fp32 copy", [
        ("zero.py", "self.master = self.parameter_shard.float()",
         "self.master = self.parameter_shard")],
        "tests/test_zero.py::test_small_updates_of_bf16_weights_add_up",
        r"\[\[1\.0\], \[1\.0\]\] == \[\[0\.9375\]"),
    Bug(20, "padding is updated, decayed and counted", [
        ("zero.py", "stop = min(self.place[p].stop, self.mine.stop)",
         "stop = self.mine.stop\n"
         "            if p is not members[-1][1]:\n"
         "                stop = min(self.place[p].stop, stop)")],
        "tests/test_zero.py::test_pieces_own_every_element_once_and_padding_never",
        "padding in a piece"),
    Bug(21, "a weight gradient written to .grad by hand", [
        ("pipeline.py", "layer.weight.backward(grad.flatten(0, -2).T @ x.flatten(0, -2))",
         "dw, weight = grad.flatten(0, -2).T @ x.flatten(0, -2), layer.weight\n"
         "    weight.grad = dw if weight.grad is None else weight.grad.add_(dw)")],
        "tests/test_pipeline.py::test_200_random_schedules_run",
        r"assert counted == pipe\.accumulations"),
    Bug(22, "the last rows of an uneven split are lost", [
        ("tensor_parallel.py", "size, rest = divmod(n, t)", "size, rest = n // t, 0")],
        "tests/test_tensor_parallel.py::"
        "test_shards_are_those_of_tensor_split_and_cover_the_full_tensor",
        "assert False"),
    Bug(23, "a reduction over the wrong group", [
        ("train_3d.py", "tensor_parallel.all_reduce_partial(pairs)",
         "[dist.all_reduce(g, group=self.dp_group) for p, g in pairs if p.distribution.partial]")],
        LAYOUTS, r"\('tp', 'all_reduce'\)"),
    Bug(23, "the gradient of an expert summed over ranks with other experts", [
        ("ddp.py", "self.groups.append(gradient_group(parameters[0], self.group))",
         "self.groups.append(self.group)")],
        "tests/test_distribution.py::test_experts_equal_one_process", NUMBERS),
    Bug(23, "shard and replica groups swapped", [
        ("train_3d.py", 'self._make_group(state, "replica")', 'self._make_group(state, "shard"  )'),
        ("train_3d.py", 'self._make_group(state, "shard")', 'self._make_group(state, "replica")')],
        "tests/test_train_3d.py::test_neighbours_shard_and_the_far_replicate",
        r"\[1, 5\] != \[4, 5, 6, 7\]"),
    Bug(24, "gradients averaged instead of summed", [
        ("ddp.py", "dist.all_reduce(flat, group=group, async_op=True)",
         "dist.all_reduce(flat, op=dist.ReduceOp.AVG, group=group, async_op=True)")],
        "tests/test_ddp.py::test_bucketed_equals_naive_and_leaves_during_the_last_backward",
        r"assert torch\.equal\(a\.grad, b\.grad\)"),
    Bug(25, "a backward that sums a replicated gradient", [
        ("tensor_parallel.py", G_BACKWARD,
         "ctx.group = group\n        return x\n\n    @staticmethod\n"
         "    def backward(ctx, grad: Tensor):\n"
         "        return start_all_reduce(grad.clone(), ctx.group)(), None")],
        "tests/test_tensor_parallel.py::test_conjugates", r"assert torch\.equal\(part\.grad"),
    Bug(26, "a bucket keeps the gradients of the last step", [
        ("ddp.py", "        total.copy_(gradient)", "        total.add_(gradient)")],
        "tests/test_ddp.py::test_bucketed_equals_naive_and_leaves_during_the_last_backward",
        r"assert torch\.equal\(a\.grad"),
    Bug(26, "a shard starts with the gradients of the last step", [
        ("zero.py", "first=round_ == 0)", "first=False)")],
        "tests/test_zero.py::test_pieces_own_every_element_once_and_padding_never",
        r"AssertionError: 0\.params\.0"),
    Bug(27, "a layer runs before its parameters are gathered", [
        ("zero.py", "            self.gathering.wait()\n            self.gathering = None",
         "            self.gathering = None")],
        "tests/test_tools.py -k races", "parameters DIFFER"),
    Bug(27, "the reduced gradients are not waited for", [
        ("ddp.py", "                handle.wait()\n                self.buckets[i].copy_(sent)",
         "                self.buckets[i].copy_(sent)")],
        "tests/test_tools.py -k races", "parameters DIFFER"),
    Bug(28, "gradients of bf16 parameters accumulated in bf16", [
        ("ddp.py", "self.grad_dtype = grad_dtype or torch.float32",
         "self.grad_dtype = grad_dtype or torch.bfloat16")],
        "tests/test_zero.py -k bf16_is_bitwise", r"AssertionError: \('wte\.weight', tensor"),
    Bug(28, "gradients sent in fp32 instead of bf16", [
        ("ddp.py", "sent = flat.to(dtype)", "sent = flat")],
        "tests/test_zero.py -k bf16_is_bitwise", r"AssertionError: \('wte\.weight', tensor"),
    Bug(29, "no weight decay, because shards are 1-D", [
        ("train_3d.py", "= piece.parameter.ndim < 2", "= piece.tensor.ndim < 2")],
        LAYOUTS, NUMBERS),
    Bug(30, "every replica reads the same rows", [
        ("train_3d.py", "first, b = self.dp_group.rank() * rows_per_replica,", "first, b = 0,")],
        LAYOUTS, NUMBERS),
    Bug(31, "every sequence shard starts at position 0", [
        ("gpt.py", "return x + self.tokens.take(self.weight[: self.tokens.total(x.size(1))], 0)",
         "return x + self.weight[: x.size(1)]")],
        LAYOUTS, r"where='gradient wpe\.weight"),
    Bug(31, "every rank of a ring masks the documents of the first tokens", [
        ("context_parallel.py", "starts = core.tokens.take(starts, 1)",
         "starts = starts[:, : q.size(2)]")],
        "tests/test_documents.py::test_layouts", NUMBERS),
    Bug(32, "ranks sample different tokens", [
        ("generate.py", "manual_seed(trainer.args.seed)",
         "manual_seed(trainer.args.seed + dist.get_rank())")],
        "tests/test_train_3d.py::test_launched_runs_are_the_plain_one", "assert .*estion"),
    Bug(33, "a save writes values that training has changed", [
        ("checkpoint.py", "s._replace(tensor=buffer.copy_(s.tensor, non_blocking=True))", "s")],
        "tests/test_checkpoint.py::test_what_is_written_is_the_state_at_the_save",
        r"\[False, False\] == \[True, True\]"),
    Bug(34, "a half-written checkpoint looks complete", [
        ("checkpoint.py", 'self.group.rank() == 0, self.directory / f"tmp-step-{step}"',
         'self.group.rank() == 0, self.directory / f"step-{step}"')],
        "tests/test_checkpoint.py -k 'kill or full_disk'", "No such file or directory: .*step-1'"),
    Bug(34, "damage that rank 0 did not read is ignored", [
        ("checkpoint.py", "if not any(everyone):", "if not everyone[0]:")],
        "tests/test_checkpoint.py -k damaged", r"assert \(?2 == 1"),
    Bug(35, "softmax with a different maximum on each rank", [
        ("tensor_parallel.py",
         "        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)  # payload: b s\n",
         "")],
        "tests/test_tensor_parallel.py::test_vocabulary_parallel_loss", "Scalars are not close"),
    Bug(36, "a linear keeps the graph of its input until W", [
        ("pipeline.py", "x.detach().to(grad.dtype), grad)", "x.to(grad.dtype), grad)")],
        "tests/test_pipeline.py::test_what_waits_for_its_w_keeps_no_graph",
        r"\[\(1, False\), .* == \[\(1, True\)"),
    Bug(36, "recomputed tensors are never freed", [
        ("activation_ckpt.py", "t = t.detach()  # else", "# else")],
        "tests/test_activation_ckpt.py::test_nothing_of_the_second_forward_outlives_backward",
        r"assert \(\[<weakref"),
    Bug(37, "dropout is active in validation", [
        ("train_3d.py", "        self.model.eval()\n        loss = sum(", "        loss = sum(")],
        "tests/test_train_3d.py::test_validation_drops_nothing", r"assert \(?False"),
    Bug(38, "1F1B warms up with one forward too many", [
        ("schedules.py", '[(p - 1 - r, "F"), (m, "FB")]', '[(p - r, "F"), (m, "FB")]')],
        "tests/test_schedules.py::test_bubble_and_memory_are_as_predicted", r"assert 2 == 1"),
    Bug(39, "a parameter that no rank used is updated", [
        ("ddp.py", "p.grad = torch.full_like(p, -0.0)", "p.grad = torch.zeros_like(p)")],
        "tests/test_ddp.py::test_each_version_equals_one_process",
        r"AssertionError: unused\.weight"),
    Bug(43, "recomputed layers get no gradient", [
        ("activation_ckpt.py", "torch.autograd.backward(y, grad)",
         "(x.grad,) = torch.autograd.grad(y, x, grad)")],
        "tests/test_activation_ckpt.py::test_all_versions_compute_the_same_gradients",
        r"AssertionError: h\.0\.ln_1\.weight"),
    Bug(43, "the second forward saves other tensors than the first", [
        ("activation_ckpt.py", "requires_grad_(x.requires_grad) for x in inputs]",
         "requires_grad_() for x in inputs]")],
        "tests/test_activation_ckpt.py::test_the_second_forward_saves_what_the_first_has_saved",
        "assert False"),
    Bug(41, "the gradient of a shared input is not summed", [
        ("tensor_parallel.py",
         "        dist.all_reduce(grad, group=ctx.group)  # payload: b s h\n", "")],
        "tests/test_tensor_parallel.py::test_version_1_and_the_parallel_layers_equal_one_process",
        r"AssertionError: \(\d\.\d+, \d\.\d+e-1\d\)"),
    Bug(42, "version 1 runs the backward of the newest microbatch", [
        ("pipeline.py", "x, y = in_flight.popleft()", "x, y = in_flight.pop()")],
        "tests/test_pipeline.py::test_version_1_equals_one_process", r"assert \d\.\d+ <= 1e-12"),
    Bug(40, "version 1 of ZeRO does not sum its shard of the gradients", [
        ("zero.py", "reduce_scatter(self.shard.grad, self.gradients, group=self.group)", "pass")],
        "tests/test_zero.py::test_version_1_equals_one_process", "Tensor-likes are not close"),
    Bug(40, "version 1 of ZeRO-3 does not sum its shard of the gradients", [
        ("zero3.py", "reduce_scatter(shard, grad.contiguous(), group=ctx.group)",
         "shard.copy_(grad.chunk(ctx.group.size())[ctx.group.rank()])")],
        "tests/test_zero.py::test_version_1_of_zero3_equals_one_process",
        "Tensor-likes are not close"),
    Bug(44, "positions of consecutive tokens under a zigzag", [
        ("train_3d.py", "module.tokens = self.tokens",
         "module.tokens = gpt.ALL.chunk(self.cp_group.rank(), c)")],
        CONTEXT, r"where='gradient wpe"),
    Bug(45, "the loss is a mean over each shard of the sequence", [
        ("train_3d.py", "ddp.global_count(y, self.gradient_group)",
         "ddp.global_count(y, self.dp_group)")],
        CONTEXT, r"Errors\(loss=\d\.\d+,"),
    Bug(45, "the printed loss is that of one shard of the sequence", [
        ("train_3d.py", "stats = torch.stack([loss * first_tp, squared_norm, stop])",
         "first_tp &= self.cp_group.rank() == 0\n"
         "        stats = torch.stack([loss * first_tp, squared_norm, stop])")],
        CONTEXT, r"Errors\(loss=0\.\d+, norm=\d\.\d+e-1\d"),
    Bug(46, "results of the ring are merged in bf16", [
        ("context_parallel.py", "out = torch.zeros_like(q, dtype=wide)",
         "out = torch.zeros_like(q)")],
        "tests/test_context_parallel.py::test_rounding_errors_do_not_grow_with_the_number_of_ranks",
        r"\(8, \{'out': (1\.[4-9]|[2-9])"),
    Bug(46, "gradients of the keys are added in bf16 along the ring", [
        ("context_parallel.py", "d_kv = torch.zeros_like(kv, dtype=lse.dtype)",
         "d_kv = torch.zeros_like(kv)")],
        "tests/test_context_parallel.py::test_rounding_errors_do_not_grow_with_the_number_of_ranks",
        r"\(8, \{.*'k': (1\.[4-9]|[2-9])"),
    Bug(47, "the ring computes with stale keys", [
        ("context_parallel.py", "kv = wait_kv()\n        out = out.to(q.dtype)",
         "wait_kv()\n        out = out.to(q.dtype)")],
        ATTENTION, r"assert \d+\.\d+ <= 1e-12"),
    Bug(47, "the ring uses keys before they are received", [
        ("context_parallel.py", "        for handle in handles:\n            handle.wait()\n", "")],
        "tests/test_races.py -k ring", "handles were not waited for|loss=(nan|inf)"),
    Bug(48, "gradients of keys stay one rank before their owner", [
        ("context_parallel.py", "            d_kv = wait_d_kv()\n", "            wait_d_kv()\n")],
        ATTENTION, r"assert \d+\.\d+ <= 1e-12"),
    Bug(48, "gradients of gathered keys are not summed over the ranks", [
        ("context_parallel.py", "reduce_scatter(shard, stacked, group=ctx.group)",
         "shard.copy_(stacked.chunk(c)[ctx.group.rank()])")],
        ATTENTION, r"assert \d+\.\d+ <= 1e-12"),
    Bug(49, "cp left out of the sum of the gradients", [
        ("train_3d.py", "(self.model, self.gradient_group, accumulations, **how)",
         "(self.model, self.dp_group, accumulations, **how)")],
        CONTEXT, r"Errors\(.*gradient=\d\.\d+,"),
    Bug(49, "the norm counts each cp rank", [
        ("train_3d.py", "replicas is None or replicas.rank() == 0",
         "replicas is None or replicas.rank() // self.cp_group.size() == 0")],
        CONTEXT, NORM),
    Bug(50, "gathered inputs are kept in a buffer that all layers share", [
        ("tensor_parallel.py", "stacked = x.new_empty(t * x.size(0), *x.shape[1:])",
         "stacked = x.new_empty(t * x.size(0), *x.shape[1:])\n"
         "    stacked = vars(start_all_gather).setdefault((t, x.shape, x.dtype), stacked)")],
        "tests/test_tensor_parallel.py::"
        "test_an_input_that_is_kept_is_the_one_that_is_gathered_again",
        "AssertionError: 0"),
]  # fmt: skip


def put_in(bug: Bug, root: Path) -> None:
    """Applies the patch to the copy in `root`. Raises ValueError if it does not apply."""
    for file, old, new in bug.edits:
        text = (root / file).read_text()
        if (n := text.count(old)) != 1:
            raise ValueError(f"bug {bug.number}, {bug.name}: {file} contains the old text {n} "
                             f"times, expected once: {old!r}")  # fmt: skip
        (root / file).write_text(text.replace(old, new))


def run_pytest(root: Path, arguments: list[str], timeout: float) -> tuple[int | None, str]:
    """Runs pytest. Returns its exit code (None if it hung) and a text.

    The first line of the text is the first test that failed. The next lines are its error, with the
    traceback of the rank that failed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "999"}
    with tempfile.TemporaryFile("w+") as output:
        job = subprocess.Popen(command, cwd=root, env=environment, stdout=output,
                               stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            code = job.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(job.pid, 9)  # also kills the ranks that it has forked
            job.wait()
        output.seek(0)
        text = output.read()
    if code is None:
        return None, HANG
    failed = re.search(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    if not failed:
        return code, text.strip().splitlines()[-1] if text.strip() else ""
    return code, "\n".join([failed[1], *re.findall(r"^E +(.+)$", text, re.MULTILINE)])


def hunt(bug: Bug) -> tuple[str, str, float]:
    """Tests one bug. Returns ("killed", "test-all" or "SURVIVED"; the failed test; seconds)."""
    since, test = time.monotonic(), shlex.split(bug.test)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        put_in(bug, root)
        for verdict, which in (("killed", ["-m", "not slow"]), ("test-all", ["-m", "slow"])):
            code, line = run_pytest(root, [*test, *which], LIMIT)
            if code is not None and (code < 0 or code in (2, 3, 4)):
                raise ValueError(f"bug {bug.number}, {bug.name}: pytest could not run: {line}")
            if code not in (0, 5):  # 0: passed, 5: no test selected
                as_expected = re.search(bug.failure, line)
                return verdict if as_expected else "SURVIVED", line, time.monotonic() - since
    return "SURVIVED", f"{bug.test} passed", time.monotonic() - since


def main(argv: list[str] | None = None, zoo: list[Bug] = ZOO) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", nargs="+", metavar="WORD", help="numbers, or words in names")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count(), help="bugs tested at a time")
    args = arguments.parse_args(argv)
    chosen = [bug for bug in zoo if args.only is None or any(
        word == str(bug.number) or (not word.isdigit() and word in bug.name) for word in args.only
    )]  # fmt: skip
    try:
        if not chosen:
            raise ValueError(f"--only {' '.join(args.only)}: no bug has that number or name")
        with tempfile.TemporaryDirectory() as folder:  # check all patches first
            for i, bug in enumerate(chosen):
                root = Path(folder) / str(i)
                root.mkdir()
                for file in {file for file, _, _ in bug.edits}:
                    shutil.copy(ROOT / file, root / file)
                put_in(bug, root)
        tests = dict.fromkeys(tuple(shlex.split(bug.test)) for bug in chosen)
        print(f"{len(chosen)} bugs; first {len(tests)} tests without a bug", flush=True)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            sound = pool.map(lambda test: run_pytest(ROOT, list(test), 4 * LIMIT), tests)
            for test, (code, line) in zip(tests, sound, strict=True):
                if code != 0:
                    raise ValueError(f"{' '.join(test)} fails without a bug: {line}")
            since, killed = time.monotonic(), 0
            for bug, (verdict, how, took) in zip(chosen, pool.map(hunt, chosen), strict=True):
                killed += verdict != "SURVIVED"
                how = how.removeprefix("tests/").splitlines()[0][:150]
                print(f"{bug.number:3d}  {verdict:8s} {took:5.1f} s  {bug.name:52s} by {how}",
                      flush=True)  # fmt: skip
    except ValueError as error:
        arguments.error(str(error))
    print(f"{killed} of {len(chosen)} killed; {time.monotonic() - since:.0f} s")
    sys.exit(0 if killed == len(chosen) else 1)


if __name__ == "__main__":
    main()
