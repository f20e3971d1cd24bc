"""From a model's name to an engine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..heads.artefact import ArtefactError
from ..heads.base import head_kinds
from ..heads.fingerprint import BaseIdentity, base_fingerprint, tokenizer_sha256
from ..heads.head_set import HeadSet, shipped_folder_for
from .engine import Engine
from .model import Decoder
from .planner import follow_plan
from .pretrained import Pretrained, load_pretrained
from .sparsity.tda import Tda, shipped_for
from .sparsity.teal import Teal


def load(
    model: str | os.PathLike[str],
    *,
    heads: str | os.PathLike[str] | HeadSet | None = "default",
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    deterministic: bool = True,
    verify: str = "dense",
    sparsity: str | os.PathLike[str] | Tda | None = None,
    draft: str = "dense",
    teal: str | os.PathLike[str] | Teal | None = None,
    teal_level: float | None = None,
    prefill: str = "auto",
    plan: str = "cached",
    revision: str | None = None,
    allow_base_mismatch: bool = False,
    progress: bool = True,
) -> Engine:
    """Load a model and its exit heads.

    Args:
        model: a packaged model's name ("smollm2-135m-instruct"), a hub id, a folder or a .gguf file.
        heads: "default" takes the shipped set made for these weights, if there is one; a kind ("recurrent", "adapter")
            takes the shipped set of that kind; a folder or a `HeadSet`; None decodes plainly.
        dtype: of weights and matmuls: torch.bfloat16, float16 or float32.
        device: None takes a GPU if there is one.
        deterministic: see `Engine`.
        verify: the target model: "dense" is the whole model; "tda" skips neurons of each sequence by its prompt; "teal"
            drops every row's small inputs behind the prompt, on a GPU without speculation (both lossy against the whole
            model, lossless against their own plain decoding).
        sparsity: of "tda": a folder that `skipstone calibrate --sparsity tda` wrote, or thresholds; None: the shipped
            ones of this model.
        draft: what runs the layers before an exit while drafting: "dense" is the target model, and verification goes on
            from there; "teal" drops small inputs, and verification runs these layers again, so the output stays.
        teal: of verify="teal" and draft="teal": a folder of `skipstone calibrate --sparsity teal`, or thresholds.
        teal_level: share of the weights that are not read, one of the thresholds' levels; None: their default.
        prefill: what reads prompts: "sdpa" (torch's attention), "flash" (flash-attn 2, 3 or 4, where it is installed,
            on a GPU and in half precision), "fused" (the decode step's kernels, on a GPU with Triton), or "auto":
            "fused" where such kernels decode the target, unless it is "tda", else "sdpa".
        plan: how drafting is chosen: "cached" follows the plan that `skipstone plan` kept for this machine, model and
            heads, if there is one, else the heads' calibration; "now" measures one (seconds) where none was kept, and
            keeps it; "none" looks for none.
        revision: of a hub id.
        allow_base_mismatch: use heads and thresholds that were made for other weights of the same shape (a fine-tuned
            base).
        progress: show progress on stderr.

    Raises:
        FileNotFoundError, ValueError: the model or the heads cannot be used; the message says what to do.
    """
    if plan not in ("cached", "now", "none"):
        raise ValueError(f"plan is {plan!r}, expected 'cached', 'now' or 'none'")
    if verify not in ("dense", "tda", "teal"):
        raise ValueError(f"verify is {verify!r}, expected 'dense', 'tda' or 'teal'")
    if draft not in ("dense", "teal"):
        raise ValueError(f"draft is {draft!r}, expected 'dense' or 'teal'")
    if ("teal" in (verify, draft)) != (teal is not None) or (teal is None and teal_level is not None):
        raise ValueError(
            f"verify is {verify!r}, draft is {draft!r}, teal is {teal!r}, teal_level is {teal_level}: 'teal' needs "
            "thresholds (a folder that `skipstone calibrate --sparsity teal` wrote), and nothing else takes them"
        )
    if verify != "tda" and sparsity is not None:
        raise ValueError(
            f"sparsity is {sparsity!r} and verify is {verify!r}: thresholds are of verify='tda' (teal=... is of 'teal')"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch {torch.__version__} sees no GPU")
    # float16 would round away what the fingerprint reads; the decoder converts.
    stored = torch.float32 if dtype == torch.float16 else dtype
    pretrained = load_pretrained(model, stored, revision=revision, progress=progress)
    head_set = _head_set(pretrained, heads, allow_base_mismatch)
    tda = sparsity if isinstance(sparsity, Tda) else None
    if verify == "tda" and tda is None:
        tda = _tda(pretrained, sparsity, allow_base_mismatch)  # type: ignore[arg-type]
    if teal is not None and not isinstance(teal, Teal):
        teal = Teal.load(_folder(teal, "teal"), identity(pretrained), allow_base_mismatch)
    level = None if teal is None else teal.at(teal_level)
    decoder = Decoder(pretrained.config, pretrained.weights, dtype, chosen)
    engine = Engine(
        decoder, pretrained.tokenizer, head_set, deterministic=deterministic, model_id=pretrained.model_id,
        prefill=prefill, sparsity=level if verify == "teal" else tda, draft=level if draft == "teal" else None,
    )  # fmt: skip
    if plan != "none":
        follow_plan(engine, measure=plan == "now")
    return engine


def _tda(pretrained: Pretrained, folder: str | os.PathLike[str] | None, allow_base_mismatch: bool) -> Tda:
    if folder is not None:
        return Tda.load(_folder(folder, "tda"), identity(pretrained), allow_base_mismatch)
    shipped = shipped_for(identity(pretrained))
    if shipped is None:
        raise ArtefactError(
            f"no thresholds are shipped for {pretrained.model_id}: give sparsity, a folder that "
            "`skipstone calibrate --sparsity tda` wrote"
        )
    return shipped


def _folder(path: str | os.PathLike[str], method: str) -> str:
    folder = os.fspath(path)
    if not Path(folder).is_dir():
        raise ArtefactError(
            f"no thresholds at {folder}: expected a folder that `skipstone calibrate --sparsity {method}` wrote"
        )
    return folder


def load_heads(model: str | os.PathLike[str], heads: str | os.PathLike[str], dtype: torch.dtype) -> HeadSet:
    """Another head set of a model that is loaded already; arguments and errors as of `load`."""
    stored = torch.float32 if dtype == torch.float16 else dtype
    found = _head_set(load_pretrained(model, stored, progress=False), heads, False)
    if found is None:
        raise ArtefactError(f"no heads are shipped for {model}: train some, or give a folder")
    return found


def shipped_kinds(model: str | os.PathLike[str], dtype: torch.dtype) -> list[str]:
    """Kinds of heads of which a set is shipped for this model; "tda" where thresholds are."""
    stored = torch.float32 if dtype == torch.float16 else dtype
    base = identity(load_pretrained(model, stored, progress=False))
    kinds = [kind for kind in head_kinds() if shipped_folder_for(base, kind=kind) is not None]
    return kinds if shipped_for(base) is None else [*kinds, "tda"]


def load_tda(model: str | os.PathLike[str], folder: str | os.PathLike[str] | None, dtype: torch.dtype) -> Tda:
    """TDA thresholds of a model that is loaded already: of a folder, or the shipped ones; errors as of `load`."""
    stored = torch.float32 if dtype == torch.float16 else dtype
    return _tda(load_pretrained(model, stored, progress=False), folder, False)


def load_teal(model: str | os.PathLike[str], folder: str | os.PathLike[str], dtype: torch.dtype) -> Teal:
    """TEAL thresholds of a model that is loaded already; errors as of `load`."""
    stored = torch.float32 if dtype == torch.float16 else dtype
    return Teal.load(_folder(folder, "teal"), identity(load_pretrained(model, stored, progress=False)))


def _head_set(
    pretrained: Pretrained, heads: str | os.PathLike[str] | HeadSet | None, allow_base_mismatch: bool
) -> HeadSet | None:
    if heads is None or isinstance(heads, HeadSet):
        return heads
    base = identity(pretrained)
    if heads in ("default", *head_kinds()):
        found = HeadSet.default_for(base, kind=str(heads))
        if found is None and heads != "default":
            raise ArtefactError(f"no {heads} heads are shipped for {pretrained.model_id}: train some, or give a folder")
        return found
    folder = Path(os.fspath(heads))
    if not folder.is_dir():
        raise ArtefactError(
            f"no head set at {folder}: expected a folder with manifest.json, 'default', a kind "
            f"({', '.join(head_kinds())}) or None"
        )
    return HeadSet.load(folder, base, allow_base_mismatch=allow_base_mismatch)


def identity(pretrained: Pretrained) -> BaseIdentity:
    """A loaded model as artefacts name it."""
    return BaseIdentity(
        model_id=pretrained.model_id,
        fingerprint=base_fingerprint(pretrained.weights, pretrained.config.num_layers),
        tokenizer_sha256=tokenizer_sha256(pretrained.tokenizer),
        revision=pretrained.revision,
    )
