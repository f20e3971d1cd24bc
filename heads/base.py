"""What an exit head is: a module that turns the hidden state at an exit layer into draft logits.

Heads know nothing of decoders. The base model reaches them as a `Projection` (its final norm and LM head), attached
once. A head may change how much is accepted, never what is written (design rule 10).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LinearFactory = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class HeadSpec:
    """One head of a set.

    Args:
        kind: a registered kind, see `head_kinds()`.
        exit_layer: number of layers executed before the head reads a token's residual stream; 0 (the embedding) only
            where the kind allows it.
        options: the kind's own settings; unknown ones are refused by the kind.
    """

    kind: str
    exit_layer: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.exit_layer < 0:
            raise ValueError(f"exit_layer is {self.exit_layer}, expected at least 0 (layers executed before the head)")


class Projection:
    """The base model's own way from hidden states to logits, frozen: final norm, LM head rows, soft-cap.

    Args:
        final_norm: `[N, D]` fp32 -> `[N, D]`; differentiable where heads are trained.
        head_weight: LM head `[V, D]`, or its rows for a draft vocabulary `[Vd, D]`.
        logit_softcap: cap on logits (Gemma 2), None where the family has none.
        linear: `(weight, bias) -> callable` that makes the projections used for inference, for example one that
            prepacks weights for the device. None keeps plain differentiable matmuls, for training.
    """

    def __init__(
        self,
        final_norm: Callable[[Tensor], Tensor],
        head_weight: Tensor,
        logit_softcap: float | None = None,
        linear: LinearFactory | None = None,
    ) -> None:
        self.final_norm = final_norm
        self.head_weight = head_weight
        self.logit_softcap = logit_softcap
        self.linear = linear
        self._apply: Callable[[Tensor], Tensor] | None = None

    def prepare(self) -> None:
        """Make the inference projection, once; the rows are packed here and not before `restrict`."""
        if self.linear is not None and self._apply is None:
            self._apply = self.linear(self.head_weight, None)

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    def restrict(self, draft_ids: Tensor | None) -> Projection:
        """The same projection onto a draft vocabulary: rows `draft_ids` long `[Vd]`, gathered once."""
        if draft_ids is None:
            return self
        rows = self.head_weight[draft_ids.to(self.head_weight.device)].contiguous()
        return Projection(self.final_norm, rows, self.logit_softcap, self.linear)

    def logits(self, hidden: Tensor) -> Tensor:
        """Residual stream `[N, D]` fp32 -> logits `[N, Vd]` (fp32 for inference, matmul dtype for training)."""
        normed = self.final_norm(hidden).to(self.dtype)
        if self._apply is None:
            logits = F.linear(normed, self.head_weight)
        else:
            logits = self._apply(normed).float()
        return self.cap(logits)

    def cap(self, logits: Tensor) -> Tensor:
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits.float() / cap)


class ExitHead(nn.Module):
    """A draft head at one exit layer.

    Subclasses set `kind` and `options` (name -> default), and implement `forward`. `attach` must run before
    `forward`. `stateful` heads (own KV, recurrent state) return their state from `new_state`; the caller owns it,
    passes it to `forward`, and nothing but acceptance may depend on it.
    """

    kind: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    stateful: ClassVar[bool] = False
    least_exit: ClassVar[int] = 1

    def __init__(self, spec: HeadSpec, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        if spec.exit_layer < self.least_exit:
            raise ValueError(f"{spec.kind} head: exit_layer is {spec.exit_layer}, expected at least {self.least_exit}")
        unknown = sorted(set(spec.options) - set(self.options))
        if unknown:
            raise ValueError(f"{spec.kind} head: unknown options {unknown}; it knows {sorted(self.options)}")
        self.spec = spec
        self.hidden_size, self.num_outputs = hidden_size, num_outputs
        self.projection: Projection | None = None

    def initialise(self, projection: Projection, weights: Mapping[str, Tensor] | None = None) -> None:
        """Start from the base's weights where the kind does so; parameters are already at their default start.

        Args:
            projection: restricted to the head's outputs.
            weights: the base's tensors by canonical name, for kinds that take over layers.
        """

    def attach(self, projection: Projection) -> None:
        """Bind the base's projection, already restricted to the draft vocabulary, and prepare for inference.

        Raises:
            ValueError: its shape is not `[num_outputs, hidden_size]`.
        """
        given, expected = tuple(projection.head_weight.shape), (self.num_outputs, self.hidden_size)
        if given != expected:
            raise ValueError(
                f"{self.kind} head at layer {self.spec.exit_layer}: LM head rows are {given}, expected {expected}; "
                "attach the projection of the model that the head was made for, restricted to its draft vocabulary"
            )
        self.projection = projection

    def new_state(self, num_rows: int, capacity: int, device: torch.device | str = "cpu") -> Any:
        """Fresh state for `num_rows` sequences of at most `capacity` tokens; None for stateless heads."""
        return None

    def forward(self, hidden: Tensor, state: Any = None) -> Tensor:
        """Residual stream at the exit `[N, D]` fp32 -> draft logits `[N, num_outputs]`."""
        raise NotImplementedError

    def attached(self) -> Projection:
        """The bound projection, or an error that says how to bind one."""
        if self.projection is None:
            raise RuntimeError(f"{self.kind} head at layer {self.spec.exit_layer} is not attached: call attach() first")
        return self.projection

    def prepared(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """`weight [M, K]` as an inference projection in the base's dtype, through the attached linear factory."""
        projection = self.attached()
        if projection.linear is None:
            raise RuntimeError("no linear factory attached: inference projections are made by Projection(linear=...)")
        target = projection.head_weight
        return projection.linear(weight.detach().to(target.device, target.dtype), None)


_KINDS: dict[str, type[ExitHead]] = {}


def register_head(cls: type[ExitHead]) -> type[ExitHead]:
    """Class decorator: make a head known by its `kind`."""
    if not cls.kind or cls.kind in _KINDS:
        raise ValueError(f"head kind {cls.kind!r} is empty or taken; registered: {head_kinds()}")
    _KINDS[cls.kind] = cls
    return cls


def head_kinds() -> list[str]:
    """Registered kinds, sorted."""
    return sorted(_KINDS)


def build_head(spec: HeadSpec, hidden_size: int, num_outputs: int) -> ExitHead:
    """A head with fresh parameters.

    Raises:
        ValueError: unknown kind or option.
    """
    if spec.kind not in _KINDS:
        raise ValueError(f"unknown head kind {spec.kind!r}; expected one of {head_kinds()}")
    return _KINDS[spec.kind](spec, hidden_size, num_outputs)


def rms_normalise(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    """`x [N, D] / rms(x) * weight [D]` in fp32."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps)
