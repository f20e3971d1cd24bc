"""The adapter to flash-attn, with stand-ins that have each version's signature, against `full_attention` in fp32.

The stand-ins do what flash-attn documents (bottom-right causal mask, window counted from the row's own key, soft-cap,
grouped heads, rows before heads) in their own arithmetic, so a wrong argument shows as a wrong result. Regimes: first
and later chunks, one row, keys beyond the chunk (poisoned with NaN), windows shorter and longer than the chunk,
soft-cap, MHA and GQA, strided keys as the cache holds them. The last test runs the package itself, where there is one.

Planted bugs that these tests were seen to catch: keys beyond the chunk passed on, the window off by one, heads before
rows, no soft-cap, the default scale, no causal mask.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipstone.engine.cache import KVCache, plan_cache
from skipstone.engine.forward import prefill
from skipstone.kernels import flash
from skipstone.kernels.attention import full_attention
from torch import Tensor

TOLERANCE = 2e-6  # fp32 on both sides, sums of up to 40 products of order one
HALF_TOLERANCE = 2e-2  # bf16 outputs of order one, rounded at different places
MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
GPUS = {2: (8, 0), 3: (9, 0), 4: (10, 0)}


def documented(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, cap: float) -> Tensor:
    """What the package says of itself; `q [B, T, H, d]`, `k, v [B, S, KV, d]`, left < 0 for no window."""
    assert causal and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    shift, out = k.shape[1] - q.shape[1], torch.empty_like(q)
    for head in range(q.shape[2]):
        own = head // (q.shape[2] // k.shape[2])
        for row in range(q.shape[1]):
            last = row + shift
            first = 0 if left < 0 else max(0, last - left)
            scores = torch.einsum("bd,bsd->bs", q[:, row, head], k[:, first : last + 1, own]) * scale
            scores = cap * torch.tanh(scores / cap) if cap else scores
            out[:, row, head] = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, first : last + 1, own])
    return out


def two(
    q: Any, k: Any, v: Any, dropout_p: Any = 0.0, softmax_scale: Any = None, causal: Any = False,
    window_size: Any = (-1, -1), softcap: Any = 0.0, alibi_slopes: Any = None, deterministic: Any = False,
    return_attn_probs: Any = False,
) -> Tensor:  # fmt: skip
    assert dropout_p == 0.0 and window_size[1] == (-1 if window_size[0] == -1 else 0)
    return documented(q, k, v, softmax_scale, causal, window_size[0], softcap)


def three(
    q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: Any = False, qv: Any = None, q_descale: Any = None,
    k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1), attention_chunk: Any = 0,
    softcap: Any = 0.0, num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False, sm_margin: Any = 0,
    return_attn_probs: Any = False,
) -> Tensor:  # fmt: skip
    assert qv is None
    return two(q, k, v, 0.0, softmax_scale, causal, window_size, softcap)


def four(
    q: Any, k: Any, v: Any, qv: Any = None, gather_kv_indices: Any = None, softmax_scale: Any = None,
    causal: Any = False, window_size: Any = (None, None), learnable_sink: Any = None, softcap: Any = 0.0,
    num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False, return_lse: Any = False,
) -> tuple[Tensor, None]:  # fmt: skip
    assert qv is None and gather_kv_indices is None and window_size[1] in (None, 0)
    left = -1 if window_size[0] is None else window_size[0]
    return documented(q, k, v, softmax_scale, causal, left, softcap), None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`installed(2, 4)`: these versions' stand-ins are all that can be imported."""

    def install(*versions: int) -> None:
        for version, name in MODULES.items():
            monkeypatch.setitem(sys.modules, name, None)
            if version in versions:
                module = types.ModuleType(name)
                module.flash_attn_func = {2: two, 3: three, 4: four}[version]  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, name, module)
        if 4 in versions and 2 not in versions:  # the namespace that version 4 lies in, without version 2's functions
            monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))

    return install


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize(("first", "rows", "beyond"), [(0, 9, 0), (0, 9, 5), (13, 9, 6), (13, 1, 0)])
def test_computes_full_attention(
    version: int, softcap: float | None, window: int | None, first: int, rows: int, beyond: int, installed: Callable
) -> None:
    installed(version)
    attention = flash.choose(GPUS[version], 16, softcap)
    assert attention.version == version
    generator = torch.Generator().manual_seed(0)
    stop = first + rows
    for heads, kv in ((4, 2), (3, 3)):
        q = torch.randn(1, heads, rows, 16, generator=generator)
        k, v = (torch.randn(1, kv, stop, 16, generator=generator) for _ in range(2))
        expected = full_attention(q, k, v, 0.35, first, window, softcap)
        rest = torch.full((1, kv, beyond, 16), float("nan"))
        out = attention(q, torch.cat([k, rest], 2), torch.cat([v, rest], 2), 0.35, first, window, softcap)
        assert out.shape == expected.shape
        assert (out - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma2"])
def test_prompts_are_read_as_without_it(family: str, engine_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks, the last one short, of a model with windows, one with soft-caps too, and one with neither."""
    from skipstone.engine import forward

    monkeypatch.setattr(forward, "PREFILL_CHUNK", 16)
    decoder = engine_of(family).decoder
    config, ids = decoder.config, [(17 * i + 2) % 199 for i in range(41)]
    attention = flash.FlashAttention("a stand-in", 2, two)
    caches = []
    with torch.inference_mode():
        for chosen in (None, attention):
            cache = KVCache(plan_cache(config, 1, 64, decoder.device, decoder.dtype), decoder.device)
            prefill(decoder, cache, 0, ids, flash=chosen)
            assert cache.lens == [41]
            caches.append(cache)
    for one, other in ((caches[0].k, caches[1].k), (caches[0].v, caches[1].v)):
        assert (one - other).abs().max() < 1e-4 * one.abs().max()


def test_the_first_that_is_installed_and_takes_the_model(installed: Callable) -> None:
    installed(2, 3, 4)
    assert [flash.choose(gpu, 128).version for gpu in ((8, 6), (9, 0), (10, 0), (12, 0))] == [2, 3, 4, 4]
    assert [flash.choose((10, 0), 256, cap).version for cap in (None, 30.0)] == [4, 2]
    assert flash.choose((10, 0), 192).version == 2
    installed(2, 4)
    assert flash.choose((9, 0), 64).version == 4
    installed(4)
    with pytest.raises(ValueError, match=r"no flash-attn for GPUs of compute capability 8\.0.*install flash-attn "):
        flash.choose((8, 0), 64)


def test_what_cannot_be_had_is_said_with_a_way_out(installed: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    installed()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU.*prefill='sdpa'"):
        flash.find_flash(cpu, torch.bfloat16, 64)
    with pytest.raises(ValueError, match="takes bfloat16 and float16, and dtype is torch.float32.*prefill='sdpa'"):
        flash.find_flash(gpu, torch.float32, 64)
    for head_dim in (20, 264):
        with pytest.raises(ValueError, match=f"multiple of 8 up to 256.*have {head_dim}: use prefill='sdpa'"):
            flash.choose((9, 0), head_dim)
    with pytest.raises(ValueError, match="install flash_attn_3 or flash-attn-4 or flash-attn .*or use prefill='sdpa'"):
        flash.choose((9, 0), 64)
    with pytest.raises(ValueError, match=r"no flash-attn takes this model .* 7\.5: use prefill='sdpa'"):
        flash.choose((7, 5), 64)

    def broken(name: str) -> Any:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(flash.importlib, "import_module", broken)
    with pytest.raises(ValueError, match="flash_attn cannot be imported: flash_attn: undefined symbol"):
        flash.choose((8, 0), 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("first", "rows"), [(0, 512), (512, 77), (512, 1)])
def test_the_package_itself(first: int, rows: int, window: int | None, softcap: float | None) -> None:
    """Near the reference, and the same bits again and with other keys beyond the chunk (design rule 6)."""
    try:
        attention = flash.find_flash(torch.device("cuda"), torch.bfloat16, 64, softcap)
    except ValueError as error:
        pytest.skip(str(error))
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (9, rows), (3, first + rows + 30), (3, first + rows + 30)
    q, k, v = (torch.randn(1, h, n, 64, device="cuda", generator=generator) for h, n in sizes)
    half = [t.to(torch.bfloat16) for t in (q, k, v)]
    out = attention(*half, 0.125, first, window, softcap)
    stop = first + rows
    q, k, v = (t.float() for t in half)
    expected = full_attention(q, k[:, :, :stop], v[:, :, :stop], 0.125, first, window, softcap)
    assert (out.float() - expected).abs().max() < HALF_TOLERANCE
    for t in half[1:]:
        t[:, :, stop:] = float("nan")
    assert torch.equal(attention(*half, 0.125, first, window, softcap), out)
