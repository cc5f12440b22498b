"""Precision ``auto``: bfloat16 on a device that computes in it."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator


def has_bf16(accelerator: Any) -> bool | None:
    """Return whether a device has instructions for bfloat16, or None if that is unknown.

    Args:
        accelerator: The Trainer's ``accelerator``; ``auto`` and ``gpu`` stand for the device that the Trainer chooses.
    """
    if accelerator in ("auto", "gpu"):
        found = [name for name, kind in (("mps", MPSAccelerator), ("cuda", CUDAAccelerator)) if kind.is_available()]
        accelerator = found[0] if found else "cpu"
    if accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if accelerator != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12
        return None
    instructions = torch.cpu.get_capabilities()
    if not str(instructions["architecture"]).startswith("x86"):  # the gain on ARM has not been measured
        return None
    is_there = instructions.get("avx512_bf16") or instructions.get("amx_bf16")
    # oneDNN computes the layers, and ONEDNN_MAX_CPU_ISA may forbid it to use existing instructions
    return bool(is_there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_precision(precision: Any, accelerator: Any) -> Any:
    """Return the precision that ``auto`` stands for on a device, or the given precision."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if has_bf16(accelerator) else "32-true"


class Trainer(pl.Trainer):
    """Lightning's Trainer, whose precision may also be ``auto``.

    Args:
        precision: Lightning's ``precision``, or ``auto``: ``bf16-mixed`` on a GPU of compute capability 8 or more and
            on a CPU with AVX512-BF16 or AMX, otherwise ``32-true``.
        args: Lightning's arguments.
        kwargs: Lightning's keyword arguments.
    """

    def __init__(self, *args: Any, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, precision=choose_precision(precision, kwargs.get("accelerator", "auto")), **kwargs)
