"""Draw the README's pictures, docs/pictures/*.png, from runs of the three scripts at their defaults.

python analyze.py run.dir=runs/a; python train.py run.dir=runs/t; python perturb.py run.dir=runs/p
python examples/pictures.py runs/a runs/t runs/p

The page is photographed with the tests' browser (Chromium). Figures keep their white ground, so that they can be read
on a dark page too.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from execute import few_colours
from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
MARGIN = 24  # pixels of white
PAIRS = {
    "fig2": ("analyze/fig2a_portraits", "analyze/fig2b_rotations"),
    "fig3": ("train/fig3b_latent_trajectory", "train/fig3d_explained_variance"),
    "fig4": ("analyze/fig4a_trajectory", "perturb/fig4d_teleport"),
}


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two figures in one picture, their tops in line."""
    width = left.width + right.width + 3 * MARGIN
    sheet = Image.new("RGB", (width, max(left.height, right.height) + 2 * MARGIN), "white")
    sheet.paste(left, (MARGIN, MARGIN))
    sheet.paste(right, (left.width + 2 * MARGIN, MARGIN))
    return sheet


def save(picture: Image.Image, name: str, *, width: int = 1200) -> None:
    """At most ``width`` pixels wide and with 256 colours, as ``docs/pictures/<name>.png``."""
    if picture.width > width:
        size = (width, round(picture.height * width / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    few_colours(picture).save(PICTURES / f"{name}.png", optimize=True)


def photograph(page: Path) -> Image.Image:
    """Where a report page has a unit's portrait and its place in the null: controls, figures, and how to read them."""
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import Browser, find_chromium

    program = find_chromium()
    if program is None:
        sys.exit("No Chromium on the path: install one, or name it in the environment variable CHROMIUM.")
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(Path(folder) / "profile", program)
        try:
            browser.look(1100)
            browser.open(page)
            section, last = (
                browser.run(f"document.getElementById({name!r}).getBoundingClientRect().{side} + scrollY")
                for name, side in (("figure-2", "top"), ("fig2a-null", "bottom"))
            )
            whole = Image.open(browser.screenshot(Path(folder) / "page.png")).convert("RGB")
            return whole.crop((0, round(section) - MARGIN, whole.width, round(last) + MARGIN))
        finally:
            browser.close()


def main(analyze: str, train: str, perturb: str) -> None:
    runs = {"analyze": Path(analyze), "train": Path(train), "perturb": Path(perturb)}
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, pair in PAIRS.items():
        figures = []
        for figure in pair:
            script, file = figure.split("/")
            figures.append(Image.open(runs[script] / "figures" / f"{file}.png").convert("RGB"))
        save(side_by_side(*figures), name)
    save(photograph(runs["analyze"] / "report.html"), "report")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
