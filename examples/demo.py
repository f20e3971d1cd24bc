"""What `make demo` shows: one answer written plainly and with drafting, equal, with both speeds.

python examples/demo.py [MODEL [HEADS]]
"""

import sys

import skipstone

PROMPT = "Write a Python function that returns the largest number in a list, and explain it."
TOKENS = 96


def rate(out: skipstone.Generation) -> float:
    """Tokens per second of decoding, without reading the prompt."""
    return 1e3 * out.stats.num_committed / out.stats.decode_ms


model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
heads = sys.argv[2] if len(sys.argv) > 2 else "default"
engine = skipstone.load(model, heads=heads)
messages = [{"role": "user", "content": PROMPT}]
for speculation in (False, True):  # the first calls of a process are slow, drafted or not
    engine.chat(messages, max_new_tokens=12, speculation=speculation)

plain = engine.chat(messages, max_new_tokens=TOKENS, speculation=False)
drafted = engine.chat(messages, max_new_tokens=TOKENS, speculation="always")
chosen = engine.chat(messages, max_new_tokens=TOKENS)
stats, pace = drafted.stats, engine.pace()

print(f"You ask {model}: {PROMPT}\n")
print(f"Plain decoding, {rate(plain):.1f} tokens/s:\n{plain.text.strip()}\n")
print(
    f"With exit heads and the text itself drafting and the full model verifying, {rate(drafted):.1f} tokens/s:\n"
    f"{drafted.text.strip()}\n"
)
same = plain.token_ids == drafted.token_ids == chosen.token_ids
print(f"Equal token for token: {'yes' if same else 'NO'} ({len(drafted.token_ids)} tokens)")
if stats.num_drafted:
    names = {layer: f"layer {layer}" for layer in stats.tokens_by_exit} | {0: "the recurrent head", -1: "the text"}
    exits = ", ".join(f"{count} from {names[layer]}" for layer, count in stats.tokens_by_exit.items())
    print(
        f"Acceptance rate {stats.acceptance_rate:.0%} "
        f"({stats.num_accepted} of {stats.num_drafted} drafted tokens: {exits}), "
        f"{stats.tokens_per_verification:.2f} tokens per verification"
    )
print(f"Speed against plain: always drafting {rate(drafted) / rate(plain):.2f}x, the engine's own choice ", end="")
print(f"{rate(chosen) / rate(plain):.2f}x{' (drafting paused: it does not pay here)' if pace and pace.resting else ''}")
if not engine.policy.exits:
    print(f"No exit heads drafted: {engine.warning or 'there are no calibrated ones for this model here'}.")
try:
    sparse = skipstone.load(model, heads=heads, verify="tda")  # another target: skips the neurons a prompt did not use
except ValueError as error:
    print(f"With a target that skips neurons (tda): not shown, {error}")
else:
    slow, fast = (sparse.chat(messages, max_new_tokens=TOKENS // 2, speculation=s) for s in (False, "always"))
    alike = slow.token_ids == fast.token_ids
    same = same and alike
    pairs = zip(slow.token_ids, plain.token_ids, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), "none")
    print(
        f"With a target that skips neurons (tda): drafted equals its own plain decoding: {'yes' if alike else 'NO'}, "
        f"{fast.stats.tokens_per_verification:.2f} tokens per verification, "
        f"first token unlike the whole model's: {first}"
    )
sys.exit(0 if same else 1)
