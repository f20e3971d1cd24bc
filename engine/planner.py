"""The planner: which way of drafting is the fastest here, if any.

Costs measured on this machine (`costs.py`) and the heads' rehearsal give every policy its expected tokens per second
(`expectation.py`) over the rehearsed texts and as much text that is harder for the heads; the fastest is taken, or
plain decoding; in captured rounds with the text beside its heads, where that costs little. A plan is kept in the cache
folder under a fingerprint of everything that it depends on, and `load` uses it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..heads.calibration import JOINT_LEVELS, Calibration
from ..heads.head_set import HeadSet
from ..heads.rehearsal import Rehearsal
from .costs import SECONDS, measure_costs
from .expectation import Costs, Expected, expect
from .gate import BESIDE, PLAIN, WHOLE, DraftPolicy, Gate, Lookup, best_first, calibrated, fixed_exit
from .pretrained import cache_dir

if TYPE_CHECKING:
    from .engine import Engine

PLAN_VERSION = 8
# Of the tokens that heads had right in the rehearsal, how many they have right on harder text. Users' text is rarely as
# easy as a head's own held-out prompts, and then long drafts lose most and drafts from the text nothing (docs/log.md).
KEPT = 0.75
# Of the speed, what drafts from the text beside heads may cost in captured rounds: held-out prompts hold little to
# copy, users' often do, and there such drafts bring up to a third (docs/log.md).
TEXT_MAY_COST = 0.05
MOST_EXITS = 3  # asked in turn
DEPTHS = (1, 2, 3, 4, 6, 8)
STOPS = (1.0, 2.0, 3.0, 4.0, math.inf)  # nats, of a head at exit 0
LOOKUPS = tuple(Lookup(match, max_nodes=nodes) for nodes in (3, 5, 8) for match in (1, 2, 3))
LONGEST = 6  # chain that the plan may go on to while running
MOST_MIXED = 12  # policies of heads that lookups are set beside: the best without them
NUM_ALTERNATIVES = 20


@dataclass(frozen=True)
class Choice:
    """One policy and what is expected of it (`over_both`). `name` is a bench arm's where there is one."""

    name: str
    policy: DraftPolicy
    expected: Expected

    @property
    def tokens_per_second(self) -> float:
        return self.expected.tokens_per_second


@dataclass(frozen=True)
class Plan:
    """What was measured and chosen.

    Attributes:
        chosen: see `choose`.
        choices: the best first, at most `NUM_ALTERNATIVES`, the chosen one and plain decoding always
            among them.
        rungs: length -> expected of the chosen policy's heads with chains or trees so long (`engine/ladder.py`); empty
            where heads do not draft or a gate ends their chains, and on a GPU where captured rounds cannot draft them.
        num_considered: policies that were compared.
        seconds: that measuring and choosing took.
    """

    fingerprint: str
    costs: Costs
    chosen: Choice
    choices: tuple[Choice, ...]
    num_considered: int
    seconds: float
    rungs: Mapping[int, Expected] = field(default_factory=dict)

    @property
    def plain(self) -> Choice:
        return _plain(self.choices)

    @property
    def speedup(self) -> float:
        """Expected, of the chosen policy against plain decoding."""
        return self.chosen.tokens_per_second / self.plain.tokens_per_second


def plan(engine: Engine, seconds: float = SECONDS, costs: Costs | None = None) -> Plan:
    """Measure and choose; nothing is stored or changed.

    Args:
        engine: with calibrated heads.
        costs: measured before; None measures for about `seconds`.

    Raises:
        ValueError: no heads, or heads that were not rehearsed.
    """
    start = time.perf_counter()
    if engine.heads is None:
        raise ValueError("this engine has no heads: there is nothing to plan; load with heads=...")
    if engine.heads.calibration is None or engine.heads.calibration.rehearsal is None:
        raise ValueError(
            "these heads were not rehearsed, so nothing is known of their drafts: run `skipstone calibrate`"
        )
    costs = measure_costs(engine, seconds) if costs is None else costs
    choices = rank(engine.heads.calibration, costs)
    chosen = choose(choices, captured=not costs.reuse)
    moves = engine.fused is None or chosen.policy.exits == (0,)
    rungs = rungs_of(chosen.policy, engine.heads.calibration.rehearsal, costs) if moves else {}
    seconds = time.perf_counter() - start
    return Plan(fingerprint(engine), costs, chosen, _shown(choices, chosen), len(choices), seconds, rungs)


def rungs_of(policy: DraftPolicy, rehearsal: Rehearsal, costs: Costs) -> dict[int, Expected]:
    """What is expected of a policy's heads by length of their chains or depth of their trees, see `Plan.rungs`. Chains
    that a gate ends have their length from it, and cost what they drafted, not what they might have: they have none."""
    heads = replace(policy, lookup=None)
    gated = not heads.beam and any(math.isfinite(gate.low) for gate in heads.gates.values())
    if not heads.exits or gated:
        return {}
    lengths: Iterable[int] = range(1, LONGEST + 1)
    if heads.beam:
        lengths = sorted(depth for depth, nodes in rehearsal.trees if nodes == heads.max_nodes)
    play = over_both(rehearsal, costs)
    return {length: play(replace(heads, max_depth=length)) for length in lengths}


def over_both(rehearsal: Rehearsal, costs: Costs) -> Callable[[DraftPolicy], Expected]:
    """What is expected of policies over as many tokens of the rehearsed texts and of harder ones (`KEPT`)."""
    texts = rehearsal, rehearsal.harder(KEPT)

    def play(policy: DraftPolicy) -> Expected:
        each = [expect(policy, text, costs) for text in texts]
        rounds = sum(1 / own.tokens for own in each)  # a token of either
        drafted, ms = sum(own.drafted / own.tokens for own in each), sum(own.ms / own.tokens for own in each)
        return Expected(len(each) / rounds, drafted / rounds, ms / rounds)

    return play


def rank(calibration: Calibration, costs: Costs) -> list[Choice]:
    """Every policy considered, the fastest first: of heads, of the text, and both. The text is set in front of heads'
    chains; in captured rounds (not `Costs.reuse`) beside chains and trees from exit 0, for the host grows the rest, and
    drafts as much as a tile holds."""
    rehearsal = calibration.rehearsal
    if rehearsal is None:
        raise ValueError("this calibration holds no rehearsal: run `skipstone calibrate`")
    play = over_both(rehearsal, costs)

    def ranked(named: Iterable[tuple[str, DraftPolicy]]) -> list[Choice]:
        return sorted((Choice(name, own, play(own)) for name, own in named), key=lambda own: -own.tokens_per_second)

    found = ranked(candidates(calibration))
    if rehearsal.text is None:
        return found

    def follows(policy: DraftPolicy) -> bool:
        return bool(policy.exits) and not policy.beam if costs.reuse else policy.exits == (0,)

    best = [choice for choice in found if follows(choice.policy)][:MOST_MIXED]
    alone, mixed = (LOOKUPS, LOOKUPS) if costs.reuse else ((WHOLE,), (BESIDE,))
    looked = [(_name_of(own), replace(PLAIN, lookup=own)) for own in alone]
    looked += [
        (f"{choice.name}+{_name_of(own)}", replace(choice.policy, lookup=own))
        for choice, own in itertools.product(best, mixed)
    ]
    return sorted([*found, *ranked(looked)], key=lambda choice: -choice.tokens_per_second)


def _name_of(lookup: Lookup) -> str:
    if lookup.beside:
        return f"beside:{lookup.max_nodes}:{lookup.min_match}"
    each = "" if lookup.per_match == Lookup.per_match else f":{lookup.per_match}"
    return f"lookup:{lookup.max_nodes}:{lookup.min_match}{each}"


def choose(choices: Sequence[Choice], captured: bool = False) -> Choice:
    """The fastest; plain decoding is one of them. `captured`: in captured rounds the text drafts beside its heads,
    unless that costs more than `TEXT_MAY_COST`."""
    best = max(choices, key=lambda choice: choice.tokens_per_second)
    same = [own for own in choices if own.policy.lookup and replace(own.policy, lookup=None) == best.policy]
    if not (captured and same and best.policy.drafts):
        return best
    mixed = max(same, key=lambda choice: choice.tokens_per_second)
    return mixed if mixed.tokens_per_second >= (1.0 - TEXT_MAY_COST) * best.tokens_per_second else best


def _shown(choices: Sequence[Choice], chosen: Choice) -> tuple[Choice, ...]:
    needed = {id(chosen), id(_plain(choices))}
    others = [choice for choice in choices if id(choice) not in needed][: NUM_ALTERNATIVES - len(needed)]
    shown = needed | {id(choice) for choice in others}
    return tuple(choice for choice in choices if id(choice) in shown)


def _plain(choices: Sequence[Choice]) -> Choice:
    return next(choice for choice in choices if not choice.policy.drafts)


def candidates(calibration: Calibration) -> Iterator[tuple[str, DraftPolicy]]:
    """Everything of heads that is compared: exits x thresholds x budgets, trees, plain decoding."""
    rehearsal = calibration.rehearsal
    assert rehearsal is not None
    yield "plain", PLAIN
    if rehearsal.chain_entropy is not None:
        for depth, stop in itertools.product(DEPTHS, STOPS):
            if depth <= len(rehearsal.chain_entropy):
                name = f"fixed:0:{depth}" if stop == math.inf else f"chain:{depth}:{stop:g}"
                yield name, DraftPolicy((0,), {0: Gate(stop, stop)}, max_depth=depth, branch=1)
    for depth, nodes in sorted(rehearsal.trees):
        name = f"tree:{rehearsal.beam}:{rehearsal.branch}:{depth}:{nodes}"
        yield name, best_first(rehearsal.beam, rehearsal.branch, depth, nodes)
    trunk = sorted(rehearsal.entropy)
    for exit_layer, depth in itertools.product(trunk, DEPTHS):
        yield f"fixed:{exit_layer}:{depth}", fixed_exit(exit_layer, depth)
    for count in range(1, MOST_EXITS + 1):
        for exits, level in itertools.product(itertools.combinations(trunk, count), JOINT_LEVELS):
            policy = calibrated(calibration, exits, level)
            if policy.exits != exits:
                continue  # a closed gate: the same as without that exit
            for depth in DEPTHS:
                yield f"accuracy:{level:.2f}:{depth}:{'+'.join(map(str, exits))}", replace(policy, max_depth=depth)


# ---- kept in the cache folder


def fingerprint(engine: Engine, batch: int = 1) -> str:
    """Hex digest of what a plan depends on: machine, versions, model, heads, settings."""
    decoder, heads = engine.decoder, engine.heads
    device = decoder.device
    about = {
        "version": PLAN_VERSION,
        "machine": [platform.node(), platform.machine(), _processor(), len(_cores()), torch.get_num_threads()],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": [torch.__version__, _version("triton"), platform.python_version()],
        "model": [engine.model_id, _digest(decoder.embedding.flatten()[:: max(1, decoder.embedding.numel() // 4096)])],
        "layers": [decoder.config.num_layers, decoder.config.hidden_size, decoder.config.intermediate_size],
        "dtype": str(decoder.dtype),
        "heads": None if heads is None else heads_digest(heads),
        "settings": [engine.deterministic, engine.fused is not None, engine.prefill, engine.verify, engine.draft],
        "batch": batch,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def heads_digest(heads: HeadSet) -> str:
    """Of a head set's weights and calibration."""
    digest = hashlib.sha256()
    for layer, head in heads.heads.items():
        for name, parameter in head.named_parameters():
            digest.update(f"{layer}.{name}".encode())
            digest.update(_digest(parameter).encode())
    digest.update(heads.calibration.to_json().encode() if heads.calibration is not None else b"")
    return digest.hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def plan_path(digest: str) -> Path:
    """Where a plan with this fingerprint is kept."""
    return cache_dir() / "plans" / f"{digest[:32]}.json"


def store_plan(made: Plan) -> Path:
    """Keep a plan for later loads.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = plan_path(made.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(to_document(made), allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def follow_plan(engine: Engine, measure: bool = False) -> Plan | None:
    """Let an engine draft as its kept plan says; nothing changes where there is none, or where nothing can be planned.

    Args:
        measure: make a plan and keep it, where none was kept.
    """
    if engine.heads is None or engine.warning is not None or (engine.verify, engine.draft) != ("dense", "dense"):
        return None
    made = cached_plan(engine)
    if made is None and measure:
        made = plan(engine)
        store_plan(made)
    if made is not None:
        engine.plan, engine._policy, engine._paces = made, None, {}
    return made


def cached_plan(engine: Engine) -> Plan | None:
    """The plan of an engine like this one, if one was kept; a file that cannot be read counts as none."""
    digest = fingerprint(engine)
    try:
        made = from_document(json.loads(plan_path(digest).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = () if engine.heads is None else engine.heads.exits
    return made if made.fingerprint == digest and set(made.chosen.policy.exits) <= set(known) else None


def to_document(made: Plan) -> dict[str, Any]:
    """A plan in types that JSON holds; infinite thresholds are strings."""
    return {
        "version": PLAN_VERSION,
        "fingerprint": made.fingerprint,
        "seconds": made.seconds,
        "num_considered": made.num_considered,
        "costs": made.costs.to_document(),
        "chosen": made.chosen.name,
        "expected_speedup": made.speedup,
        "rungs": [[length, rung.tokens, rung.drafted, rung.ms] for length, rung in made.rungs.items()],
        "choices": [
            {
                "name": choice.name,
                "policy": _policy_to(choice.policy),
                "tokens_per_verification": choice.expected.tokens,
                "drafted": choice.expected.drafted,
                "round_ms": choice.expected.ms,
                "tokens_per_second": choice.tokens_per_second,
            }
            for choice in made.choices
        ],
    }


def from_document(document: Mapping[str, Any]) -> Plan:
    """Raises KeyError, TypeError or ValueError where it is not a plan of this version."""
    if document["version"] != PLAN_VERSION:
        raise ValueError(f"plan version is {document['version']!r}, expected {PLAN_VERSION}")
    choices = tuple(
        Choice(
            c["name"],
            _policy_from(c["policy"]),
            Expected(c["tokens_per_verification"], c["drafted"], c["round_ms"]),
        )
        for c in document["choices"]
    )
    chosen = next((choice for choice in choices if choice.name == document["chosen"]), None)
    if chosen is None or all(choice.policy.drafts for choice in choices):
        raise ValueError("a plan without its choice, or without plain decoding")
    return Plan(
        document["fingerprint"], Costs.from_document(document["costs"]), chosen, choices,
        int(document["num_considered"]), float(document["seconds"]),
        {int(length): Expected(*map(float, rung)) for length, *rung in document["rungs"]},
    )  # fmt: skip


def _policy_to(policy: DraftPolicy) -> dict[str, Any]:
    gates = {str(e): [_stored(g.low), _stored(g.high)] for e, g in policy.gates.items()}
    sizes = {name: getattr(policy, name) for name in ("max_depth", "max_nodes", "branch", "beam")}
    lookup = None if policy.lookup is None else vars(policy.lookup)
    return {"exits": list(policy.exits), "gates": gates, **sizes, "lookup": lookup}


def _policy_from(document: Mapping[str, Any]) -> DraftPolicy:
    gates = {int(e): Gate(float(low), float(high)) for e, (low, high) in document["gates"].items()}
    sizes: dict[str, Any] = {name: int(document[name]) for name in ("max_depth", "max_nodes", "branch", "beam")}
    lookup = None if document["lookup"] is None else Lookup(**document["lookup"])
    return DraftPolicy(tuple(document["exits"]), gates, **sizes, lookup=lookup)


def _stored(threshold: float) -> float | str:
    return threshold if math.isfinite(threshold) else str(threshold)
