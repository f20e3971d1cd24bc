"""What a GPU says it has used, in joules.

NVIDIA's management library counts millijoules per device since the driver was loaded (Volta and newer); the counter
moves about every 20 ms, so short answers are coarse. It is asked through the package `nvidia-ml-py` (module `pynvml`)
where that is installed; nothing else reports energy here.
"""

from __future__ import annotations

from typing import Any

import torch


class Meter:
    """A counter of joules.

    Args:
        handle: NVML's of the device; None reports nothing.
        nvml: the module `pynvml`.
    """

    def __init__(self, handle: Any = None, nvml: Any = None) -> None:
        self._handle, self._nvml = handle, nvml

    def joules(self) -> float | None:
        """Used since some moment, with all that is in flight finished; None where nothing is reported."""
        if self._handle is None:
            return None
        torch.cuda.synchronize()
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def meter_of(device: torch.device) -> Meter:
    """The counter of a device; a CPU, a GPU without it or a missing `pynvml` gives one that reports nothing."""
    if device.type != "cuda":
        return Meter()
    try:
        import pynvml
    except ImportError:
        return Meter()
    try:
        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES numbers devices otherwise than the driver does.
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name.encode())
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return Meter()
    return Meter(handle, pynvml)
