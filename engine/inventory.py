"""What a loaded engine consists of, and the bytes it takes: weights, second copies, KV cache, heads, their memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..heads.base import ExitHead
from ..heads.stateful import BlockHead, RecurrentHead, StatefulHead
from ..kernels.grow_level import Levels
from ..kernels.head_rows import RING
from ..kernels.linear import PackedLinear
from .cache import CachePlan, KVCache, plan_cache
from .engine import Engine
from .fused import FusedStep
from .model import Decoder, Norm
from .prompt_reader import SIZES
from .tree import MAX_NODES
from .workspace import reach_of, round_shape

ACCURACIES = (0.60, 0.70, 0.80, 0.90, 0.95)


@dataclass(frozen=True)
class MemoryItem:
    """One line of the memory budget. A second copy holds numbers that another item holds too."""

    what: str
    num_bytes: int
    arithmetic: str
    second_copy: bool = False


def inventory(
    engine: Engine, batch: int = 1, context: int | None = None, accuracies: Sequence[float] = ACCURACIES
) -> dict[str, Any]:
    """Model, memory for `batch` sequences of `context` tokens, and heads, in types that JSON holds.

    Raises:
        ContextTooLong: a context beyond the model's.
        ValueError: an accuracy level that the heads are not calibrated for.
    """
    config = engine.decoder.config
    items = memory_items(engine, batch, config.max_context if context is None else context)
    return {
        "model": {
            "id": engine.model_id,
            "family": config.family,
            "num_parameters": num_parameters(engine.decoder),
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "max_context": config.max_context,
            "tied_head": config.tied_head,
            "dtype": str(engine.decoder.dtype).removeprefix("torch."),
            "device": str(engine.decoder.device),
            "prefill": engine.prefill,
        },
        "memory": {
            "items": [vars(item) for item in items],
            "total_bytes": sum(item.num_bytes for item in items),
        },
        "heads": _heads(engine, accuracies),
        "drafts_from": list(engine.policy.sources),
        "warning": engine.warning,
    }


def num_parameters(decoder: Decoder) -> int:
    """Numbers of the model, a tied head counted once."""
    total = decoder.embedding.numel() + _norm_size(decoder._final_norm)
    if not _same(decoder.head_weight, decoder.embedding):
        total += decoder.head_weight.numel()
    return total + sum(_layer_size(decoder, i) for i in range(decoder.config.num_layers))


def memory_items(engine: Engine, batch: int, context: int) -> list[MemoryItem]:
    """The budget, largest parts named one by one."""
    decoder, config = engine.decoder, engine.decoder.config
    size, width = decoder.dtype.itemsize, config.hidden_size
    table = f"{config.vocab_size:,} x {width} x {size} bytes"
    layers = sum(_layer_size(decoder, i) for i in range(config.num_layers))
    items = [
        MemoryItem("embedding", decoder.embedding.numel() * size, table),
        MemoryItem(f"{config.num_layers} layers", layers * size, f"{layers:,} parameters x {size} bytes"),
    ]
    if not _same(decoder.head_weight, decoder.embedding):
        items.append(MemoryItem("LM head", decoder.head_weight.numel() * size, table))
    if decoder.output.packed:
        what = "LM head in the layout its kernel reads"
        items.append(MemoryItem(what, decoder.head_weight.numel() * size, table, second_copy=True))
    if (copied := engine.by_channel) is not None and copied.num_bytes:
        what = "weights by input channel, for rows that drop inputs"
        items.append(MemoryItem(what, copied.num_bytes, copied.arithmetic(), second_copy=True))
    plan = plan_cache(config, batch, context, decoder.device, decoder.dtype, check_free=False)
    items.append(MemoryItem(f"KV cache of {batch} x {context} tokens", plan.num_bytes, plan.arithmetic()))
    for exit_layer, memory in engine.memory_plans(engine.policy_for(batch), batch, context).items():
        what = f"memory of the head at {exit_layer} for {batch} x {context} tokens"
        items.append(MemoryItem(what, memory.num_bytes, memory.arithmetic()))
    return items + _round_items(engine, plan) + _prompt_items(engine, plan) + _head_items(engine)


def _round_items(engine: Engine, plan: CachePlan) -> list[MemoryItem]:
    """What rounds on the device hold for this cache (`engine/graphs.py`, `engine/device_draft.py`): the rows' buffers
    and the drafts' large parts; sampling with filters or penalties adds a row of logits for each row."""
    if engine.fused is None:
        return []
    batch, config = plan.batch, engine.decoder.config
    shape, _, width, taps = round_shape(engine.policy_for(batch), engine.heads, engine.thinned is not None)
    cache = KVCache(plan, torch.device("meta"))
    widths = {MAX_NODES} if engine.fused.by_neuron else {1, width}
    counts = sorted({_tiled(batch * rows_each) for rows_each in widths})
    held = sum(_held_bytes(FusedStep(engine.fused, cache, count)) for count in counts)
    held += sum(counts) * len(taps) * config.hidden_size * 4
    each = held // sum(counts)
    rows = f"{' + '.join(map(str, counts))} rows x {each:,} bytes (residual streams, activations, partial sums)"
    items = [MemoryItem(f"rows of device rounds of {batch} x {width}", held, rows)]
    if shape is None or engine.heads is None:
        return items
    outputs = engine.heads.config.num_outputs
    asked = [engine.heads.heads[e] for e in engine.policy_for(batch).exits]
    if isinstance(shape, Levels):
        num_rows = _tiled(batch * shape.lanes)
        drafts = f"logits {num_rows} rows x {outputs:,} x 4 bytes"
        items.append(MemoryItem("drafts of device rounds", 4 * num_rows * outputs, drafts))
        return items + _copied(engine, [head for head in asked if isinstance(head, BlockHead)])
    (head,) = asked
    assert isinstance(head, RecurrentHead)
    num_rows = _tiled(batch) + _tiled(batch * shape.width)
    waiting = batch * RING * len(head.taps) * config.hidden_size
    drafts = (
        f"logits {num_rows} rows x {outputs:,} x 4 bytes + states that wait {batch} x {RING} x {len(head.taps)} x "
        f"{config.hidden_size} x 4 bytes"
    )
    items.append(MemoryItem("drafts of device rounds", 4 * (num_rows * outputs + waiting), drafts))
    return items + _copied(engine, [head])


def _copied(engine: Engine, heads: Sequence[StatefulHead]) -> list[MemoryItem]:
    """The matrices of heads with memory, in the model's dtype."""
    size = engine.decoder.dtype.itemsize
    if engine.decoder.dtype == torch.float32 or not heads:
        return []
    copied = sum(p.numel() for head in heads for p in _matrices(head))
    what, how = f"the {heads[0].kind} head's matrices for device rounds", f"{copied:,} x {size} bytes"
    return [MemoryItem(what, copied * size, how, second_copy=True)]


def _prompt_items(engine: Engine, plan: CachePlan) -> list[MemoryItem]:
    """What steps over prompts hold for the longest prompt (`engine/prompt_reader.py`)."""
    if engine.fused is None or not engine.prefill.startswith("fused"):
        return []
    width, longest = engine.decoder.config.hidden_size, engine._longest_fused()
    reach = min(reach_of(plan.context if longest is None else longest), plan.context)
    cache, taps = KVCache(plan, torch.device("meta")), round_shape(engine.policy_for(plan.batch), engine.heads)[3]
    steps = [FusedStep(engine.fused, cache, size, reach=reach) for size in SIZES]
    held = sum(map(_held_bytes, steps)) + sum(SIZES) * len(taps) * width * 4
    if engine.fused.by_neuron:  # sums of what neurons did
        held += engine.decoder.config.num_layers * engine.decoder.config.intermediate_size * 4
    how = f"{' + '.join(map(str, SIZES))} rows x {held // sum(SIZES):,} bytes"
    return [MemoryItem("steps that read prompts", held, how)]


def _tiled(rows: int) -> int:
    return -(-rows // MAX_NODES) * MAX_NODES


def _held_bytes(step: FusedStep) -> int:
    """Bytes of a step's own tensors, views counted once."""
    own = [vars(part) for part in (step, step.rows, step._scratch, step._parts, step.kept) if part is not None]
    stores = {t.untyped_storage()._cdata: t for part in own for t in part.values() if isinstance(t, Tensor)}
    return sum(t.untyped_storage().nbytes() for t in stores.values())


def _head_items(engine: Engine) -> list[MemoryItem]:
    heads = engine.heads
    if heads is None:
        return []
    size, width = engine.decoder.dtype.itemsize, engine.decoder.config.hidden_size
    items = [MemoryItem("heads", 4 * heads.num_parameters, f"{heads.num_parameters:,} parameters x 4 bytes")]
    packed = sum(p.numel() for head in heads.heads.values() for p in _matrices(head))
    items.append(
        MemoryItem("heads' matrices for inference", packed * size, f"{packed:,} x {size} bytes", second_copy=True)
    )
    rows = f"{heads.config.num_outputs:,} x {width} x {size} bytes"
    num_bytes = heads.config.num_outputs * width * size
    if heads.draft_ids is not None:
        items.append(MemoryItem("LM head rows of the draft vocabulary", num_bytes, rows, second_copy=True))
    if engine.decoder.output.packed:
        items.append(MemoryItem("the heads' LM head in the layout its kernel reads", num_bytes, rows, second_copy=True))
    return items


def _heads(engine: Engine, accuracies: Sequence[float]) -> dict[str, Any] | None:
    heads = engine.heads
    if heads is None:
        return None
    calibration = heads.calibration
    exits = []
    for spec in sorted(heads.config.heads, key=lambda spec: spec.exit_layer):
        layer = spec.exit_layer
        entry: dict[str, Any] = {"exit_layer": layer, "kind": spec.kind, "options": dict(spec.options)}
        if calibration is not None and layer in calibration.exits:
            measured = calibration.exits[layer]
            entry |= {"agreement": measured.agreement, "top_k": list(measured.top_k)}
            entry["gates"] = {f"{a:.2f}": list(calibration.gate(layer, a)) for a in accuracies}
        exits.append(entry)
    return {
        "base": None if heads.base is None else heads.base.model_id,
        "num_parameters": heads.num_parameters,
        "draft_vocab": heads.config.num_outputs,
        "calibrated_on": None if calibration is None else calibration.source,
        "exits_in_use": list(engine.policy.exits),
        "exits": exits,
    }


def _matrices(head: ExitHead) -> list[Tensor]:
    return [p for p in head.parameters() if p.ndim == 2]


def _layer_size(decoder: Decoder, index: int) -> int:
    total = 0
    for part in vars(decoder.layers[index]).values():
        if isinstance(part, PackedLinear):
            total += part.out_features * part.in_features + (0 if part.bias is None else part.bias.numel())
        elif isinstance(part, Norm):
            total += _norm_size(part)
    return total


def _norm_size(norm: Norm) -> int:
    return norm.weight.numel() + (0 if norm.bias is None else norm.bias.numel())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()
