"""Folders of small pictures."""

from PIL import Image

COLORS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


def write_files(folder, count=10, mode="RGB", size=(10, 8)):
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = Image.new("RGB", size, color)
            image.putpixel((0, 0), (number, 0, 0))
            image.convert(mode).save(folder / name / f"{number}.png")
    return folder
