"""What crosses between hosts, on network namespaces of this machine, or skipped."""

import io

import pytest

import gpt
from tests.test_hosts import namespaces  # noqa: F401
from tools.bench import hierarchy, hosts
from tools.plan import cost
from tools.verify import two_hosts

SMALL = gpt.GPTConfig(2, 4, 64, 64, 64)


@pytest.mark.usefixtures("namespaces")
@pytest.mark.slow
def test_every_byte_that_crosses_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(hierarchy, "CONFIG", SMALL)
    monkeypatch.setattr(hierarchy, "BUCKET", 1 << 16)
    fast = cost.Hardware("", 0.1, 10, 10, 1, 0.1)
    with hosts.Hosts(2, mbit=1000) as net:
        calls = hierarchy.compare_all_reduces(net, 1000, 2)
        rows = {row["what"]: row["bytes"]
                for row in hierarchy.compare_places(net, fast, 1000, 100, 2, 1)}  # fmt: skip
    assert "differs" not in capsys.readouterr().out
    for row in calls:
        for kind in ("flat_bytes", "by_host_bytes"):
            formula, sent = row[kind]
            assert formula < sent < 1.2 * formula + 20_000
        assert row["by_host_bytes"][1] < 0.8 * row["flat_bytes"][1]
    (counted, formula, _) = rows.pop("tp 2 on one host")
    assert counted == formula == 0
    for what, (counted, formula, sent) in rows.items():
        assert counted == formula < sent, what
        # gloo's reduce-scatter over all takes as many bytes as an all-reduce
        assert sent < (1.5 if what == "ZeRO-3 over all" else 1.2) * formula + 20_000, what
    assert rows["tp inside, pp across"][2] < 0.3 * rows["tp across, pp inside"][2]
    assert rows["DDP, by host"][2] < 0.8 * rows["DDP, flat"][2]
    assert rows["ZeRO-3 inside"][2] < 0.4 * rows["ZeRO-3 over all"][2]


@pytest.mark.usefixtures("namespaces")
def test_no_host_stays_behind():
    with pytest.raises(ZeroDivisionError), hosts.Hosts(2) as net:
        assert set(net.names) <= set(hosts.run("ip netns list").split())
        raise ZeroDivisionError
    assert not set(net.names) & set(hosts.run("ip netns list").split())


def test_the_model_knows_which_link_is_slow():
    fast = cost.Hardware("", 0.1, 10, 10, 1, 0.1, 1, 0, 1, 1, 1, 1, 50, 50)
    times = {p.what: hierarchy.predicted(p, fast, 100, 500) for p in hierarchy.places(2)}
    assert times["tp inside, pp across"] < 0.7 * times["tp across, pp inside"]
    assert times["tp inside, dp across"] < 0.7 * times["tp across, dp inside"]
    assert times["tp over all"] > times["tp inside, pp across"]
    assert times["tp 2 across"] > 2 * times["tp 2 on one host"]
    assert times["DDP, flat"] < times["ZeRO-3 over all"]
    assert times["ZeRO-3 inside"] is None


BOTH, NET, SYS = 0x201000, 0x1000, 0x200000  # CAP_NET_ADMIN, CAP_SYS_ADMIN


def have_capabilities(monkeypatch, effective: int) -> None:
    status = f"Name:\tpython\nCapPrm:\t{'f' * 16}\nCapEff:\t{effective:016x}\n"
    monkeypatch.setattr(hosts, "open", lambda path: io.StringIO(status), raising=False)


@pytest.mark.parametrize("tool", [hierarchy, two_hosts])
def test_skipped_where_there_can_be_no_hosts(tool, monkeypatch, capsys):
    have_capabilities(monkeypatch, 0)
    monkeypatch.setattr("sys.argv", [tool.__name__])
    assert tool.main() is None
    said = capsys.readouterr().out
    assert said.startswith(f"{tool.__name__}: skipped: network namespaces need CAP_NET_ADMIN")
    assert said.count("\n") == 1


@pytest.mark.parametrize("n", [2, 4])
def test_every_place_is_one_that_the_trainer_takes(n):
    for place in hierarchy.places(n):
        assert len(place.hosts) == place.layout.gpus
        assert hierarchy.CONFIG.n_head % place.layout.tp == 0
        rows = place.layout.dp * place.layout.microbatches * place.layout.micro_batch_size
        assert rows == hierarchy.ROWS, place


@pytest.mark.parametrize(
    "effective, lack, message",
    [(NET, None, "need CAP_SYS_ADMIN: use sudo"),
     (SYS, None, "need CAP_NET_ADMIN: use sudo"),
     (BOTH, "ip", "no ip: install iproute2"), (BOTH, "tc", "no tc: install iproute2"),
     (BOTH, "kernel", "does not allow it: ip netns add")],
)  # fmt: skip
def test_what_is_missing_is_said_in_one_line(effective, lack, message, monkeypatch):
    have_capabilities(monkeypatch, effective)
    which = {"ip": "/bin/false", "tc": "/bin/false"} | {lack: None}
    monkeypatch.setattr(hosts.shutil, "which", lambda name, path: which[name])
    said = hosts.missing()
    assert message in said and "\n" not in said
