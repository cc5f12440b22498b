"""Run fit, tune and report in a new folder, and make the README's pictures of them: ``python docs/screenshots.py``.

It needs Linux or macOS, Chromium, ``pip install pyte`` and, on two cores, five minutes.
"""

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

PICTURES = Path(__file__).parents[1] / "benchmarks"
ROWS, COLUMNS = 32, 80
"""Size of the recorded terminal."""
CELL = 8, 17
"""Width and height of a letter in a recording, in pixels."""
PAPER, INK = "#0d1117", "#e6edf3"
COLORS = {"red": "#ff7b72", "green": "#7ee787", "brown": "#e3b341", "blue": "#79c0ff", "cyan": "#a5d6ff"}
"""Colors of a recording, by the names that pyte gives to those of a terminal."""


def head_of_page(page: Path, folder: Path) -> Image.Image:
    """Return the first screen of a page."""
    shot = folder / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,720"]
    chromium = shutil.which("chromium") or sys.exit("This machine does not have Chromium.")
    subprocess.run([chromium, *options, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True)
    return Image.open(shot).convert("RGB")


def output_of(words: list[str], folder: Path) -> Iterator[tuple[float, bytes]]:
    """Run a command in a terminal; yield the seconds since its start and what it printed, as it prints it."""
    start = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ["TERM"] = "xterm-256color"
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
        os.execvp(words[0], words)  # noqa: S606 - the command is ours
    while True:
        try:
            printed = os.read(terminal, 65536)
        except OSError:  # the command has ended
            break
        yield time.monotonic() - start, printed
    os.waitpid(pid, 0)


def draw(screen: pyte.Screen) -> Image.Image:
    """Draw a terminal."""
    (width, height), fonts = CELL, Path(matplotlib.get_data_path(), "fonts/ttf")
    image = Image.new("RGB", ((COLUMNS + 2) * width, (ROWS + 1) * height), PAPER)
    pen = ImageDraw.Draw(image)
    for row, line in screen.buffer.items():
        for column, cell in line.items():
            if cell.data.strip():
                font = ImageFont.truetype(fonts / f"DejaVuSansMono{'-Bold' if cell.bold else ''}.ttf", 13)
                place = (column + 1) * width, row * height + height // 2
                pen.text(place, cell.data, COLORS.get(cell.fg, INK), font)
    return image


def record(words: list[str], prompt: str, folder: Path, file: Path) -> None:
    """Run a command in a terminal, and write an animation of it with at most ten pictures a second."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    stream.feed(f"$ {prompt}\r\n".encode())
    frames, times = [draw(screen)], [0.0]
    for seconds, printed in output_of(words, folder):
        if seconds - times[-1] > 0.1:
            frames.append(draw(screen))
            times.append(seconds)
        stream.feed(printed)
    frames.append(draw(screen))
    times.append(seconds)
    durations = [round(1000 * (after - before)) for before, after in zip(times, [*times[1:], seconds + 8], strict=True)]
    palette = frames[-1].quantize(16)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(file, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


def main() -> None:
    """Make all pictures."""
    command = ["-m", "mnist_lightning"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short = [*command, "fit", "--trainer.max_epochs", "5"]
        record([sys.executable, *short], " ".join(["python", *short]), folder, PICTURES / "fit.gif")
        for word in ("fit", "tune", "report"):
            subprocess.run([sys.executable, *command, word], cwd=folder, check=True)
        picture = head_of_page(folder / "lightning_logs/report/report.html", folder)
        picture.save(PICTURES / "report.png", optimize=True)


if __name__ == "__main__":
    main()
