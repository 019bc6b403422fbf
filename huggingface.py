"""GPT-2 weights in Hugging Face's format: a folder with config.json and model.safetensors.

    source = GPT2Folder(directory)              --init-from: any GPT-2 saved by `transformers`
    gpt.init_weights(model, .., source.draw)    loads them into any layout
    export_gpt2(found, directory, group)        python -m tools.convert: the newest checkpoint

Needs the package safetensors.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import checkpoint

# Linear weights that Hugging Face stores as [in, out].
GPT2_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# Entries of config.json for which gpt.py has no option, with the values that gpt.py implements.
GPT2_FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


class GPT2Folder:
    """A folder with config.json and model.safetensors of a GPT-2, as `transformers` saves it.
    Raises ValueError if files are missing or gpt.py does not implement the model.

    sizes: arguments for gpt.GPTConfig."""

    def __init__(self, directory: str):
        self.path = Path(directory)
        try:
            config = json.loads((self.path / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise self._error(f"config.json cannot be read: {error}") from None
        for key, known in GPT2_FIXED.items():
            if (value := config.get(key, known[0])) not in known:
                raise self._error(f"config.json has {key} {value}: expected {known[0]}")
        try:
            names = ("n_layer", "n_head", "n_embd", "vocab_size")
            self.sizes = {name: config[name] for name in names}
            self.sizes["seq_len"] = config["n_positions"]
            self.sizes["tied"] = config.get("tie_word_embeddings", True)
        except KeyError as error:
            raise self._error(f"config.json has no {error}") from None
        inner, expected = config.get("n_inner"), 4 * self.sizes["n_embd"]
        if inner not in (None, expected):
            raise self._error(f"config.json has n_inner {inner}: expected 4 n_embd, {expected}")
        package = safetensors("--init-from")
        try:
            self.file = package.safe_open(self.path / "model.safetensors", framework="pt")
        except (OSError, package.SafetensorError) as error:
            raise self._error(f"model.safetensors cannot be read: {error}") from None
        self.keys = set(self.file.keys())

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"--init-from {self.path}: {problem}")

    def _key(self, name: str) -> str:
        """The name of a parameter in the file. A tied lm_head.weight is stored as wte.weight."""
        for key in (f"transformer.{name}", name):
            if key in self.keys:
                return key
        if name == "lm_head.weight":
            return self._key("wte.weight")
        raise self._error(f"model.safetensors has no {name}")

    def check(self, model: nn.Module) -> None:
        """Raises ValueError if a parameter of the full model is missing or has another shape. The
        file may have more positions (wpe.weight) than the model."""
        for name, p in model.named_parameters():
            shape, expected = list(self.file.get_slice(self._key(name)).get_shape()), list(p.shape)
            shape = shape[::-1] if name.endswith(GPT2_TRANSPOSED) else shape
            if shape != expected and not (name == "wpe.weight" and shape[0] > expected[0]):
                raise self._error(f"{name} is {shape}: expected {expected}")

    def draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The `draw` of gpt.init_weights(): reads the full tensor from the file."""
        full = self.file.get_tensor(self._key(name))
        full = full.T if name.endswith(GPT2_TRANSPOSED) else full
        return full[: shape[0]]  # wpe.weight can have more positions than the model


def export_gpt2(
    candidates: list[checkpoint.Found], directory: str, group: dist.ProcessGroup
) -> None:
    """Write the parameters of the newest undamaged checkpoint as a folder that
    `transformers.GPT2LMHeadModel.from_pretrained` can load. Any layout may have saved it.

    candidates: from checkpoint.find(). group: this process alone. Raises ValueError if all
    checkpoints are damaged, or if the folder cannot be written."""
    import checkpoint_dcp

    found, wrong = checkpoint.newest_complete(candidates, group)
    for line in wrong:
        print(f"skipped a damaged checkpoint: {line}")
    if (arch := found.about["arguments"].get("arch", "gpt")) != "gpt":
        raise ValueError(f"{found.path} is of --arch {arch}: only a GPT-2 can be converted")
    save_file = safetensors("tools.convert").torch.save_file
    sizes = found.about["sizes"]
    stored = checkpoint_dcp.Reader(found.path).read_metadata().state_dict_metadata
    slices = [
        checkpoint.TensorSlice(name, tuple(s.size), (0,) * len(s.size), torch.empty(s.size))
        for name, s in stored.items()
        if name.startswith("parameter/")
    ]
    checkpoint.read(found.path, slices, group)
    tensors = {}
    for s in slices:
        name = s.name.removeprefix("parameter/")
        tensor = s.tensor.T.contiguous() if name.endswith(GPT2_TRANSPOSED) else s.tensor
        tensors[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor
    config = {key: known[0] for key, known in GPT2_FIXED.items()} | {
        "architectures": ["GPT2LMHeadModel"], "dtype": "float32",
        "tie_word_embeddings": not found.about["arguments"]["untied"],
        "n_positions": sizes["seq_len"], "bos_token_id": None, "eos_token_id": None,
        **{key: sizes[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
    }  # fmt: skip
    try:
        os.makedirs(directory, exist_ok=True)
        save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        (Path(directory) / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"--out {directory} cannot be written: {error.strerror}") from None
    print(
        f"wrote {found.path} to {directory}. Load it with "
        "transformers.GPT2LMHeadModel.from_pretrained."
    )


def safetensors(user: str):
    """Import the optional package. Raises ValueError if it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ValueError(f"{user} needs a package: pip install safetensors") from None
    return safetensors
