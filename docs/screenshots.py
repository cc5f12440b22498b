"""Run fit, tune and report in a new folder, and make the README's pictures of them: ``python docs/screenshots.py``.

It needs Chromium, and five minutes on two cores.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).parents[1] / "benchmarks"
WIDTH = 1600


def side_by_side(pictures: list[Path]) -> Image.Image:
    """Return pictures next to each other, as high as the highest."""
    images = [Image.open(path).convert("RGB") for path in pictures]
    height = max(image.height for image in images)
    images = [image.resize((round(image.width * height / image.height), height)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in images), height), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    row.thumbnail((WIDTH, WIDTH))
    return row


def head_of_page(page: Path, folder: Path) -> Image.Image:
    """Return the first screen of a page."""
    shot = folder / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,900"]
    chromium = shutil.which("chromium") or sys.exit("This machine does not have Chromium.")
    subprocess.run([chromium, *options, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True)
    return Image.open(shot).convert("RGB")


def main() -> None:
    """Make all pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for command in ("fit", "tune", "report"):
            subprocess.run([sys.executable, "-m", "mnist_lightning", command], cwd=folder, check=True)
        figures = folder / "lightning_logs/baseline/version_0/figures"
        pictures = {
            "baseline": side_by_side([figures / "accuracy.png", figures / "predictions.png"]),
            "report": head_of_page(folder / "lightning_logs/report/report.html", folder),
        }
        for title, picture in pictures.items():
            picture.save(PICTURES / f"{title}.png", optimize=True)


if __name__ == "__main__":
    main()
