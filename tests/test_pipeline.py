import collections
import copy
import functools
import itertools
import random
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gpt
import measure
import pipeline
import schedules
import tensor_parallel
from pipeline import derive_programs
from schedules import Action, check
from tests.test_schedules import NAMES, SIZES, random_schedule
from tools.verify import oracle
from tools.verify.oracle import launch
from tools.verify.waits import check_no_deadlock


def test_the_timeline_in_the_docstring():
    timeline = schedules.draw(schedules.one_f_one_b(3, 4)).splitlines()
    assert [line.strip() for line in pipeline.__doc__.splitlines() if "|" in line] == timeline


def test_the_program_in_the_comment_on_the_full_version():
    def text(step, rank: int) -> str:
        if isinstance(step, Action):
            return f"{step.kind}{step.microbatch}"
        sent = [">" if t.src == rank else "<" for t in step]
        # A received tensor is named after the action that needs it; on another rank, the action
        # that computed it has the same kind and microbatch.
        names = [f"{t.action.kind}{t.action.microbatch}" for t in step]
        return "[" + " ".join(map("".join, zip(sent, names, strict=True))) + "]"

    program = derive_programs(schedules.one_f_one_b(3, 4))[1]
    comment = " ".join(Path(pipeline.__file__).read_text().replace("#", " ").split())
    assert " ".join(text(step, 1) for step in program) in comment


@pytest.mark.parametrize("name, chunks", NAMES)
def test_schedules_are_complete_and_their_transfers_never_deadlock(name, chunks):
    for p, m in SIZES[::13]:
        schedule = schedules.SCHEDULES[name](p, m, chunks)
        check(schedule, m)
        few = m // 2 + 1
        forwards = schedules.forward_only(schedule, few)
        assert [[a for a in row if a.kind == "F" and a.microbatch in range(few)]
                for row in schedule] == forwards  # fmt: skip
        check_no_deadlock(derive_programs(forwards))


# --- version 1 ------------------------------------------------------------------------------------


def train_version_1(p: int, m: int, gpipe: bool) -> tuple[float, int]:
    """A step of version 1, compared with one process and with Pipeline. Stages have different
    numbers of blocks. Frozen: one weight; or all of the first stage and one more weight. Returns
    (largest error, gradients compared)."""
    rank, worst, compared = dist.get_rank(), 0.0, 0
    net = gpt.build(gpt.GPTConfig(5, 2, 8, 17, 6, tied=False), dtype=torch.float64)
    split = pipeline.split_layers(5, p)
    x = torch.randint(17, (m, 2, 6), generator=torch.Generator().manual_seed(m))
    boundary = torch.empty(2, 6, 8, dtype=torch.float64)
    schedule = (schedules.gpipe if gpipe else schedules.one_f_one_b)(p, m)

    def loss_of(logits, microbatch):
        return gpt.cross_entropy(logits, x[microbatch]) / x.numel()

    first_stage = ("wte", "wpe", *(f"h.{i}." for i in split[0])) if p > 1 else ()
    for frozen in (("h.3.mlp.c_fc.weight",), (*first_stage, "h.4.ln_1.weight")):
        models = [copy.deepcopy(net) for _ in range(3)]
        for name, q in itertools.chain(*(model.named_parameters() for model in models)):
            q.requires_grad_(not name.startswith(frozen))
        full, mine, other = models
        loss = sum(loss_of(full(x[i]), i) for i in range(m))
        loss.backward()
        pipeline.take_stages(mine, [rank], split)
        pipeline.take_stages(other, [rank], split)
        total = pipeline.train_step(mine, x, loss_of, boundary, dist.group.WORLD, gpipe)
        program = derive_programs(schedule)[rank]
        pipe = pipeline.Pipeline({rank: other}, p, dist.group.WORLD, torch.float64, "cpu", program)
        found = [{"loss": total}, {"loss": pipe.run(program, x, loss_of, (2, 6, 8))}]
        expected, reference = {"loss": loss.detach()}, dict(full.named_parameters())
        for version, model in zip(found, (mine, other), strict=True):
            dist.all_reduce(version["loss"])
            for name, q in model.named_parameters():
                assert (q.grad is None) == name.startswith(frozen), name
                if q.grad is not None:
                    version[name], expected[name] = q.grad, reference[name].grad
            errors = measure.relative_errors(version, expected)
            worst = measure.largest([worst, *errors.values()])
        compared += len(found[0]) - 1
    return worst, compared


@pytest.mark.parametrize("gpipe", [False, True], ids=["1f1b", "gpipe"])
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_version_1_equals_one_process(p, m, gpipe):
    results = launch(p, train_version_1, p, m, gpipe)
    assert max(worst for worst, _ in results) <= measure.TOLERANCE
    first_stage = 2 + 12 * len(pipeline.split_layers(5, p)[0]) if p > 1 else 0
    parameters = 12 * 5 + 5
    assert sum(n for _, n in results) == 2 * parameters - 1 - first_stage - 1


def version_1_in_bf16() -> torch.Tensor:
    stage, boundary = torch.nn.Linear(4, 4).bfloat16(), torch.zeros(1, 3, 4, dtype=torch.bfloat16)
    return pipeline.train_step(
        stage, [boundary, boundary], lambda y, i: y.float().sum(), boundary, dist.group.WORLD
    )


def test_the_loss_of_version_1_has_one_dtype_on_all_ranks():
    assert [loss.dtype for loss in launch(2, version_1_in_bf16)] == [torch.float32] * 2


# --- what is refused ------------------------------------------------------------------------------


def naive_programs(schedule):
    """Each receive just before it is needed, each send just after it can be: bug 18."""
    programs = []
    for rank, actions in enumerate(schedule):
        program = []
        for action in actions:
            up, down = rank + 1, rank - 1
            source, target = (down, up) if action.kind == "F" else (up, down)
            if 0 <= source < len(schedule):
                received = action._replace(stage=source)
                program.append((pipeline.Transfer(received, source, rank),))
            program.append(action)
            if 0 <= target < len(schedule):
                program.append((pipeline.Transfer(action, rank, target),))
        programs.append(program)
    return programs


def test_unfused_sends_deadlock_under_rendezvous_and_all_waits_are_named():
    check_no_deadlock(naive_programs(schedules.gpipe(4, 8)))  # one direction at a time: no harm
    with pytest.raises(ValueError) as error:
        check_no_deadlock(naive_programs(schedules.one_f_one_b(4, 8)))
    assert str(error.value) == (
        "deadlock: rank 0 waits to send F3 to rank 1; rank 1 waits to send F2 to rank 2; "
        "rank 2 waits to send F1 to rank 3; rank 3 waits to send B0 to rank 2"
    )


def test_ends_that_post_in_different_orders_are_refused():
    programs = derive_programs(schedules.gpipe(2, 2))
    a, b = [i for i, step in enumerate(programs[1]) if not isinstance(step, Action)][:2]
    programs[1][a], programs[1][b] = programs[1][b], programs[1][a]
    with pytest.raises(ValueError, match="different orders"):
        check_no_deadlock(programs)


def test_an_end_that_never_posts_is_refused():
    programs = derive_programs(schedules.gpipe(2, 1))
    programs[1] = programs[1][1:]
    with pytest.raises(ValueError, match="deadlock: rank 0 waits to send F0 to rank 1"):
        check_no_deadlock(programs)


def test_receives_ahead_keep_the_order_between_two_ranks():
    rng = random.Random(3)
    chosen = [schedules.one_f_one_b(4, 6), schedules.zb_v(3, 7)]
    chosen += [random_schedule(rng, rng.randint(2, 4))[0] for _ in range(50)]
    for schedule in chosen:
        for rank, program in enumerate(derive_programs(schedule)):
            ahead = pipeline.receive_ahead(program, rank)
            assert [a for a in ahead if isinstance(a, Action)] == schedule[rank]
            places = []
            for steps in (program, ahead):
                places.append({t: i for i, s in enumerate(s for s in steps if s)
                               for t in (() if isinstance(s, Action) else s)})  # fmt: skip
            was, now = places
            for pair in {(t.src, t.dst) for t in was}:
                of_pair = [[t for t in place if (t.src, t.dst) == pair] for place in (was, now)]
                assert of_pair[0] == of_pair[1]
            actions = [[a for a in steps[:place] if isinstance(a, Action)] for steps, places_ in
                       ((program, was), (ahead, now)) for place in places_.values()]  # fmt: skip
            before = dict(zip([*((0, t) for t in was), *((1, t) for t in now)],
                              map(len, actions), strict=True))  # fmt: skip
            for t in was:
                sent = t.src == rank
                assert before[1, t] == before[0, t] if sent else before[1, t] <= before[0, t]


# --- from a model to stages -----------------------------------------------------------------------


def test_layers_are_split_evenly_and_all():
    assert pipeline.split_layers(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    for n in range(1, 20):
        for stages in range(1, n + 1):
            parts = pipeline.split_layers(n, stages)
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="3 stages for 2 blocks: lower --pp"):
        pipeline.split_layers(2, 3)


def test_layers_are_split_by_cost():
    """GPT-2's head costs 4.9 blocks."""
    embedding, block, head = gpt.flops_per_token(gpt.GPTConfig(12, 12, 768, 50257, 512))
    assert 4.9 < head / block < 5 and embedding / block < 1e-4
    parts = pipeline.split_layers(12, 4, embedding / block, head / block)
    assert [len(part) for part in parts] == [3, 4, 4, 1]
    assert [len(part) for part in pipeline.split_layers(8, 3, first=2)] == [2, 3, 3]


class Chain(nn.Module):
    """A model as others write it: blocks in an nn.ModuleList."""

    def __init__(self, n_layer: int = 5):
        super().__init__()
        self.wte, self.drop, self.ln_f = nn.Embedding(17, 8), nn.Dropout(0.5), nn.LayerNorm(8)
        self.h = nn.ModuleList(nn.Linear(8, 8) for _ in range(n_layer))
        self.lm_head = nn.Linear(8, 17)

    def forward(self, x):
        x = self.drop(self.wte(x))
        for block in self.h:
            x = x + block(x)
        return self.lm_head(self.ln_f(x))


def test_the_layers_of_chunks_follow_train_and_eval_of_the_model():
    torch.manual_seed(0)
    model, split = Chain(), pipeline.split_layers(5, 3)
    x, outputs = torch.arange(4)[None], []
    whole = pipeline.take_stages(copy.deepcopy(model), range(3), split)
    chunks = pipeline.chunks_of(whole, range(3), split)
    for mode in (model.eval, model.train):
        mode(), whole.train(model.training)
        torch.manual_seed(0)
        y = x
        for chunk in chunks.values():
            y = chunk(y)
        torch.manual_seed(0)
        assert torch.equal(y, model(x))
        outputs.append(y)
    assert not torch.equal(*outputs)


def test_blocks_in_a_list_keep_their_names():
    split = pipeline.split_layers(5, 3)
    model = pipeline.take_stages(Chain(), [1], split)
    assert [n for n, _ in model.named_parameters()] == [
        "h.2.weight", "h.2.bias", "h.3.weight", "h.3.bias"
    ]  # fmt: skip
    assert isinstance(model.h, nn.ModuleList) and len(list(model.h)) == 2


@pytest.mark.parametrize("split", [[range(3), range(3, 4)], [range(3), range(3, 6)]])
def test_a_split_of_another_number_of_blocks_is_refused(split):
    with pytest.raises(ValueError, match=r"blocks 0, 1, 2, 3, 4, but split is \[range\(0, 3\)"):
        pipeline.take_stages(Chain(), [1], split)


def test_a_parameter_outside_the_stages_and_blocks_without_numbers_are_refused():
    model, split = Chain(2), [range(1), range(1, 2)]
    model.scale = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match="scale would be on every stage: .* FIRST or to LAST"):
        pipeline.take_stages(model, [0], split)
    model = Chain(0)
    model.h = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="blocks a, b, but split"):
        pipeline.take_stages(model, [0], split)


# --- the executor ---------------------------------------------------------------------------------

batch_isend_irecv = dist.batch_isend_irecv


class Batch:
    """The handle of all transfers of a batch, as NCCL gives it. It may be waited for repeatedly."""

    def __init__(self, works: list[dist.Work]):
        self.works = works

    def wait(self) -> None:
        while self.works:
            self.works.pop(0).wait()


def one_handle_for_a_batch(operations: list[dist.P2POp]) -> list[Batch]:
    return [Batch(batch_isend_irecv(operations))]


def run_schedules(p: int, chosen: list, as_nccl: bool = False) -> tuple[float, int]:
    """On each rank: the schedules (with m and the number of stages) through the executor. as_nccl:
    in the order that NCCL needs. (worst error, gradients)."""
    worst, compared = 0.0, 0
    shape, rank, pp = (2, 6, 8), dist.get_rank(), dist.new_group(range(p))
    for seed, (schedule, m, n) in enumerate(chosen):
        config = gpt.GPTConfig(max(5, n), 2, 8, 17, 6)
        x = torch.randint(17, (m, 2, 6), generator=torch.Generator().manual_seed(seed))

        def loss_of(logits, microbatch, x=x):
            return gpt.cross_entropy(logits, x[microbatch])

        with torch.device("meta"):
            whole, mine = gpt.GPT(config), gpt.GPT(config)
        gpt.init_weights(whole, 0, torch.float64, "cpu", oracle.draw)
        for i in range(m):
            loss_of(whole(x[i]), i).backward()
        stages, split = schedules.stages_of(schedule)[rank], pipeline.split_layers(max(5, n), n)
        pipeline.take_stages(mine, stages, split)
        gpt.init_weights(mine, 0, torch.float64, "cpu", oracle.draw)
        chunks = pipeline.chunks_of(mine, stages, split)
        program, counted = derive_programs(schedule)[rank], {}
        pipe = pipeline.Pipeline(chunks, n, pp, torch.float64, "cpu", program)
        if as_nccl:
            pipe.is_gloo, dist.batch_isend_irecv = False, one_handle_for_a_batch
        for q in mine.parameters():
            q.register_post_accumulate_grad_hook(
                lambda q, c=counted: c.update({q: c.get(q, 0) + 1})
            )
        pipe.run(program, x, loss_of, shape)
        assert counted == pipe.accumulations()
        held = [q.grad for q in mine.parameters() if hasattr(q, "tied_name")]
        tied = sum(held) if held else torch.zeros(17, 8, dtype=torch.float64)
        pipeline.all_reduce_tied([tied], pp)  # first and last stage, wherever they are
        gradients = {n: q.grad for n, q in gpt.named_parameters(mine)} | {"wte.weight": tied}
        expected = {n: q.grad for n, q in gpt.named_parameters(whole) if n in gradients}
        worst = measure.largest([worst, *measure.relative_errors(gradients, expected).values()])
        compared += len(gradients) - 1
    return worst, compared


@pytest.mark.parametrize("p, count", [
    (1, 20), *(pytest.param(p, n, marks=pytest.mark.slow) for p, n in ((2, 70), (4, 50))), (3, 60),
])  # fmt: skip
def test_200_random_schedules_run(p, count):
    """The executor is right for any list, not only for those of SCHEDULES."""
    rng = random.Random(p)
    compare_with_one_process(p, [random_schedule(rng, p) for _ in range(count)])


@pytest.mark.parametrize("p", [2, 3])
def test_schedules_run_in_the_order_of_nccl(p):
    """No receive is posted ahead, and a batch of transfers has one handle."""
    chosen = []
    for entry in schedules.SCHEDULES.values():
        for m in (1, p, 2 * p + 1):
            chosen.append((entry(p, m), m, p * entry.chunks))
    compare_with_one_process(p, chosen, as_nccl=True)


def compare_with_one_process(p: int, chosen: list, as_nccl: bool = False) -> None:
    results = launch(p, run_schedules, p, chosen, as_nccl, timeout=60)
    assert max(error for error, _ in results) <= measure.TOLERANCE
    # Every gradient was compared by a rank: 12 per block, wpe and ln_f's two.
    gradients = sum(12 * max(5, n) + 3 for *_, n in chosen)
    assert sum(compared for _, compared in results) == gradients


def exchanged_at_the_start(schedule) -> list[tuple[int, ...]]:
    """The batches that Pipeline's constructor posts, each as the ranks it sends to and receives
    from."""
    batches, plain, rank = [], dist.batch_isend_irecv, dist.get_rank()

    def watched(operations):
        assert [op.op for op in operations] == [dist.isend, dist.irecv]
        batches.append(tuple(op.group_peer for op in operations))
        return plain(operations)

    dist.batch_isend_irecv = watched
    stages, program = schedules.stages_of(schedule), derive_programs(schedule)[rank]
    pipeline.Pipeline(
        {k: nn.Identity() for k in stages[rank]}, sum(map(len, stages)), dist.group.WORLD,
        torch.float32, "cpu", program,
    )  # fmt: skip
    return batches


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("name", [*schedules.SCHEDULES, "random"])
def test_each_pair_of_ranks_that_sends_exchanges_a_tensor_at_the_start(name, p):
    """Once, and in an order in which no batch waits for a later one."""
    schedule = (random_schedule(random.Random(6), p)[0] if name == "random" else
                schedules.SCHEDULES[name](p, 4))  # fmt: skip
    rank_of = {k: rank for rank, row in enumerate(schedules.stages_of(schedule)) for k in row}
    neighbours = {frozenset((rank_of[k], rank_of[k - 1])) for k in rank_of if k > 0}
    by_rank, programs = launch(p, exchanged_at_the_start, schedule), []
    for rank, batches in enumerate(by_rank):
        expected = {peer for pair in neighbours if rank in pair for peer in pair if peer != rank}
        assert sorted(batches) == [(peer, peer) for peer in sorted(expected)]
        ways = [[(rank, peer), (peer, rank)] for peer, _ in batches]
        action = Action("F", 0, 0)
        programs.append([tuple(pipeline.Transfer(action, *way) for way in two) for two in ways])
    check_no_deadlock(programs)


def test_a_pipeline_of_one_rank_calls_no_collective():
    """Its group may be anything that has a size and a rank."""
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    schedule = schedules.interleaved(1, 2)
    chunks, (program,) = {0: Tower(linear), 1: Tower(linear)}, derive_programs(schedule)
    pipe = pipeline.Pipeline(chunks, 2, group, torch.float32, "cpu", program)
    pipe.run(program, torch.ones(2, 1, 3, 4), lambda y, i: y.sum(), (1, 3, 4))
    pipeline.all_reduce_tied([torch.ones(1)], group)
    assert chunks[0].linear.weight.grad.any()


def sends_held(m: int) -> int:
    rank = dist.get_rank()
    whole, split = gpt.build(gpt.GPTConfig(2, 2, 8, 17, 6), dtype=torch.float64), [[0], [1]]
    model = pipeline.take_stages(whole, [rank], split)
    program = derive_programs(schedules.one_f_one_b(2, m))[rank]
    pipe = pipeline.Pipeline({rank: model}, 2, dist.group.WORLD, torch.float64, "cpu", program)
    x, held = torch.zeros(m, 1, 6, dtype=torch.int64), []
    model.register_forward_hook(lambda *_: held.append(len(pipe.sending)))
    pipe.run(program, x, lambda out, i: gpt.cross_entropy(out, x[i]), (1, 6, 8))
    return max(held)


def test_tensors_that_were_sent_are_let_go():
    """Not more than one a direction, however many microbatches there are."""
    assert max(launch(2, sends_held, 12)) <= 2


def short_microbatch():
    rank, m = dist.get_rank(), 2
    model = pipeline.take_stages(gpt.build(gpt.GPTConfig(2, 2, 8, 17, 6)), [rank], [[0], [1]])
    program = derive_programs(schedules.gpipe(2, m))[rank]
    pipe = pipeline.Pipeline({rank: model}, 2, dist.group.WORLD, torch.float32, "cpu", program)
    x = torch.zeros(2 * m - 1, 6, dtype=torch.int64).split(2)
    if rank == 0:  # the other would wait for what does not come
        pipe.run(schedules.gpipe(1, m)[0], x, None, (2, 6, 8))


def test_a_short_last_microbatch_is_refused_where_it_is_made():
    """Bug 16: its receiver expects the shape of the others."""
    message = r"shape torch.Size\(\[1, 6, 8\]\).* shape given to run\(\), \(2, 6, 8\)"
    with pytest.raises(RuntimeError, match=message):
        launch(2, short_microbatch)


class Tower(nn.Module):
    """A stage that is a function."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.linear, x)


def run_alone(schedule, function, n: int = 1, m: int = 2, shape=(1, 3, 4), stages=None):
    """On one rank: n stages that are `function`, m microbatches."""
    torch.manual_seed(0)
    chunks = {k: Tower(function) for k in (range(n) if stages is None else stages)}
    (program,) = derive_programs(schedule)
    pipe = pipeline.Pipeline(chunks, n, dist.group.WORLD, torch.float32, "cpu", program)
    pipe.run(program, torch.randn(m, *shape), lambda y, i: y.sum(), shape)


def linear(layer, x):
    return layer(x)


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(schedule=schedules.one_f_one_b(1, 2), function=linear, m=3),
         "2 microbatches, but .* there are 3 inputs"),
        (dict(schedule=schedules.one_f_one_b(1, 2), function=linear, n=2, stages=[1]),
         r"stages \[0\] .* but the chunks are stages \[1\]"),
        (dict(schedule=schedules.interleaved(1, 2), n=2, function=lambda layer, x: (layer(x), 0)),
         r"F0 of stage 0 has shape None.* run\(\), \(1, 3, 4\), and .* dtype, torch.float32"),
        (dict(schedule=schedules.interleaved(1, 2), n=2, function=lambda layer, x: layer(x).half()),
         r"shape torch.Size\(\[1, 3, 4\]\), dtype torch.float16: it must be one tensor"),
        (dict(schedule=schedules.interleaved(1, 2), n=2,
              function=lambda layer, x: layer(x.detach() * 0)),
         "B0 of stage 1 has shape None, dtype None: it must be one tensor"),
    ],
)  # fmt: skip
def test_what_the_executor_cannot_run_is_refused(how, message):
    with pytest.raises(RuntimeError, match="ValueError: .*" + message):
        launch(1, functools.partial(run_alone, **how))


def forwards_only() -> tuple[bool, bool]:
    """(the model's output requires a gradient, the loss requires one)."""
    (program,), needed = derive_programs(schedules.zb_v(1, 2)), []
    chunks = {0: Tower(linear), 1: Tower(linear)}
    pipe = pipeline.Pipeline(chunks, 2, dist.group.WORLD, torch.float32, "cpu", program)

    def loss_of(y, microbatch):
        needed.append(y.requires_grad)
        return y.sum()

    (forwards,) = derive_programs(schedules.forward_only(schedules.zb_v(1, 2), 2))
    loss = pipe.run(forwards, torch.ones(2, 1, 3, 4), loss_of, (1, 3, 4))
    return any(needed), loss.requires_grad


def test_a_program_without_b_runs_without_gradients():
    assert launch(1, forwards_only) == [(False, False)]


def interrupted_backward() -> list[torch.Tensor]:
    """The gradients of a step, and of the same step after one whose second B is interrupted: its
    queue then has an entry of microbatch 1, and a W of microbatch 0 is to come."""
    (program,), calls = derive_programs(schedules.zb_h1(1, 3)), []
    order = [Action(kind, i, 0) for kind, i in (("F", 0), ("F", 1), ("B", 0), ("B", 1), ("W", 0))]
    program = order + [action for action in program if action not in order]

    class Interrupt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(0)
            if len(calls) == 5:  # 3 in the first step
                raise InterruptedError
            return grad

    torch.manual_seed(0)
    stage = Tower(lambda layer, x: layer(Interrupt.apply(layer(x.tanh() + 0 * layer.bias))))
    pipe = pipeline.Pipeline({0: stage}, 1, dist.group.WORLD, torch.float32, "cpu", program)
    x, gradients = torch.randn(3, 1, 3, 4), []
    for _ in range(3):
        stage.zero_grad()
        try:
            pipe.run(program, x, lambda y, i: y.square().sum(), (1, 3, 4))
            gradients.append(stage.linear.weight.grad)
        except InterruptedError:
            assert pipe.queue and pipe.pending
    return gradients


def test_a_run_after_an_interrupted_backward_equals_the_run_alone():
    ((one, two),) = launch(1, interrupted_backward)
    assert torch.equal(one, two)


def left_of_a_stage_whose_w_waits(plan: dict) -> tuple[int, bool]:
    """(what waits, whether the stage's input is gone)."""
    model, queue = nn.ModuleDict({"up": nn.Linear(4, 4)}), []
    tensor_parallel.parallelize(model, plan, dist.group.WORLD)
    pipeline.defer_weight_gradients(model, queue)
    x = torch.randn(1, 2, model["up"].weight.size(1), requires_grad=True)
    model["up"](x * 2).sum().backward()
    gone = weakref.ref(x)
    del x
    end = time.monotonic() + 5
    while gone() is not None and time.monotonic() < end:  # gloo's thread releases its tensor late
        time.sleep(0.01)
    return len(queue), gone() is None


@pytest.mark.parametrize("plan", [{"up": style} for style in ("replicated", "column", "row")])
def test_what_waits_for_its_w_keeps_no_graph(plan):
    """A linear's input hangs on a graph, and at its end is what the stage has received."""
    assert launch(2, left_of_a_stage_whose_w_waits, plan) == [(1, True)] * 2


def test_a_second_pipeline_on_a_model_has_its_own_queue():
    model, queues = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ([], [])
    model[0].weight.requires_grad_(False)  # a frozen weight has no W
    for queue in queues:
        pipeline.defer_weight_gradients(model, queue)
    model(torch.ones(2, 4)).sum().backward()
    assert [*map(len, queues)] == [0, 1] and model[0].bias.grad is not None


class Mixed(nn.Module):
    """A stage that runs under autocast. Its backward does not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x).float()


def gradients_under_autocast() -> list[list[torch.Tensor]]:
    gradients = []
    for schedule in (schedules.interleaved(1, 2), schedules.zb_v(1, 2)):
        torch.manual_seed(0)
        chunks, (program,) = {0: Mixed(), 1: Mixed()}, derive_programs(schedule)
        pipe = pipeline.Pipeline(chunks, 2, dist.group.WORLD, torch.float32, "cpu", program)
        pipe.run(program, torch.randn(2, 1, 3, 4), lambda y, i: y.square().sum(), (1, 3, 4))
        gradients.append([q.grad for chunk in chunks.values() for q in chunk.parameters()])
    return gradients


def test_a_split_backward_under_autocast_has_the_same_gradients():
    ((whole, split),) = launch(1, gradients_under_autocast)
    assert len(whole) == 6 and all(map(torch.equal, whole, split))


# --- frozen parameters ----------------------------------------------------------------------------


def train_frozen(p: int, names: list[str]) -> tuple[float, int]:
    """A step of SGD by each schedule, with each choice of what is trained, next to one process.
    (largest error of a gradient or a parameter, parameters compared)."""
    rank, m, worst, compared = dist.get_rank(), 2, 0.0, 0
    config = gpt.GPTConfig(2 * p, 2, 4, 7, 3, tied=False)
    x = torch.randint(7, (m, 2, 3), generator=torch.Generator().manual_seed(0))
    net = gpt.build(config, dtype=torch.float64)

    def loss_of(logits, microbatch):
        return gpt.cross_entropy(logits, x[microbatch]) / x.numel()

    for name in names:
        schedule = schedules.SCHEDULES[name](p, m)
        stages = schedules.stages_of(schedule)
        n = sum(map(len, stages))
        split, program = pipeline.split_layers(2 * p, n), derive_programs(schedule)[rank]
        first, last = (tuple(f"h.{i}." for i in split[k]) for k in (0, -1))
        for trained in (
            lambda n, first=first: not n.startswith(("wte", "wpe", *first)),
            lambda n, last=last: not n.startswith(("ln_f", "lm_head", *last)),
            lambda n: n.endswith(("c_attn.weight", "c_fc.weight")),
            lambda n, last=last: n.startswith(last) and n.endswith("c_fc.weight"),
        ):
            whole, mine = copy.deepcopy(net), copy.deepcopy(net)
            for n_, q in (*whole.named_parameters(), *mine.named_parameters()):
                q.requires_grad_(trained(n_))
            pipeline.take_stages(mine, stages[rank], split)
            chunks = pipeline.chunks_of(mine, stages[rank], split)
            pipe = pipeline.Pipeline(chunks, n, dist.group.WORLD, torch.float64, "cpu", program)
            counted = collections.Counter()
            for q in mine.parameters():
                if q.requires_grad:
                    q.register_post_accumulate_grad_hook(lambda q, c=counted: c.update([q]))
            for i in range(m):
                loss_of(whole(x[i]), i).backward()
            pipe.run(program, x, loss_of, (2, 3, 4))
            assert counted == pipe.accumulations()
            held, expected, one = {}, {}, dict(whole.named_parameters())
            for net_ in (whole, mine):
                torch.optim.SGD(net_.parameters(), lr=0.5).step()
            for n_, q in mine.named_parameters():
                held[n_], expected[n_] = q, one[n_]
                assert (q.grad is None) == (not trained(n_)), n_
                if q.grad is not None:
                    held[n_ + ".grad"], expected[n_ + ".grad"] = q.grad, one[n_].grad
                compared += 1
            worst = measure.largest([worst, *measure.relative_errors(held, expected).values()])
    return worst, compared


@pytest.mark.parametrize("p", [2, 3])
def test_frozen_stages_and_frozen_weights_equal_one_process(p):
    """Frozen: the first stage with its embedding; the last with its head; all but some linear
    layers; all but some of the last stage."""
    names = [*schedules.SCHEDULES]
    results = launch(p, train_frozen, p, names)
    assert max(worst for worst, _ in results) <= measure.TOLERANCE
    assert sum(compared for _, compared in results) == 4 * len(names) * (12 * 2 * p + 5)
