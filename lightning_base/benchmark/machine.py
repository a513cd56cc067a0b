"""On what machine something was measured, in one line and as a mapping."""

import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """CPU model, cores, threads, torch's version, load average, and the GPU if there is one."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "gpu": gpu,
    }


def machine_line(found: dict[str, Any]) -> str:
    """The same for people."""
    load = " ".join(f"{value:.2f}" for value in found["load_average"])
    gpu = f", {found['gpu']}" if found["gpu"] else ""
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads{gpu}, torch {found['torch']}, "
        f"Python {found['python']}, load average {load}"
    )


def cpu_model() -> str:
    """As the kernel names it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
