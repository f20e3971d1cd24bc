"""The paper's head: a norm like the model's final one and its own vocabulary projection.

Source: DSSD, arXiv 2407.21082 v2, section 3. It holds Vd x D numbers an exit, more than an adapter by two orders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import ExitHead, HeadSpec, Projection, register_head, rms_normalise


@register_head
class LinearHead(ExitHead):
    """`logits = W norm(h)`, `W [num_outputs, D]`; starts as the model's own LM head."""

    kind = "linear"

    def __init__(self, spec: HeadSpec, hidden_size: int, num_outputs: int) -> None:
        super().__init__(spec, hidden_size, num_outputs)
        self.norm = nn.Parameter(torch.ones(hidden_size))
        self.weight = nn.Parameter(torch.zeros(num_outputs, hidden_size))
        self._project: Callable[[Tensor], Tensor] | None = None

    def initialise(self, projection: Projection, weights: Mapping[str, Tensor] | None = None) -> None:
        """Rows of the LM head. Of the final norm only a pure gain is taken (what it makes of a flat positive row)."""
        with torch.no_grad():
            flat = torch.ones(1, self.hidden_size, device=projection.head_weight.device)
            gain = projection.final_norm(flat)[0].float()
            # A LayerNorm maps a flat row to its bias: no gain to read there, ones are as good a start.
            if gain.abs().mean() > 1e-3:
                self.norm.copy_(gain)
            self.weight.copy_(projection.head_weight.float())

    def attach(self, projection: Projection) -> None:
        super().attach(projection)
        self._project = None if projection.linear is None else self.prepared(self.weight)

    def forward(self, hidden: Tensor, state: Any = None) -> Tensor:
        projection = self.attached()
        normed = rms_normalise(hidden, self.norm)
        if self._project is None:
            return projection.cap(F.linear(normed, self.weight))
        return projection.cap(self._project(normed.to(projection.dtype)).float())
