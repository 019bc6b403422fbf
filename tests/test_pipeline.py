import doctest

import pytest
import torch
import torch.distributed as dist

import gpt
import measure
import pipeline
from pipeline import Action, derive_programs, rendezvous, simulate
from tools.oracle import draw, launch

SIZES = [(p, m) for p in (1, 2, 3, 4, 8, 16) for m in (1, 2, 3, 5, 8, 16, 33)]


def test_the_timeline_in_the_docstring():
    results = doctest.testmod(pipeline)
    assert results.attempted == 1 and results.failed == 0


@pytest.mark.parametrize("name", pipeline.SCHEDULES)
def test_bubble_and_memory_are_as_predicted(name):
    for p, m in SIZES:
        schedule = pipeline.SCHEDULES[name](p, m)
        makespan = max(span.end for span in simulate(schedule))
        assert makespan / (3 * m) - 1 == pytest.approx(pipeline.predicted_bubble(p, m)), (p, m)
        for rank in range(p):
            predicted = pipeline.predicted_in_flight(name, p, m, rank)
            assert pipeline.peak_in_flight(schedule[rank]) == predicted, (p, m, rank)


@pytest.mark.parametrize("name", pipeline.SCHEDULES)
def test_derived_transfers_never_deadlock(name):
    for p, m in SIZES:
        rendezvous(derive_programs(pipeline.SCHEDULES[name](p, m)))


def naive_programs(schedule):
    """Each receive just before it is needed, each send just after it can be: bug 18."""
    programs = []
    for rank, actions in enumerate(schedule):
        program = []
        for action in actions:
            up, down = rank + 1, rank - 1
            source, target = (down, up) if action.kind == "F" else (up, down)
            kind, i = action.kind, action.microbatch
            if 0 <= source < len(schedule):
                program.append((pipeline.Transfer(kind, i, source, source, rank),))
            program.append(action)
            if 0 <= target < len(schedule):
                program.append((pipeline.Transfer(kind, i, rank, rank, target),))
        programs.append(program)
    return programs


def test_unfused_sends_deadlock_under_rendezvous():
    rendezvous(naive_programs(pipeline.gpipe(4, 8)))  # one direction at a time: no harm
    with pytest.raises(ValueError, match=r"deadlock: rank 0 waits for rank 1 \(to take F"):
        rendezvous(naive_programs(pipeline.one_f_one_b(4, 8)))


def test_ends_that_post_in_different_orders_are_refused():
    programs = derive_programs(pipeline.gpipe(2, 2))
    a, b = [i for i, step in enumerate(programs[1]) if not isinstance(step, Action)][:2]
    programs[1][a], programs[1][b] = programs[1][b], programs[1][a]
    with pytest.raises(ValueError, match="different orders"):
        rendezvous(programs)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s[1].remove(Action("B", 1)), "rank 1: B1 is missing"),
        (lambda s: s[0].append(Action("F", 0)), "rank 0: F0 is unknown, or there twice"),
        (lambda s: s[0].append(Action("W", 0)), "rank 0: W0 is unknown"),
        (lambda s: s[1].insert(0, Action("F", 9)), "rank 1: F9 is unknown"),
        (lambda s: s[2].insert(0, s[2].pop(1)), "rank 2: B0 comes before its forward"),
        (lambda s: s[0].insert(0, s[0].pop()), "rank 0: B3 comes before its forward"),
    ],
)
def test_incomplete_schedules_are_refused(spoil, message):
    schedule = pipeline.one_f_one_b(3, 4)
    spoil(schedule)
    with pytest.raises(ValueError, match=message):
        derive_programs(schedule)


def test_a_circle_is_refused_and_named():
    """Rank 0 wants B0 before it forwards microbatch 1, rank 1 wants F1 before it gives back B0."""
    f0, f1, b0, b1 = Action("F", 0), Action("F", 1), Action("B", 0), Action("B", 1)
    with pytest.raises(ValueError) as error:
        derive_programs([[f0, b0, f1, b1], [f0, f1, b0, b1]])
    assert str(error.value) == (
        "the schedule cannot run: rank 0 at B0 waits for B0 of stage 1; "
        "rank 1 at F1 waits for F1 of stage 0"
    )


def test_a_batch_holds_only_transfers_between_two_actions():
    for program in derive_programs(pipeline.one_f_one_b(4, 6)):
        kinds = [isinstance(step, Action) for step in program]
        assert (False, False) not in list(zip(kinds, kinds[1:], strict=False))


def test_layers_are_split_evenly_and_all():
    assert pipeline.split_layers(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    for n in range(1, 20):
        for stages in range(1, n + 1):
            parts = pipeline.split_layers(n, stages)
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="3 stages for 2 blocks: lower --pp"):
        pipeline.split_layers(2, 3)


def two_chunks(stages: list[list[int]], m: int):
    """Both passes of every chunk in turn: a schedule and placements that no name stands for."""
    p, rank = len(stages), dist.get_rank()
    config = gpt.GPTConfig(5, 2, 8, 17, 6)
    x = torch.randint(17, (m, 2, 6), generator=torch.Generator().manual_seed(0))

    def build(stage: int | None) -> gpt.GPT:
        with torch.device("meta"):
            model = gpt.GPT(config)
        if stage is not None:
            pipeline.take_stage(model, stage, 2 * p)
        gpt.init_weights(model, 0, torch.float64, "cpu", draw)
        return model

    def loss_of(logits, microbatch):
        return gpt.cross_entropy(logits, x[microbatch])

    whole = build(None)
    for i in range(m):
        loss_of(whole(x[i]), i).backward()
    actions = [Action("F", i, c) for c in (0, 1) for i in range(m)]
    actions += [Action("B", i, c) for c in (1, 0) for i in range(m)]
    programs = derive_programs([actions] * p, stages)
    rendezvous(programs)
    chunks = [build(stage) for stage in stages[rank]]
    pipe = pipeline.Pipeline(chunks, dist.group.WORLD, torch.float64, "cpu", stages)
    pipe.run(programs[rank], x, loss_of, (2, 6, 8))
    held = [q.grad for chunk in chunks for q in chunk.parameters() if hasattr(q, "tied_name")]
    tied = sum(held) if held else torch.zeros(17, 8, dtype=torch.float64)
    dist.all_reduce(tied)  # first and last stage, wherever they are
    expected = {n: q.grad for n, q in gpt.named_parameters(whole)}
    mine = {n: q.grad for chunk in chunks for n, q in gpt.named_parameters(chunk)}
    mine["wte.weight"] = tied
    return max(measure.relative_errors(mine, expected).values()), sorted(mine)


@pytest.mark.parametrize("stages", [[[0, 2], [1, 3]], [[0, 3], [1, 2]]], ids=["looped", "v"])
def test_several_chunks_on_a_rank(stages):
    results = launch(2, two_chunks, stages, 3)
    assert max(error for error, _ in results) <= measure.TOLERANCE
    assert len({name for _, names in results for name in names}) == 2 + 5 * 12 + 2


def sends_held(m: int) -> int:
    rank = dist.get_rank()
    whole = gpt.build(gpt.GPTConfig(2, 2, 8, 17, 6), dtype=torch.float64)
    model = pipeline.take_stage(whole, rank, 2)
    pipe = pipeline.Pipeline([model], dist.group.WORLD, torch.float64, "cpu")
    x, held = torch.zeros(m, 1, 6, dtype=torch.int64), []
    model.register_forward_hook(lambda *_: held.append(len(pipe.sending)))
    program = derive_programs(pipeline.one_f_one_b(2, m))[rank]
    pipe.run(program, x, lambda out, i: gpt.cross_entropy(out, x[i]), (1, 6, 8))
    return max(held)


def test_tensors_that_were_sent_are_let_go():
    """Not more than are in flight, however many microbatches there are."""
    assert max(launch(2, sends_held, 12)) <= 2
