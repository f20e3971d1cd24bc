"""Neurons chosen token by token, by trained networks: after Deja Vu (arXiv 2310.17157, section 4), a baseline of TDA.

Per layer a network of two matrices guesses from the MLP's normed input which neurons are a token's strongest by output
norm. Deja Vu guesses one block ahead, so that guessing costs no time; here the network sees the MLP's own input, which
favours it. `exact` chooses by the norms themselves: what a perfect network would do. The engine does not decode so.

The rows of a verification share the weights that they read, so what counts there is the union of their masks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.model import Decoder
from ..engine.sparsity.neurons import down_norms
from ..engine.sparsity.quality import Quality, measure_masks
from .sparsity import Windows, overlap, strongest

BATCH, LEARNING_RATE = 256, 1e-2
PATHS, DEPTH, CONTEXT = 4, 4, 64  # of drafted trees; tokens before them
UNION_ROWS = (1, 4, 8, 16)

# (layer, normed rows [..., D], output norms of their neurons [..., F]) -> scores [..., F], larger is kept first.
Guess = Callable[[int, Tensor, Tensor], Tensor]


def exact(layer: int, normed: Tensor, norms: Tensor) -> Tensor:
    """The token's own strongest neurons, which no network can know before it has computed them."""
    return norms


class Predictor:
    """A `Guess` by one network a layer, D -> rank -> F with a ReLU.

    Attributes:
        networks: by layer.
        seconds: of the training thread's CPU time.
    """

    def __init__(self) -> None:
        self.networks: dict[int, nn.Sequential] = {}
        self.seconds = 0.0

    def __call__(self, layer: int, normed: Tensor, norms: Tensor) -> Tensor:
        scores: Tensor = self.networks[layer](normed)
        return scores

    def learn(self, layer: int, normed: Tensor, active: Tensor, rank: int, epochs: int) -> None:
        """Train a layer's network by binary cross entropy on rows `[N, D]` and their strongest neurons, bool `[N, F]`.

        It starts from how often each neuron is active: without training it is a fixed pruning.
        """
        start = time.thread_time()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(layer)
            last = nn.Linear(rank, active.shape[-1])
            network = nn.Sequential(nn.Linear(normed.shape[-1], rank), nn.ReLU(), last).to(normed.device)
            with torch.no_grad():
                last.bias.copy_(active.float().mean(0).logit(eps=1e-3))
            steps = max(1, epochs * -(-len(normed) // BATCH))
            optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            for _ in range(epochs):
                for rows in torch.randperm(len(normed)).to(normed.device).split(BATCH):
                    logits = network(normed[rows])
                    loss = nn.functional.binary_cross_entropy_with_logits(logits, active[rows].float())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    decay.step()
        self.networks[layer] = network.requires_grad_(False)
        self.seconds += time.thread_time() - start

    def costs(self, decoder: Decoder) -> dict[str, Any]:
        """What guessing takes beside the neurons of the same layers; multiply-adds are of one token."""
        config, networks = decoder.config, self.networks.values()
        matrices = 3 if config.gated_mlp else 2
        own = sum(p.numel() for network in networks for p in network.parameters() if p.ndim == 2)
        neurons = len(networks) * matrices * config.hidden_size * config.intermediate_size
        return {
            "parameters": sum(p.numel() for network in networks for p in network.parameters()),
            "training_cpu_seconds": round(self.seconds, 1),
            "multiply_adds": own,
            "neurons_multiply_adds": neurons,
            "share_of_neurons": own / neurons,
        }


@torch.no_grad()
def train_predictors(
    decoder: Decoder, texts: Tensor, shares: tuple[float, ...], first_dense: int, rank: int, epochs: int
) -> dict[float, Predictor]:
    """A predictor for each share of the neurons, trained layer by layer in one pass over texts, long `[B, T]`."""
    found, norms = {share: Predictor() for share in shares}, down_norms(decoder)

    def watch(layer: int, normed: Tensor) -> Tensor:
        own = decoder.layers[layer]
        neurons = decoder.neurons(own.up, normed)
        if layer >= first_dense:
            strengths = neurons.abs() * norms[layer]
            for share, predictor in found.items():
                predictor.learn(layer, normed, strongest(strengths, share), rank, epochs)
        return decoder.from_neurons(own.down, neurons)

    decoder.encode(texts, [decoder.config.num_layers], watch)
    return found


@dataclass(frozen=True, eq=False)
class TokenTarget:
    """Each token behind the prompt runs with the neurons guessed for it, `density` of them, behind the first layers."""

    guess: Guess
    density: float
    first_dense: int

    def masks(self, decoder: Decoder, num_texts: int, prompt_len: int) -> TokenMasks:
        return TokenMasks(decoder, self, num_texts, prompt_len)

    def read(self, decoder: Decoder, windows: Windows) -> Quality:
        """The loss on the windows' continuations."""
        masks = self.masks(decoder, len(windows.texts), windows.prompt_len)
        return measure_masks(decoder, windows.texts, windows.prompt_len, masks)


class TokenMasks:
    """An `mlp` of `Decoder.encode`, dense up to the prompt's last token but one, as `PromptMasks`; `kept` is by layer,
    bool `[B, rows behind, F]`."""

    def __init__(self, decoder: Decoder, target: TokenTarget, num_texts: int, prompt_len: int) -> None:
        self.kept: dict[int, Tensor] = {}
        self._decoder, self._target, self._num_texts = decoder, target, num_texts
        self._read, self._norms = prompt_len - 1, down_norms(decoder)

    def __call__(self, layer: int, normed: Tensor) -> Tensor:
        own, target = self._decoder.layers[layer], self._target
        neurons = self._decoder.neurons(own.up, normed)
        if layer >= target.first_dense:
            rows = neurons.view(self._num_texts, -1, neurons.shape[-1])[:, self._read :]
            inputs = normed.view(self._num_texts, -1, normed.shape[-1])[:, self._read :]
            scores = target.guess(layer, inputs, rows.abs() * self._norms[layer])
            self.kept[layer] = strongest(scores, target.density)
            rows *= self.kept[layer]
        return self._decoder.from_neurons(own.down, neurons)


@torch.inference_mode()
def found_of_strongest(decoder: Decoder, windows: Windows, targets: Mapping[str, TokenTarget]) -> dict[str, float]:
    """In the whole model, the share of a continuation token's strongest neurons that are guessed, mean over layers."""
    shares: dict[str, list[float]] = {name: [] for name in targets}
    norms, count, first = down_norms(decoder), len(windows.texts), windows.prompt_len - 1

    def watch(layer: int, normed: Tensor) -> Tensor:
        own = decoder.layers[layer]
        neurons = decoder.neurons(own.up, normed)
        rows, inputs = (t.view(count, -1, t.shape[-1])[:, first:] for t in (neurons, normed))
        strengths = rows.abs() * norms[layer]
        for name, target in targets.items():
            if layer >= target.first_dense:
                guessed = strongest(target.guess(layer, inputs, strengths), target.density)
                shares[name].append(overlap(guessed, strongest(strengths, target.density)))
        return decoder.from_neurons(own.down, neurons)

    decoder.encode(windows.texts, [decoder.config.num_layers], watch)
    return {name: sum(own) / len(own) for name, own in shares.items()}


@torch.inference_mode()
def draft_trees(decoder: Decoder, prompts: Tensor) -> Tensor:
    """Trees that a perfect drafter would propose: the `PATHS` likeliest next tokens, the likeliest first, each followed
    greedily; `[B, T]` -> root-to-leaf texts `[B * PATHS, T + DEPTH]`."""
    last = decoder.config.num_layers

    def logits(texts: Tensor) -> Tensor:
        return decoder.lm_head(decoder.final_norm(decoder.encode(texts, [last])[last][:, -1])).float()

    nodes = logits(prompts).topk(PATHS).indices.view(-1, 1)
    texts = torch.cat([prompts.repeat_interleave(PATHS, 0), nodes], 1)
    for _ in range(DEPTH - 1):
        texts = torch.cat([texts, logits(texts).argmax(-1, keepdim=True)], 1)
    return texts


@torch.inference_mode()
def union_over_rows(decoder: Decoder, trees: Tensor, target: TokenTarget) -> dict[str, float]:
    """Share of the neurons that at least one of a tree's rows keeps, of masked layers, by the number of rows: the
    first ones of the likeliest path, then of further paths."""
    length = trees.shape[1]
    masks = target.masks(decoder, len(trees), length - DEPTH + 1)
    decoder.encode(trees, [decoder.config.num_layers], masks)
    found = {}
    for count in UNION_ROWS:
        shares = [
            kept.view(-1, PATHS * DEPTH, kept.shape[-1])[:, :count].any(1).double().mean()
            for kept in masks.kept.values()
        ]
        found[str(count)] = float(torch.stack(shares).mean())
    return found


def about_tokens(
    decoder: Decoder, windows: Windows, targets: Mapping[str, TokenTarget], strengths: Tensor
) -> dict[str, Any]:
    """What masks of single tokens find, cost and add up to.

    Args:
        targets: by setting.
        strengths: of a fixed pruning, `[L, F]`: found beside them, at the same shares.
    """

    def fixed(layer: int, normed: Tensor, norms: Tensor) -> Tensor:
        return strengths[layer].expand(norms.shape)

    beside = {name: TokenTarget(fixed, own.density, own.first_dense) for name, own in targets.items()}
    found, pruned = (found_of_strongest(decoder, windows, own) for own in (targets, beside))
    trees = draft_trees(decoder, windows.texts[:, : min(CONTEXT, windows.prompt_len)])
    return {
        name: {
            "found_of_strongest": found[name],
            "found_by_fixed": pruned[name],
            "union_over_rows": union_over_rows(decoder, trees, target),
            **(target.guess.costs(decoder) if isinstance(target.guess, Predictor) else {}),
        }
        for name, target in targets.items()
    }
