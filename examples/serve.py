"""An HTTP endpoint for an exported network: POST an image, get its likeliest classes.

    pip install "npprune[serve]"
    python examples/serve.py model.onnx --port 8000
    curl -F file=@cat.jpg "http://127.0.0.1:8000/predict?topk=3"

No PyTorch runs here: ONNX Runtime, with the labels and the preprocessing from the file itself.
Whatever is sent takes bounded memory and time; a proxy in front adds TLS, rate limits and users.
"""

import argparse
import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Query, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from npprune.export.predict import Classifier, Guess
from npprune.images.decoding import UnreadableImage

MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 25_000_000  # of an image
UPLOADS, RUNS = 256, 4  # received at a time; decoded and classified at a time
PATIENCE = 20.0  # seconds for an upload to be received, or to wait until it can be
END = {"Connection": "close"}  # what is still sent is not read
SECONDS = 90.0  # that a connection may last, whatever it sends or does not


def make_app(model: Path, provider: str = "auto", threads: int | None = None) -> FastAPI:
    """The application: `/predict`, `/health` and, from FastAPI, `/docs`."""
    classifier = Classifier(model, provider=provider, threads=threads)
    running = asyncio.Semaphore(RUNS)
    app = FastAPI(title=f"npprune: {model.name}")
    app.add_middleware(Bounded)

    @app.get("/health")
    async def health() -> dict[str, Any]:  # never waits for a thread
        session = classifier.session
        return {
            "model": model.name,
            "architecture": session.metadata.get("architecture", ""),
            "classes": len(classifier.classes),
            "provider": session.provider,
            "reason": session.reason,
        }

    @app.post("/predict")
    async def predict(
        file: UploadFile, topk: Annotated[int, Query(ge=1, le=1000)] = 5
    ) -> dict[str, Any]:
        def guess() -> list[Guess]:
            image = classifier.open(file.file.read(), str(file.filename), MAX_PIXELS)
            return classifier.classify([image], topk=topk)[0]

        await patiently(running)
        try:
            guesses = await run_in_threadpool(guess)
        except UnreadableImage as err:
            said = f"{file.filename} is not a readable image: {err.reason}"
            raise HTTPException(422, said) from err
        finally:
            running.release()
        return {"guesses": [asdict(g) for g in guesses]}

    return app


async def patiently(free: asyncio.Semaphore) -> None:
    """Wait for one's turn; 503 where that takes too long."""
    try:
        await asyncio.wait_for(free.acquire(), PATIENCE)
    except asyncio.TimeoutError:
        raise HTTPException(503, "busy", {"Retry-After": f"{PATIENCE:.0f}"}) from None


class Bounded:
    """Some uploads at a time, and of each so many bytes: more are not even received."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.free = asyncio.Semaphore(UPLOADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        try:
            await patiently(self.free)
        except HTTPException as err:  # out here nobody else makes an answer of it
            answer = JSONResponse({"detail": err.detail}, err.status_code, err.headers)
            return await answer(scope, receive, send)
        received, end = 0, asyncio.get_running_loop().time() + PATIENCE

        async def counted() -> Message:
            nonlocal received
            while True:
                left = end - asyncio.get_running_loop().time()
                try:
                    message = await asyncio.wait_for(receive(), left)
                except asyncio.TimeoutError:
                    raise HTTPException(408, f"over {PATIENCE:g} seconds", END) from None
                received += len(message.get("body", b""))
                if received <= MAX_BYTES:
                    return message
                if received > 4 * MAX_BYTES or not message.get("more_body"):  # or unread: a reset
                    raise HTTPException(413, f"an image may have {MAX_BYTES} bytes", END)

        try:
            await self.app(scope, counted, send)
        finally:
            self.free.release()


class Mortal(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """A connection that ends after a while, so that slow clients hold nothing for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.end = asyncio.get_running_loop().call_later(SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end.cancel()
        super().connection_lost(exc)


def main() -> None:
    """Parse the command line and serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve an ONNX file written by npprune.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--provider", default="auto", help="auto, cpu, cuda or tensorrt")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    app = make_app(args.model, args.provider, args.threads)
    uvicorn.run(app, host=args.host, port=args.port, http=Mortal, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
