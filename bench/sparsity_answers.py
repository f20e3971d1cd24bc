"""What settings write, and whether it is right: greedy text of many prompts side by side, by the decoder's own layers.

As when text is read (`engine/sparsity/quality.py`), what a setting drops is zeroed. So all settings run the same
operations at the same shapes on any device: a GPU needs no kernels for them, and `ROWS` sequences take little longer
than one. It is what the engine decodes under each target, up to rounding.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.model import Attend, Decoder, Mlp
from ..engine.sparsity.target import SparseTarget
from ..engine.stopping import StopChecker
from ..engine.tokenizer import Tokenizer
from ..kernels.attention import full_attention, without_plans
from .early_exit import first_difference
from .intervals import interval, mcnemar
from .sparsity_settings import DENSE, Setting
from .tasks import Item

ROWS = 32  # sequences side by side


class Texts:
    """Keys and values of B texts as they grow, a slot a position: `[L, B, KV, S, d]`."""

    def __init__(self, decoder: Decoder, count: int, room: int) -> None:
        config, self._decoder = decoder.config, decoder
        shape = config.num_layers, count, config.num_kv_heads, room, config.head_dim
        self.keys, self.values = (torch.zeros(shape, dtype=decoder.dtype, device=decoder.device) for _ in range(2))

    def read(self, text: int, ids: Tensor, mlp: Mlp | None) -> None:
        """Read a text's first tokens, long `[T]`, through the whole model."""
        positions, causal = self._decoder.whole_texts(1, len(ids))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for store, rows in ((self.keys, k), (self.values, v)):
                store[layer, text, :, : len(ids)] = rows.to(store.dtype).transpose(0, 1)
            return causal(layer, q, k, v)

        self._decoder.run_layers(
            self._decoder.embed(ids), 0, self._decoder.config.num_layers, positions, attend, mlp=mlp
        )

    def attend(self, at: Tensor) -> Attend:
        """Attention of one further token of every text, at positions long `[B]`."""
        config, slots = self._decoder.config, torch.arange(self.keys.shape[3], device=at.device)
        texts, places = torch.arange(len(at), device=at.device), at.view(-1, 1, 1, 1)
        visible = {
            window: (slots <= places) & (slots > (-1 if window is None else places - window))
            for window in set(config.windows)
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[texts, :, at], values[texts, :, at] = k.to(keys.dtype), v.to(values.dtype)
            row = q.to(keys.dtype).unsqueeze(2)
            seen = visible[config.windows[layer]]
            out = full_attention(
                row, keys, values, config.attention_scale, softcap=config.attention_softcap, visible=seen
            )
            return out.squeeze(2)

        return attend


class KeptNeurons:
    """An `mlp` of `Decoder.run_layers` over one row a text: the neurons that its text does not keep are zeroed."""

    def __init__(self, decoder: Decoder, kept: Sequence[Mapping[int, Tensor]]) -> None:
        self._decoder, self.masks = decoder, dict[int, Tensor]()
        for layer in {layer for own in kept for layer in own}:
            size = len(kept), decoder.config.intermediate_size
            self.masks[layer] = torch.ones(size, dtype=torch.bool, device=decoder.device)
            for mask, own in zip(self.masks[layer], kept, strict=True):
                if layer in own:
                    mask.zero_().index_fill_(0, own[layer], True)

    def __call__(self, layer: int, normed: Tensor) -> Tensor:
        own = self._decoder.layers[layer]
        neurons = self._decoder.neurons(own.up, normed)
        if layer in self.masks:
            neurons *= self.masks[layer]
        return self._decoder.from_neurons(own.down, neurons)


@torch.inference_mode()
def write(
    decoder: Decoder, setting: Setting, prompts: Sequence[Sequence[int]], checkers: Sequence[StopChecker]
) -> None:
    """Continue every prompt greedily until its checker has ended; prompts but for their last token are read densely.

    Args:
        prompts: token ids, at least 2 each.
        checkers: fresh, one a prompt; they take the tokens.
    """
    config, device = decoder.config, decoder.device
    skipping = setting.target if isinstance(setting.target, SparseTarget) else None
    room = max(len(prompt) + checker.num_remaining for prompt, checker in zip(prompts, checkers, strict=True))
    texts, kept = Texts(decoder, len(prompts), room), []
    rows, mlp = setting.rows(decoder), None
    with without_plans(device):
        for i, prompt in enumerate(prompts):
            watch = None if skipping is None else skipping.watch(i)
            texts.read(i, torch.tensor(prompt[:-1], device=device), watch)
            if skipping is not None and watch is not None:
                kept.append(skipping.kept(watch))
        if kept:
            mlp = KeptNeurons(decoder, kept)
        tokens = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        at = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        while not all(checker.finished for checker in checkers):  # texts that have ended keep their rows
            hidden = rows.run_layers(decoder.embed(tokens), 0, config.num_layers, at, texts.attend(at), mlp=mlp)
            tokens, at = decoder.lm_head(decoder.final_norm(hidden)).argmax(-1), (at + 1).clamp_max(room - 1)
            for checker, token in zip(checkers, tokens.tolist(), strict=True):
                checker.push([token])


def answers(decoder: Decoder, tokenizer: Tokenizer, setting: Setting, items: Sequence[Item]) -> list[StopChecker]:
    """Each item's answer, in their order: tasks apart, `ROWS` items side by side."""
    found: dict[str, StopChecker] = {}
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        for first in range(0, len(own), ROWS):
            some = own[first : first + ROWS]
            prompts = [tokenizer.encode(item.prompt) for item in some]
            checkers = [
                StopChecker(
                    tokenizer.detokenizer(), max_new_tokens=item.max_new_tokens, stop_ids=tokenizer.stop_ids,
                    stop=item.stop, context_room=decoder.config.max_context - len(prompt),
                )
                for item, prompt in zip(some, prompts, strict=True)
            ]  # fmt: skip
            write(decoder, setting, prompts, checkers)
            found |= {item.name: checker for item, checker in zip(some, checkers, strict=True)}
    return [found[item.name] for item in items]


def task_rows(
    items: Sequence[Item], own: Sequence[StopChecker], plain: Sequence[StopChecker]
) -> dict[str, dict[str, Any]]:
    """By task, how a setting's answers are judged, and against the whole model's."""
    return {
        task: _task_row([one for one in zip(items, own, plain, strict=True) if one[0].task == task])
        for task in dict.fromkeys(item.task for item in items)
    }


def _task_row(answered: Sequence[tuple[Item, StopChecker, StopChecker]]) -> dict[str, Any]:
    right, plain = (
        [int(item.right(outs[of].text, outs[of].finish_reason == "stop")) for item, *outs in answered] for of in (0, 1)
    )
    firsts = [first_difference(out.token_ids, base.token_ids) for _, out, base in answered]
    places = [
        len(base.token_ids) if first is None else first for first, (_, _, base) in zip(firsts, answered, strict=True)
    ]
    return {
        "n": len(right),
        "accuracy": statistics.fmean(right),
        "accuracy_95": mean_interval(right),
        **paired(right, plain),
        "same_answers": sum(first is None for first in firsts),
        "median_first_difference": statistics.median(places),  # of equal answers, their length
        "items": {
            "name": [item.name for item, _, _ in answered],
            "right": right,
            "first_difference": firsts,
            "num_tokens": [len(out.token_ids) for _, out, _ in answered],
        },
    }


def paired(right: Sequence[int], others: Sequence[int]) -> dict[str, Any]:
    """Right answers (1 or 0) against another setting's to the same items: the difference, and what was lost and gained
    one by one."""
    lost = sum(b and not a for a, b in zip(right, others, strict=True))
    gained = sum(a and not b for a, b in zip(right, others, strict=True))
    return {
        "difference": statistics.fmean(right) - statistics.fmean(others),
        "difference_95": mean_interval(right, others),
        "lost": lost,
        "gained": gained,
        "mcnemar_p": mcnemar(lost, gained),
    }


def mean_interval(values: Sequence[float], others: Sequence[float] | None = None) -> list[float] | None:
    """Of the mean of paired differences, or of the values alone."""
    own = np.array([values], dtype=float) - (0 if others is None else np.array([others], dtype=float))
    return interval([own], lambda sums: np.asarray(sums.mean(0) / own.shape[1]))


def against_masks(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """TDA against the other masks of its density, paired over the same windows and items: "tda 0.75 - griffin 0.75" ->
    quotient of perplexities, and by task what `paired` says."""
    found = {}
    tda = {row["level"]: name for name, row in rows.items() if row["method"] == "tda"}
    for name, row in rows.items():
        base = tda.get(row["level"])
        if base is None or row["method"] in (DENSE, "tda") or row["method"].startswith("teal"):
            continue
        own = rows[base]
        nats = own["windows"]["nats"], row["windows"]["nats"]
        bounds = mean_interval(*nats)
        tasks = {
            task: paired(mine["items"]["right"], row["tasks"][task]["items"]["right"])
            for task, mine in own.get("tasks", {}).items()
            if "tasks" in row
        }
        found[f"{base} - {name}"] = {
            "perplexity_quotient": float(np.exp(np.mean(nats[0]) - np.mean(nats[1]))),
            "perplexity_quotient_95": None if bounds is None else [float(np.exp(bound)) for bound in bounds],
            "tasks": tasks,
        }
    return found
