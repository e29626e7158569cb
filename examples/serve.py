"""An HTTP endpoint for an exported network: POST an image, get its likeliest classes.

    pip install "npprune[serve]"
    python examples/serve.py model.onnx --port 8000
    curl -F file=@cat.jpg "http://127.0.0.1:8000/predict?topk=3"

No PyTorch runs here: ONNX Runtime, with the labels and the preprocessing from the file itself.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Query, UploadFile

from npprune.export.predict import Classifier
from npprune.images.decoding import UnreadableImage, decode

MAX_BYTES = 20 * 2**20


def make_app(model: Path, provider: str = "auto", threads: int | None = None) -> FastAPI:
    """The application: `/predict`, `/health` and, from FastAPI, `/docs`."""
    classifier = Classifier(model, provider=provider, threads=threads)
    app = FastAPI(title=f"npprune: {model.name}")

    @app.get("/health")
    def health() -> dict[str, Any]:
        session = classifier.session
        return {
            "model": model.name,
            "architecture": session.metadata.get("architecture", ""),
            "classes": len(classifier.classes),
            "provider": session.provider,
            "reason": session.reason,
        }

    @app.post("/predict")
    def predict(file: UploadFile, topk: Annotated[int, Query(ge=1, le=1000)] = 5) -> dict[str, Any]:
        data = file.file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"an image may have {MAX_BYTES} bytes")
        try:
            image = decode(data, str(file.filename))
        except UnreadableImage as err:
            said = f"{file.filename} is not a readable image: {err.reason}"
            raise HTTPException(422, said) from err
        return {"guesses": [asdict(g) for g in classifier.classify([image], topk=topk)[0]]}

    return app


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
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
