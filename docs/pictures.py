"""Make the pictures of README and documentation: `python docs/pictures.py [ROOT]`.

Runs the demo and a small study on the digits below ROOT (a temporary folder, or one where they were
run before: what is finished is not computed again), opens their pages in the system's Chromium, and
writes `docs/img/*.webp`. Needs the `dev` extra.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parent / "img"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, HIGH = 1200, 860
LARGEST = 150 * 1024  # bytes of a picture
LOADED = """Promise.all([...document.images].map(image => {
  image.loading = 'eager';
  return image.decode();
}))"""

DEMO = "demo"
STUDY = (
    "study reports/demo --keep 0.1,0.2,0.35,0.5 --criteria magnitude,curvature-obs --protect off "
    "--calibration digits:calibration --val digits:test --out reports/study"
)


def main(root: Path) -> None:
    """Run what is shown, and take the pictures."""
    for command in (DEMO, STUDY):
        subprocess.run([sys.executable, "-m", "npprune", *command.split()], cwd=root, check=True)
    runs = root / "reports"
    program = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDE, "height": HIGH}, color_scheme="light")
        page.goto(f"file://{runs / 'demo/report.html'}")
        save("report", page)
        page.goto(f"file://{runs / 'demo/explore/index.html'}#/class/3")
        page.wait_for_selector(".graph .node")
        page.wait_for_selector(".preview .strip img")
        page.evaluate(LOADED)
        save("explorer", page)
        page.goto(f"file://{runs / 'study/report.html'}")
        save("study", page.locator("figure .scroll").first)
        browser.close()


def save(name: str, of: Any) -> None:
    """A screenshot as a WebP file, as good as fits."""
    picture = Image.open(io.BytesIO(of.screenshot())).convert("RGB")
    for quality in (90, 80, 70, 60):
        out = io.BytesIO()
        picture.save(out, "WEBP", quality=quality, method=6)
        if len(out.getvalue()) <= LARGEST:
            break
    (IMAGES / f"{name}.webp").write_bytes(out.getvalue())
    print(f"{name}.webp: {len(out.getvalue()) // 1024} KiB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
