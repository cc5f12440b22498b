"""Pictures of one's own: the network's answers to them, what cannot be used, and sheets."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from helpers.commands import ROOT, in_process
from helpers.pictures import write_files
from PIL import Image, ImageDraw, ImageOps

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.data.ink import ink_of
from mnist_lightning.data.pictures import PIXELS, PictureError, find, read
from mnist_lightning.data.placing import characters, count_characters
from mnist_lightning.datasets import FashionMNIST, ImageFolder

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def digits(mnist):
    return mnist.test.images[:24, 0].numpy()


def enlarged(digit, side=280):
    return Image.fromarray(digit).resize((side, side), Image.Resampling.NEAREST)


def on_paper(digit, paper=(230, 220, 150), ink=(40, 30, 120)):
    share = np.asarray(enlarged(digit), float)[..., None] / 255
    return Image.fromarray((np.array(paper) * (1 - share) + np.array(ink) * share).astype(np.uint8))


def in_shadow(digit):
    y, x = np.mgrid[:400, :360]
    share = np.zeros((400, 360))
    share[60:340, 40:320] = np.asarray(enlarged(digit), float) / 255
    noise = np.random.default_rng(0).normal(0, 4, share.shape)
    return Image.fromarray((190 * (1 - x / 600 - y / 1500) * (1 - 0.8 * share) + noise).clip(0, 255).astype(np.uint8))


def at_an_edge(digit):
    picture = np.array(in_shadow(digit), float)
    y, x = np.mgrid[:400, :360]
    picture[x + 0.3 * y > 260] *= 0.6  # the shadow's edge crosses the digit
    return Image.fromarray(picture.astype(np.uint8))


def grainy(digit):
    noise = np.random.default_rng(0).normal(0, 40, (280, 280))
    return Image.fromarray((210 - 0.6 * np.asarray(enlarged(digit)) + noise).clip(0, 255).astype(np.uint8))


def see_through(digit):
    alpha = enlarged(digit)
    return Image.merge("RGBA", [Image.new("L", alpha.size, 255)] * 3 + [alpha])


def likeness(image, digit):
    """Return the correlation of two images, allowing a shift by a pixel from rounding the center of mass."""
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return max(np.corrcoef(np.roll(image, shift, (0, 1)).ravel(), digit.ravel())[0, 1] for shift in shifts)


def ruled(digit, is_squared=False):
    y, x = np.mgrid[:360, :320]
    rules = (y - 0.03 * x) % 40 < 2
    if is_squared:
        rules |= (x + 0.03 * y) % 40 < 2
    values = np.where(rules, 170.0, 240.0)
    values[40:320, 20:300] *= 1 - 0.8 * np.asarray(enlarged(digit), float) / 255
    return Image.fromarray(values.astype(np.uint8))


KINDS = {
    "light on dark": enlarged,
    "dark on light": lambda digit: ImageOps.invert(enlarged(digit)),
    "one bit": lambda digit: ImageOps.invert(enlarged(digit)).convert("1"),
    "palette": lambda digit: on_paper(digit).quantize(8),
    "16 bit": lambda digit: Image.fromarray(np.asarray(enlarged(digit)).astype(np.uint16) * 257),
    "color": on_paper,
    "white on transparent": see_through,
    "padded": lambda digit: ImageOps.expand(ImageOps.invert(enlarged(digit)), (300, 20, 10, 150), 255),
    "shadow": in_shadow,
    "edge of a shadow": at_an_edge,
    "grain": grainy,
    "lined paper": ruled,
    "squared paper": lambda digit: ruled(digit, is_squared=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_any_kind_become_the_images_that_they_are_of(digits, tmp_path, kind):
    data = MNISTDataModule()
    for digit in digits[:8]:
        KINDS[kind](digit).save(tmp_path / "digit.png")
        picture, remark = read(tmp_path / "digit.png")
        assert not remark
        image = data.from_picture(picture)
        assert image.shape == (1, 1, 28, 28)
        assert likeness(image[0, 0], digit) > (0.8 if kind == "one bit" else 0.85)


def test_a_rotated_photo_is_set_upright(digits, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # says: turn clockwise
    upright = ImageOps.invert(enlarged(digits[0]))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert read(tmp_path / "turned.png")[0].tobytes() == upright.tobytes()


@pytest.mark.parametrize("light", [np.linspace(1, 0.6, 900), np.repeat([1, 0.5], (330, 570))], ids=["even", "edge"])
def test_a_sheet_is_cut_in_reading_order(digits, light):
    sheet = np.full((620, 900), 235.0)
    generator = np.random.default_rng(1)
    expected = digits[:20]
    for number, digit in enumerate(expected):
        row, column = divmod(number, 5)
        top = 20 + 145 * row + 4 * column + generator.integers(8)  # the rows are slanted
        left = 20 + 170 * column + generator.integers(20)
        sheet[top : top + 112, left : left + 112] -= 0.8 * np.asarray(enlarged(digit, 112), float)
    sheet *= light
    images = MNISTDataModule().from_picture(Image.fromarray(sheet.clip(0, 255).astype(np.uint8)), is_sheet=True)
    assert images.shape == (20, 1, 28, 28)
    alike = np.corrcoef(images.reshape(20, -1), expected.reshape(20, -1))[:20, 20:]
    assert (alike.argmax(axis=1) == np.arange(20)).all()
    assert count_characters(Image.fromarray(sheet.clip(0, 255).astype(np.uint8))) == 20
    assert alike.diagonal().min() > 0.65  # rounding the center of mass may shift an image by a pixel


def test_parts_of_one_digit_are_joined_and_specks_left_out():
    ink = np.zeros((100, 200), np.float32)
    ink[20:24, 12:40] = ink[28:60, 10:14] = ink[56:60, 10:40] = 1  # like a 5 with a detached bar
    ink[20:60, 100:104] = 1
    ink[80:82, 150:152] = 1
    five, one = characters(ink, is_sheet=True)
    assert count_characters(Image.fromarray(np.uint8(255 * (1 - ink)))) == 2
    assert five.shape == (40, 30)
    assert one.shape == (40, 4)


@pytest.mark.parametrize("pen", [2, 5, 12, 40])
def test_strokes_get_a_usual_width(pen, mnist):
    picture = Image.new("L", (400, 400), 255)
    ImageDraw.Draw(picture).line([(80, 100), (300, 110), (180, 320)], fill=0, width=pen, joint="curve")
    image = mnist.from_picture(picture)[0, 0] / 255
    strokes = mnist.strokes
    length = (220 + 242) * (20 - strokes.median) / 220  # of the path, in pixels of the image
    assert strokes.low < strokes.median < strokes.high
    assert 0.8 * strokes.low < image.sum() / length < 1.2 * strokes.high
    assert np.ptp(np.flatnonzero(image.any(axis=1))) == 19


def test_a_line_alone_is_a_character(mnist):
    picture = Image.new("L", (200, 400), 255)
    picture.paste(0, (98, 0, 102, 400))
    assert mnist.from_picture(picture)[0, 0].any(axis=1).sum() == 20


@pytest.mark.parametrize("noise", [0, 3])
def test_blank_paper_has_no_ink(noise):
    paper = np.linspace(230, 150, 300) + np.random.default_rng(0).normal(0, noise, (200, 300))
    with pytest.raises(PictureError, match="no ink"):
        characters(ink_of(Image.fromarray(paper.astype(np.uint8))))


def test_other_data_sets_have_their_own_way(tmp_path):
    photo = Image.new("RGB", (60, 40), "white")
    photo.paste((200, 30, 30), (20, 5, 30, 35))
    write_files(tmp_path, 5)
    image = ImageFolder(str(tmp_path), size=(6, 7)).from_picture(photo)
    assert image.shape == (1, 3, 6, 7)
    assert np.array_equal(image[0].transpose(1, 2, 0), np.asarray(photo.resize((7, 6))))
    clothes = FashionMNIST().from_picture(photo)[0, 0]
    assert clothes.shape == (28, 28)
    assert (clothes > 100).any(axis=1).all()  # the clothes fill the height of the image
    assert 8 <= (clothes > 100).any(axis=0).sum() <= 11
    assert clothes[:, :8].max() == 0


def test_files_folders_and_patterns_are_found_once(digits, tmp_path):
    (tmp_path / "more/.hidden").mkdir(parents=True)
    for name in ("a.png", "b[1].png", "more/c.jpg", "more/.hidden/d.png"):
        enlarged(digits[0]).save(tmp_path / name)
    (tmp_path / "more/notes.txt").write_text("no picture")
    names = [str(tmp_path / name) for name in ("*.png", "b[1].png", "more", "none*")]
    found = [(path.name, bool(problem)) for path, problem in find(names)]
    assert found == [("a.png", False), ("b[1].png", False), ("c.jpg", False), ("none*", True)]


def test_predict_names_what_it_leaves_out(fitted, digits, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    for number in range(3):
        ImageOps.invert(enlarged(digits[number])).save(tmp_path / f"{number}.png")
    enlarged(digits[3]).save(tmp_path / "3.gif", save_all=True, append_images=[enlarged(digits[4])])
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    pair = Image.new("L", (600, 280), 255)
    for number in range(2):
        pair.paste(ImageOps.invert(enlarged(digits[number])), (300 * number, 0))
    pair.save(tmp_path / f"{'two' * 20}.jpg")
    code, out, err = in_process(capfd, "predict", "--images", "*.png", "3.gif", "nothing.jpg", "two*.jpg")
    assert code == 0, err
    assert "Network: lightning_logs/baseline/version_0/checkpoints/last.ckpt\nTrained on MNIST" in out
    for line in (
        "cut.png is left out: it cannot be read", "empty.png is left out: there is no ink on it",
        "text.png is left out: it is not a picture", "nothing.jpg is left out: there is no such file",
        "3.gif: it has several frames or pages: the first is used", "two.jpg seems to hold 2 digits: try --sheet",
    ):  # fmt: skip
        assert err.count(line) == 1
    table = pd.read_csv("predictions.csv")
    assert [*table.columns] == ["file", "class", "probability", "runner_up", "runner_up_probability"]
    assert [*table.file] == ["0.png", "1.png", "2.png", "3.gif", f"{'two' * 20}.jpg"]
    assert err.count("try --sheet") == 1
    doubtful = [line.split()[0] for line in out.splitlines() if re.search(r" 0\.\d{4}\? ", line)]
    assert [name[:5] for name in doubtful] == [name[:5] for name in table.file[table.probability < 0.8]]
    assert (f"below 0.8: {len(doubtful)} of 5\n" in out) == bool(doubtful)
    assert max(len(line) for line in out.splitlines() if not line.startswith("Trained on")) <= 80
    assert (table.probability > table.runner_up_probability).all()
    assert "Traceback" not in err
    assert min(Image.open("predictions.png").size) > 100
    before = (tmp_path / "predictions.png").read_bytes()
    (tmp_path / "predictions.csv").unlink()
    code, _, err = in_process(capfd, "predict", "--images", "0.png")
    assert code == 1
    assert "predictions.png exists and is not overwritten" in err
    assert (tmp_path / "predictions.png").read_bytes() == before
    code, _, err = in_process(capfd, "predict", "--images", "empty.png", "--output=other.csv")
    assert code == 1
    assert "none of the --images can be used" in err
    assert not (tmp_path / "other.csv").exists()


@pytest.mark.skipif(not psutil.LINUX, reason="only Linux allows file names that are not text")
def test_a_file_may_have_any_name(fitted, digits, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    (tmp_path / "some").mkdir()
    for name in (b"zif\xf6fer.png", b"cost_$5_$6^.png", "数字.png".encode(), b"a,b\nc.png"):
        enlarged(digits[0]).save(os.path.join(os.fsencode(tmp_path / "some"), name).decode(errors="surrogateescape"))
    with warnings.catch_warnings(action="error", category=UserWarning):
        code, _, err = in_process(capfd, "predict", "--images=some")
    assert code == 0, err
    names = sorted(Path(name).name for name in pd.read_csv("predictions.csv")["file"])
    assert names == ["a,b\nc.png", "cost_$5_$6^.png", r"zif\udcf6fer.png", "数字.png"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["predictions.csv", "predictions.png"]


def test_predict_draws_why(fitted, digits, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    for number in range(2):
        ImageOps.invert(enlarged(digits[number])).save(tmp_path / f"digit{number}.png")
    assert in_process(capfd, "predict", "--images", "digit*.png", "--output=plain.csv")[0] == 0
    code, _, err = in_process(capfd, "predict", "--images", "digit*.png", "--output=why.csv", "--explain")
    assert code == 0, err
    assert Path("plain.csv").read_text(encoding="utf-8") == Path("why.csv").read_text(encoding="utf-8")
    plain, why = (np.asarray(Image.open(f"{name}.png"), int) for name in ("plain", "why"))
    assert why.shape[1] == 2 * plain.shape[1]
    reds = why[..., 0] - why[..., 2]  # red minus blue
    image, explained, *_ = np.array_split(reds, 4, axis=1)
    assert abs(image).max() == 0
    assert abs(explained).max() > 100
    assert reds.max() > 50
    assert reds.min() < -50
    code, _, err = in_process(capfd, "predict", "--explain")
    assert code == 1
    assert "--explain needs pictures" in err


def test_the_newest_tuned_run_is_taken_unless_another_is_named(fitted, digits, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lightning_logs").mkdir()
    for name in ("baseline", "tuned"):
        shutil.copytree(fitted[0].parent, tmp_path / "lightning_logs" / name)
    enlarged(digits[0]).save("digit.png")
    cases = [
        ([], "tuned/version_0/checkpoints/last"),
        (["--ckpt_path=best"], "tuned/version_0/checkpoints/best"),
        (["--name=baseline"], "baseline/version_0/checkpoints/last"),
    ]
    for number, (options, name) in enumerate(cases):
        code, out, err = in_process(capfd, "predict", "--images", "digit.png", f"--output={number}.csv", *options)
        assert code == 0, err
        assert f"Network: lightning_logs/{name}.ckpt" in out
    monkeypatch.chdir(ROOT.parent)
    code, _, err = in_process(
        capfd, "predict", "--images", "digit.png", f"--trainer.default_root_dir={tmp_path / 'none'}"
    )
    assert code == 1
    assert "There is no complete tuned or baseline run" in err


def test_tiny_pictures_are_sharpened(digits):
    found = [
        likeness(MNISTDataModule().from_picture(reduced)[0, 0], digit)
        for digit in digits
        for reduced in [Image.fromarray(digit).crop((3, 3, 25, 25)).resize((9, 9), Image.Resampling.BOX)]
    ]
    assert np.mean(found) > 0.87  # 0.84 if the picture is only enlarged


@pytest.mark.parametrize("side", [1, 2, 5])
def test_pictures_of_few_pixels_have_an_image_or_no_ink(side):
    picture = Image.new("L", (side, side), 255)
    with pytest.raises(PictureError, match="no ink"):
        MNISTDataModule().from_picture(picture)
    if side > 2:
        picture.paste(0, (side // 2, 0, side // 2 + 1, side))
        assert MNISTDataModule().from_picture(picture).shape == (1, 1, 28, 28)


@pytest.mark.slow
def test_the_whole_command_needs_less_than_a_gibibyte(fitted, tmp_path):
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    side = int(PIXELS**0.5)
    largest = Image.new("RGBA", (side, side), "white")
    largest.paste("black", (2000, 1000, 2600, 4000))
    largest.save(tmp_path / "largest.png", compress_level=1)
    largest.convert("RGB").save(tmp_path / "progressive.jpg", progressive=True, subsampling=0)
    Image.new("RGB", (10_000, 10_000)).save(tmp_path / "huge.jpg", progressive=True)
    code = "import atexit, pathlib; from mnist_lightning.__main__ import run\n"
    code += "atexit.register(lambda: print(pathlib.Path('/proc/self/status').read_text())); run()"
    command = [sys.executable, "-c", code, "predict", "--images", "largest.png", "progressive.jpg", "huge.jpg"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("huge.jpg is left out: it has more than 25 megapixels") == 1
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 2
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) < 2**20, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not psutil.LINUX, reason="reads the used memory from Linux")
def test_huge_pictures_need_less_than_a_gibibyte(tmp_path):
    Image.new("L", (10_000, 10_000), 255).save(tmp_path / "huge.png")
    with pytest.raises(PictureError, match=f"more than {PIXELS // 10**6} megapixels"):
        read(tmp_path / "huge.png")
    Image.new("RGB", (10_000, 10_000), "white").save(tmp_path / "huge.jpg", quality=50)
    code = "import sys, pathlib; from mnist_lightning.data.pictures import read\n"
    code += "print(*read(pathlib.Path(sys.argv[1]))[0].size, pathlib.Path('/proc/self/status').read_text())"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "huge.jpg"], capture_output=True, text=True, check=True
    )
    assert 1200 <= int(done.stdout.split()[0]) < 2400
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) < 2**20
