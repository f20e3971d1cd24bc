"""What a benchmark compares: ways to decode with one set of weights.

An arm turns prompt ids into an `Outcome`. Arms of our own engine must give the same tokens; the baselines of
`bench/baselines.py` are other programs and need not.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from ..engine.config import ModelConfig
from ..engine.early_exit import calibrated_exits
from ..engine.engine import Engine, Speculation
from ..engine.gate import DraftPolicy, Lookup, best_first, calibrated, fixed_exit, from_text, likely
from ..engine.statistics import Statistics
from ..heads.head_set import HeadSet, adapter_config
from .energy import meter_of

ARM_FORMS = (
    "plain, default, always, lookup[:NODES[:MATCH]], suffix[:NODES[:MATCH]] (drafts from the text; behind another form "
    "with +: heads where the text has none), tree:BEAM:BRANCH:DEPTH[:ENTROPY] (best first, from a head at exit 0), "
    "accuracy:LEVEL[:LENGTH[:EXIT+EXIT...]], likely:LEVEL[:LENGTH[:EXIT+EXIT...]] (by the probability of the whole "
    "draft), fixed:EXIT:LENGTH, bare:EXIT:LENGTH, "
    "early:LEVEL[:EXIT+EXIT...] (early exit, lossy); FORM@HEADS takes another head set; to sweep, LEVEL may be "
    "0.6-0.95 (steps of 0.05), LENGTH 1-6, EXIT * (all that have heads)"
)
LEVEL_STEP = 0.05
BRANCHES = {"lookup": 1, "suffix": 2}
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Outcome:
    """One generated answer and its times.

    Attributes:
        text, token_ids: the answer.
        wall_ms: prompt ids in, answer out.
        decode_ms: the part of it after the prompt was read, in which `decode_tokens` of the tokens came. Both times are
            0 where nothing was timed.
        stats: what drafting did; None for baselines.
        error: why the request failed, if it did.
        blocks: `(ms since the start, tokens)` of what came at once, in order; the first is the time to first token.
        exit_layers: of each token, the exit that drafted it, None for the full model's own; empty for baselines.
        joules: that the GPU reports for this answer, with whatever else ran on it; None where it reports none.
    """

    text: str
    token_ids: list[int]
    wall_ms: float
    decode_ms: float
    decode_tokens: int
    stats: Statistics | None = None
    error: str | None = None
    blocks: tuple[tuple[float, int], ...] = ()
    exit_layers: tuple[int | None, ...] = ()
    joules: float | None = None


class Arm(Protocol):
    """One way to decode."""

    name: str
    lossless: bool  # its tokens must equal plain decoding's

    def run(self, prompt_ids: list[int], sampling: Mapping[str, Any]) -> Outcome:
        """Answer one prompt; `sampling` holds fields of `SamplingParams`."""

    def describe(self) -> dict[str, Any]:
        """Its settings, for the report."""


class EngineArm:
    """Our engine with one setting.

    Args:
        name: in reports.
        engine: it may be shared with other arms.
        speculation, policy: as for `Engine.generate`.
    """

    lossless = True

    def __init__(
        self, name: str, engine: Engine, speculation: Speculation = True, policy: DraftPolicy | None = None
    ) -> None:
        self.name, self.engine, self.speculation, self.policy = name, engine, speculation, policy
        self.meter = meter_of(engine.decoder.device)

    def run(self, prompt_ids: list[int], sampling: Mapping[str, Any]) -> Outcome:
        before, start, blocks = self.meter.joules(), time.perf_counter(), []
        with self.engine.stream(prompt_ids, **self.drafting(), **sampling) as stream:
            while block := stream.next_block():
                blocks.append((1e3 * (time.perf_counter() - start), len(block)))
        out, wall_ms = stream.result, 1e3 * (time.perf_counter() - start)
        after = self.meter.joules()
        assert out is not None
        return Outcome(
            out.text, out.token_ids, wall_ms, out.stats.decode_ms, len(out.token_ids), out.stats, out.error,
            tuple(blocks), tuple(out.exit_layers), None if before is None or after is None else after - before,
        )  # fmt: skip

    def drafting(self) -> dict[str, Any]:
        """Options of `Engine.generate` that say how it decodes."""
        return {"speculation": self.speculation, "policy": self.policy}

    def describe(self) -> dict[str, Any]:
        policy = self.policy or self.engine.policy
        if self.speculation is False or not policy.drafts:
            return {"speculation": False}
        looked = {} if policy.lookup is None else {"lookup": vars(policy.lookup)}
        return {
            "speculation": self.speculation,
            "exits": list(policy.exits),
            "max_depth": policy.max_depth,
            "max_nodes": policy.max_nodes,
            "branch": policy.branch,
            "beam": policy.beam,
            "gates": {str(e): [_finite(gate.low), _finite(gate.high)] for e, gate in policy.gates.items()},
            "confidence": policy.confidence,
            "paced": self.speculation is True and self.policy is None,
            **looked,
        }


class EarlyExitArm(EngineArm):
    """Early exit: lossy, so its tokens need not be plain decoding's; `bench/early_exit.py` judges them."""

    lossless = False

    def __init__(self, name: str, engine: Engine, policy: DraftPolicy) -> None:
        super().__init__(name, engine, policy=policy)

    def drafting(self) -> dict[str, Any]:
        return {"mode": "early_exit", "policy": self.policy}

    def describe(self) -> dict[str, Any]:
        gates = self.policy.gates if self.policy else {}
        return {"mode": "early_exit", "lossy": True, "gates": {str(e): _finite(gate.low) for e, gate in gates.items()}}


def bare_heads(config: ModelConfig, exits: Sequence[int]) -> HeadSet:
    """Heads without training: final norm and LM head on the exit's hidden state, LayerSkip's draft (arXiv 2404.16710).

    Raises:
        ValueError: an exit outside 1..num_layers - 1.
    """
    wrong = [e for e in exits if not 1 <= e < config.num_layers]
    if wrong:
        raise ValueError(f"exit layers {wrong} are outside 1..{config.num_layers - 1} of this model")
    # An untrained adapter adds nothing, so the narrowest is the bare exit at the least cost.
    sizes = adapter_config(exits, config.hidden_size, config.vocab_size, config.num_layers, width=1, draft_vocab=None)
    return HeadSet(sizes)


def with_bare_heads(engine: Engine, exits: Sequence[int]) -> Engine:
    """A second engine over the same weights, and the same target model, whose heads are bare exits."""
    return with_heads(engine, bare_heads(engine.decoder.config, exits))


def default_arms(engine: Engine) -> str:
    """The arms that make sense for an engine: the default policy where it drafts, else a bare exit."""
    if engine.policy.drafts or engine.plan is not None:
        return "plain,default,always"
    return f"plain,bare:{max(1, 2 * engine.decoder.config.num_layers // 3)}:4"


def with_heads(engine: Engine, heads: HeadSet) -> Engine:
    """A second engine over the same weights, and the same target model, with other heads."""
    return Engine(
        engine.decoder, engine.tokenizer, heads, deterministic=engine.deterministic, model_id=engine.model_id,
        fused=engine.fused is not None, prefill=engine.prefill_option,
        sparsity=engine.teal if engine.sparse is None else engine.sparse.selection, draft=engine.teal_draft,
    )  # fmt: skip


def parse_arms(text: str, engine: Engine, heads_of: Callable[[str], HeadSet] | None = None) -> list[Arm]:
    """Arms from a comma-separated list of `ARM_FORMS`; plain is always there and first, for it is what the others are
    measured by.

    Args:
        heads_of: reads another head set of the same model, for forms with @.

    Raises:
        ValueError: a form that is unknown, or that this engine's heads cannot serve.
    """
    given = [part.strip() for part in text.split(",") if part.strip()]
    exits = engine.heads.exits if engine.heads is not None else ()
    names = list(dict.fromkeys(["plain", *(name for form in given for name in expand(form, exits))]))
    bare_exits = sorted({_exit_and_length(_LOOKUP.sub("", n))[0] for n in names if n.startswith("bare:")})
    bare = with_bare_heads(engine, bare_exits) if bare_exits else None
    others: dict[str, Engine] = {}
    arms: list[Arm] = []
    for name in names:
        form, found = _LOOKUP.sub("", name), _LOOKUP.search(name)
        form, _, wanted = form.partition("@")
        if wanted and wanted not in others:
            if heads_of is None:
                raise ValueError(f"arm {name!r}: other heads are read by name only where the model has one")
            others[wanted] = with_heads(engine, heads_of(wanted))
        owner = others[wanted] if wanted else engine
        if not form:
            assert found is not None
            arms.append(EngineArm(name, owner, "always", _from_text(name, found)))
            continue
        arm = _arm(form, owner, bare)
        if found is not None:
            arm = _with_text(arm, name, found)
        arm.name = name
        arms.append(arm)
    return arms


# `lookup` or `suffix` with sizes: alone, or behind another form and a +
_LOOKUP = re.compile(r"(?:^|\+)(lookup|suffix)((?::[^:+@]*)*)$")


def _from_text(name: str, found: re.Match[str]) -> DraftPolicy:
    try:
        sizes = [int(part) for part in found[2].split(":")[1:]]
        nodes, match = [*sizes, *(Lookup.max_nodes, Lookup.min_match)[len(sizes) :]]
    except ValueError:
        raise ValueError(f"arm {name!r}: expected {found[1]}[:NODES[:MATCH]], e.g. {found[1]}:8:2") from None
    return from_text(match, max_nodes=nodes, branch=BRANCHES[found[1]])


def _with_text(arm: Arm, name: str, found: re.Match[str]) -> Arm:
    """The same arm, with drafts from the text where there are some."""
    policy = arm.policy or arm.engine.policy if isinstance(arm, EngineArm) else None
    if not isinstance(arm, EngineArm) or policy is None or arm.speculation is False or not arm.lossless:
        raise ValueError(f"arm {name!r}: only forms that draft take + {found[1]}")
    return EngineArm(name, arm.engine, "always", replace(policy, lookup=_from_text(name, found).lookup))


def expand(form: str, exits: Sequence[int]) -> list[str]:
    """One arm a name: ranges of levels and lengths, and * for exits, written out; other forms stay as they are.

    Raises:
        ValueError: a * without heads, or a range that does not rise.
    """
    looked = _LOOKUP.search(form)
    whole, at, heads = (form[: looked.start()] if looked else form).partition("@")
    kind, *parts = whole.split(":")
    if kind not in ("accuracy", "likely", "early", "fixed", "bare") or not parts:
        return [form]
    tail = at + heads + (looked[0] if looked else "")
    by_level = kind in ("accuracy", "likely", "early")
    firsts = _levels(form, parts[0]) if by_level else [parts[0]]
    if not by_level and parts[0] == "*":
        if not exits:
            raise ValueError(f"arm {form!r}: * stands for the exits of trained heads, and this engine has none")
        firsts = [str(exit_layer) for exit_layer in exits]
    rests = [":".join(parts[1:])]
    if len(parts) > 1 and "-" in parts[1]:
        first, last = _bounds(form, parts[1], int)
        rests = [":".join([str(length), *parts[2:]]) for length in range(first, last + 1)]
    return [":".join(part for part in (kind, first, rest) if part) + tail for first in firsts for rest in rests]


def _levels(form: str, text: str) -> list[str]:
    if "-" not in text:
        return [text]
    first, last = _bounds(form, text, float)
    return [f"{first + i * LEVEL_STEP:.2f}" for i in range(round((last - first) / LEVEL_STEP) + 1)]


def _bounds(form: str, text: str, number: Callable[[str], Number]) -> tuple[Number, Number]:
    try:
        first, last = (number(part) for part in text.split("-"))
    except ValueError:
        raise ValueError(f"arm {form!r}: {text!r} is no range such as 1-6 or 0.6-0.95") from None
    if not first <= last:
        raise ValueError(f"arm {form!r}: {text!r} is empty, expected a range that rises")
    return first, last


def _arm(name: str, engine: Engine, bare: Engine | None) -> Arm:
    kind, _, rest = name.partition(":")
    if name == "plain":
        return EngineArm(name, engine, speculation=False)
    if name in ("default", "always"):
        if not engine.policy.drafts and engine.plan is None:
            raise ValueError(
                f"arm {name!r} needs something to draft with, and this engine has nothing "
                f"({engine.warning or 'no head set'}); give --heads, or arms such as bare:12:4"
            )
        return EngineArm(name, engine, speculation=True if name == "default" else "always")
    if kind in ("accuracy", "likely") and rest:
        calibration = None if engine.heads is None else engine.heads.calibration
        if engine.heads is None or (kind == "accuracy" and calibration is None):
            raise ValueError(f"arm {name!r} needs calibrated heads, and this engine has none; give --heads")
        level, depth, layers, *more = [*rest.split(":"), "", ""]
        try:
            accuracy, max_depth = float(level), int(depth) if depth else DraftPolicy.max_depth
            asked = [int(exit_layer) for exit_layer in layers.split("+")] if layers else None
        except ValueError:
            raise ValueError(
                f"arm {name!r}: expected a level such as {kind}:0.9, {kind}:0.9:4 or {kind}:0.9:4:12+18"
            ) from None
        if any(more):
            raise ValueError(f"arm {name!r} has too many parts; expected {ARM_FORMS}")
        if calibration is not None and kind == "accuracy":
            policy = calibrated(calibration, asked, accuracy, max_depth=max_depth)
        else:
            asked = asked or list(engine.heads.exits)
            if missing := sorted(set(asked) - set(engine.heads.exits)):
                raise ValueError(f"arm {name!r}: no heads at exits {missing}, they are at {list(engine.heads.exits)}")
            policy = likely(asked, accuracy, max_depth=max_depth)
        return EngineArm(name, engine, "always", policy)
    if kind == "early" and rest:
        level, _, layers = rest.partition(":")
        try:
            accuracy, asked = float(level), [int(exit_layer) for exit_layer in layers.split("+")] if layers else None
        except ValueError:
            raise ValueError(f"arm {name!r}: expected a level such as early:0.95, or early:0.95:18+24") from None
        return EarlyExitArm(name, engine, calibrated_exits(engine.heads, accuracy, asked))
    if kind == "tree":
        return EngineArm(name, engine, "always", _tree(name, engine))
    if kind in ("fixed", "bare"):
        exit_layer, length = _exit_and_length(name)
        owner = engine if kind == "fixed" else bare
        exits = owner.heads.exits if owner is not None and owner.heads is not None else ()
        if owner is None or exit_layer not in exits:
            raise ValueError(f"arm {name!r}: no trained head at exit {exit_layer}; trained exits are {list(exits)}")
        return EngineArm(name, owner, "always", fixed_exit(exit_layer, length))
    raise ValueError(f"unknown arm {name!r}; expected {ARM_FORMS}")


def _tree(name: str, engine: Engine) -> DraftPolicy:
    if engine.heads is None or 0 not in engine.heads.exits:
        raise ValueError(f"arm {name!r} needs a head at exit 0 (recurrent), and this engine has none; give --heads")
    try:
        sizes, stop = name.split(":")[1:4], name.split(":")[4:]
        beam, branch, depth = map(int, sizes)
        return best_first(beam, branch, depth, stop=float(stop[0]) if stop else math.inf)
    except ValueError:
        raise ValueError(f"arm {name!r}: expected tree:BEAM:BRANCH:DEPTH[:ENTROPY], e.g. tree:4:4:6:3.5") from None


def _exit_and_length(name: str) -> tuple[int, int]:
    parts = name.split(":")
    if len(parts) != 3 or not parts[1].isdigit() or not parts[2].isdigit() or not 1 <= int(parts[2]) <= 15:
        raise ValueError(f"arm {name!r}: expected {parts[0]}:EXIT:LENGTH with a length of 1..15, e.g. {parts[0]}:12:4")
    return int(parts[1]), int(parts[2])


def _finite(threshold: float) -> float | None:
    """JSON has no infinity; None stands for 'no threshold'."""
    return threshold if abs(threshold) < float("inf") else None
