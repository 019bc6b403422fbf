"""Several hosts: launched by torchrun across namespaces (or skipped), and by Slurm."""

import json
import os
import subprocess
import sys

import pytest
import torch.distributed.run

import train_3d
from tests.commands import ROOT, TINY, forked
from tools.bench import hosts
from tools.verify import two_hosts


@pytest.fixture(scope="session")
def namespaces():
    """Skips the test, with the reason, where this machine has no network namespaces."""
    if lack := hosts.missing():
        pytest.skip(lack)


@pytest.mark.usefixtures("namespaces")
@pytest.mark.slow
def test_a_pipeline_across_the_link(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["two_hosts", "--steps", "3"])
    with pytest.raises(SystemExit) as end:
        two_hosts.main()
    said = capsys.readouterr().out
    assert not end.value.code and "largest relative difference" in said, said
    assert said.count("host ") == 2 and "2 local ranks" in said


@pytest.mark.parametrize("name", ["eth7", "lo,eth7"])
def test_an_interface_that_is_not_there(name, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    done = forked(1, train_3d.main, *TINY)
    assert done.returncode == 2
    assert "train_3d.py: error: GLOO_SOCKET_IFNAME is eth7, but this host has lo" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NNODES; i++)); do
  SLURM_NODEID=$i SLURM_PROCID=$i SLURM_LOCALID=0 "$@" &
done
wait -n && wait -n
"""
TASK = """import json, os, sys
names = "RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
names += ["SLURM_NODEID", "TORCHELASTIC_MAX_RESTARTS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]
about = {name: os.environ.get(name) for name in names} | {"argv": sys.argv[1:]}
with open(f"{os.path.dirname(__file__)}/rank-{os.environ['RANK']}", "w") as file:
    json.dump(about, file)
"""


# The long options of torchrun in torch 2.11.0: get_args_parser() in torch/distributed/run.py.
TORCHRUN_2_11 = """
--nnodes --nproc-per-node --rdzv-backend --rdzv-endpoint --rdzv-id --rdzv-conf --standalone
--max-restarts --monitor-interval --start-method --event-log-handler --role --module --no-python
--run-path --log-dir --redirects --tee --local-ranks-filter --duplicate-stdout-filters
--duplicate-stderr-filters --node-rank --master-addr --master-port --local-addr --logs-specs
--numa-binding --signals-to-handle --virtual-local-rank
""".split()


def test_slurm_passes_only_flags_that_torchrun_of_torch_2_11_has(tmp_path):
    """--shutdown-timeout is newer; its environment variable has no effect before."""
    stub = '#!/bin/sh\necho "timeout $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"\nprintf "%s\\n" "$@"\n'
    for name, text in (("srun", stub), ("scontrol", "#!/bin/sh\necho localhost\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_NNODES": "2",
           "SLURM_JOB_NODELIST": "localhost"}  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    line = [str(ROOT / "tools/slurm.sh"), "--tp", "2"]
    done = subprocess.run(line, env=environment | own, capture_output=True, text=True)
    first, *words = done.stdout.splitlines()
    flags = words[words.index("torch.distributed.run") + 1 : words.index("train_3d.py")]
    names = {word for word in flags if word.startswith("--")}
    assert first == "timeout 240" and "--max-restarts" in names, done
    assert names <= set(TORCHRUN_2_11), names - set(TORCHRUN_2_11)
    args = torch.distributed.run.parse_args([*flags, "train_3d.py", "--tp", "2"])
    assert args.training_script == "train_3d.py" and args.nnodes == "2"


@pytest.mark.slow
def test_what_slurm_gives_each_task(tmp_path):
    """A stub of srun starts a torchrun a node, both on this host."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\nprintf 'localhost\\nother\\n'\n"),
                       ("task.py", TASK)):  # fmt: skip
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()),
           "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost,other", "NPROC": "2",
           "PYTHON": sys.executable, "SCRIPT": str(tmp_path / "task.py")}  # fmt: skip
    line = [str(ROOT / "tools/slurm.sh"), "--tp", "2", "--metrics", "run.jsonl"]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | own, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    tasks = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(4)]
    assert [task["RANK"] for task in tasks] == ["0", "1", "2", "3"]
    assert [task["LOCAL_RANK"] for task in tasks] == ["0", "1"] * 2
    assert [task["GROUP_RANK"] for task in tasks] == ["0", "0", "1", "1"]
    assert tasks[0]["SLURM_NODEID"] != tasks[2]["SLURM_NODEID"]  # ranks of a node are neighbours
    assert tasks[0]["SLURM_NODEID"] == tasks[1]["SLURM_NODEID"]
    for task in tasks:
        assert (task["WORLD_SIZE"], task["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert task["MASTER_ADDR"] == tasks[0]["MASTER_ADDR"] != ""
        assert task["MASTER_PORT"] == tasks[0]["MASTER_PORT"]
        assert task["TORCHELASTIC_MAX_RESTARTS"] == "3"
        assert task["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert task["argv"] == ["--tp", "2", "--metrics", "run.jsonl"]
