"""Who makes the C++ kernels' modules where a model has its own, for executor/swap.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from executor.native.library import INT4, INT8, KINDS, NativeMissing, native
from executor.native.modules import GatedMlp, NativeLinear, NativeRmsNorm, Product, SharedLinear
from executor.native.packed import PANEL, Pages, merge, pack
from executor.native.packed import why_not as why_not_packed
from executor.shared_product import SharedProduct

KIND_NAMES: Final = {INT8: "int8", INT4: "int4"}


class NativeMaker:
    """Packs weights, of `kind` where they can be, and lets go of what is packed."""

    settled: tuple[type[nn.Module], ...] = ()

    def __init__(self, kind: int | None = None) -> None:
        self.shared: list[SharedProduct] = []
        self.left: Counter[str] = Counter()
        self.num_weights = 0
        self._kind = kind
        self._pages = Pages()
        self._num_linears = self._num_quantised = 0

    def why_not(self, model: PreTrainedModel) -> str | None:
        """Return why no module of this model can be made, or None when some may be."""
        if model.device.type != "cpu":
            return f"the kernels are for the CPU, not for {model.device.type}"
        if model.dtype not in KINDS:
            return str(model.dtype)
        try:
            native()
        except NativeMissing as missing:
            return str(missing)
        return None

    def linears(self, layers: Sequence[nn.Module], head: nn.Module | None) -> dict[nn.Module, nn.Module]:
        """Pack layers of one input, together where that can be."""
        by_kind: dict[int, list[nn.Module]] = {}
        for layer in layers:
            if (kind := self._kind_for(layer, is_head=layer is head)) is not None:
                by_kind.setdefault(kind, []).append(layer)
        news: dict[nn.Module, nn.Module] = {}
        for kind, alike in by_kind.items():
            whole_panels = all(_outputs(layer) % PANEL == 0 for layer in alike[:-1])
            for some in [alike] if whole_panels else [[layer] for layer in alike]:
                news.update(zip(some, self._product(some, kind), strict=True))
        return news

    def gated_mlp(
        self, gate: nn.Module | None, up: nn.Module | None, both: nn.Module | None, down: nn.Module
    ) -> nn.Module | None:
        """An MLP of layers that are packed, gate and up in one product."""
        if not isinstance(down, NativeLinear):
            return None
        if isinstance(both, NativeLinear) and both.out_features == 2 * down.in_features:
            return GatedMlp(native(), both.product, down.product, gate=0, up=down.in_features)
        if isinstance(gate, SharedLinear) and isinstance(up, SharedLinear) and gate.shared is up.shared:
            return GatedMlp(native(), gate.whole, down.product, gate=gate.first, up=up.first)
        return None

    def norm(self, weight: Tensor, offset: float, epsilon: float) -> nn.Module | None:
        """A norm whose gain is `weight` (n,) and `offset`."""
        if len(weight) % 16:
            return None
        return NativeRmsNorm(native(), weight.float() + offset, epsilon, weight.dtype)

    def refusal(self) -> str | None:
        """Return why no layer has weights of `kind`, if that was wanted of some."""
        return None if self._kind is None or self._num_quantised else "no layer of it can have them"

    def summary(self) -> str:
        """Which layers were packed."""
        kind = "" if self._kind is None else f", {self._num_quantised} of them {KIND_NAMES[self._kind]}"
        return f"{self._num_linears} linear layers{kind}"

    def _product(self, layers: list[nn.Module], kind: int) -> list[NativeLinear]:
        """Pack layers of one input as one product."""
        weight, bias = _weights(layers[0]) if len(layers) == 1 else merge([_weights(layer) for layer in layers])
        packed = pack(native(), self._pages, weight.contiguous(), bias, kind=kind)
        self.num_weights += weight.numel()
        self._num_linears += len(layers)
        self._num_quantised += len(layers) if kind in KIND_NAMES else 0
        whole = Product(native(), packed)
        if len(layers) == 1:
            return [NativeLinear(whole, weight.dtype)]
        shared = SharedProduct(whole, whole.outputs)
        self.shared.append(shared)
        first, news = 0, list[NativeLinear]()
        for layer in layers:
            part = Product(native(), packed, first, _outputs(layer))
            news.append(SharedLinear(part, weight.dtype, shared, whole, first))
            first += part.outputs
        return news

    def _kind_for(self, layer: nn.Module, *, is_head: bool) -> int | None:
        """How the weights of a layer are to be packed; None leaves it alone."""
        weight, _ = _weights(layer)
        if weight.dtype not in KINDS:
            self.left[f"a linear layer in {weight.dtype}"] += 1
            return None
        own = KINDS[weight.dtype]
        # the answer hangs on the last layer most, and whole branches hang on gates, which have few outputs
        wanted = INT8 if is_head and self._kind == INT4 else self._kind
        if wanted is not None and len(weight) >= PANEL:
            reason = why_not_packed(weight.shape[1], wanted)
            if reason is None:
                return wanted
            self.left[f"not {KIND_NAMES[wanted]}: {reason}"] += 1
        if (reason := why_not_packed(weight.shape[1], own)) is not None:
            self.left[f"a linear layer: {reason}"] += 1
            return None
        return own


def _outputs(layer: nn.Module) -> int:
    return len(_weights(layer)[0])


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weights (outputs, inputs) and bias of a linear layer."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return weight.detach().t() if isinstance(layer, Conv1D) else weight.detach(), bias
