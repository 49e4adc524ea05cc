"""One product for several linear layers that are given the same input, though each is called by itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class SharedProduct:
    """The first layer that is called computes it, the others take their part. Right in any order of calls."""

    def __init__(self, whole: Callable[[Tensor], Tensor], outputs: int) -> None:
        """`whole` computes all `outputs` of them."""
        self.whole = whole
        self.outputs = outputs
        self.enabled = True
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    def part(self, x: Tensor, first: int, outputs: int) -> Tensor | None:
        """Outputs [first, first + outputs) for `x`, a view; None where the layer has to compute them itself."""
        if not self.enabled:
            return None
        if first == 0:
            self.x, self.y = x, self.whole(x)
        elif self.x is not x:
            return None
        assert self.y is not None
        mine = self.y.narrow(-1, first, outputs)
        if first + outputs == self.outputs:  # the last: nothing is kept between steps
            self.x = self.y = None
        return mine
