"""What a benchmark compares: ways to decode with one set of weights.

An arm turns prompt ids into an `Outcome`. Arms of our own engine must give the same tokens; the baselines of
`bench/baselines.py` are other programs and need not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from ..engine.config import ModelConfig
from ..engine.early_exit import calibrated_exits
from ..engine.engine import Engine, Speculation
from ..engine.gate import DraftPolicy, Lookup, best_first, calibrated, fixed_exit, likely
from ..engine.statistics import Statistics
from ..engine.tree import MAX_NODES
from ..heads.head_set import HeadSet, adapter_config
from .energy import meter_of
from .targets import FORMS, LOSSY, ThresholdsOf, kind_of, with_target

ARM_FORMS = (
    "plain, default, always, lookup[:NODES[:MATCH[:EACH]]], suffix likewise (drafts from the text, EACH for each token "
    "of a match; behind another form with +: heads where the text has none; +beside: both share the tree), "
    "tree:BEAM:BRANCH:DEPTH[:NODES[:ENTROPY]] (best first, from a head at exit 0), "
    "accuracy:LEVEL[:LENGTH[:EXIT+EXIT...]], likely:LEVEL[:LENGTH[:EXIT+EXIT...]] (by the probability of the whole "
    "draft), fixed:EXIT:LENGTH, bare:EXIT:LENGTH, "
    "early:LEVEL[:EXIT+EXIT...] (early exit, lossy); FORM@HEADS takes another head set, FORM%TARGET skips weights, "
    f"TARGET of {FORMS}; to sweep, LEVEL may be 0.6-0.95 (steps of 0.05), LENGTH 1-6, EXIT * (all that have heads)"
)
LEVEL_STEP = 0.05
PLAIN_ARM = "plain"
BARE = "bare:"  # among head sets: exits without training; no name that can be typed behind @
BRANCHES = {"lookup": 1, "suffix": 2, "beside": 1}
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
    plain: str  # the arm that decodes the same target plainly
    lossless: bool  # its tokens must equal that arm's

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
        alone: answer one prompt at a time also where others answer several side by side.

    Attributes:
        batch: prompts that it will be given side by side; `describe` says how so many draft.
    """

    lossless, plain = True, PLAIN_ARM

    def __init__(
        self,
        name: str,
        engine: Engine,
        speculation: Speculation = True,
        policy: DraftPolicy | None = None,
        alone: bool = False,
    ) -> None:
        self.name, self.engine, self.speculation, self.policy, self.alone = name, engine, speculation, policy, alone
        self.batch = 1
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

    def run_together(
        self, prompts: Sequence[list[int]], sampling: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[Outcome]:
        """Answer several prompts side by side. Each answer has an even share of the batch's times, so that sums over
        answers are time that passed; blocks are not timed."""
        before, start = self.meter.joules(), time.perf_counter()
        outs = self.engine.generate(list(prompts), seeds=seeds, **self.drafting(), **sampling)
        wall_ms, after, count = 1e3 * (time.perf_counter() - start), self.meter.joules(), len(outs)
        joules = None if before is None or after is None else (after - before) / count
        decode_ms = max(out.stats.decode_ms for out in outs)  # an answer's own runs until its last token
        return [
            Outcome(
                out.text, out.token_ids, wall_ms / count, decode_ms / count, len(out.token_ids), out.stats, out.error,
                exit_layers=tuple(out.exit_layers), joules=joules,
            )
            for out in outs
        ]  # fmt: skip

    def drafting(self) -> dict[str, Any]:
        """Options of `Engine.generate` that say how it decodes."""
        return {"speculation": self.speculation, "policy": self.policy}

    def describe(self) -> dict[str, Any]:
        policy, engine = self.policy or self.engine.policy_for(self.batch), self.engine
        target = {} if engine.verify == "dense" else {"verify": engine.verify}
        target |= {} if engine.teal_draft is None else {"draft": engine.draft}
        if self.speculation is False or not policy.drafts:
            return {"speculation": False, **target}
        looked = {} if policy.lookup is None else {"lookup": vars(policy.lookup)}
        return {
            **target,
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


def parse_arms(
    text: str,
    engine: Engine,
    heads_of: Callable[[str], HeadSet] | None = None,
    thresholds_of: ThresholdsOf | None = None,
) -> list[Arm]:
    """Arms from a comma-separated list of `ARM_FORMS`; plain is always there and first, for it is what the others are
    measured by, and so is the plain decoding of every other target.

    Args:
        heads_of: reads another head set of the same model, for forms with @.
        thresholds_of: reads the thresholds of "tda" or "teal", for forms with %.

    Raises:
        ValueError: a form that is unknown, or that this engine's heads cannot serve.
    """
    given = [part.strip() for part in text.split(",") if part.strip()]
    exits = engine.heads.exits if engine.heads is not None else ()
    every = [name for form in given for name in expand(form, exits)]
    names = list(dict.fromkeys(name for form in (PLAIN_ARM, *every) for name in (plain_of(form), form)))
    bare_exits = sorted({_exit_and_length(_parts(n)[0])[0] for n in names if n.startswith("bare:")})
    engines: dict[tuple[str, str], Engine] = {("", ""): engine}

    def engine_of(name: str, heads: str, target: str) -> Engine:
        if heads and heads != BARE and heads_of is None:
            raise ValueError(f"arm {name!r}: other heads are read by name only where the model has one")
        if target and thresholds_of is None:
            raise ValueError(f"arm {name!r}: thresholds are read only where the model has a name")
        if (heads, target) not in engines:
            own = bare_heads(engine.decoder.config, bare_exits) if heads == BARE else engine.heads
            if heads and heads != BARE:
                own = heads_of(heads)  # type: ignore[misc]
            if target:
                engines[heads, target] = with_target(engine, own, target, thresholds_of)  # type: ignore[arg-type]
            else:
                engines[heads, target] = with_heads(engine, own)  # type: ignore[arg-type]
        return engines[heads, target]

    arms: list[Arm] = []
    for name in names:
        form, heads, found, target = _parts(name)
        if form.startswith("bare:") and heads:
            raise ValueError(f"arm {name!r}: a bare exit is no head set's, leave @{heads} out")
        owner = engine_of(name, BARE if form.startswith("bare:") else heads, target)
        if form:
            arm = _arm(form, owner)
            arm = arm if found is None else _with_text(arm, name, found)
        else:
            assert found is not None
            arm = EngineArm(name, owner, "always", _from_text(name, found))
        arm.name, arm.plain = name, plain_of(name)
        if arm.name == arm.plain != PLAIN_ARM:  # the text of another model, compared with the whole one's
            arm.lossless, arm.plain = False, PLAIN_ARM
        arms.append(arm)
    return arms


def plain_of(name: str) -> str:
    """The arm that decodes an arm's target plainly."""
    target = name.partition("%")[2]
    return f"{PLAIN_ARM}%{target}" if kind_of(target) in LOSSY else PLAIN_ARM


def _parts(name: str) -> tuple[str, str, re.Match[str] | None, str]:
    """Form, head set, what drafts from the text, target."""
    whole, _, target = name.partition("%")
    form, _, heads = _LOOKUP.sub("", whole).partition("@")
    return form, heads, _LOOKUP.search(whole), target


# `lookup` or `suffix` with sizes, alone or behind another form and a +; `beside` behind one
_LOOKUP = re.compile(r"(?:^|\+)(lookup|suffix|beside)((?::[^:+@]*)*)$")


def _from_text(name: str, found: re.Match[str]) -> DraftPolicy:
    kind, shared = found[1], found[1] == "beside"
    form = f"{kind}[:NODES[:MATCH[:EACH]]], e.g. {kind}:8:2"
    if shared:
        form = "beside[:NODES[:MATCH]] behind heads, e.g. tree:4:4:4+beside:15"
    try:
        sizes = [int(part) for part in found[2].split(":")[1:]]
        nodes, match, each = [*sizes, *(Lookup.max_nodes, Lookup.min_match, Lookup.per_match)[len(sizes) :]]
        if shared and (len(sizes) > 2 or not found[0].startswith("+")):
            raise ValueError
    except ValueError:
        raise ValueError(f"arm {name!r}: expected {form}") from None
    return DraftPolicy(lookup=Lookup(match, each, nodes, BRANCHES[kind], beside=shared))


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
    head, percent, target = form.partition("%")
    looked = _LOOKUP.search(head)
    whole, at, heads = (head[: looked.start()] if looked else head).partition("@")
    kind, *parts = whole.split(":")
    if kind not in ("accuracy", "likely", "early", "fixed", "bare") or not parts:
        return [form]
    tail = at + heads + (looked[0] if looked else "") + percent + target
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


def _arm(name: str, engine: Engine) -> Arm:
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
        exits = engine.heads.exits if engine.heads is not None else ()
        if exit_layer not in exits:
            raise ValueError(f"arm {name!r}: no trained head at exit {exit_layer}; trained exits are {list(exits)}")
        return EngineArm(name, engine, "always", fixed_exit(exit_layer, length))
    raise ValueError(f"unknown arm {name!r}; expected {ARM_FORMS}")


def _tree(name: str, engine: Engine) -> DraftPolicy:
    if engine.heads is None or 0 not in engine.heads.exits:
        raise ValueError(f"arm {name!r} needs a head at exit 0 (recurrent), and this engine has none; give --heads")
    parts = name.split(":")[1:]
    try:
        beam, branch, depth, nodes = map(int, [*parts[:4], str(MAX_NODES - 1)][:4])
        (stop,) = map(float, parts[4:] or ("inf",))
    except ValueError:
        raise ValueError(
            f"arm {name!r}: expected tree:BEAM:BRANCH:DEPTH[:NODES[:ENTROPY]], e.g. tree:4:4:6 or tree:4:4:6:15:3.5"
        ) from None
    return best_first(beam, branch, depth, nodes, stop=stop)


def _exit_and_length(name: str) -> tuple[int, int]:
    parts = name.split(":")
    if len(parts) != 3 or not parts[1].isdigit() or not parts[2].isdigit() or not 1 <= int(parts[2]) <= 15:
        raise ValueError(f"arm {name!r}: expected {parts[0]}:EXIT:LENGTH with a length of 1..15, e.g. {parts[0]}:12:4")
    return int(parts[1]), int(parts[2])


def _finite(threshold: float) -> float | None:
    """JSON has no infinity; None stands for 'no threshold'."""
    return threshold if abs(threshold) < float("inf") else None
