"""Further counts for tests and tools: hidden collectives, and the bytes that a rank stores.

    with Collectives({"dp": group}) as seen:            measure.Collectives, with hidden calls
        step()
    seen.total("dp", "all_reduce", hidden=True)         Total(calls, payload in elements)

    bytes_held(model.parameters())                      bytes of the distinct storages
    bytes_by_kind(sync.held(), optimizer)               the same, by kind

A call is hidden if it is asynchronous and a matmul started before its result was used. A send has
no result.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

import measure
from measure import storage_id

MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


class Collectives(measure.Collectives):
    """Also sets Call.hidden."""

    def __init__(self, groups: dict[str, dist.ProcessGroup] | None = None):
        super().__init__(groups)
        self._matmuls = 0  # so far
        # Asynchronous calls with unused results: storage -> (index of the call, matmuls before it)
        self._unused: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        i = len(self.calls)
        self._find_uses(args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._matmuls += func._schema.name in MATMULS
        is_collective = len(self.calls) > i and self.calls[i].operation != "send"  # has a result
        if is_collective and is_async(func, args):
            output = args[0][0] if isinstance(args[0], list) else args[0]
            self._unused[storage_id(output)] = (i, self._matmuls)
        return result

    def _find_uses(self, args) -> None:
        """Mark a call as hidden if its result is among args and a matmul ran in between."""
        for arg in args if self._unused else ():
            for t in arg if isinstance(arg, (list, tuple)) else [arg]:
                if isinstance(t, Tensor) and storage_id(t) in self._unused:
                    i, before = self._unused.pop(storage_id(t))
                    self.calls[i] = self.calls[i]._replace(hidden=self._matmuls > before)


def is_async(func, args) -> bool:
    """torch 2.11 has no async_op argument, so every call counts as asynchronous there. A
    synchronous call is still not hidden if its result is used before the next matmul. args omits
    arguments that have their default value."""
    names = [argument.name for argument in func._schema.arguments]
    position = names.index("async_op") if "async_op" in names else len(args)
    return args[position] if position < len(args) else True


def bytes_held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of these tensors. Two views of one buffer count once, and a
    view counts its full buffer."""
    storages = {storage_id(t): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def bytes_by_kind(
    held: dict[str, list[Tensor]], optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """bytes_held() of each kind of `held`. The optimizer's moments are added to "optimizer"."""
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    more = {"optimizer": moments}
    return {kind: bytes_held([*tensors, *more.get(kind, [])]) for kind, tensors in held.items()}
