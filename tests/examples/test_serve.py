"""The example endpoint, over a real loopback connection."""

from __future__ import annotations

import contextlib
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


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("data", "code", "said"), [
    (picture(6000, 6000), 422, b"6000 x 6000 pixels, and at most 25 million are decoded"),
    (picture(1, 200_000), 422, b"too long and thin"),
    (bytes(21 * 2**20), 413, b"an image may have 20971520 bytes"),
])  # fmt: skip
def test_what_would_take_any_memory_is_refused(server, data, code, said):
    with pytest.raises(urllib.error.HTTPError) as err:
        post(f"{server}/predict", data)
    assert err.value.code == code
    assert said in err.value.read()


def health(server: str) -> float:
    started = time.perf_counter()
    urllib.request.urlopen(f"{server}/health", timeout=10).close()
    return time.perf_counter() - started


def test_slow_clients_and_endless_uploads_hold_nobody_up(server):
    port = int(server.rpartition(":")[2])
    start = (
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    )
    slow = []
    for i in range(60):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall((start + b"Content-Length: 1000\r\n\r\n--b") if i % 2 else b"POST /pre")
        slow.append(client)
    endless = socket.create_connection(("127.0.0.1", port), timeout=30)
    endless.sendall(start + b"Transfer-Encoding: chunked\r\n\r\n")
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    endless.sendall(b"%x\r\n%s\r\n" % (len(form), form))
    piece, sent = b"10000\r\n" + bytes(65536) + b"\r\n", 0
    with contextlib.suppress(OSError):
        while sent < 200 * 2**20:
            endless.sendall(piece)
            sent += 65536
    assert sent < 200 * 2**20  # it was cut off
    with contextlib.suppress(ConnectionError):
        assert endless.recv(100).startswith(b"HTTP/1.1 413")
    assert health(server) < 2
    assert post(f"{server}/predict?topk=1", jpeg())["guesses"]
    for client in [*slow, endless]:  # cancelled
        client.close()
    assert health(server) < 2
    assert post(f"{server}/predict?topk=1", jpeg())["guesses"]


def test_wrong_topk_is_refused(server):
    with pytest.raises(urllib.error.HTTPError) as err:
        post(f"{server}/predict?topk=0", jpeg())
    assert err.value.code == 422


def test_the_example_stays_short():
    assert len(SCRIPT.read_text().splitlines()) < 150
