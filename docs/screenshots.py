"""Run fit, tune and report in a new folder, and make the pictures of the docs: ``python docs/screenshots.py``.

It needs Linux or macOS, Chromium, ``pip install pyte`` and, on two cores, six minutes. The pictures of the report and
of the terminal also hold their words: tests compare these with the words of today's commands.
"""

import html
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING
from urllib.request import urlopen

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    import pyte

PICTURES = Path(__file__).with_name("pictures")
ROWS, COLUMNS = 32, 80
"""Size of the recorded terminal."""
CELL = 8, 17
"""Width and height of a letter in a recording, in pixels."""
PAPER, INK = "#0d1117", "#e6edf3"
COLORS = {"red": "#ff7b72", "green": "#7ee787", "brown": "#e3b341", "blue": "#79c0ff", "cyan": "#a5d6ff"}
"""Colors of a recording, by the names that pyte gives to those of a terminal."""


def words_of_page(page: str) -> list[str]:
    """Return the texts of a report's page before its curves, each number as 0."""
    head = page[page.index("<body>") : page.index('<section aria-labelledby="curves"')]
    text = re.sub(r"<(style|script).*?</\1>", "", head, flags=re.DOTALL)
    return [without_numbers(html.unescape(part)) for part in re.split(r"<[^>]*>", text) if part.strip()]


def without_numbers(text: str) -> str:
    """Return a text with each number as 0, without the mark of the best epoch."""
    return " ".join(re.sub(r"[-\u2212+]?\d+([.,:]\d+)*", "0", text).replace("*", " ").split())


def screenshot(url: str, file: Path, *flags: str) -> Image.Image:
    """Return the first screen of a page."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,720"]
    chromium = shutil.which("chromium") or sys.exit("This machine does not have Chromium.")
    subprocess.run([chromium, *options, *flags, f"--screenshot={file}", url], check=True, capture_output=True)
    return Image.open(file).convert("RGB")


def screenshot_after(seconds: float, url: str, file: Path) -> Image.Image:
    """Return the first screen of a page that goes on drawing after it is loaded."""

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/slow":  # Chromium waits for this image before it takes the picture
                time.sleep(seconds)
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f'{framed(url, 1280, 720)}<img src="/slow">'.encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        picture = screenshot(f"http://127.0.0.1:{server.server_port}/", file)
        server.shutdown()
    return picture


def framed(url: str, width: int, height: int) -> str:
    """Return a page that shows another page in a frame."""
    return (
        f'<body style="margin: 0"><iframe style="border: 0" width={width} height={height} src="{html.escape(url)}">'
        "</iframe>"
    )


def picture_report(page: Path, folder: Path) -> None:
    """Make the pictures of a report: light, dark and on a phone."""
    note = PngInfo()
    note.add_itxt("words", json.dumps(words_of_page(page.read_text(encoding="utf-8"))))
    phone = folder / "phone.html"  # a window of Chromium cannot be so narrow
    phone.write_text(framed(page.as_uri(), 390, 844))
    pictures = {
        "report": screenshot(page.as_uri(), folder / "light.png"),
        "report_dark": screenshot(page.as_uri(), folder / "dark.png", "--blink-settings=preferredColorScheme=0"),
        "report_phone": screenshot(phone.as_uri(), folder / "phone.png", "--window-size=600,844"),
    }
    pictures["report_phone"] = pictures["report_phone"].crop((0, 0, 390, 844))
    for name, picture in pictures.items():
        picture.quantize(128).save(PICTURES / f"{name}.png", optimize=True, pnginfo=note)


def picture_tensorboard(folder: Path) -> None:
    """Make a picture of four of TensorBoard's pages."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    host, _, port = address.partition(":")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "lightning_logs", "--host", host, "--port", port]
    server = subprocess.Popen(command, cwd=folder)
    try:
        while not json.loads(_read(f"http://{address}/data/runs") or "[]"):
            if server.poll() is not None:
                sys.exit("TensorBoard has ended before it showed the runs: see its messages above.")
            time.sleep(1)
        for name in ("timeseries", "custom_scalars", "images", "hparams"):
            url = f"http://{address}/?darkMode=false&tagFilter=%5E(train%7Cval)/#{name}"
            picture = screenshot_after(20, url, folder / f"{name}.png")
            picture.quantize(128).save(PICTURES / f"tensorboard_{name}.png", optimize=True)
    finally:
        server.terminate()


def _read(url: str) -> bytes:
    try:
        with urlopen(url) as answer:  # noqa: S310 - the address is ours
            return bytes(answer.read())
    except OSError:  # the server is starting
        return b""


def output_of(words: list[str], folder: Path) -> Iterator[tuple[float, bytes]]:
    """Run a command in a terminal; yield the seconds since its start and what it printed, as it prints it."""
    import fcntl  # Windows lacks these three
    import pty
    import termios

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


def draw(screen: "pyte.Screen") -> Image.Image:
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
    import pyte  # the test does not need it

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
    palette = frames[-1].quantize(64)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    words = json.dumps([line for line in map(without_numbers, screen.display) if line])
    first.save(file, save_all=True, append_images=others, duration=durations, loop=0, optimize=True, comment=words)


def main() -> None:
    """Make all pictures."""
    command = ["-m", "mnist_lightning"]
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder, other = Path(name, "project"), Path(name, "short")
        folder.mkdir()
        other.mkdir()
        short = [*command, "fit", "--trainer.max_epochs", "5"]
        record([sys.executable, *short], " ".join(["python", *short]), other, PICTURES / "fit.gif")
        for word in ("fit", "tune", "report"):
            subprocess.run([sys.executable, *command, word], cwd=folder, check=True)
        picture_report(folder / "lightning_logs/report/report.html", folder)
        picture_tensorboard(folder)


if __name__ == "__main__":
    main()
