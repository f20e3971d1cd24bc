"""Filling a head set's calibration from text that its training never saw."""

from __future__ import annotations

from ..engine.model import Decoder
from ..heads import Calibration, HeadSet, fit_calibration
from .data import SelfText
from .measure import measure


def calibrate(
    decoder: Decoder, heads: HeadSet, held_out: SelfText, batch_tokens: int = 16_384, chunk_tokens: int = 2_048
) -> Calibration:
    """Measure attached heads on the greedy continuations of held-out prompts and fit their gates.

    Only positions whose next token the model wrote count: in decoding nothing else is drafted. Attach
    `inference_projection` first, so that entropies are those of decoding.

    Raises:
        ValueError: no greedy text.
    """
    members = [i for i in range(len(held_out)) if bool(held_out.greedy[i])]
    if not members:
        raise ValueError("no greedy held-out text to calibrate on: give more prompts or a larger held-out share")
    found = measure(decoder, heads, held_out, members, batch_tokens, chunk_tokens)
    source = (
        f"{len(found.text):,} positions in greedy continuations of {len(members):,} held-out prompts, true prefixes; "
        "agreement is with the full model's argmax"
    )
    return fit_calibration(found.entropy, found.rank, source)
