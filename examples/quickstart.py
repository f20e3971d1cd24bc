"""Load a model, continue a text, look at what drafting did.    python examples/quickstart.py [MODEL]"""

import sys

import skipstone

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
engine = skipstone.load(model)

out = engine.generate("Rainbows form when", max_new_tokens=48)
print("Rainbows form when" + out.text)
print(f"-- {len(out.token_ids)} tokens, ended by {out.finish_reason}")
print(f"-- {out.stats.num_accepted} of {out.stats.num_drafted} drafted tokens accepted")

# The same seed gives the same text, drafted or not; a list of prompts gives a list of answers.
sampled = engine.generate(["Once upon a time", "The recipe needs"], max_new_tokens=24, temperature=0.7, seed=1)
for answer in sampled:
    print("*", answer.text.strip())
