"""Build the documentation site: `python docs/build.py [FOLDER]`, by default into `site/`.

Works on a copy: the pages of this folder, the drawings set into them, and the reference pages,
which are generated from the installed package (`docs/reference.py`). Needs the `docs` extra. The
build is strict: a broken link or name, or a page that loads anything from elsewhere, ends it with
exit code 1. The site opens from disk; its search needs `python -m http.server -d FOLDER`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import reference

DOCS = Path(__file__).resolve().parent
DRAWING = re.compile(r"^!\[[^\]]*\]\((?:\.\./)*(img/[\w-]+\.svg)\)$", re.MULTILINE)
FOREIGN = re.compile(r'src="(?:https?:)?//|<link[^>]*stylesheet[^>]*href="(?:https?:)?//')


def main(target: Path) -> int:
    """Build into `target`, replacing an older site; the exit code of the site builder."""
    if target.exists() and not (target / "sitemap.xml").is_file():
        print(f"{target} exists and is not a site: choose another folder")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        shutil.copy(DOCS.parent / "mkdocs.yml", root)
        shutil.copytree(DOCS, root / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        for page in (root / "docs").rglob("*.md"):
            page.write_text(DRAWING.sub(_inline, page.read_text(encoding="utf-8")), "utf-8")
        for name, text in reference.pages().items():
            (root / "docs" / name).parent.mkdir(exist_ok=True)
            (root / "docs" / name).write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        code = subprocess.run(command, cwd=root, check=False).returncode
        built = (root / "site").rglob("*.html")
        foreign = [p.name for p in built if FOREIGN.search(p.read_text(encoding="utf-8"))]
        if code == 0 and foreign:
            print(f"these pages load something from elsewhere: {', '.join(foreign)}")
            return 1
        if code == 0:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(root / "site", target)
            print(f"open {target / 'index.html'}")
    return code


def _inline(found: re.Match[str]) -> str:
    """A drawing as part of the page, so that its lines take the colour of the page's text."""
    svg = (DOCS / found[1]).read_text(encoding="utf-8")
    svg = re.sub(r"<style>.*?</style>\n?|<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    return f'<figure class="drawing">{svg.strip()}</figure>'


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve()))
