"""Draw the letters A to Z in many fonts, turned and moved a little: train/A/*.png, ..., test/Z/*.png.

matplotlib brings the fonts, so the pictures are the same everywhere. The test pictures use other fonts.
"""

import argparse
import random
import string
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

FONTS = {
    "train": (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-BoldOblique"),
        *("DejaVuSerif", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"),
    ),
    "test": ("DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "STIXGeneralBol", "cmb10"),
}
SIZE = 28
"""Pixels on each side of a picture."""


def draw(letter: str, font: ImageFont.FreeTypeFont, chance: random.Random) -> Image.Image:
    """Return a picture of a dark letter on white paper."""
    scale = 4  # drawn large, then reduced: turned letters have smooth edges
    middle = SIZE * scale / 2
    picture = Image.new("L", (SIZE * scale, SIZE * scale), 255)
    place = (middle + chance.uniform(-8, 8), middle + chance.uniform(-8, 8))
    ImageDraw.Draw(picture).text(place, letter, fill=chance.randrange(90), font=font, anchor="mm")
    return picture.rotate(chance.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor=255).resize((SIZE, SIZE))


def main() -> None:
    """Draw all letters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("images"), help="folder for train and test")
    parser.add_argument("--copies", type=int, default=8, help="pictures of each letter in each font")
    options = parser.parse_args()
    chance = random.Random(0)  # noqa: S311 - the pictures must be the same each time
    for split, names in FONTS.items():
        for name in names:
            font = ImageFont.truetype(Path(matplotlib.get_data_path(), f"fonts/ttf/{name}.ttf"), 80)
            for letter in string.ascii_uppercase:
                folder = options.output / split / letter
                folder.mkdir(parents=True, exist_ok=True)
                for copy in range(options.copies):
                    draw(letter, font, chance).save(folder / f"{name}_{copy}.png")


if __name__ == "__main__":
    main()
