"""What this machine's processor computes fast, and the description of a rank's machine. Imports no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

UNITS = ("amx_bf16", "avx512_bf16")
"""x86 flags of units that multiply bfloat16, as in /proc/cpuinfo."""
CAPPED_BELOW_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA that keep oneDNN from using these units."""


@dataclass(frozen=True)
class Machine:
    """What a rank computes on."""

    gpu: bool
    bf16: bool
    """Whether the hardware multiplies bfloat16."""

    def __str__(self) -> str:
        return f"{'GPU' if self.gpu else 'CPU'} {'with' if self.bf16 else 'without'} bf16 units"


def cpu_units(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine's CPU multiplies bfloat16 and oneDNN may use it (ONEDNN_MAX_CPU_ISA)."""
    cap = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", "")).upper()
    return cap not in CAPPED_BELOW_BF16 and any(unit in _flags() for unit in _units())


def _units() -> tuple[str, ...]:
    return ("bf16",) if platform.machine() in ("aarch64", "arm64") else UNITS


@cache
def _flags(file: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The first processor's features. Empty where the kernel has no such file (macOS, Windows), where torch multiplies
    bfloat16 no faster than float32."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(":")[2] for line in lines if line.partition(":")[0].strip() in ("flags", "Features"))
    return frozenset(next(listed, "").split())
