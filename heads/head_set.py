"""The heads of one base model: by exit layer, with their draft vocabulary and calibration, as one folder.

config.json         sizes, heads, how they were trained
heads.safetensors   exit.{layer}.{parameter}, draft_ids
calibration.json    see `calibration.py`
manifest.json       SHA-256 of the three, base model, tokenizer hash, format version
README.md           the card, for people; not hashed, so it may be edited
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise_safetensors
from torch import Tensor

from .artefact import ArtefactError, parse_tensors, read_folder, write_folder
from .base import ExitHead, HeadSpec, Projection, build_head
from .calibration import Calibration
from .fingerprint import BaseIdentity
from .stateful import StatefulHead

FORMAT_VERSION = 1
DEFAULT = "default"
PREFERRED = ("recurrent", "block", "adapter", "linear")  # of several shipped sets: the cheaper draft first
CARD = "README.md"
HASHED = {"config.json", "heads.safetensors", "calibration.json"}


@dataclass(frozen=True)
class HeadSetConfig:
    """Sizes of the base and the heads on it.

    Args:
        hidden_size, vocab_size, num_layers: of the base model.
        heads: one spec an exit layer.
        draft_vocab: Vd, how many token ids the heads can draft; None is all of them.
        training: provenance (data, steps, versions), recorded and never interpreted.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    heads: tuple[HeadSpec, ...]
    draft_vocab: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = [spec.exit_layer for spec in self.heads]
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"exit layers are {layers}, expected at least one and no layer twice")
        if max(layers) >= self.num_layers:
            raise ValueError(f"exit layers are {layers}, expected below the model's {self.num_layers} layers")
        taps = [layer for spec in self.heads for layer in spec.options.get("taps", ())]
        if max(taps, default=0) > self.num_layers:
            raise ValueError(f"taps are {taps}, expected at most the model's {self.num_layers} layers")
        if self.draft_vocab is not None and not 1 <= self.draft_vocab <= self.vocab_size:
            raise ValueError(f"draft_vocab is {self.draft_vocab}, expected within 1..{self.vocab_size}")

    @property
    def num_outputs(self) -> int:
        return self.vocab_size if self.draft_vocab is None else self.draft_vocab


class HeadSet:
    """Heads by exit layer.

    Args:
        config: sizes and specs.
        draft_ids: long `[Vd]`, distinct token ids in the order of the heads' outputs; None for the whole vocabulary.
        base: the model they belong to.
        calibration: thresholds, or None when not measured.
    """

    def __init__(
        self,
        config: HeadSetConfig,
        draft_ids: Tensor | None = None,
        base: BaseIdentity | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        _check_draft_ids(config, draft_ids)
        self.config, self.base, self.calibration = config, base, calibration
        self.draft_ids = None if draft_ids is None else draft_ids.long()
        self.heads: dict[int, ExitHead] = {
            spec.exit_layer: build_head(spec, config.hidden_size, config.num_outputs)
            for spec in sorted(config.heads, key=lambda spec: spec.exit_layer)
        }

    @property
    def exits(self) -> tuple[int, ...]:
        """Exit layers, ascending."""
        return tuple(self.heads)

    @property
    def layers_read(self) -> tuple[int, ...]:
        """Layers whose residual streams the heads read: their exits and taps, ascending."""
        taps = {layer for head in self.heads.values() if isinstance(head, StatefulHead) for layer in head.taps}
        return tuple(sorted({*self.heads, *taps}))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for head in self.heads.values() for p in head.parameters())

    def initialise(self, projection: Projection, weights: Mapping[str, Tensor] | None = None) -> None:
        """Start every head from the base's weights where its kind does so, before training; see `ExitHead`."""
        restricted = projection.restrict(self.draft_ids)
        for head in self.heads.values():
            head.initialise(restricted, weights)

    def attach(self, projection: Projection) -> HeadSet:
        """Bind all heads to the base: LM head rows gathered once and shared, heads on the projection's device."""
        device = projection.head_weight.device
        if self.draft_ids is not None:
            self.draft_ids = self.draft_ids.to(device)
        restricted = projection.restrict(self.draft_ids)
        for head in self.heads.values():
            head.to(device).attach(restricted)
        return self

    def restricted(self, draft_ids: Tensor) -> HeadSet:
        """Copies of the heads that draft `draft_ids` only, not attached and not calibrated.

        Raises:
            ValueError: ids that these heads do not draft, or heads with an output layer of their own.
        """
        ids = draft_ids.to("cpu").long()
        if self.draft_ids is not None and not bool(torch.isin(ids, self.draft_ids.cpu()).all()):
            raise ValueError(f"some of {len(ids)} ids are not among the {len(self.draft_ids)} that the heads draft")
        found = HeadSet(replace(self.config, draft_vocab=len(ids)), ids, self.base)
        own, new = self._parameters(), found._parameters()
        other = sorted(name for name in own if own[name].shape != new[name].shape)
        if other:
            raise ValueError(f"heads with outputs of their own cannot be restricted: {', '.join(other)}")
        with torch.no_grad():
            for name, parameter in new.items():
                parameter.copy_(own[name])
        return found

    def logits(self, exit_layer: int, hidden: Tensor, state: Any = None) -> Tensor:
        """Residual stream `[N, D]` fp32 after `exit_layer` layers -> logits `[N, num_outputs]`."""
        return self.heads[exit_layer](hidden, state)

    def token_ids(self, outputs: Tensor) -> Tensor:
        """Indices into a head's outputs -> token ids, same shape."""
        return outputs if self.draft_ids is None else self.draft_ids[outputs]

    def gate(self, exit_layer: int, accuracy: float) -> tuple[float, float]:
        """`(low, high)` in nats from the calibration.

        Raises:
            ValueError: the set is not calibrated.
        """
        if self.calibration is None:
            raise ValueError("this head set has no calibration: run the calibration, or give thresholds yourself")
        return self.calibration.gate(exit_layer, accuracy)

    def save(
        self, folder: str | Path, dtype: torch.dtype = torch.bfloat16, card: str = "", overwrite: bool = False
    ) -> None:
        """Write the folder atomically, weights in `dtype`.

        Raises:
            ValueError: the base is not named.
            FileExistsError: the folder exists and `overwrite` is False.
            ArtefactError: a weight is NaN or Inf.
        """
        folder = Path(folder)
        if self.base is None:
            raise ValueError("the head set names no base model: set `base` before saving")
        if folder.exists() and not overwrite:
            raise FileExistsError(f"{folder} exists; pass overwrite=True or choose another folder")
        tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in self._parameters().items()}
        if self.draft_ids is not None:
            tensors["draft_ids"] = self.draft_ids.to("cpu", torch.int32)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ArtefactError(f"head tensor {name} holds NaN or Inf after rounding to {dtype}; nothing was saved")
        calibration = self.calibration or Calibration({})
        files = {
            "config.json": _config_to_json(self.config),
            "heads.safetensors": serialise_safetensors(tensors),
            "calibration.json": calibration.to_json().encode(),
            CARD: (card or _plain_card(self)).encode(),
        }
        manifest = {"format_version": FORMAT_VERSION, "base": vars(self.base)}
        write_folder(folder, files, manifest, HASHED)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        base: BaseIdentity | None = None,
        allow_base_mismatch: bool = False,
        calibrated: bool = True,
    ) -> HeadSet:
        """Read a folder strictly. Weights come back in fp32; `attach` brings them to the base's dtype.

        Args:
            base: the model the heads will run on; None skips that check (inspection).
            allow_base_mismatch: accept a base with other weights, for example a fine-tuned one. Output stays right,
                fewer drafts are accepted. Sizes must still match.
            calibrated: False leaves the calibration unread, which may then be of any version: to measure it again.

        Raises:
            ArtefactError: damaged, incomplete, unexpected, not finite, another format version, or another base.
        """
        folder = Path(folder)
        manifest, files = read_folder(folder, HASHED)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ArtefactError(f"{folder} has format version {version!r}; this release reads {FORMAT_VERSION}")
        try:
            made_for = BaseIdentity(**manifest["base"])
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"{folder}: the manifest's base is not understood ({error})") from error
        if base is not None and not allow_base_mismatch:
            _check_base(folder, made_for, base)
        config = _config_from_json(files["config.json"], folder)
        tensors = parse_tensors(files["heads.safetensors"], str(folder / "heads.safetensors"))
        draft_ids = tensors.pop("draft_ids", None)
        calibration = Calibration.from_json(files["calibration.json"].decode()) if calibrated else Calibration({})
        try:
            heads = cls(config, draft_ids, made_for, calibration if calibration.exits else None)
        except ValueError as error:
            raise ArtefactError(f"{folder}: {error}") from error
        unknown = sorted(set(calibration.exits) - set(heads.exits))
        if unknown:
            raise ArtefactError(f"{folder}: calibration.json has exits {unknown}, the heads are {list(heads.exits)}")
        heads._fill(tensors, folder)
        return heads

    @classmethod
    def default_for(cls, base: BaseIdentity, root: Path | None = None, kind: str = DEFAULT) -> HeadSet | None:
        """The shipped set for this base (same fingerprint), or None; arguments as in `shipped_folder_for`."""
        folder = shipped_folder_for(base, root, kind)
        return None if folder is None else cls.load(folder, base)

    def _parameters(self) -> dict[str, Tensor]:
        return {f"exit.{layer}.{n}": p for layer, head in self.heads.items() for n, p in head.named_parameters()}

    def _fill(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        parameters = self._parameters()
        missing, unexpected = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
        if missing or unexpected:
            raise ArtefactError(f"{folder}: heads.safetensors misses {missing} and has unexpected {unexpected}")
        for name, parameter in parameters.items():
            given, expected = tuple(tensors[name].shape), tuple(parameter.shape)
            if given != expected:
                raise ArtefactError(f"{folder}: tensor {name} has shape {given}, the configuration expects {expected}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])


def shipped_folders(root: Path | None = None) -> list[Path]:
    """Folders of the head sets that came with the package, sorted by name."""
    root = Path(str(resources.files(__package__))) / "pretrained" if root is None else root
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if (path / "manifest.json").is_file())


def shipped_folder_for(base: BaseIdentity, root: Path | None = None, kind: str = DEFAULT) -> Path | None:
    """The folder of the shipped set that was trained on these weights, or None.

    Args:
        root: where sets lie; None is the package's own folder.
        kind: of its heads; "default" takes the set that drafts fastest, by the order of `PREFERRED`.
    """
    found: dict[str, Path] = {}
    for folder in shipped_folders(root):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["base"]["fingerprint"] == base.fingerprint:
            config = json.loads((folder / "config.json").read_bytes())
            found.setdefault(config["heads"][0]["kind"], folder)
    wanted = PREFERRED if kind == DEFAULT else (kind,)
    return next((found[one] for one in wanted if one in found), None)


def store_calibration(folder: str | Path, calibration: Calibration, out: str | Path | None = None) -> None:
    """Write a head set's folder again with another calibration; weights and card stay as they are, byte for byte.

    Args:
        out: another folder to write, which must not exist; None replaces `folder`.

    Raises:
        FileExistsError: `out` exists and is not `folder`.
        ArtefactError: the folder is damaged.
    """
    folder = Path(folder)
    target = folder if out is None else Path(out)
    if target.exists() and target.resolve() != folder.resolve():
        raise FileExistsError(f"{target} exists; choose another folder")
    manifest, files = read_folder(folder, HASHED)
    files["calibration.json"] = calibration.to_json().encode()
    if (folder / CARD).is_file():
        files[CARD] = (folder / CARD).read_bytes()
    del manifest["files"]
    write_folder(target, files, manifest, HASHED)


def adapter_config(
    exits: Sequence[int], hidden_size: int, vocab_size: int, num_layers: int, width: int, draft_vocab: int | None
) -> HeadSetConfig:
    """Adapters of one width at the given exits."""
    specs = tuple(HeadSpec("adapter", layer, {"width": width}) for layer in exits)
    return HeadSetConfig(hidden_size, vocab_size, num_layers, specs, draft_vocab)


def _check_draft_ids(config: HeadSetConfig, draft_ids: Tensor | None) -> None:
    if (draft_ids is None) != (config.draft_vocab is None):
        given = "absent" if draft_ids is None else "given"
        raise ValueError(f"draft_vocab is {config.draft_vocab} but draft_ids is {given}")
    if draft_ids is None:
        return
    if draft_ids.is_floating_point() or tuple(draft_ids.shape) != (config.draft_vocab,):
        raise ValueError(
            f"draft_ids is {draft_ids.dtype} {tuple(draft_ids.shape)}, expected integers ({config.draft_vocab},)"
        )
    if int(draft_ids.min()) < 0 or int(draft_ids.max()) >= config.vocab_size:
        raise ValueError(
            f"draft_ids span {int(draft_ids.min())}..{int(draft_ids.max())}, the vocabulary has {config.vocab_size}"
        )
    if len(torch.unique(draft_ids)) != len(draft_ids):
        raise ValueError("draft_ids holds an id twice: a head's outputs must be distinct tokens")


def _check_base(folder: Path, made_for: BaseIdentity, base: BaseIdentity) -> None:
    if made_for.fingerprint != base.fingerprint:
        raise ArtefactError(
            f"{folder} was trained on {made_for.model_id} (fingerprint {made_for.fingerprint[:12]}), the model is "
            f"{base.model_id} ({base.fingerprint[:12]}): its weights differ. If it is a fine-tuned version, pass "
            "allow_base_mismatch=True (output stays exact, acceptance may fall); otherwise train heads for it"
        )
    if made_for.tokenizer_sha256 and base.tokenizer_sha256 and made_for.tokenizer_sha256 != base.tokenizer_sha256:
        raise ArtefactError(
            f"{folder} was trained with tokenizer {made_for.tokenizer_sha256[:12]}, the model's is "
            f"{base.tokenizer_sha256[:12]}; the weights are the same, so one of them was read wrongly (releases of "
            "transformers read some vocabularies differently); allow_base_mismatch=True takes the heads all the same"
        )


def _config_to_json(config: HeadSetConfig) -> bytes:
    heads = [{"kind": s.kind, "exit_layer": s.exit_layer, "options": dict(s.options)} for s in config.heads]
    return (json.dumps({**vars(config), "heads": heads, "training": dict(config.training)}, indent=1) + "\n").encode()


def _config_from_json(data: bytes, folder: Path) -> HeadSetConfig:
    try:
        document = json.loads(data)
        specs = tuple(HeadSpec(**entry) for entry in document.pop("heads"))
        return HeadSetConfig(**document, heads=specs)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtefactError(f"{folder / 'config.json'} is not a head set configuration: {error}") from error


def _plain_card(heads: HeadSet) -> str:
    assert heads.base is not None
    kinds = ", ".join(f"{spec.kind} at {spec.exit_layer}" for spec in heads.config.heads)
    return (
        f"# Exit heads for {heads.base.model_id}\n\n{kinds} of {heads.config.num_layers} layers; "
        f"{heads.num_parameters:,} parameters; draft vocabulary {heads.config.num_outputs:,} tokens.\n"
    )
