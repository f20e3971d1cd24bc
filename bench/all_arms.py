"""What `--arms all` stands for, and which arms are slow."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..engine.engine import Engine
from ..engine.workspace import round_shape
from ..heads import StatefulHead
from ..heads.head_set import HeadSet
from .arms import PLAIN_ARM, Arm, EarlyExitArm, EngineArm

CHAINS = (3, 5)  # tokens drafted in a row by a head at exit 0
CHAIN = 3  # likewise by one that costs trunk layers
TREES = ("4:4:3", "4:4:4", "4:4:6")
GATES, EARLY = (0.75, 0.9), 0.95  # accuracy levels


def all_arms(engine: Engine, others: Mapping[str, HeadSet], thresholds: Collection[str]) -> str:
    """Everything that makes sense for an engine: its default with and without pausing, drafts from the text, of each
    head set a chain from every exit, trees from exit 0, gates and early exit, LayerSkip's bare exit; and of each target
    that skips weights plain decoding and drafts.

    Args:
        others: further head sets of the model, by what stands behind @.
        thresholds: those of "tda" and "teal" that there are.
    """
    drafts = engine.policy.drafts or engine.plan is not None
    found = [PLAIN_ARM, *(["default", "always"] if drafts else []), "lookup", "suffix"]
    sets = {} if engine.heads is None else {"": engine.heads}
    for name, heads in {**sets, **{f"@{kind}": own for kind, own in others.items()}}.items():
        found += [f"{form}{name}" for form in _of_heads(heads)]
    found.append(f"bare:{max(1, 2 * engine.decoder.config.num_layers // 3)}:{CHAIN}")
    whole = engine.verify == engine.draft == "dense"
    for target in [kind for kind in ("tda", "teal") if whole and kind in thresholds]:
        found.append(f"{PLAIN_ARM}%{target}")
        if target == "teal":
            found += [f"{form}%teal-draft" for form in found if form.startswith("fixed:") and form[6] != "0"]
            if engine.decoder.device.type != "cpu":
                continue  # a target that drops inputs decodes plainly there
        found += [f"always%{target}"] if drafts else []
    return ",".join(found)


def _of_heads(heads: HeadSet) -> list[str]:
    forms = []
    if 0 in heads.exits:
        forms += [*(f"fixed:0:{length}" for length in CHAINS), *(f"tree:{tree}" for tree in TREES)]
    trunk = [e for e in heads.exits if e]
    forms += [f"fixed:{e}:{CHAIN}" for e in trunk]
    if trunk and heads.calibration is not None:
        forms += [f"accuracy:{level}" for level in GATES]
        if not any(isinstance(head, StatefulHead) for head in heads.heads.values()):
            forms.append(f"early:{EARLY}")
    return forms


def is_slow(arm: Arm) -> bool:
    """Baselines, and on a GPU what our engine decodes without its captured rounds or by drafts that the host makes."""
    if not isinstance(arm, EngineArm):
        return True
    engine, policy = arm.engine, arm.policy or arm.engine.policy
    if engine.decoder.device.type == "cpu" or arm.speculation is False:
        return False
    waits = engine.fused is None or isinstance(arm, EarlyExitArm)
    shape, text, *_ = round_shape(policy, engine.heads)
    return waits or (policy.drafts and shape is None and text is None)
