"""Open an ONNX file in ONNX Runtime, and say on what it runs.

ONNX Runtime falls back to the CPU without an error when a GPU library is missing. Here a provider
asked for by name runs or is refused, and `auto` says what it took and why.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune import words
from npprune.errors import DeviceError, ExportError, UsageError, setting
from npprune.export.loops import repeated
from npprune.records import plain_text
from npprune.untrusted import shown
from npprune.words import check_word

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_PLACE = re.compile(r"\S*\.(?:cc|cpp|cu|cuh|h|hpp|mm):\d+ ")  # in ONNX Runtime's source
_NO_ONNX = "the file is damaged, or no ONNX file"
_GPU_HINT = "pip install 'onnxruntime-gpu[cuda,cudnn]', and a driver that `nvidia-smi` can see"


@dataclass(frozen=True)
class Session:
    """An open ONNX file: what was asked for, what runs, and why."""

    inner: onnxruntime.InferenceSession
    path: Path
    asked: str  # auto | cpu | cuda | tensorrt
    provider: str  # the first of `providers`, e.g. "CPUExecutionProvider"
    providers: list[str]  # as the session itself reports them
    reason: str
    threads: int  # intra-op; 0: ONNX Runtime's own choice

    @property
    def input_name(self) -> str:
        """`images`, or `pixels` where the file holds its preprocessing."""
        return str(self.inner.get_inputs()[0].name)

    @property
    def input_shape(self) -> list[int | str | None]:
        """Sizes; the batch is a string or None where it is open."""
        return list(self.inner.get_inputs()[0].shape)

    @property
    def fixed_batch(self) -> int | None:
        """The batch size the file insists on, or None."""
        first = self.input_shape[0]
        return first if isinstance(first, int) else None

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own metadata."""
        return dict(self.inner.get_modelmeta().custom_metadata_map)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Logits float32 [b, c] of one batch. ExportError names the file if it cannot run."""
        try:
            logits: np.ndarray = self.inner.run(None, {self.input_name: batch})[0]
        except Exception as err:  # ONNX Runtime's own exceptions share no public base
            raise ExportError(
                f"{self.path} cannot run on a batch of shape {tuple(batch.shape)} "
                f"(input `{self.input_name}` {self.input_shape}): {reason(err)}"
            ) from err
        return logits


def open_session(
    path: Path, provider: str = "auto", threads: int | None = None, *, timed: bool = True
) -> Session:
    """Open `path` on `provider` (auto, cpu, cuda, tensorrt) with `threads` intra-op threads.

    `timed`: ONNX Runtime's own defaults, its fastest. Otherwise idle threads leave the cores to
    others, and CUDA multiplies in full float32 instead of TF32: for results, not for speed.

    Errors: UsageError for an unknown provider, ExportError for a file that is missing or broken,
    DeviceError for a named provider that is not there or that did not start.
    """
    import onnxruntime as ort

    check_word("provider", provider, words.PROVIDERS)
    if threads is not None and threads < 1:
        raise UsageError(f"`threads` must be at least 1, got `{threads}`")
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"no ONNX file at {path}", hint="`npprune export` writes one")
    if plain_text(str(path)) != str(path):
        raise ExportError(
            f"ONNX Runtime opens no file whose path is not UTF-8, got `{path}`",
            hint="rename the file, or the folder that it is in",
        )
    refuse_loops(path)
    built = ort.get_available_providers()
    if provider == "auto":
        return _auto(path, threads, built, timed)
    wanted = PROVIDERS[provider]
    if wanted not in built:
        raise DeviceError(
            f"`provider` {provider} is not part of the installed ONNX Runtime "
            f"(it has {', '.join(built)})",
            hint=None if provider == "cpu" else _GPU_HINT,
        )
    session, problem = _try(path, wanted, threads, timed)
    if session is None:
        _start(path, PROVIDERS["cpu"], threads, timed)  # a broken file is said to be one
        raise DeviceError(
            f"`provider` {provider} did not start: {problem}",
            hint=_GPU_HINT + ("; TensorRT: pip install tensorrt" if "tensor" in provider else ""),
        )
    return _session(session, path, provider, "asked for", threads)


def refuse_loops(path: Path) -> None:
    """ExportError for a file that may never end, or that is none of ONNX."""
    try:
        operator = repeated(path)
    except ValueError as err:
        raise ExportError(f"{path} cannot be opened: {err}", hint=_NO_ONNX) from err
    if operator is not None:
        raise ExportError(
            f"{path} holds the operator {shown(operator)}, which repeats a part of the network and "
            "may never end: it is not run",
            hint="npprune writes no such files; export the network with `npprune export`",
        )


def _auto(path: Path, threads: int | None, built: list[str], timed: bool) -> Session:
    cuda, cpu = PROVIDERS["cuda"], PROVIDERS["cpu"]
    if cuda not in built:
        reason = "this ONNX Runtime is built without CUDA"
    elif not _has_nvidia_driver():
        reason = "no NVIDIA driver on this machine"
    else:
        session, problem = _try(path, cuda, threads, timed)
        if session is not None:
            return _session(session, path, "auto", "a CUDA device is there", threads)
        reason = f"the CUDA provider did not start: {problem}"
    return _session(_start(path, cpu, threads, timed), path, "auto", reason, threads)


def _try(path: Path, provider: str, threads: int | None, timed: bool) -> tuple[Any, str]:
    """A session on `provider`, or None and why not."""
    try:
        session = _start(path, provider, threads, timed)
    except ExportError as err:
        return None, err.message
    running = session.get_providers()
    if running[0] != provider:
        return None, f"ONNX Runtime would have run on {running[0]} (missing libraries or no device)"
    return session, ""


def _start(path: Path, provider: str, threads: int | None, timed: bool) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")  # as was looked at
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads of one session must not burn the cores while another one is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not timed:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted: list[Any] = [provider]
    if provider == PROVIDERS["cuda"] and not timed:
        wanted = [(provider, {"use_tf32": "0"})]
    if provider != PROVIDERS["cpu"]:
        wanted.append(PROVIDERS["cpu"])
    try:
        with _silent():
            if provider != PROVIDERS["cpu"] and hasattr(ort, "preload_dlls"):
                ort.preload_dlls()
            return ort.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
    except Exception as err:  # ONNX Runtime's own exceptions share no public base
        why = reason(err)
        raise ExportError(f"{path} cannot be opened: {why}", hint=_hint(why)) from err


def _session(session: Any, path: Path, asked: str, reason: str, threads: int | None) -> Session:
    running = list(session.get_providers())
    return Session(session, path, asked, running[0], running, reason, threads or 0)


def _has_nvidia_driver() -> bool:
    import ctypes.util

    return Path("/proc/driver/nvidia/version").exists() or bool(
        ctypes.util.find_library("cuda") or ctypes.util.find_library("nvcuda")
    )


def reason(err: BaseException) -> str:
    """What ONNX Runtime says, in one line, without its codes, source files and C++ signatures."""
    text = " ".join(str(err).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    while place := _PLACE.search(text):
        text = text[: place.start()] + _after_signature(text[place.end() :])
    return text or type(err).__name__


def _after_signature(text: str) -> str:
    """`text` without the function it begins with: a bare name, or a signature in C++."""
    before, _, _ = text.partition("(")
    if "::" not in before.rpartition(" ")[2]:
        return text.partition(" ")[2] or text
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0:
            return re.sub(r"^(::\S+)?( const)?( \[with .*?\])? ", "", text[i + 1 :])
    return text


def _hint(why: str) -> str | None:
    """The next step, where the reason says which."""
    import onnxruntime as ort

    newer = f"use a newer ONNX Runtime (this is {ort.__version__})"
    if "IR version" in why or "under development" in why:
        return f"{newer}, or export with a lower {setting('export.opset')}"
    if "not a registered function/op" in why or "No Op registered" in why:
        return f"{newer}, or the runtime the file was made for"
    if re.search(r"external|no such file|GetFileLength", why, re.IGNORECASE):
        return "the `.data` file written with it must lie next to it, whole and under its own name"
    if "Protobuf parsing failed" in why or "No graph was found" in why:
        return _NO_ONNX
    return None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """ONNX Runtime prints about missing GPU libraries; what matters is said by `open_session`."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        ort.set_default_logger_severity(2)
