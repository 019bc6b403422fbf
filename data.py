"""Text as tokens, and the batch of each training step.

Row r of a step's batch is a function of (seed, step, r), and no state is kept between steps. Any
number of processes, each reading different rows, read the same batch as one process. A run that
resumes reads the tokens that it would have read without the interruption. s is the sequence length.

    corpus:  [------------------------- train ------------------------|--- validation ---]
    row:            [x0 x1 x2 ... x(s-1)]            s + 1 tokens from a random start:
                       [y0 y1 ...     y(s-1)]        inputs x, and targets y, shifted by one

A corpus is a text file or a folder of text files, read as bytes (tokens 0..255). It can also be a
`.npy` file of token ids, or a `.bin` file of token ids in uint16. The default corpus is the source
code of Python's standard library (about 30 MB), which needs no download.

    python data.py         prints the size and the first lines of the default corpus
"""

import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VALIDATION_FRACTION = 0.02  # of the corpus, taken from its end; at most 1 M tokens


def read(path: str | None) -> np.ndarray:
    """All tokens of a corpus, 1-D; path None is the default corpus. Raises ValueError if the path
    does not exist, is an empty file, cannot be read, or is an array that is not 1-D integers."""
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if "site-packages" not in f.parts]
    elif path.endswith(".npy"):
        tokens = _open(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False))
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"--data {path} holds {tokens.dtype} of shape {tokens.shape}: "
                "give token ids, integers in one dimension"
            )
        return tokens
    elif path.endswith(".bin"):
        return _open(path, lambda: np.memmap(path, dtype=np.uint16, mode="r"))
    else:
        root = Path(path)
        files = [f for f in root.rglob("*") if f.is_file()] if root.is_dir() else [root]
    # Sorted: every process must read the files in the same order.
    text = _open(path, lambda: b"\n".join(f.read_bytes() for f in sorted(files)))
    return np.frombuffer(text, dtype=np.uint8)


def _open(path: str | None, read: Callable[[], np.ndarray | bytes]) -> np.ndarray | bytes:
    """read(), with its errors turned into a ValueError that names the path."""
    if path is not None and not os.path.exists(path):
        raise ValueError(f"--data {path} does not exist: give a file or a folder of text")
    if path is not None and os.path.isfile(path) and os.path.getsize(path) == 0:
        raise ValueError(f"--data {path} is empty (0 bytes): give a file or a folder of text")
    try:
        return read()
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {path} cannot be read: {error}") from None


def load(
    path: str | None, seq_len: int = 128, vocab_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) tokens. The validation set has at least seq_len + 1 tokens. Raises
    ValueError if the corpus is too short for one row of each, or if a token id is not in the
    vocabulary."""
    tokens = read(path)
    held_out = max(seq_len + 1, min(int(len(tokens) * VALIDATION_FRACTION), 1_000_000))
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
    """n tokens (bytes) for demos and tests: a text of 64 different words in random order. It is the
    same on every machine."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, 2 + i % 8).tolist()) + b" " for i in range(64)]
    text = b"".join(words[i] for i in rng.integers(64, size=n))
    return np.frombuffer(text[:n], dtype=np.uint8)


def fingerprint(tokens: np.ndarray) -> dict[str, int]:
    """Identifies a corpus: its length, and the crc32 of its first and last 500,000 tokens."""
    ends = tokens[:500_000].tobytes() + tokens[-500_000:].tobytes()
    return {"tokens": len(tokens), "crc32": zlib.crc32(ends)}


def batch(
    tokens: np.ndarray, step: int, rows: Iterable[int], seq_len: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of these rows of a step, both int64 [len(rows), seq_len]. `rows` are
    numbers in the global batch."""
    starts = [
        int(np.random.default_rng((seed, step, row)).integers(len(tokens) - seq_len))
        for row in rows
    ]
    return _windows(tokens, starts, seq_len)


def validation_batch(
    tokens: np.ndarray, rows: Iterable[int], seq_len: int
) -> tuple[Tensor, Tensor]:
    """Like batch(), but row r is the r-th window of seq_len tokens, without overlap. Row numbers
    wrap around at the end of the validation set."""
    count = (len(tokens) - 1) // seq_len
    return _windows(tokens, [(row % count) * seq_len for row in rows], seq_len)


def decode(tokens: list[int], path: str | None) -> str:
    """Tokens as text; ids above 255 are skipped. For a `.npy` or `.bin` corpus the tokenizer is
    unknown, so this returns the ids as decimal numbers."""
    if (path or "").endswith((".npy", ".bin")):
        return " ".join(map(str, tokens))
    return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")


def _windows(tokens: np.ndarray, starts: list[int], seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the windows that begin at `starts`."""
    rows = np.stack([tokens[i : i + seq_len + 1] for i in starts]).astype(np.int64)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """Copy t asynchronously. It is pinned first: a copy from pageable memory blocks the host."""
    if t.device.type != device.type:
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def main() -> None:
    train, validation = load(None)
    print(f"train {len(train):,} tokens, validation {len(validation):,} tokens")
    print(bytes(train[:200]).decode("utf-8", "replace"))


if __name__ == "__main__":
    main()
