"""Peak throughput of this machine in FLOP/s, the reference of MFU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

PEAKS = {  # Dense bf16 TFLOP/s from data sheets; the first name found in the device's name is used.
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L4": 121.0,
    "4090": 165.2,
    "3090": 71.0,
}
SIDE, TRIES = 1024, 5


@dataclass(frozen=True)
class PeakFlops:
    """A peak throughput.

    Attributes:
        flops: FLOP/s of one process's device.
        name: Description of the device and of the source of the value.
    """

    flops: float
    name: str


def peak_flops(tflops: float = 0.0, dtype: torch.dtype = torch.float32) -> PeakFlops:
    """Returns the peak of this process's device: the given one, that of its data sheet (bf16), or a measured one.

    Args:
        tflops: Given peak in TFLOP/s; 0 for none.
        dtype: Type of the arithmetic.
    """
    if tflops:
        return PeakFlops(tflops * 1e12, f"{tflops:g} TFLOP/s (setting)")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        for name, value in PEAKS.items():
            if name in device and dtype == torch.bfloat16:
                return PeakFlops(value * 1e12, f"{device}, {value:g} TFLOP/s bf16 (data sheet)")
    return measure_peak_flops(dtype)


def measure_peak_flops(dtype: torch.dtype) -> PeakFlops:
    """Measure the best of a few products of square matrices."""
    cuda = torch.cuda.is_available()
    matrix = torch.randn(SIDE, SIDE).to("cuda" if cuda else "cpu", dtype)
    best = 0.0
    for _ in range(TRIES):
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        matrix @ matrix
        if cuda:
            torch.cuda.synchronize()
        best = max(best, 2 * SIDE**3 / (time.perf_counter() - begun))
    device = torch.cuda.get_device_name() if cuda else _threads()
    return PeakFlops(
        best, f"{device}, {best / 1e12:.3g} TFLOP/s {str(dtype).removeprefix('torch.')} (measured matrix product)"
    )


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)} of this CPU"
