"""Decode with and without drafting and compare token by token.    python examples/lossless.py [MODEL [HEADS]]"""

import math
import sys

import skipstone

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
heads = sys.argv[2] if len(sys.argv) > 2 else "default"
engine = skipstone.load(model, heads=heads)
if engine.heads is None:
    sys.exit("this model has no exit heads here, so there is nothing to compare")

# A tree: certain heads extend, uncertain ones put two candidates side by side, none ever stops.
exits = engine.heads.exits
tree = skipstone.DraftPolicy(exits[-1:], {exits[-1]: skipstone.Gate(1.0, math.inf)}, branch=2)

different = 0
for name, policy in (("as calibrated", None), ("chain", skipstone.fixed_exit(exits[-1], 4)), ("tree", tree)):
    for temperature in (0.0, 0.8):
        report = engine.verify_lossless("The sea is", policy=policy, temperature=temperature, max_new_tokens=32)
        verdict = "equal" if report.equal else f"different from new token {report.divergence} on"
        stats = report.speculative.stats
        print(f"{name}, temperature {temperature}: {verdict}; {stats.num_accepted} of {stats.num_drafted} accepted")
        different += not report.equal
sys.exit(1 if different else 0)
