"""Which device the work runs on, and why."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

from npprune._version import __version__
from npprune.errors import DeviceError, UsageError, setting
from npprune.records import Environment

PACKAGES = ("torch", "timm", "torch-pruning", "numpy", "onnx", "onnxruntime-gpu", "onnxruntime")


def resolve_device(asked: str = "auto") -> tuple[torch.device, str]:
    """The device and the reason for it. An explicit device that is missing is an error.

    Raises:
        DeviceError: the device is unknown or not there.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0), f"auto: CUDA is there ({torch.cuda.get_device_name(0)})"
        return torch.device("cpu"), "auto: no CUDA device was found"
    try:
        device = torch.device(asked)
    except RuntimeError as err:
        raise DeviceError(
            f"{setting('device')} must be auto, cpu, cuda, cuda:N or mps, got `{asked}`"
        ) from err
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0 or (device.index or 0) >= count:
            raise DeviceError(
                f"`{asked}` was asked for, and there are {count} CUDA devices",
                hint=f"{setting('device', 'auto')} takes what there is; `npprune env` shows it",
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("`mps` was asked for, and it is not available here")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(
            f"{setting('device')} must be auto, cpu, cuda, cuda:N or mps, got `{asked}`"
        )
    return device, f"asked for `{asked}`"


def place_of(runtime: str, provider: str) -> str:
    """Where a runtime runs: PyTorch on a device, the others where a word of `--provider` says.

    Raises:
        DeviceError: PyTorch does not have it.
    """
    if not runtime.startswith("torch"):
        return provider
    return str(resolve_device({"tensorrt": "cuda"}.get(provider, provider))[0])


def check_shortcuts(precision: str, compiled: bool, device: torch.device) -> None:
    """UsageError where the device has no such products, or compiling is for nothing.

    On a CPU compiled blocks would round differently with the number of threads.
    """
    asked = {
        setting("discover.precision", "tf32"): precision == "tf32",
        setting("discover.compile"): compiled,
    }
    for named, wanted in asked.items():
        if wanted and device.type != "cuda":
            raise UsageError(
                f"{named} needs a CUDA GPU, got `{device.type}`",
                hint="leave it out; `npprune env` shows the devices",
            )


@contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """For the duration, a GPU's float32 products and convolutions use TF32 if asked, else not.

    PyTorch by itself takes TF32 for convolutions, such as the patch embedding.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with warnings.catch_warnings():  # torch's newer switches cannot be mixed with its compiler
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


def environment(device: torch.device, reason: str, seed: int) -> Environment:
    """What the numbers of this process are made with."""
    versions = {"npprune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Environment(
        versions=versions,
        device=str(device),
        device_reason=reason,
        threads=torch.get_num_threads(),
        platform=f"{platform.system()} {platform.machine()}",
        seed=seed,
    )
