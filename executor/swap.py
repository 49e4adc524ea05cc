"""Modules of a Transformers model swapped for those of the kernels: linear layers, gated MLPs and RMS norms.

Nothing here knows an architecture. One forward over a few tokens shows which layers are called, and which of one parent
are given the very same input: those become one product. A norm or an MLP is swapped when ours gives what it gives on
random rows. In the end the whole model is run both ways; where the two disagree, only the layers stay, each by itself.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import ModelFolderError
from executor.attention.protocol import LayerOptions
from executor.native.library import INT4, INT8, KINDS, NativeMissing, native
from executor.native.modules import GatedMlp, NativeLinear, NativeRmsNorm, Product, SharedLinear, SharedProduct
from executor.native.packed import PANEL, Pages, merge, pack
from executor.native.packed import why_not as why_not_packed
from executor.paged_model import run

_log = logging.getLogger(__name__)

_NUM_TOKENS: Final = 4  # of a forward that looks: more than one, so that a part of a shared product is not dense
_SCALES: Final = (1e-3, 1.0, 100.0)  # of random rows: an epsilon shows in small ones, a clamp in large ones
_NORM_TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_MLP_TOLERANCE: Final = 2e-2  # what is between its layers is rounded once, not three times, to the weights' kind
_LOGITS_TOLERANCE: Final = {torch.float32: 1e-2, torch.bfloat16: 0.1}  # what roundings of a deep model add up to
# What a forward raises when a module in it is not what it seems.
_FORWARD_ERRORS: Final = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)
_KIND_NAMES: Final = {INT8: "int8", INT4: "int4"}
_MLP_CHILDREN: Final = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}

_Places = list[tuple[nn.Module, str]]  # parents, and the child's name in each


def swap(model: PreTrainedModel, kind: int | None = None) -> None:
    """Swap what can be swapped, with weights of `kind` (their own unless said), and log in one line what was.

    The weights of swapped layers are let go. Raises ModelFolderError when `kind` is asked of a model none of whose
    layers can have it.
    """
    reason = why_not(model)
    if reason is None:
        work = _Swap(model, kind)
        work.linears()
        work.mlps()
        work.norms()
        work.verify()
        _log.info("modules: %s", work.summary())
        reason = None if work.num_quantised else "no layer of it can have them"
    else:
        _log.info("modules: Transformers' own (%s)", reason)
    if kind is not None and reason is not None:
        raise ModelFolderError(f"{type(model).__name__} cannot have {_KIND_NAMES[kind]} weights: {reason}")


def why_not(model: PreTrainedModel) -> str | None:
    """Return why no module of this model can be swapped, or None when some may be."""
    if model.device.type != "cpu":
        return f"the kernels are for the CPU, not for {model.device.type}"
    if model.dtype not in KINDS:
        return str(model.dtype)
    try:
        native()
    except NativeMissing as missing:
        return str(missing)
    return None


class _Swap:
    """The work on one model, in the order of its methods."""

    def __init__(self, model: PreTrainedModel, kind: int | None) -> None:
        self.num_quantised = 0
        self._model = model
        self._kind = kind
        self._head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._native = native()
        self._pages = Pages()
        self._shared: list[SharedProduct] = []
        self._fused: list[tuple[_Places, nn.Module, nn.Module]] = []  # MLPs and norms: where, the old, the new
        self._num_linears = 0
        self._num_packed = 0  # weights
        self._left: Counter[str] = Counter()

    def linears(self) -> None:
        """Pack the linear layers, those of one parent with one input together."""
        places = {old: where for old, where in _places(self._model).items() if type(old) in {nn.Linear, Conv1D}}
        for group in self._groups(places):
            news = self._packed(group)
            for layer in group:
                where = places.pop(layer)
                if layer in news:
                    _put(where, news[layer])
            group.clear()  # with it go the weights, before the next ones are packed

    def mlps(self) -> None:
        """Swap the MLPs that are down(silu(gate(x)) * up(x))."""
        for old, where in _places(self._model).items():
            self._put_one_that_agrees(where, old, self._mlps_like(old), _MLP_TOLERANCE)

    def norms(self) -> None:
        """Swap the norms that are gain * x / rms(x), where the gain is the weight, or one more."""
        for old, where in _places(self._model).items():
            self._put_one_that_agrees(where, old, self._norms_like(old), _NORM_TOLERANCE[self._model.dtype])

    def verify(self) -> None:
        """Take back all but the layers one by one, if the model computes something else with it."""
        ours = self._logits()
        self._use(ours=False)
        plain = self._logits()
        if plain is None:
            raise ModelFolderError(f"{type(self._model).__name__} reads weights of layers that were packed")
        if ours is not None and _distance(ours, plain) < _LOGITS_TOLERANCE[self._model.dtype]:
            self._use(ours=True)
        else:
            self._shared, self._fused = [], []
            self._left["all that is merged or fused: with it the model computes something else"] += 1

    def summary(self) -> str:
        """What was done, and what was left alone and why."""
        swapped: Counter[str] = Counter(type(new).__name__ for _, _, new in self._fused)
        elsewhere: Counter[str] = Counter()
        for module in self._model.modules():
            matrices = [each for each in module.parameters(recurse=False) if each.dim() > 1]
            if matrices and not isinstance(module, nn.Embedding):
                elsewhere[type(module).__name__] += sum(each.numel() for each in matrices)
        total = self._num_packed + elsewhere.total()
        left = [f"{name} with {count / total:.1%} of the weights" for name, count in elsewhere.most_common()]
        left += [f"{reason} ({count} times)" if count > 1 else reason for reason, count in self._left.items()]
        kind = f", {self.num_quantised} of them {_KIND_NAMES[self._kind]}" if self._kind is not None else ""
        return (
            f"{self._num_linears} linear layers{kind}, {len(self._shared)} products for several of them, "
            f"{swapped['GatedMlp']} MLPs and {swapped['NativeRmsNorm']} norms are the kernels'; "
            f"left alone: {'; '.join(left) or 'nothing'}"
        )

    def _groups(self, places: dict[nn.Module, _Places]) -> list[list[nn.Module]]:
        """Layers to be packed: together where one parent gave them one input, in the order of its calls."""
        inputs: dict[nn.Module, Tensor] = {}  # in the order of the calls

        def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if len(args) == 1:  # as ours is called
                inputs.setdefault(layer, args[0])

        hooks = [layer.register_forward_pre_hook(note) for layer in places]
        self._logits()
        for hook in hooks:
            hook.remove()
        groups: dict[object, list[nn.Module]] = {}
        for layer, given in inputs.items():
            parent, _ = places[layer][0]
            groups.setdefault((parent, id(given)), []).append(layer)
        # An expert that no token chose is a layer as its sisters are; what none of its kind calls may be anything.
        called = {_role(place) for layer in inputs for place in places[layer]}
        for layer, where in places.items():
            if layer not in inputs and any(_role(place) in called for place in where):
                groups[layer] = [layer]
            elif layer not in inputs:
                self._left[f"{_role(where[0])} is not called"] += 1
        return list(groups.values())

    def _packed(self, group: list[nn.Module]) -> dict[nn.Module, NativeLinear]:
        """What stands for each layer that can be packed."""
        by_kind: dict[int, list[nn.Module]] = {}
        for layer in group:
            if (kind := self._kind_for(layer)) is not None:
                by_kind.setdefault(kind, []).append(layer)
        news: dict[nn.Module, NativeLinear] = {}
        for kind, layers in by_kind.items():
            whole_panels = all(_outputs(layer) % PANEL == 0 for layer in layers[:-1])
            for some in [layers] if whole_panels else [[layer] for layer in layers]:
                news.update(zip(some, self._product(some, kind), strict=True))
        return news

    def _product(self, layers: list[nn.Module], kind: int) -> list[NativeLinear]:
        """Pack layers of one input as one product."""
        weight, bias = _weights(layers[0]) if len(layers) == 1 else merge([_weights(layer) for layer in layers])
        packed = pack(self._native, self._pages, weight.contiguous(), bias, kind=kind)
        self._num_linears += len(layers)
        self._num_packed += weight.numel()
        self.num_quantised += len(layers) if kind in _KIND_NAMES else 0
        if len(layers) == 1:
            return [NativeLinear(Product(self._native, packed), weight.dtype)]
        shared = SharedProduct(Product(self._native, packed))
        self._shared.append(shared)
        first, news = 0, list[NativeLinear]()
        for layer in layers:
            part = Product(self._native, packed, first, _outputs(layer))
            news.append(SharedLinear(part, weight.dtype, shared, first))
            first += part.outputs
        return news

    def _kind_for(self, layer: nn.Module) -> int | None:
        """How the weights of a layer are to be packed; None leaves it alone."""
        weight, _ = _weights(layer)
        if weight.dtype not in KINDS:
            self._left[f"a linear layer in {weight.dtype}"] += 1
            return None
        own = KINDS[weight.dtype]
        # the answer hangs on the last layer most, and whole branches hang on gates, which have few outputs
        wanted = INT8 if layer is self._head and self._kind == INT4 else self._kind
        if wanted is not None and len(weight) >= PANEL:
            reason = why_not_packed(weight.shape[1], wanted)
            if reason is None:
                return wanted
            self._left[f"not {_KIND_NAMES[wanted]}: {reason}"] += 1
        if (reason := why_not_packed(weight.shape[1], own)) is not None:
            self._left[f"a linear layer: {reason}"] += 1
            return None
        return own

    def _mlps_like(self, old: nn.Module) -> Iterator[GatedMlp]:
        """Our form of an MLP that looks as if it had one."""
        children = dict(old.named_children())
        activation, down = children.get("act_fn") or children.get("activation_fn"), children.get("down_proj")
        if (
            type(activation).__name__ not in {"SiLU", "SiLUActivation"}
            or not isinstance(down, NativeLinear)
            or not children.keys() <= _MLP_CHILDREN
            or not _takes_one(old)
        ):
            return
        gate, up, both = (children.get(name) for name in ("gate_proj", "up_proj", "gate_up_proj"))
        if isinstance(both, NativeLinear) and both.out_features == 2 * down.in_features:
            yield GatedMlp(self._native, both.product, down.product, gate=0, up=down.in_features)
        if isinstance(gate, SharedLinear) and isinstance(up, SharedLinear) and gate.shared is up.shared:
            yield GatedMlp(self._native, gate.shared.whole, down.product, gate=gate.first, up=up.first)

    def _norms_like(self, old: nn.Module) -> Iterator[NativeRmsNorm]:
        """Our forms of a norm that is called one."""
        weight, epsilon = getattr(old, "weight", None), getattr(old, "variance_epsilon", getattr(old, "eps", None))
        if (
            not type(old).__name__.endswith("RMSNorm")
            or not isinstance(weight, nn.Parameter)
            or not isinstance(epsilon, float)
            or len(list(old.parameters())) != 1
            or weight.dim() != 1
            or len(weight) % 16
            or not _takes_one(old)
        ):
            return
        for gain in (weight.float(), weight.float() + 1):
            yield NativeRmsNorm(self._native, gain, epsilon, weight.dtype)

    def _put_one_that_agrees(
        self,
        where: _Places,
        old: nn.Module,
        news: Iterable[GatedMlp] | Iterable[NativeRmsNorm],
        tolerance: float,
    ) -> None:
        """Put the first of `news` that gives what `old` gives on random rows."""
        dtype, differs = self._model.dtype, False
        for new in news:
            noise = torch.randn(1, len(_SCALES), new.in_features, generator=torch.Generator().manual_seed(0))
            rows = (noise * torch.tensor(_SCALES)[:, None]).to(dtype)
            if _disagreement(old, new, rows) < tolerance:
                _put(where, new)
                self._fused.append((where, old, new))
                return
            differs = True
        if differs:
            self._left[f"{type(old).__name__} computes something else"] += 1

    def _use(self, *, ours: bool) -> None:
        """Compute with all that was swapped, or with the layers alone."""
        for shared in self._shared:
            shared.enabled = ours
        for where, old, new in self._fused:
            _put(where, new if ours else old)

    def _logits(self) -> Tensor | None:
        """What the model says of a few tokens, each alone in its sequence; None when it fails."""
        tokens = torch.arange(_NUM_TOKENS) + 1
        try:
            return run(self._model, tokens, torch.zeros_like(tokens), torch.arange(_NUM_TOKENS), _Alone())
        except _FORWARD_ERRORS as error:
            _log.debug("a forward failed while modules were swapped", exc_info=error)
            return None


class _Alone:
    """Attention of tokens that are each the first of a sequence."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions) -> Tensor:
        return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def _places(model: nn.Module) -> dict[nn.Module, _Places]:
    """Every module below the model, and all the places where it hangs."""
    found: dict[nn.Module, _Places] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            found.setdefault(child, []).append((parent, name))
    return found


def _put(where: _Places, module: nn.Module) -> None:
    for parent, name in where:
        setattr(parent, name, module)


def _role(place: tuple[nn.Module, str]) -> str:
    """What a layer is to its parent, whichever of its kind that is."""
    parent, name = place
    return f"{type(parent).__name__}.{name}"


def _outputs(layer: nn.Module) -> int:
    return len(_weights(layer)[0])


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weights (outputs, inputs) and bias of a linear layer."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return weight.detach().t() if isinstance(layer, Conv1D) else weight.detach(), bias


def _takes_one(module: nn.Module) -> bool:
    """Whether a call has one argument and no more."""
    return len(inspect.signature(module.forward).parameters) == 1


def _disagreement(old: nn.Module, new: nn.Module, rows: Tensor) -> float:
    """How far apart two modules are on some rows; infinite when the old one cannot be called so."""
    with torch.inference_mode():
        try:
            wanted = old(rows)
        except _FORWARD_ERRORS:
            return float("inf")
        return (
            _distance(new(rows), wanted) if isinstance(wanted, Tensor) and wanted.dtype == rows.dtype else float("inf")
        )


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest error of a row, relative to the row: NaN or infinite where it cannot be said."""
    if found.shape != wanted.shape:
        return float("inf")
    errors = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
    return float(errors.max())
