"""A small head: a gated residual MLP on the exit's hidden state, then the model's own final norm and LM head.

    n = h / rms(h)
    y = gain * n + W_down (silu(W_gate m) * (W_up m)),    m = weight * n
    logits = LM head (final norm (y))

The final norm forgets the scale of its input, so the residual may carry `n` in place of `h`: the MLP then adds to a
row of known size at every exit, whatever the stream's norm is there. `W_down` starts at zero and `gain` at one, so an
untrained adapter is the bare exit (final norm + LM head), LayerSkip's draft.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import ExitHead, HeadSpec, Projection, register_head, rms_normalise


@register_head
class AdapterHead(ExitHead):
    """Options: `width`, the MLP's inner size (3 * width * D numbers an exit)."""

    kind = "adapter"
    options = {"width": 192}

    def __init__(self, spec: HeadSpec, hidden_size: int, num_outputs: int) -> None:
        super().__init__(spec, hidden_size, num_outputs)
        width = int(spec.options.get("width", self.options["width"]))
        if width < 1:
            raise ValueError(f"adapter width is {width}, expected at least 1")
        self.width = width
        self.norm = nn.Parameter(torch.ones(hidden_size))
        self.gain = nn.Parameter(torch.ones(hidden_size))
        self.up = nn.Parameter(torch.empty(2 * width, hidden_size))  # gate rows first, as the decoder stores them
        self.down = nn.Parameter(torch.zeros(hidden_size, width))
        nn.init.normal_(self.up, std=hidden_size**-0.5)
        self._up: Callable[[Tensor], Tensor] | None = None
        self._down: Callable[[Tensor], Tensor] | None = None

    def attach(self, projection: Projection) -> None:
        super().attach(projection)
        projection.prepare()
        packed = projection.linear is not None
        self._up = self.prepared(self.up) if packed else None
        self._down = self.prepared(self.down) if packed else None

    def forward(self, hidden: Tensor, state: Any = None) -> Tensor:
        projection = self.attached()
        plain = rms_normalise(hidden, None)
        normed = plain * self.norm
        if self._up is None or self._down is None:
            gate, up = F.linear(normed, self.up).chunk(2, -1)
            delta = F.linear(F.silu(gate) * up, self.down)
        else:
            gate, up = self._up(normed.to(projection.dtype)).float().chunk(2, -1)
            delta = self._down((F.silu(gate) * up).to(projection.dtype))
        return projection.logits(torch.addcmul(delta.float(), plain, self.gain))
