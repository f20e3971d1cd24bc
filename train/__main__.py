"""`python -m skipstone.train`: a head set from a model and a prompt file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .run import TrainConfig, train
from .trainer import Recipe


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Command line -> settings. Unknown options end the program with a message."""
    run, recipe = TrainConfig("", "", "", (1,)), Recipe()
    parser = argparse.ArgumentParser(prog="python -m skipstone.train", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="name, hub id, folder or .gguf file of the base model")
    add("--prompts", required=True, help="JSON lines with 'prompt' or Spec-Bench's 'turns' (.gz too)")
    add("--out", required=True, help="output folder; an interrupted run there goes on")
    add("--exits", required=True, help="exit layers, for example 6,12,18")
    add("--kind", default=run.kind)
    add("--width", type=int, default=run.width, help="of adapters")
    add("--draft-vocab", type=int, default=run.draft_vocab, help="ids a head can draft; 0 for all")
    add("--steps", type=int, default=recipe.steps)
    add("--batch-tokens", type=int, default=recipe.batch_tokens)
    add("--chunk-tokens", type=int, default=recipe.chunk_tokens)
    add("--lr", type=float, default=recipe.lr)
    add("--warmup", type=int, default=recipe.warmup)
    add("--seed", type=int, default=recipe.seed)
    add("--max-prompts", type=int, default=None)
    add("--max-prompt-tokens", type=int, default=run.max_prompt_tokens)
    add("--max-new-tokens", type=int, default=run.max_new_tokens)
    add("--held-out-percent", type=float, default=run.held_out_percent)
    add("--cache-tokens", type=int, default=run.cache_tokens, help="KV slots held at once while writing")
    add("--eval-every", type=int, default=run.eval_every)
    add("--eval-texts", type=int, default=run.eval_texts)
    add("--save-every", type=int, default=run.save_every)
    add("--device", default=run.device)
    add("--dtype", default=run.dtype, choices=["bf16", "fp32", "fp16"])
    add("--no-progress", dest="progress", action="store_false")
    given = vars(parser.parse_args(arguments))
    given["exits"] = tuple(int(layer) for layer in given["exits"].split(","))
    given["draft_vocab"] = given["draft_vocab"] or None
    shared = {name: given.pop(name) for name in ("steps", "batch_tokens", "chunk_tokens", "lr", "warmup", "seed")}
    return TrainConfig(**given, recipe=Recipe(**shared))


def main() -> None:
    heads = train(parse())
    assert heads.calibration is not None
    for layer, measured in heads.calibration.exits.items():
        print(f"exit {layer}: agreement {measured.agreement:.3f}, in top 4 {measured.top_k[3]:.3f}")


if __name__ == "__main__":
    main()
