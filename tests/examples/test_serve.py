"""The example endpoint, over a real loopback connection."""

from __future__ import annotations

import importlib.util
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MISSING = [m for m in ("fastapi", "uvicorn", "multipart") if importlib.util.find_spec(m) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"needs the [serve] extra: {', '.join(MISSING)} not installed"
)
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serve.py"


def jpeg(side: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((side, side)).save(buffer, "JPEG")
    return buffer.getvalue()


def post(url: str, data: bytes, name: str = "image.jpg") -> dict:
    """Send `data` as a form's file field; the JSON that comes back."""
    boundary = "0123456789abcdef"
    body = (
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        + data
        + f"\r\n--{boundary}--\r\n".encode()
    )
    request = urllib.request.Request(
        url, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm
    import torch

    from npprune.export.onnx import export_onnx
    from npprune.records import ClassInfo, Preprocessing

    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3,
        num_classes=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("serve") / "model.onnx"
    classes = [ClassInfo(i, f"kind {i}") for i in range(4)]
    export_onnx(network, Preprocessing((3, 32, 32)), classes, path)
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), str(model), "--port", str(port), "--provider", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).close()
                break
            except OSError:
                if process.poll() is not None:
                    pytest.fail(f"the server ended: {process.communicate()[0]}")
                time.sleep(0.1)
        else:
            pytest.fail("the server did not answer within 30 seconds")
        yield url
    finally:
        process.terminate()
        process.wait(10)


def test_health(server):
    with urllib.request.urlopen(f"{server}/health", timeout=10) as answer:
        said = json.loads(answer.read())
    assert said["classes"] == 4
    assert said["provider"] == "CPUExecutionProvider"


def test_it_answers_what_predict_answers(server, model):
    from npprune.export.predict import Classifier

    said = post(f"{server}/predict?topk=2", jpeg())["guesses"]
    image = Image.open(io.BytesIO(jpeg()))
    expected = Classifier(model, provider="cpu").classify([image], topk=2)[0]
    assert [g["name"] for g in said] == [g.name for g in expected]
    assert said[0]["probability"] == pytest.approx(expected[0].probability, abs=1e-6)


def test_sixteen_bits_are_no_white(server):
    answers = []
    for pixels in (np.arange(0, 256), np.arange(0, 256).astype(np.uint16) * 257):
        buffer = io.BytesIO()
        grey = pixels.reshape(16, 16).astype(np.uint8 if pixels.max() < 256 else np.uint16)
        Image.fromarray(grey).save(buffer, "PNG")
        answers.append(post(f"{server}/predict", buffer.getvalue()))
    assert answers[0] == answers[1]


def postscript() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"no picture", jpeg()[:100], postscript()])
def test_what_is_no_image_is_refused(server, data):
    with pytest.raises(urllib.error.HTTPError) as err:
        post(f"{server}/predict", data, "notes.txt")
    assert err.value.code == 422
    assert b"notes.txt is not a readable image" in err.value.read()


def test_wrong_topk_is_refused(server):
    with pytest.raises(urllib.error.HTTPError) as err:
        post(f"{server}/predict?topk=0", jpeg())
    assert err.value.code == 422


def test_the_example_stays_short():
    assert len(SCRIPT.read_text().splitlines()) < 150
