"""Trains with torchrun on two simulated hosts and compares the run with a single process.

    make two-hosts    python -m tools.verify.two_hosts     as root, 1 minute

The hosts are network namespaces of this machine (tools/bench/hosts.py). torchrun is started on each
of them, as on a cluster, with two ranks per host. Tensor parallelism stays inside a host; the
pipeline has one stage per host. The tool prints the losses and gradient norms of both runs in
float64, and for each host the bytes that its network interface sent and the bytes predicted by
pipeline.py.

The exit code is 1 if the results differ or an interface sent less, or much more, than predicted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import options
import pipeline
import schedules
from tools.bench import hosts

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    "--n-layer 4 --n-head 4 --n-embd 64 --seq-len 64 --global-batch-size 16 --micro-batch-size 4 "
    "--dtype float64 --optimizer sgd --lr 0.1 --grad-clip 0.5 --device cpu --data train_3d.py "
    "--eval-interval 0 --log-interval 1"
).split()
LAYOUT = "--tp 2 --pp 2 --schedule 1f1b".split()
PORT = 29500


def torchrun(net: hosts.Hosts, i: int, script: list[str]) -> list[str]:
    """The command that a user would type on host i."""
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(net.names)),
            "--node-rank", str(i), "--nproc-per-node", "2", "--master-addr",
            net.addresses[0], "--master-port", str(PORT), *script]  # fmt: skip


def across(net: hosts.Hosts, script: list[str]) -> list[int]:
    """Runs `script` with torchrun on all hosts. Returns the bytes that each host sent.

    Raises RuntimeError with the end of stderr if it fails on a host.
    """
    environment = os.environ | {"GLOO_SOCKET_IFNAME": hosts.INTERFACE, "OMP_NUM_THREADS": "1",
                                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # fmt: skip
    jobs = []
    try:
        for i in range(len(net.names)):
            line = torchrun(net, i, script)
            print(f"{net.addresses[i]}: GLOO_SOCKET_IFNAME={hosts.INTERFACE} torchrun "
                  f"{' '.join(line[3:])}", flush=True)  # fmt: skip
            jobs.append(
                net.popen(
                    i,
                    line,
                    cwd=ROOT,
                    env=environment,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        outputs = [job.communicate(timeout=300) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for i, job in enumerate(jobs):
        if job.returncode:
            raise RuntimeError(f"host {i}, exit code {job.returncode}: {outputs[i][1][-2000:]}")
    print(outputs[0][0].strip())
    return [net.sent_bytes(i) for i in range(len(net.names))]


def rows(path: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    with open(path) as file:
        found = map(json.loads, file)
        return [(row["loss"], row["grad_norm"]) for row in found if "loss" in row]


def predicted_sent_bytes(args: argparse.Namespace, steps: int) -> list[int]:
    """Bytes that each host sends in all steps.

    Its t ranks send activations or their gradients to the other stage. They also all-reduce their
    shards of the gradient of the tied embedding over the two stages; a ring of two ranks sends it
    once.
    """
    config = options.check(args, args.tp * args.pp)
    m = args.global_batch_size // args.micro_batch_size
    stages = schedules.stages_of(options.make_schedule(args, m))
    each = (pipeline.predicted_sends(stages, r, m, args.micro_batch_size, config.seq_len,
                                     config.n_embd)[1] for r in range(args.pp))  # fmt: skip
    tied = config.vocab_size // args.tp * config.n_embd
    return [steps * args.tp * 8 * (payload + tied) for payload in each]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=options.at_least(1), default=5, help="training steps")
    arguments.add_argument("--mbit", type=options.at_least(1), default=1000,
                           help="bandwidth between the hosts, Mbit/s per direction")  # fmt: skip
    steps, mbit = vars(arguments.parse_args()).values()
    if lack := hosts.missing():
        return print(f"tools.verify.two_hosts: skipped: {lack}")
    flags = [*MODEL, f"--steps={steps}"]
    with tempfile.TemporaryDirectory() as folder, hosts.Hosts(2, mbit) as net:
        log = f"{folder}/two-hosts.jsonl"
        sent = across(net, ["train_3d.py", *flags, *LAYOUT, "--metrics", log])
        alone = f"{folder}/alone.jsonl"
        subprocess.run([sys.executable, "train_3d.py", *flags, "--metrics", alone], cwd=ROOT,
                       check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        two, one = rows(log), rows(alone)
    errors = []
    for step, (found, expected) in enumerate(zip(two, one, strict=True)):
        errors += [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
        print(
            f"step {step}: loss {found[0]:.15f}, norm {found[1]:.15f} | one process "
            f"{expected[0]:.15f}, {expected[1]:.15f}"
        )
    worst = measure.largest(errors)
    same = len(two) == steps and worst <= measure.TOLERANCE
    print(f"largest relative difference {worst:.1e}: {'ok' if same else 'MISMATCH'}")
    args = options.parser().parse_args([*flags, *LAYOUT])
    for i, expected in enumerate(predicted_sent_bytes(args, steps)):
        print(f"host {i} sent {sent[i] / 1e6:.2f} MB; predicted {expected / 1e6:.2f} MB without "
              "headers, rendezvous and gradient norms")  # fmt: skip
        same &= expected < sent[i] < 1.1 * expected + 1e6
    sys.exit(not same)


if __name__ == "__main__":
    main()
