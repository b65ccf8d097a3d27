"""Take the README's picture from the chapter that draws it: book/_static/result.png.

python -m tools.picture
"""

import base64
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CHAPTER, FIGURE = ROOT / "notebooks" / "learn2synth.ipynb", "fig-l2s-recovered"
PICTURE = ROOT / "book" / "_static" / "result.png"


def figure(chapter: Path, name: str) -> bytes:
    """Return the PNG that the cell with this figure name shows.

    Raises:
        SystemExit: the chapter shows no such figure.
    """
    for cell in nbformat.read(chapter, as_version=4).cells:
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output.data["image/png"])
    raise SystemExit(f"{chapter} shows no figure {name}: execute it first.")


if __name__ == "__main__":
    PICTURE.write_bytes(figure(CHAPTER, FIGURE))
