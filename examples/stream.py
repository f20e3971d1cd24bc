"""Print tokens as they come; [brackets] mark what an exit head drafted.    python examples/stream.py [MODEL [HEADS]]"""

import sys

import skipstone

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
heads = sys.argv[2] if len(sys.argv) > 2 else "default"
engine = skipstone.load(model, heads=heads)

# As a context manager the stream frees the engine also when the loop is left early.
with engine.stream("The three primary colours are", max_new_tokens=48, speculation="always") as stream:
    for event in stream:
        print(f"[{event.text}]" if event.drafted else event.text, end="", flush=True)
print()

assert stream.result is not None
for exit_layer, count in stream.result.stats.tokens_by_exit.items():
    print(f"-- {count} tokens drafted at exit layer {exit_layer}")
