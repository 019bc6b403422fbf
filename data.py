"""Text as tokens, and which tokens row r of step s is.

Row r of step s is a function of (seed, s, r): there is no sampler with a state. So any number of
readers, each asking for rows of its own, reads the batch that one reader would; and a run that
resumes at step s goes on with exactly the tokens it would have seen.

    corpus:  [------------------------- train ------------------------|--- validation ---]
    row:            [x0 x1 x2 ... x(s-1)]            seq_len + 1 tokens from a random start:
                       [y0 y1 ...     y(s-1)]        inputs, and the same shifted by one

Sources: any text file or folder of text files (tokens are bytes, 0..255), `.npy` or `.bin` (uint16)
token ids, or by default the source code of Python's own standard library (about 30 MB that every
machine has).

    python data.py         prints what the default corpus holds
"""

import os
import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VALIDATION_SHARE = 0.02  # the held-out tail of the corpus, at most 1 M tokens


def read(path: str | None) -> np.ndarray:
    """All tokens of a corpus, 1-D. Raises ValueError where there is nothing to read."""
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if "site-packages" not in f.parts]
    elif path.endswith(".npy"):
        tokens = _open(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False))
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"--data {path} holds {tokens.dtype} of shape {tokens.shape}: "
                "token ids are integers in one dimension"
            )
        return tokens
    elif path.endswith(".bin"):
        return _open(path, lambda: np.memmap(path, dtype=np.uint16, mode="r"))
    else:
        root = Path(path)
        files = [f for f in root.rglob("*") if f.is_file()] if root.is_dir() else [root]
    # Sorted by name: every process reads the same corpus in the same order.
    text = _open(path, lambda: b"\n".join(f.read_bytes() for f in sorted(files)))
    return np.frombuffer(text, dtype=np.uint8)


def _open(path: str | None, how):
    if path is not None and not os.path.exists(path):
        raise ValueError(f"--data {path} does not exist: give a file or a folder of text")
    if path is not None and os.path.isfile(path) and os.path.getsize(path) == 0:
        raise ValueError(f"--data {path} is empty (0 bytes): give a file or a folder of text")
    try:
        return how()
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {path} cannot be read: {error}") from None


def load(
    path: str | None, seq_len: int = 128, vocab_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) tokens. Raises ValueError, with both numbers, for a corpus that is too
    short for one row each, or that holds a token id outside the vocabulary."""
    tokens = read(path)
    # The held-out tail is a whole row at least, however short the corpus.
    held_out = max(seq_len + 1, min(int(len(tokens) * VALIDATION_SHARE), 1_000_000))
    if len(tokens) < held_out + seq_len + 1:
        raise ValueError(
            f"--data holds {len(tokens)} tokens and needs {2 * (seq_len + 1)} (a row of "
            f"--seq-len {seq_len} + 1 to train on and one to validate): "
            "lower --seq-len or give more text"
        )
    largest, smallest = int(tokens.max()), int(tokens.min())
    if largest >= vocab_size or smallest < 0:
        raise ValueError(
            f"--data holds token id {smallest if smallest < 0 else largest}, outside the "
            f"vocabulary 0..{vocab_size - 1}: set --vocab-size to at least {largest + 1}"
        )
    return tokens[:-held_out], tokens[-held_out:]


def example(n: int = 20_000) -> np.ndarray:
    """n tokens for demos and tests, the same on every machine: a text of 64 words in random order,
    as bytes."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, 2 + i % 8).tolist()) + b" " for i in range(64)]
    text = b"".join(words[i] for i in rng.integers(64, size=n))
    return np.frombuffer(text[:n], dtype=np.uint8)


def fingerprint(tokens: np.ndarray) -> dict[str, int]:
    """To tell a corpus from another: its length, and the crc32 of half a million tokens at either
    end."""
    ends = tokens[:500_000].tobytes() + tokens[-500_000:].tobytes()
    return {"tokens": len(tokens), "crc32": zlib.crc32(ends)}


def batch(
    tokens: np.ndarray, step: int, rows: Iterable[int], seq_len: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows `rows` of step `step`: inputs and targets, int64, each [len(rows), seq_len]."""
    starts = [
        int(np.random.default_rng((seed, step, row)).integers(len(tokens) - seq_len))
        for row in rows
    ]
    return _windows(tokens, starts, seq_len)


def validation_batch(
    tokens: np.ndarray, rows: Iterable[int], seq_len: int
) -> tuple[Tensor, Tensor]:
    """Row r of the validation set: windows side by side from its beginning, wrapped at its end."""
    count = (len(tokens) - 1) // seq_len
    return _windows(tokens, [(row % count) * seq_len for row in rows], seq_len)


def decode(tokens: list[int], path: str | None) -> str:
    """Bytes as text; ids of a `.npy` or `.bin` corpus, whose tokenizer is not here, as ids."""
    if (path or "").endswith((".npy", ".bin")):
        return " ".join(map(str, tokens))
    return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")


def _windows(tokens: np.ndarray, starts: list[int], seq_len: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([tokens[i : i + seq_len + 1] for i in starts]).astype(np.int64)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def main() -> None:
    train, validation = load(None)
    print(f"train {len(train):,} tokens, validation {len(validation):,} tokens")
    print(bytes(train[:200]).decode("utf-8", "replace"))


if __name__ == "__main__":
    main()
