"""Checkpoints: any layout loads any other, nothing damaged is loaded, nothing good is lost."""

import copyreg
import dataclasses
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import checkpoint
import checkpoint_dcp
import gpt
import huggingface
import measure
import options
import tensor_parallel
import train_3d
from tests.commands import (
    ROOT,
    TINY,
    Forked,
    command_line,
    environment,
    forked,
    read_log,
    until,
)
from tests.test_train_3d import text  # noqa: F401
from tools import convert
from tools.verify.fuzz import draw_resume
from tools.verify.oracle import STEPS, Case, judge, launch, reader, trainer_of

# --- slices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 6), (4, 1), (2, 3, 4)])
def test_boxes_are_the_range(shape):
    """Every range of a small tensor: the boxes hold its elements, in order, and no box too many."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            parts = []
            for offsets, sizes in checkpoint.boxes_of_range(shape, start, stop):
                box = whole
                for dim, (o, n) in enumerate(zip(offsets, sizes, strict=True)):
                    box = box.narrow(dim, o, n)
                parts += box.flatten().tolist()
            assert parts == list(range(start, stop))
            assert len(list(checkpoint.boxes_of_range(shape, start, stop))) <= 2 * len(shape) - 1


def group_of(t: int, rank: int):
    return types.SimpleNamespace(rank=lambda: rank, size=lambda: t)


@pytest.mark.parametrize("others", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("parts, t", [((12,), 1), ((12,), 5), ((4, 4, 4), 2), ((6, 3, 3), 2)])
def test_the_slices_of_all_pieces_fill_the_full_tensor(parts, t, dim, others):
    """Fused matrices of equal or different sizes are split over t ranks, and the other dimension
    over `others`. Each shard is flattened and split in three. Every element occurs once."""
    shape = torch.Size((12, 5) if dim == 0 else (5, 12))
    whole = torch.arange(60, dtype=torch.float64).view(shape)
    rebuilt, times = torch.zeros(shape), torch.zeros(shape)
    for rank, other in itertools.product(range(t), range(others)):
        splits = (tensor_parallel.Split(1 - dim, (2, 3), group_of(others, other)),
                  tensor_parallel.Split(dim, parts, group_of(t, rank)))  # fmt: skip
        how = tensor_parallel.Distribution(shape, splits)
        parameter = torch.nn.Parameter(how.shard(whole))
        parameter.distribution = how
        flat = parameter.detach().flatten()
        n = max(1, -(-flat.numel() // 3))  # a fifth rank has none of 12
        for start in range(0, flat.numel(), n):
            piece = flat[start : start + n]
            for name, size, offsets, tensor in checkpoint.slices_of("w", piece, parameter, start):
                assert (name, size) == ("w", tuple(shape))
                place = tuple(slice(o, o + k) for o, k in zip(offsets, tensor.shape, strict=True))
                rebuilt[place], times[place] = tensor.float(), times[place] + 1
    assert torch.equal(rebuilt, whole.float()) and times.min() == times.max() == 1


def test_buffers_are_one_allocation_and_no_views_for_dcp():
    tensors = [torch.rand(3, 2), torch.rand(5, dtype=torch.float64), torch.rand(1).bfloat16()]
    tensors.append(torch.rand(4, 6)[:, 1:3])  # a slice of a tensor
    buffers = checkpoint.host_buffers(tensors)
    for buffer, t in zip(buffers, tensors, strict=True):
        assert torch.equal(buffer.copy_(t), t) and buffer.dtype == t.dtype
        assert buffer.untyped_storage().nbytes() == t.nbytes  # otherwise DCP copies it
    starts = [buffer.data_ptr() - buffers[0].data_ptr() for buffer in buffers]
    assert starts == [0, 32, 80, 96]
    assert all(map(torch.equal, buffers, tensors))  # they do not overlap


def test_replicas_share_the_writing():
    held = [checkpoint.TensorSlice(str(i), (n,), (0,), torch.zeros(n))
            for i, n in enumerate((100, 30, 40, 30, 7, 1))]  # fmt: skip
    shares = [checkpoint.split_between_replicas(held, rank, 2) for rank in range(2)]
    assert sorted(r.name for mine in shares for r in mine) == [r.name for r in held]
    assert [sum(r.tensor.numel() for r in mine) for mine in shares] == [107, 101]


# --- any layout loads any other -------------------------------------------------------------------

WIDE = dict(n_layer=8, seq_len=12, vocab_size=41)
PAIRS = [
    Case(t=2, p=2, d=2, zero=1, resume=dict(at=1, t=1, p=1, d=1, m=4, zero=0), **WIDE),
    Case(m=4, tied=False, resume=dict(at=2, t=2, d=2, m=2, zero=3, sequence=True), **WIDE),
    Case(p=2, d=2, m=3, zero=3, schedule="zb-v", dropout=0.1,
         resume=dict(at=1, t=3, p=2, d=1, m=6, zero=0, schedule="interleaved"), **WIDE),
]  # fmt: skip


def drawn_pairs(seed: int, n: int) -> list[Case]:
    """Two layouts of one run, up to 4 in each direction."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        case = Case(m=12, b=1, tied=rng.random() < 0.5, dropout=rng.choice((0.0, 0.1)), **WIDE)
        first, second = (draw_resume(rng, case) for _ in range(2))
        fields = {k: v for k, v in first.items() if k != "at"}
        if first["t"] * first["p"] * first["d"] * second["t"] * second["p"] * second["d"] > 1:
            found.append(dataclasses.replace(case, **fields, resume=second))
    return found


MORE = drawn_pairs(int(os.environ.get("SEED", 7)), int(os.environ.get("PAIRS", 0)))


@pytest.mark.parametrize("case", PAIRS + MORE, ids=str)
def test_saved_in_one_layout_and_resumed_in_another_is_the_undisturbed_run(case):
    errors = judge(case)
    assert errors.worst <= measure.TOLERANCE, errors


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(t=2, p=2, d=2, m=3, zero=2, schedule="zb-v", n_layer=6, dropout=0.1),
                     marks=pytest.mark.slow),
        Case(d=4, n_layer=2),  # a ring adds in an order that depends on the place in a bucket
    ],
    ids=str,
)
def test_the_same_layout_goes_on_bit_by_bit(case, tmp_path):
    undisturbed = launch(case.world_size, steps_of, case, "", 0, STEPS)
    for at in range(1, STEPS):
        folder = str(tmp_path / str(at))
        before = launch(case.world_size, steps_of, case, folder, 0, at)
        after = launch(case.world_size, steps_of, case, folder, at, STEPS)
        for whole, a, b in zip(undisturbed, before, after, strict=True):
            assert torch.equal(whole[0], torch.cat([a[0], b[0]]))
            assert all(torch.equal(x, y) for x, y in zip(whole[1], b[1], strict=True))


def steps_of(case: Case, folder: str, first: int, end: int) -> tuple[torch.Tensor, list]:
    """(stats of the steps, parameters afterwards)."""
    trainer = trainer_of(case)
    if first:
        load(trainer, folder)
    stats = torch.stack([trainer.step(step) for step in range(first, end)])
    if end < STEPS:
        assert save(trainer, folder, end) is None
    trainer.sync.gather()
    return stats, [p.detach().clone() for p in trainer.model.parameters()]


def save(trainer: train_3d.Trainer, folder: str, step: int) -> str | None:
    disk = checkpoint.Checkpoints(folder, 2, dist.group.WORLD)
    mine, numbers = trainer.state_to_save()
    disk.save(step, mine, {"optimizer": numbers})
    disk.wait()
    return disk.failed


def load(trainer: train_3d.Trainer, folder: str) -> None:
    found, _ = checkpoint.newest_complete(checkpoint.find(folder)[0], dist.group.WORLD)
    checkpoint.read(
        found.path, trainer.state_to_load(found.about["optimizer"]), dist.group.WORLD
    )
    trainer.loaded()


def resumed_in(case: Case, dtype: str, folder: str) -> torch.Tensor:
    """Losses of steps 1 and 2, in case.dtype and in `dtype`, which resumes after step 0."""
    old, new = trainer_of(case), trainer_of(dataclasses.replace(case, dtype=dtype))
    old.step(0)
    assert save(old, folder, 1) is None
    dist.barrier()  # rank 0 has renamed it
    load(new, folder)
    old_pieces, new_pieces = ([piece for _, piece, _, _ in t.sync.pieces()] for t in (old, new))
    for a, b in zip(old_pieces, new_pieces, strict=True):
        assert b.dtype == torch.promote_types(options.DTYPES[dtype], torch.float32)
        assert torch.equal(b, a.to(b.dtype))
        for key, moment in old.optimizer.state[a].items():
            assert torch.equal(new.optimizer.state[b][key], moment.to(b.dtype)), key
    for trainer in (old, new):
        trainer.sync.gather()
    parameters = [options.DTYPES[name] for name in (case.dtype, dtype)]
    narrow = min(parameters, key=lambda dtype: dtype.itemsize)
    for a, b in zip(old.model.parameters(), new.model.parameters(), strict=True):
        assert [a.dtype, b.dtype] == parameters and torch.equal(a.to(narrow), b.to(narrow))
    return torch.stack([torch.stack([t.step(step)[0].double() for step in (1, 2)])
                        for t in (old, new)])  # fmt: skip


@pytest.mark.parametrize(
    "old, new, tolerance",
    [("float64", "float32", 1e-6), ("float32", "bf16", 1e-2), ("bf16", "float32", 1e-2)],
)
def test_a_run_resumes_in_another_dtype(old, new, tolerance, tmp_path):
    """The state is converted: exactly between float32 and bf16, which has float32 master weights.
    The losses that follow differ by rounding."""
    case = Case(d=2, n_layer=2, zero=1, dtype=old)
    for before, after in launch(2, resumed_in, case, new, str(tmp_path)):
        assert after.tolist() == pytest.approx(before.tolist(), rel=tolerance)
        assert not torch.equal(before, after)


# --- nothing damaged is loaded, nothing good is lost ----------------------------------------------

SMALL = Case(d=2, n_layer=2)


def two_saves(case: Case, folder: str) -> None:
    args = options.parser().parse_args(case.arguments())
    config = options.check(args, case.world_size)
    trainer = train_3d.Trainer(args, config, reader(case), torch.device("cpu"))
    for step in (1, 2):
        trainer.step(step - 1)
        assert save(trainer, folder, step) is None


@pytest.fixture(scope="module")
def saves(tmp_path_factory) -> Path:
    """step-1 and step-2, from two ranks; not to be changed."""
    folder = tmp_path_factory.mktemp("saves")
    launch(2, two_saves, SMALL, str(folder))
    return folder


def newest(folder: str) -> tuple[int, list[str]]:
    found, wrong = checkpoint.find(folder)
    whole, more = checkpoint.newest_complete(found, dist.group.WORLD)
    return whole.about["step"], wrong + more


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(old: str, new: str):
    def do(path: Path) -> None:
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))

    return do


@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("__1_0.distcp", truncate, r"__1_0.distcp has \d+ bytes, expected \d+"),
        ("__0_0.distcp", change, r"__0_0.distcp has changed: crc32 \d+, expected \d+"),
        ("__0_0.distcp", os.remove, "__0_0.distcp is missing"),
        (".metadata", change, ".metadata has changed"),
        (".metadata", os.remove, ".metadata is missing"),
        ("checkpoint.json", os.remove, "checkpoint.json is missing"),
        ("checkpoint.json", truncate, "checkpoint.json cannot be read"),
        ("checkpoint.json", replace('"step": 2', '"step": 3'), "checkpoint.json has changed"),
        ("checkpoint.json", replace("{", "["), "checkpoint.json cannot be read"),
        ("checkpoint.json", replace('"format": 1', '"format": 2'),
         "has format 2, but this version reads formats up to 1"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_passed_over(saves, file, damage, message, tmp_path):
    folder = tmp_path / "saves"
    shutil.copytree(saves, folder)
    assert launch(2, newest, str(folder)) == [(2, [])] * 2
    damage(folder / "step-2" / file)
    (step, wrong), other = launch(2, newest, str(folder))
    assert step == 1 and len(wrong) == 1 and re.search(message, wrong[0]), wrong
    assert other == (step, wrong)  # the ranks agree


def refusal_of(*folders: str) -> str:
    with pytest.raises(ValueError) as error:
        newest(folders[min(dist.get_rank(), len(folders) - 1)])
    return str(error.value)


def test_ranks_that_see_different_directories_say_so(saves, tmp_path):
    shutil.copytree(saves / "step-1", tmp_path / "step-1")
    for one in launch(2, refusal_of, str(saves), str(tmp_path)):
        assert "see different checkpoints, ['step-2', 'step-1'] and ['step-1']" in one


def saves_at(case: Case, folder: str, keep: int, steps: list[int]) -> None:
    args = options.parser().parse_args(case.arguments())
    trainer = train_3d.Trainer(args, options.check(args, 2), reader(case), torch.device("cpu"))
    disk = checkpoint.Checkpoints(folder, keep, dist.new_group(backend="gloo"))
    for step in steps:
        mine, numbers = trainer.state_to_save()
        disk.save(step, mine, {"optimizer": numbers})
    disk.wait()
    assert [(n.step, n.failed) for n in disk.completed()] == [(step, None) for step in steps]


def test_the_newest_are_kept_and_nothing_of_anybody_elses_goes(tmp_path):
    """By number, not by name. A save that comes after a damaged one of a later step is not the
    oldest; one that was passed over is put aside when its step comes again."""
    for name in ("step-9.bak", "tmp-mine", "step-x"):
        (tmp_path / name).mkdir()
    theirs = sorted(os.listdir(tmp_path))
    launch(2, saves_at, SMALL, str(tmp_path), 2, [8, 9, 10, 100])
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "step-10", "step-100"])
    truncate(tmp_path / "step-100" / "__1_0.distcp")
    launch(2, saves_at, SMALL, str(tmp_path), 1, [20])
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "step-100", "step-20"])
    assert launch(1, newest, str(tmp_path))[0][0] == 20
    launch(2, saves_at, SMALL, str(tmp_path), 1, [100])
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "replaced-step-100", "step-100"])
    assert launch(1, newest, str(tmp_path)) == [(100, [])]


@pytest.mark.parametrize("file", ["__1_0.distcp", "checkpoint.json"])
def test_when_all_are_damaged_all_ranks_say_so(saves, file, tmp_path):
    folder = tmp_path / "saves"
    shutil.copytree(saves, folder)
    for step in (1, 2):
        truncate(folder / f"step-{step}" / file)
    one, other = launch(2, refusal_of, str(folder))
    assert one == other and "\n" not in one
    assert re.search(f"every checkpoint .*is damaged: .*{file}", one)


def as_python_3_11_2_writes(metadata: dcp.Metadata) -> bytes:
    """Debian 12's: it pickles a member of an enum as a call of getattr."""
    encoding = dcp.metadata._MEM_FORMAT_ENCODING
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    by_name = {encoding: lambda member: (getattr, (encoding, member.name))}
    pickler.dispatch_table = copyreg.dispatch_table | by_name
    pickler.dump(metadata)
    return file.getvalue()


def test_metadata_of_another_python(saves):
    good = (Path(saves) / "step-2" / ".metadata").read_bytes()
    older = as_python_3_11_2_writes(pickle.loads(good))
    assert b"getattr" in older
    assert checkpoint_dcp.MetadataUnpickler(io.BytesIO(older)).load() == pickle.loads(good)


class Named:
    """What unpickling this looks up."""

    def __reduce__(self):
        return getattr, (dcp.Metadata, "__init__")


def test_metadata_takes_nothing_else_by_its_name():
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint contains"):
        checkpoint_dcp.MetadataUnpickler(io.BytesIO(pickle.dumps(Named()))).load()


class Hostile:
    """What unpickling this calls."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_checkpoint_runs_no_code(saves, tmp_path):
    """A .metadata that calls os.system; one whose tensor is bytes, which torch would unpickle
    without asking; and a tensor file with such a pickle in it. Sizes and crc32 all as they should
    be. torch's own reader does call: the attack is real."""
    folder, mark = tmp_path / "saves", tmp_path / "mark"
    shutil.copytree(saves, folder)
    path = folder / "step-2"

    def sign() -> None:
        about = json.loads((path / "checkpoint.json").read_text())
        del about["crc"]
        about["files"] = {name: checkpoint_dcp.size_and_crc(path / name) for name in about["files"]}
        (path / "checkpoint.json").write_text(
            json.dumps(about | {"crc": checkpoint._crc_of(about)})
        )

    good = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(AttributeError):
        dcp.FileSystemReader(path).read_metadata()
    assert mark.exists()
    mark.unlink()
    sign()
    ((step, wrong),) = launch(1, newest, str(folder))
    assert step == 1 and re.search(r"it uses \w+.system, which no checkpoint contains", wrong[0])
    assert not mark.exists()

    metadata = pickle.loads(good)
    name = "parameter/wpe.weight"
    stored = metadata.state_dict_metadata[name]
    metadata.state_dict_metadata[name] = dcp.BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign()
    ((step, wrong),) = launch(1, newest, str(folder))
    assert step == 1 and "BytesStorageMetadata, which no checkpoint contains" in wrong[0]

    metadata.state_dict_metadata[name] = stored
    index = dcp.metadata.MetadataIndex(name, (0, 0))
    where = metadata.storage_data[index]
    with open(path / where.relative_path, "ab") as file:
        where.offset = file.tell()
        torch.save(Hostile(mark), file)
        where.length = file.tell() - where.offset
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign()
    (message,) = launch(1, what_loading_says, SMALL, str(folder))
    assert "Weights only load failed" in message and not mark.exists()


def what_loading_says(case: Case, folder: str) -> str:
    case = dataclasses.replace(case, d=1)
    args = options.parser().parse_args(case.arguments())
    trainer = train_3d.Trainer(args, options.check(args, 1), None, torch.device("cpu"))
    with pytest.raises(ValueError) as error:
        load(trainer, folder)
    return str(error.value)


def fill_the_disk(case: Case, folder: str, full: int, room: int) -> list:
    """A save for which rank `full` has room for `room` bytes, and then a save with enough room."""
    args = options.parser().parse_args(case.arguments())
    trainer = train_3d.Trainer(args, options.check(args, 2), reader(case), torch.device("cpu"))
    said, limit = [save(trainer, folder, 1)], resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, size in ((2, room), (3, limit[0])):
        if dist.get_rank() == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        trainer.step(step)
        said.append(save(trainer, folder, step))
        dist.barrier()
        said.append(sorted(os.listdir(folder)))
        dist.barrier()
    return said


@pytest.mark.parametrize("full, room", [(0, 12_000), (1, 20_000)])  # RuntimeError, OSError
def test_a_full_disk_of_one_rank_leaves_what_was_there(full, room, tmp_path):
    for said in launch(2, fill_the_disk, SMALL, str(tmp_path), full, room):
        assert said[0] is None and "File too large" in said[1] and said[2] == ["step-1"]
        assert said[3] is None and said[4] == ["step-1", "step-3"]


def trained_during_a_save(case: Case, folder: str) -> bool:
    """The state is what it was at save(), though the disk is slow and two steps come meanwhile."""
    args = options.parser().parse_args(case.arguments())
    trainer = train_3d.Trainer(args, options.check(args, 2), reader(case), torch.device("cpu"))
    write, training, waited = checkpoint_dcp.Writer.write_data, threading.Event(), []

    def slow(*args):
        start = time.perf_counter()
        assert training.wait(30)
        waited.append(time.perf_counter() - start)
        return write(*args)

    checkpoint_dcp.Writer.write_data = slow
    trainer.step(0)
    mine, numbers = trainer.state_to_save()
    then = [r.tensor.clone() for r in mine]
    disk = checkpoint.Checkpoints(folder, 1, dist.new_group(backend="gloo"))
    start = time.perf_counter()
    disk.save(1, mine, {"optimizer": numbers})
    called = time.perf_counter() - start
    assert disk.completed() == [] and os.listdir(folder) != ["step-1"]
    trainer.step(1)
    trainer.step(2)
    training.set()
    disk.wait()
    dist.barrier()  # rank 0 has renamed it
    ((step, size, pause, seconds, failed),) = disk.completed()
    assert (step, failed) == (1, None) and (size > 0) == (dist.get_rank() == 0)
    assert 0 < pause <= called and seconds >= waited[0]  # training time is not part of the pause
    changed = [not torch.equal(a, r.tensor) for a, r in zip(then, mine, strict=True)]
    for r in mine:
        r.tensor.zero_()
    checkpoint.read(Path(folder, "step-1"), mine, dist.group.WORLD)
    return all(changed) and all(torch.equal(a, r.tensor) for a, r in zip(then, mine, strict=True))


@pytest.mark.parametrize("zero", [0, 3])
def test_what_is_written_is_the_state_at_the_save(zero, tmp_path):
    case = dataclasses.replace(SMALL, zero=zero)
    assert launch(2, trained_during_a_save, case, str(tmp_path)) == [True, True]


def killed_in_mid_save(case: Case, folder: str) -> None:
    args = options.parser().parse_args(case.arguments())
    trainer = train_3d.Trainer(args, options.check(args, 2), reader(case), torch.device("cpu"))
    trainer.step(0)
    assert save(trainer, folder, 1) is None
    checkpoint.Checkpoints._finish = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    save(trainer, folder, 2)


def test_a_kill_at_the_very_end_of_a_save_leaves_the_one_before(tmp_path):
    with pytest.raises(RuntimeError, match="rank 0 died with exit code -9|rank 1"):
        launch(2, killed_in_mid_save, SMALL, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["step-1", "tmp-step-2"]
    assert launch(1, newest, str(tmp_path)) == [(1, [])]
    launch(2, saves_at, SMALL, str(tmp_path), 2, [2])  # and the rest of it does not stay
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]


# --- the command ----------------------------------------------------------------------------------


def by_step(path) -> dict[int, tuple]:
    """(loss, norm) by step; that of a step which is there twice is the same."""
    rows: dict[int, tuple] = {}
    for row in read_log(path):
        if "loss" in row:
            both = row["loss"], row["grad_norm"]
            assert rows.setdefault(row["step"], both) == both
    return rows


def test_a_run_in_three_parts_and_three_layouts(text, tmp_path):  # noqa: F811
    """--stop-after, another layout, a damaged newest checkpoint, the end; what makes the run is
    not given again. Then there is nothing left to do."""
    plain, log, folder = tmp_path / "plain", tmp_path / "log", tmp_path / "saves"
    base = ["--data", text, "--steps", 6, "--eval-interval", 0, "--log-interval", 1]
    assert forked(0, train_3d.main, *TINY, *base, "--metrics", plain).returncode == 0
    keep = ["--checkpoint-dir", folder, "--save-interval", 1, "--metrics", log]
    ranks = ["--tp", 2, "--pp", 2, "--stop-after", 3]
    first = forked(4, train_3d.main, *TINY, *base, *keep, *ranks)
    assert first.returncode == 0 and sorted(os.listdir(folder)) == ["step-2", "step-3"], first
    assert len(re.findall(r"^step +\d/6  saved  .* MB in .* training paused for \d+ ms$",
                          first.stdout, re.MULTILINE)) == 3  # fmt: skip
    truncate(folder / "step-3" / "__2_0.distcp")
    here = ["--device", "cpu", "--micro-batch-size", 1, "--eval-interval", 0, "--log-interval", 1]
    keep.append("--resume")
    rest = forked(2, train_3d.main, *here, *keep, "--zero", 3, "--recompute", "full")
    assert rest.returncode == 0, rest.stderr
    said = ("--resume: skipped a damaged checkpoint: .*step-3/__2_0.distcp has .* bytes, .*\n"
            "--resume: continued from .*step-2 after step 2\n")  # fmt: skip
    assert re.search(said, rest.stdout), rest.stdout
    expected, seen = by_step(plain), {}
    for row in read_log(log):
        if "loss" in row:
            seen.setdefault(row["step"], []).append((row["loss"], row["grad_norm"]))
    assert [len(seen[step]) for step in range(1, 7)] == [1, 1, 2, 1, 1, 1]
    for step, rows in seen.items():
        for row in rows:
            assert row == pytest.approx(expected[step], rel=1e-12, abs=0)
    last = forked(0, train_3d.main, *here, *keep)
    assert last.returncode == 0
    assert "nothing to train: the run is at step 6 and ends at step 6" in last.stdout


@pytest.mark.parametrize(
    "ranks, number, to",
    [(0, signal.SIGINT, "it"), (2, signal.SIGTERM, "one rank"),
     pytest.param(2, signal.SIGTERM, "torchrun", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_signal_ends_the_run_saved(ranks, number, to, text, tmp_path):  # noqa: F811
    """torchrun passes the signal on, and returns 1 itself. One rank alone tells the others."""
    folder = tmp_path / "saves"
    flags = [*TINY, "--data", text, "--steps", 100_000, "--eval-interval", 0, "--log-interval", 1,
             "--checkpoint-dir", folder, "--save-interval", 0,
             "--trace", tmp_path / "trace"]  # fmt: skip
    if to == "torchrun":
        out, errors, code = signalled_under_torchrun(ranks, number, *flags)
    else:
        with Forked(ranks, train_3d.main, *flags) as job:
            job.until("step ")
            os.kill(job.pids[-1], number)
            code = max(job.wait())
            out, errors = job.read("out"), job.read("errors")
        assert "Traceback" not in errors
    stopped = int(re.search(r"stopped by a signal after step (\d+)", out)[1])
    assert os.listdir(folder) == [f"step-{stopped}"]
    events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
    assert max(event["args"].get("step", 0) for event in events) + 1 == stopped
    assert code == (1 if to == "torchrun" else 0), errors
    assert "FAILED" not in errors  # no rank has


def test_a_signal_during_a_save_ends_the_run_saved(text, tmp_path):  # noqa: F811
    """The first save is under way on both ranks when the signal comes, and waits for it."""
    folder = tmp_path / "saves"

    def before() -> None:
        rank = os.environ["RANK"]
        write, install, came = checkpoint_dcp.Writer.write_data, signal.signal, threading.Event()

        def write_data(*args):
            (tmp_path / f"writes-{rank}").touch()
            assert came.wait(60)
            return write(*args)

        def install_both(number, handler):
            install(number, lambda *args: (handler(*args), came.set()))

        checkpoint_dcp.Writer.write_data, signal.signal = write_data, install_both

    flags = [*TINY, "--data", text, "--steps", 100_000, "--eval-interval", 0, "--keep-latest", 9,
             "--checkpoint-dir", folder, "--save-interval", 1]  # fmt: skip
    with Forked(2, train_3d.main, *flags, before=before) as job:
        until(lambda: all((tmp_path / f"writes-{rank}").exists() for rank in range(2)))
        assert os.listdir(folder) == ["tmp-step-1"]
        for pid in job.pids:
            os.kill(pid, signal.SIGTERM)
        assert job.wait() == [0, 0], job.read("errors")
        stopped = int(re.search(r"stopped by a signal after step (\d+)", job.read("out"))[1])
    assert sorted(os.listdir(folder)) == [f"step-{step}" for step in range(1, stopped + 1)]
    assert launch(1, newest, str(folder)) == [(stopped, [])]


def signalled_under_torchrun(ranks: int, number: int, *flags) -> tuple[str, str, int]:
    job = subprocess.Popen(
        command_line(ranks, "train_3d.py", *flags), cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        next(line for line in job.stdout if line.startswith("step"))
        os.kill(job.pid, number)
        return *job.communicate(timeout=60), job.returncode
    finally:
        job.kill()


def test_a_run_with_bf16_gradients_resumes_in_float32(text, tmp_path):  # noqa: F811
    """--grad-dtype and --reduce-dtype belong to bf16 and are not taken over."""
    flags = [*TINY, "--data", text, "--eval-interval", 0, "--checkpoint-dir", tmp_path / "saves"]
    bf16 = ["--dtype", "bf16", "--grad-dtype", "bf16", "--reduce-dtype", "float32"]
    assert forked(0, train_3d.main, *flags, *bf16, "--stop-after", 2).returncode == 0
    rest = forked(0, train_3d.main, *flags, "--resume", "--dtype", "float32")
    assert rest.returncode == 0, rest.stderr
    changed = ("--dtype bf16 -> float32, --grad-dtype bf16 -> None, "
               "--reduce-dtype float32 -> None\n")  # fmt: skip
    assert f"--resume: changed options: {changed}" in rest.stdout


def test_a_hung_collective_ends_with_its_name(text):  # noqa: F811
    flags = "--steps 100000 --tp 2 --eval-interval 0 --log-interval 1 --timeout 3 --data".split()
    with Forked(2, train_3d.main, *TINY, *flags, text) as job:
        job.until("step ")
        os.kill(job.pids[1], signal.SIGSTOP)
        job.processes[0].join(60)
        errors = job.read("errors")
        assert job.processes[0].exitcode == 1
    said = (r"train_3d.py: rank 0: all_reduce over (tp \[0, 1\]|all ranks) failed because a rank "
            r"exited or did not respond: \w+.py:\d+, \w+: .*\n")  # fmt: skip
    assert re.fullmatch(said, errors), errors


# --- GPT-2 in and out -----------------------------------------------------------------------------

NOT_HERE = "transformers and safetensors are optional: pip install transformers safetensors"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def theirs(request, tmp_path):
    """(GPT2LMHeadModel with random weights, the folder it was saved to)."""
    transformers = pytest.importorskip("transformers", reason=NOT_HERE)
    pytest.importorskip("safetensors", reason=NOT_HERE)
    config = transformers.GPT2Config(
        n_layer=3, n_head=4, n_embd=24, vocab_size=256, n_positions=32, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=request.param, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():  # biases of 0 and norms of 1 would hide mistakes
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "theirs")
    return model.eval(), tmp_path / "theirs"


def first_loss(case: Case, folder: str, seq_len: int) -> float:
    flags = f"--seq-len {seq_len} --tp {case.t} --pp {case.p} --zero {case.zero} --dtype float64"
    flags += f" --global-batch-size 4 --micro-batch-size 1 --device cpu --init-from {folder}"
    flags += " --sequence-parallel" if case.sequence else ""
    args = options.parser().parse_args(flags.split())
    source = huggingface.GPT2Folder(folder)
    config = options.check(args, case.world_size, source)
    read = reader(dataclasses.replace(case, vocab_size=256, seq_len=seq_len))
    trainer = train_3d.Trainer(args, config, read, torch.device("cpu"), source.draw)
    return trainer.step(0)[0].item()


@pytest.mark.parametrize("seq_len", [32, 24])  # all of its positions, or some
def test_their_gpt2_has_the_same_loss_in_any_layout(theirs, seq_len):
    model, folder = theirs
    case = Case(vocab_size=256, seq_len=seq_len)
    x, y = reader(case)(0, range(4))
    with torch.no_grad():
        expected = gpt.cross_entropy(model.double()(x).logits, y) / (y >= 0).sum()
    for case in (Case(), Case(t=2, p=3), Case(t=4, d=2, zero=3, sequence=True)):
        for loss in launch(case.world_size, first_loss, case, str(folder), seq_len):
            assert loss == pytest.approx(expected.item(), rel=1e-12, abs=0)


def test_our_gpt2_is_theirs_again(theirs, text, tmp_path):  # noqa: F811
    """Weights are loaded, saved by 4 ranks and exported. With a learning rate of 0 they are bitwise
    unchanged; after two real steps, the exported model has the loss of gpt.py."""
    import transformers

    model, folder = theirs
    for lr in ("0", "1e-2"):
        saves, out = tmp_path / f"saves {lr}", tmp_path / f"out {lr}"
        flags = ["--data", text, "--device", "cpu", "--eval-interval", 0, "--lr", lr, "--steps", 2,
                 "--global-batch-size", 4, "--micro-batch-size", 1]  # fmt: skip
        layout = ["--tp", 2, "--pp", 2, "--schedule", "zb-h1", "--checkpoint-dir", saves]
        result = forked(4, train_3d.main, *flags, *layout, "--init-from", folder)
        assert result.returncode == 0, result.stderr
        result = forked(0, convert.main, "--checkpoint-dir", saves, "--out", out)
        assert result.returncode == 0, result.stderr
        again = transformers.GPT2LMHeadModel.from_pretrained(out).eval()
        assert again.dtype == torch.float32
        if lr == "0":
            for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
                assert torch.equal(a, b), name
        else:
            assert not torch.equal(again.lm_head.weight, model.lm_head.weight)
            assert launch(1, logits_differ_by, str(saves), again)[0] < 1e-5


@pytest.mark.parametrize("flags, message", [
    ("--checkpoint-dir /no/such --out x", "/no/such does not exist: there is no checkpoint"),
    ("--checkpoint-dir {saves} --out x", "tools.convert needs a package: pip install safetensors"),
])  # fmt: skip
def test_what_cannot_be_converted(flags, message, text, tmp_path):  # noqa: F811
    saves = tmp_path / "saves"
    run = ["--data", text, "--eval-interval", 0, "--checkpoint-dir", saves]
    assert forked(0, train_3d.main, *TINY, *run).returncode == 0

    def before() -> None:
        sys.modules["safetensors"] = None

    done = forked(0, convert.main, *flags.format(saves=saves).split(), before=before)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith(f"tools.convert: error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1


def logits_differ_by(saves: str, theirs) -> float:
    (path, about), _ = checkpoint.newest_complete(checkpoint.find(saves)[0], dist.group.WORLD)
    config = gpt.GPTConfig(**about["sizes"], tied=not about["arguments"]["untied"])
    ours = gpt.build(config)
    whole = [r for name, p in gpt.named_parameters(ours)
             for r in checkpoint.slices_of(f"parameter/{name}", p, p, 0)]  # fmt: skip
    checkpoint.read(path, whole, dist.group.WORLD)
    x = torch.arange(60).view(2, 30) * 4
    with torch.no_grad():
        return (ours(x) - theirs(x).logits).abs().max().item()


@pytest.mark.parametrize(
    "flags, damage, message",
    [
        ("", None, None),
        ("--n-layer 2", None, "--n-layer is 2, but --init-from .*theirs has 3: leave"),
        ("--seq-len 33", None, "--seq-len is 33, but --init-from .*theirs has 32"),
        ("", lambda c, t: t.pop("transformer.h.1.mlp.c_fc.bias"), "has no h.1.mlp.c_fc.bias"),
        ("", lambda c, t: t.update({"transformer.h.2.attn.c_attn.weight": torch.zeros(24, 70)}),
         r"h.2.attn.c_attn.weight is \[70, 24\]: expected \[72, 24\]"),
        ("", lambda c, t: c.update(activation_function="relu"), "activation_function relu: exp"),
        ("", lambda c, t: c.update(model_type="llama"), "config.json has model_type llama"),
        ("", lambda c, t: c.update(n_inner=50), "config.json has n_inner 50: expected 4 n_embd"),
        ("", lambda c, t: c.pop("n_head"), "config.json has no 'n_head'"),
        ("", lambda c, t: c.pop("n_embd"), "config.json has no 'n_embd'"),
        ("", truncate, "model.safetensors cannot be read"),
    ],
)  # fmt: skip
def test_a_gpt2_that_does_not_fit_is_refused(theirs, flags, damage, message, monkeypatch):
    from safetensors.torch import load_file, save_file

    folder = theirs[1]
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if damage not in (None, truncate):
        damage(config, tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    flags = f"--init-from {folder} {flags} --global-batch-size 4"
    args = options.parser().parse_args(flags.split())

    def read() -> gpt.GPTConfig:
        return options.check(args, 1, huggingface.GPT2Folder(str(folder)))

    if damage == truncate:
        truncate(folder / "model.safetensors")
    if message is None:
        assert read().n_embd == 24
        return
    with pytest.raises(ValueError, match=message) as error:
        read()
    assert "\n" not in str(error.value) and str(error.value).count("--init-from") == 1


def test_what_is_not_a_gpt2_folder_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="config.json cannot be read"):
        huggingface.GPT2Folder(str(tmp_path))
    sizes = dict(n_layer=1, n_head=1, n_embd=4, vocab_size=9, n_positions=4, model_type="gpt2")
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match="model.safetensors cannot be read: No such|pip install"):
        huggingface.GPT2Folder(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ValueError, match="--init-from needs a package: pip install safetensors"):
        huggingface.GPT2Folder(str(tmp_path))
