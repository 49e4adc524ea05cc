"""Modules of a Transformers model swapped for those of kernels: linear layers, gated MLPs and RMS norms.

Nothing here knows an architecture, nor whose kernels: that is the maker's. One forward over a few tokens shows which
layers are called, and which of one parent are given the very same input: those become one product. A norm or an MLP is
swapped when the maker's gives what it gives on random rows. In the end the whole model is run both ways; where the two
disagree, only the layers stay, each by itself.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import ModelFolderError
from executor.attention.protocol import LayerOptions
from executor.gpu.modules import TritonMaker
from executor.native.maker import KIND_NAMES, NativeMaker
from executor.paged_model import run
from executor.shared_product import SharedProduct

_log = logging.getLogger(__name__)

_NUM_TOKENS: Final = 4  # of a forward that looks: more than one, so that a part of a shared product is not dense
_SCALES: Final = (1e-3, 1.0, 100.0)  # of random rows: an epsilon shows in small ones, a clamp in large ones
_NORM_TOLERANCE: Final = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_MLP_TOLERANCE: Final = 2e-2  # what is between its layers is rounded once, not three times, to the weights' kind
# what roundings of a deep model add up to
_LOGITS_TOLERANCE: Final = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 0.1}
# What a forward raises when a module in it is not what it seems.
_FORWARD_ERRORS: Final = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)
_MLP_CHILDREN: Final = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}

_Places = list[tuple[nn.Module, str]]  # parents, and the child's name in each


class Maker(Protocol):
    """Who makes the modules: each has the calls, shapes and dtypes of the one that it stands for, and `in_features`."""

    settled: tuple[type[nn.Module], ...]  # modules whose matrices lie as they should
    shared: list[SharedProduct]
    left: Counter[str]  # why layers were left alone, and how many
    num_weights: int  # in layers that it made

    def why_not(self, model: PreTrainedModel, /) -> str | None:
        """Return why no module of this model can be made, or None when some may be."""
        ...

    def linears(self, layers: Sequence[nn.Module], head: nn.Module | None, /) -> dict[nn.Module, nn.Module]:
        """Return what stands for each of the layers, which have one input, but for those that it leaves alone.

        `head` is the layer that gives the logits.
        """
        ...

    def gated_mlp(
        self, gate: nn.Module | None, up: nn.Module | None, both: nn.Module | None, down: nn.Module, /
    ) -> nn.Module | None:
        """Return down(silu(gate(x)) * up(x)) of the layers that an MLP has now, or None."""
        ...

    def norm(self, weight: Tensor, offset: float, epsilon: float, /) -> nn.Module | None:
        """Return (weight + offset) * x / rms(x), `weight` (n,), or None."""
        ...

    def refusal(self) -> str | None:
        """Return why nothing that it made has the weights that were wanted, or None."""
        ...

    def summary(self) -> str:
        """Say which layers it made."""
        ...


def swap(model: PreTrainedModel, kind: int | None = None, maker: Maker | None = None) -> None:
    """Swap what can be swapped, with weights of `kind` (their own unless said), and log in one line what was.

    Without `maker` it is that of the model's device. The weights of swapped layers are let go, or shared. Raises
    ModelFolderError when `kind` is asked of a model none of whose layers can have it.
    """
    if maker is None:
        maker = NativeMaker(kind) if model.device.type == "cpu" else TritonMaker(kind)
    reason = maker.why_not(model)
    if reason is None:
        work = _Swap(model, maker)
        work.linears()
        work.mlps()
        work.norms()
        work.verify()
        _log.info("modules: %s", work.summary())
        reason = maker.refusal()
    else:
        _log.info("modules: Transformers' own (%s)", reason)
    if kind is not None and reason is not None:
        raise ModelFolderError(f"{type(model).__name__} cannot have {KIND_NAMES[kind]} weights: {reason}")


class _Swap:
    """The work on one model, in the order of its methods."""

    def __init__(self, model: PreTrainedModel, maker: Maker) -> None:
        self._model = model
        self._maker = maker
        head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head = head if isinstance(head, nn.Module) else None
        self._mlps: list[_Swapped] = []
        self._norms: list[_Swapped] = []
        self._left = maker.left

    def linears(self) -> None:
        """Swap the linear layers, those of one parent with one input together."""
        places = {old: where for old, where in _places(self._model).items() if type(old) in {nn.Linear, Conv1D}}
        for group in self._groups(places):
            news = self._maker.linears(group, self._head)
            for layer in group:
                where = places.pop(layer)
                if layer in news:
                    _put(where, news[layer])
            group.clear()  # with it go the weights, before the next ones are packed

    def mlps(self) -> None:
        """Swap the MLPs that are down(silu(gate(x)) * up(x))."""
        for old, where in _places(self._model).items():
            self._mlps += self._put_one_that_agrees(where, old, self._mlps_like(old), _MLP_TOLERANCE)

    def norms(self) -> None:
        """Swap the norms that are gain * x / rms(x), where the gain is the weight, or one more."""
        tolerance = _NORM_TOLERANCE[self._model.dtype]
        for old, where in _places(self._model).items():
            self._norms += self._put_one_that_agrees(where, old, self._norms_like(old), tolerance)

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
            self._maker.shared, self._mlps, self._norms = [], [], []
            self._left["all that is merged or fused: with it the model computes something else"] += 1

    def summary(self) -> str:
        """What was done, and what was left alone and why."""
        elsewhere: Counter[str] = Counter()
        total = self._maker.num_weights
        for module in self._model.modules():
            matrices = [each for each in module.parameters(recurse=False) if each.dim() > 1]
            if matrices and not isinstance(module, nn.Embedding):
                size = sum(each.numel() for each in matrices)
                total += size
                elsewhere[type(module).__name__] += 0 if isinstance(module, self._maker.settled) else size
        left = [f"{name} with {count / total:.1%} of the weights" for name, count in elsewhere.most_common() if count]
        left += [f"{reason} ({count} times)" if count > 1 else reason for reason, count in self._left.items()]
        return (
            f"{self._maker.summary()}, {len(self._maker.shared)} products for several of them, "
            f"{len(self._mlps)} MLPs and {len(self._norms)} norms are the kernels'; "
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

    def _mlps_like(self, old: nn.Module) -> Iterator[nn.Module]:
        """The maker's form of an MLP that looks as if it had one."""
        children = dict(old.named_children())
        activation, down = children.get("act_fn") or children.get("activation_fn"), children.get("down_proj")
        if (
            type(activation).__name__ not in {"SiLU", "SiLUActivation"}
            or down is None
            or not children.keys() <= _MLP_CHILDREN
            or not _takes_one(old)
        ):
            return
        gate, up, both = (children.get(name) for name in ("gate_proj", "up_proj", "gate_up_proj"))
        new = self._maker.gated_mlp(gate, up, both, down)
        if new is not None:
            yield new

    def _norms_like(self, old: nn.Module) -> Iterator[nn.Module]:
        """The maker's forms of a norm that is called one."""
        weight, epsilon = getattr(old, "weight", None), getattr(old, "variance_epsilon", getattr(old, "eps", None))
        if (
            not type(old).__name__.endswith("RMSNorm")
            or not isinstance(weight, nn.Parameter)
            or not isinstance(epsilon, float)
            or len(list(old.parameters())) != 1
            or weight.dim() != 1
            or not _takes_one(old)
        ):
            return
        for offset in (0.0, 1.0):
            new = self._maker.norm(weight.detach(), offset, epsilon)
            if new is not None:
                yield new

    def _put_one_that_agrees(
        self, where: _Places, old: nn.Module, news: Iterable[nn.Module], tolerance: float
    ) -> Iterator[_Swapped]:
        """Put the first of `news` that gives what `old` gives on random rows, and say so."""
        differs = False
        for new in news:
            if self._disagreement(old, new) < tolerance:
                _put(where, new)
                yield _Swapped(where, old, new)
                return
            differs = True
        if differs:
            self._left[f"{type(old).__name__} computes something else"] += 1

    def _disagreement(self, old: nn.Module, new: nn.Module) -> float:
        """How far apart two modules are on some rows; infinite when the old one cannot be called so."""
        width: object = new.in_features
        assert isinstance(width, int)
        noise = torch.randn(1, len(_SCALES), width, generator=torch.Generator().manual_seed(0))
        rows = (noise * torch.tensor(_SCALES)[:, None]).to(self._model.device, self._model.dtype)
        with torch.inference_mode():
            try:
                wanted = old(rows)
            except _FORWARD_ERRORS:
                return float("inf")
            fits = isinstance(wanted, Tensor) and wanted.dtype == rows.dtype
            return _distance(new(rows), wanted) if fits else float("inf")

    def _use(self, *, ours: bool) -> None:
        """Compute with all that was swapped, or with the layers alone."""
        for shared in self._maker.shared:
            shared.enabled = ours
        for where, old, new in self._mlps + self._norms:
            _put(where, new if ours else old)

    def _logits(self) -> Tensor | None:
        """What the model says of a few tokens, each alone in its sequence; None when it fails."""
        each = torch.arange(_NUM_TOKENS, device=self._model.device)
        try:
            return run(self._model, each + 1, torch.zeros_like(each), each, _Alone())
        except _FORWARD_ERRORS as error:
            _log.debug("a forward failed while modules were swapped", exc_info=error)
            return None


class _Swapped(NamedTuple):
    where: _Places
    old: nn.Module
    new: nn.Module


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


def _takes_one(module: nn.Module) -> bool:
    """Whether a call has one argument and no more."""
    return len(inspect.signature(module.forward).parameters) == 1


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest error of a row, relative to the row: NaN or infinite where it cannot be said."""
    if found.shape != wanted.shape:
        return float("inf")
    errors = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
    return float(errors.max())
