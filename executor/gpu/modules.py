"""Modules over Triton's kernels, to stand where a Transformers model has its own, and who makes them.

What torch's product does well stays torch's: a linear layer is touched only to lie beside others of the same input.
Weights stay where a model that reads them finds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from executor.gpu.triton_case import why_not as why_not_triton
from executor.shared_product import SharedProduct

_DTYPES: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})


class MergedLinear(nn.Module):
    """A linear layer whose weights lie among those of others, and whose product may have been computed with theirs."""

    def __init__(self, weight: Tensor, bias: Tensor | None, shared: SharedProduct, first: int) -> None:
        """Take outputs [first, first + outputs) of `shared`; `weight` (outputs, inputs) and `bias` are views of all."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias
        self.shared: Final = shared
        self.first: Final = first

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ w.T + bias: a view, where others need their part too."""
        mine = self.shared.part(x, self.first, self.out_features)
        return linear(x, self.weight, self.bias) if mine is None else mine


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product and what is between in one kernel."""

    def __init__(self, gate_up: Callable[[Tensor], Tensor], down: nn.Linear, in_features: int) -> None:
        """`gate_up` gives the outputs of the gate, then those of up."""
        super().__init__()
        self.in_features = in_features
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        from executor.gpu.kernels.activation import silu_mul

        wide = self.gate_up(x)
        middle = silu_mul(wide.view(-1, wide.shape[-1]))
        out: Tensor = self.down(middle.view(*x.shape[:-1], -1))
        return out


class TritonRmsNorm(nn.Module):
    """(weight + offset) * x / rms(x) over the last axis."""

    def __init__(self, weight: Tensor, offset: float, epsilon: float) -> None:
        """`weight` (n,)."""
        super().__init__()
        self.in_features = len(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._offset, self._epsilon = offset, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normed, dense."""
        from executor.gpu.kernels.norm import rms_norm

        rows = x.reshape(-1, self.in_features)
        return rms_norm(rows, self.weight, self._epsilon, offset=self._offset).view(x.shape)


class TritonMaker:
    """Merges weights, a copy of a few layers at a time."""

    settled: tuple[type[nn.Module], ...] = (nn.Embedding, nn.Linear, Conv1D)

    def __init__(self, kind: int | None = None) -> None:
        """`kind` is that of weights in 8 or 4 bits, for which there are no kernels: `why_not` says so."""
        self.shared: list[SharedProduct] = []
        self.left: Counter[str] = Counter()
        self.num_weights = 0
        self._kind = kind
        self._num_linears = 0

    def why_not(self, model: PreTrainedModel) -> str | None:
        """Return why no module of this model can be made, or None when some may be."""
        if self._kind is not None:
            return "the kernels for them are for the CPU. Type: --weights auto"
        if model.dtype not in _DTYPES:
            return str(model.dtype)
        return why_not_triton(model.device)

    def linears(self, layers: Sequence[nn.Module], _head: nn.Module | None) -> dict[nn.Module, nn.Module]:
        """Merge layers of one input."""
        plain = [layer for layer in layers if type(layer) is nn.Linear]
        if len(plain) < 2 or len({layer.weight.dtype for layer in plain}) > 1:
            return {}
        outputs = [layer.out_features for layer in plain]
        weight = _joined([layer.weight for layer in plain])
        bias = None
        if any(layer.bias is not None for layer in plain):
            zeros = [weight.new_zeros(n) for n in outputs]
            bias = _joined([z if layer.bias is None else layer.bias for layer, z in zip(plain, zeros, strict=True)])
        shared = SharedProduct(_Product(weight, bias), len(weight))
        self.shared.append(shared)
        self._num_linears += len(plain)
        self.num_weights += weight.numel()
        news: dict[nn.Module, nn.Module] = {}
        first = 0
        for layer in plain:
            part = slice(first, first + layer.out_features)
            own = None if bias is None or layer.bias is None else bias[part]
            news[layer] = MergedLinear(weight[part], own, shared, first)
            first = part.stop
        return news

    def gated_mlp(
        self, gate: nn.Module | None, up: nn.Module | None, both: nn.Module | None, down: nn.Module
    ) -> nn.Module | None:
        """An MLP whose gate and up are merged, in this order."""
        if type(down) is not nn.Linear:
            return None
        if type(both) is nn.Linear and both.out_features == 2 * down.in_features:
            return GatedMlp(both, down, both.in_features)
        if (
            isinstance(gate, MergedLinear)
            and isinstance(up, MergedLinear)
            and gate.shared is up.shared
            and (gate.first, up.first) == (0, gate.out_features)
            and gate.shared.outputs == 2 * down.in_features
        ):
            return GatedMlp(gate.shared.whole, down, gate.in_features)
        return None

    def norm(self, weight: Tensor, offset: float, epsilon: float) -> nn.Module | None:
        """A norm whose gain is `weight` (n,) and `offset`."""
        return TritonRmsNorm(weight, offset, epsilon)

    def refusal(self) -> str | None:
        """None: nothing is wanted of the weights."""
        return None

    def summary(self) -> str:
        """Which layers were merged."""
        return f"{self._num_linears} linear layers merged"


class _Product:
    """x @ weight.T + bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other, in new memory."""
    return torch.cat([part.detach() for part in parts])
