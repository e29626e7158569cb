"""`npprune env`: what is installed, and what `--device auto` would take."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import npprune
from npprune.cli import options
from npprune.cli.console import Output

EXAMPLES = """\
Example

  npprune env --json
"""

PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxscript", "onnxruntime")


def command(as_json: options.Json = False) -> None:
    """Show versions, devices, threads and memory: what a bug report should carry."""
    output = Output(as_json=as_json)
    with output.working():
        found = environment()
    output.document("environment", found)
    output.files([*found["versions"].items()])
    output.line()
    output.files(_machine_lines(found))


def environment() -> dict[str, Any]:
    """Versions, devices, threads and memory, JSON-ready. Loads torch and ONNX Runtime."""
    import psutil
    import torch

    from npprune.pipeline.common.device import resolve_device

    device, reason = resolve_device("auto")
    cuda = [
        {
            "name": torch.cuda.get_device_name(i),
            "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
        }
        for i in range(torch.cuda.device_count())
    ]
    memory = psutil.virtual_memory()
    return {
        "versions": {
            "npprune": npprune.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "torch": torch.__version__,
        },
        "platform": platform.platform(),
        "device": str(device),
        "device_reason": reason,
        "cuda": {"built": torch.version.cuda, "devices": cuda},
        "onnxruntime_providers": providers(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory.total / 2**30, 1),
        "memory_free_gib": round(memory.available / 2**30, 1),
    }


def providers() -> list[str]:
    """What ONNX Runtime was built with; empty where it does not load."""
    try:
        import onnxruntime
    except ImportError:
        return []
    found: list[str] = onnxruntime.get_available_providers()
    return found


def version(package: str) -> str:
    """An installed package's version; ONNX Runtime comes under two names."""
    names = (package, "onnxruntime-gpu") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _machine_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    cuda = found["cuda"]
    devices = [f"{device['name']}, {device['memory_gib']} GiB" for device in cuda["devices"]]
    return [
        ("platform", found["platform"]),
        ("auto device", f"{found['device']} ({found['device_reason']})"),
        ("CUDA", f"{cuda['built'] or 'not built in'}: {'; '.join(devices) or 'no device'}"),
        ("ONNX Runtime", ", ".join(found["onnxruntime_providers"]) or "does not load"),
        ("threads", f"{found['threads']} of {found['cpus']} CPUs"),
        ("memory", f"{found['memory_free_gib']} of {found['memory_gib']} GiB free"),
    ]
