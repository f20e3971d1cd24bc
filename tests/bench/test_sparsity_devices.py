"""The report's reading, writing and claims mix no devices, found without a GPU.

A tensor made "on cuda" is a marked tensor of the CPU (`Marked`): an operation on marked and unmarked ones fails as a
GPU's would. Numbers without dimensions may come from anywhere there, a GPU's tensor may be indexed by the CPU's, and
copies go between. What a GPU computes is not tested here.

Planted bugs seen to fail here: quantiles at shares on the CPU; pairs of tokens drawn on both devices; masks of what is
written on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from skipstone.bench.shapes import random_weights, tiny_config
from skipstone.bench.sparsity import Windows, baselines, compare, inertia, uncertainty
from skipstone.bench.sparsity_answers import write
from skipstone.bench.sparsity_long import _by_position
from skipstone.bench.sparsity_report import heat_map
from skipstone.bench.sparsity_settings import WHOLE, Setting
from skipstone.engine.model import Decoder
from skipstone.engine.sparsity.target import SparseTarget
from skipstone.engine.sparsity.tda import Tda, measure_curves
from skipstone.engine.sparsity.teal import calibrate_teal
from skipstone.engine.stopping import StopChecker
from torch import Tensor
from torch.overrides import TorchFunctionMode

COPIES = ("__setitem__", "copy_", "index_put_")


class NoText:
    def feed(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors(one)


def marked(tensor: Tensor) -> bool:
    return getattr(tensor, "marked", False)


class Marked(TorchFunctionMode):
    """Operations know which tensors are "on cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        if name == "__get__" and func.__self__ in (torch.Tensor.device, torch.Tensor.is_cuda):
            on_gpu = marked(args[0])
            return on_gpu if func.__self__ is torch.Tensor.is_cuda else torch.device("cuda" if on_gpu else "cpu")
        if func is torch.device:
            return func(*args, **kwargs)
        named: list[str] = []

        def local(value: Any) -> Any:
            if isinstance(value, torch.device) or value in ("cpu", "cuda"):
                named.append(torch.device(value).type)
                return torch.device("cpu")
            return value

        given = list(tensors([args, kwargs]))
        args = [local(value) if isinstance(value, (str, torch.device)) else value for value in args]
        kwargs = {key: local(value) if key == "device" else value for key, value in kwargs.items()}
        sized = {marked(tensor) for tensor in given if tensor.ndim}
        mixed = len(sized) > 1 and name not in COPIES and not (name == "__getitem__" and marked(args[0]))
        assert not mixed, f"devices are mixed in {name}: {[(list(own.shape), marked(own)) for own in given]}"
        found = func(*args, **kwargs)
        if name in ("to", "cpu"):
            found = found.detach()  # another tensor than the one given, as on a GPU
        to = "cpu" if name == "cpu" else named[-1] if named else "cuda" if any(map(marked, given)) else "cpu"
        if name not in COPIES:
            for tensor in tensors(found):
                tensor.marked = to == "cuda"
        return found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_on_a_gpu_is_read_with_and_written_with(family):
    config = tiny_config(family)
    with Marked():
        decoder = Decoder(config, random_weights(config, torch.float32, "cpu"), torch.float32, "cuda")
        assert decoder.embedding.is_cuda and not torch.zeros(2).is_cuda, "the marks work"
        with pytest.raises(AssertionError, match="devices are mixed"):
            decoder.embedding.sum(0) + torch.zeros(config.hidden_size)
        texts = torch.randint(config.vocab_size, (3, 72), generator=torch.Generator().manual_seed(0)).to("cuda")
        windows = Windows(texts, 40)
        curves = measure_curves(decoder, texts, levels=0)
        tda = Tda(curves.thresholds_for_density(0.5).cpu(), density=0.5)
        dense = WHOLE.read(decoder, windows)
        found = Setting("tda", "tda", 0.5, SparseTarget(decoder, tda, False)).read(decoder, windows)
        assert found.losses.is_cuda and compare(found, dense)["density"] < 1
        others = baselines(decoder, tda, found, curves)
        selections = {"tda": tda, **{name: others[name] for name in ("griffin, uniform", "fixed, uniform")}}
        settings = [Setting(name, name, 0.5, SparseTarget(decoder, own, False)) for name, own in selections.items()]
        greedy = calibrate_teal(decoder, texts, levels=(0.05,), error_texts=texts[:1, :8], budget_texts=texts)
        settings += [WHOLE, Setting("teal", "teal greedy", 0.05, greedy.at(0.05))]
        for setting in settings:
            compare(setting.read(decoder, windows), dense)
            checkers = [StopChecker(NoText(), max_new_tokens=2) for _ in range(2)]
            write(decoder, setting, [list(range(30)), list(range(5, 25))], checkers)
            assert [len(checker.token_ids) for checker in checkers] == [2, 2], setting.name
            _by_position(decoder, setting, windows, 16)
        assert len(uncertainty(decoder, windows, tda, curves, dense)) == 4
        assert inertia(decoder, windows)["by_distance"]
        assert heat_map("tda", curves, found)["kept"]
