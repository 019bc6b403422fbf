import numpy as np
import pytest
import torch

import data

TOKENS = np.arange(1_000_000) % 251


def test_rows_do_not_depend_on_who_asks():
    whole = data.batch(TOKENS, 7, range(8), 16, seed=1)
    parts = [data.batch(TOKENS, 7, range(i, i + 2), 16, seed=1) for i in range(0, 8, 2)]
    for k in (0, 1):
        assert torch.equal(whole[k], torch.cat([part[k] for part in parts]))


def test_rows_differ_by_seed_step_and_row():
    rows = [data.batch(np.arange(10**6), s, [r], 16, seed=seed)[0].tolist()
            for seed in range(3) for s in range(3) for r in range(3)]  # fmt: skip
    assert len({str(row) for row in rows}) == 27


def test_targets_are_inputs_shifted_by_one():
    for x, y in (
        data.batch(TOKENS, 0, range(50), 16, seed=0),
        data.validation_batch(TOKENS, range(50), 16),
    ):
        assert x.dtype == torch.int64 and x.shape == y.shape == (50, 16)
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal(y[:, -1], (x[:, -1] + 1) % 251)  # the corpus counts up


def test_every_start_can_be_drawn_and_none_beyond():
    tokens = np.arange(10)
    starts = {data.batch(tokens, s, [0], 8, seed=0)[0][0, 0].item() for s in range(50)}
    assert starts == {0, 1}


def test_validation_walks_side_by_side_and_wraps():
    x, _ = data.validation_batch(np.arange(50), range(7), 8)
    assert x[:, 0].tolist() == [0, 8, 16, 24, 32, 40, 0]


def test_the_default_corpus_is_the_standard_library(tmp_path, monkeypatch):
    """Its .py files, in the order of their names, without installed packages."""
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    files = {"b.py": b"def", "a/c.py": b"import", "a/d.txt": b"text", "site-packages/e.py": b"pip"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content * 20)
    train, held_out = data.load(None, 8)
    assert bytes(np.concatenate([train, held_out])) == b"import" * 20 + b"\n" + b"def" * 20


def test_the_held_out_tail_is_2_percent_and_at_most_a_million_tokens(monkeypatch):
    for n, expected in ((10_000, 200), (60_000_000, 1_000_000)):
        monkeypatch.setattr(data, "read", lambda path, n=n: np.zeros(n, dtype=np.uint8))
        train, held_out = data.load(None, 8)
        assert (len(train), len(held_out)) == (n - expected, expected)


def test_the_example_is_a_fixed_text():
    tokens = data.example()
    assert bytes(tokens[:17]) == b"ixg siac dsz suai"
    assert data.fingerprint(tokens) == {"tokens": 20_000, "crc32": 2047501202}
    assert np.array_equal(data.example(50), tokens[:50])


def test_sources(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"world" * 40)
    (tmp_path / "a.txt").write_bytes(b"hello" * 40)
    train, held_out = data.load(str(tmp_path), 8)
    text = bytes(np.concatenate([train, held_out]))
    assert text == b"hello" * 40 + b"\n" + b"world" * 40
    ids = np.arange(300, dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    ids.tofile(tmp_path / "ids.bin")
    for name in ("ids.npy", "ids.bin"):
        parts = data.load(str(tmp_path / name), 8, 300)
        assert np.array_equal(np.concatenate(parts), ids)


def test_no_training_window_reaches_the_validation_set(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(2000))
    train, held_out = data.load(str(tmp_path / "ids.npy"), 8, 2000)
    assert train.max() < held_out.min()
    _, y = data.batch(train, 0, range(500), 8, seed=0)
    assert y.max() < held_out.min()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", r"is empty \(0 bytes\)"),
        (b"too short", "holds 9 tokens and needs 18"),
    ],
)
def test_bad_text(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(str(path), 8)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.arange(300), "token id 299, outside the vocabulary 0..255: set --vocab-size to at"),
        (np.full(300, -1), "token id -1, outside"),
        (np.zeros((20, 20), dtype=int), r"holds int64 of shape \(20, 20\)"),
        (np.zeros(300), "holds float64"),
        (np.array([{}] * 300, dtype=object), "cannot be read"),  # a pickle is never opened
    ],
)
def test_bad_token_ids(tmp_path, array, message):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "ids.npy"), 8)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds 0 tokens"):
        data.load(str(tmp_path), 8)
