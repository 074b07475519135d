"""SM clock and power of a GPU while it works, from the driver's own library: no process is started for a read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

CLOCK_SM = 1
POWER_INSTANT = 186  # the plain power query is a mean over the last second, longer than most cases take


class FieldValue(ctypes.Structure):
    """``nvmlFieldValue_t``, its value read as an unsigned int."""

    _fields_ = (
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency", ctypes.c_longlong),
        ("kind", ctypes.c_int),
        ("status", ctypes.c_int),
        ("value", ctypes.c_uint),
        ("rest", ctypes.c_uint),
    )


def sensor(device: torch.device) -> Callable[[], tuple[float, float]] | None:
    """A function that reads (SM clock in MHz, power in W); None where the driver tells neither."""
    if device.type != "cuda":
        return None
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None

    def read() -> tuple[float, float]:
        clock, milliwatts = ctypes.c_uint(), ctypes.c_uint()
        library.nvmlDeviceGetClockInfo(handle, CLOCK_SM, ctypes.byref(clock))
        now = FieldValue(field=POWER_INSTANT)
        if library.nvmlDeviceGetFieldValues(handle, 1, ctypes.byref(now)) == 0 and now.status == 0:
            return float(clock.value), now.value / 1e3
        library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts))
        return float(clock.value), milliwatts.value / 1e3

    return read
