"""The report: its numbers against scikit-learn, SciPy and what the commands printed; its page; what it refuses."""

import contextlib
import csv
import io
import json
import math
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from helpers.browser import DARK, as_bytes, audit, in_browser
from helpers.commands import ROOT, ROUNDING, in_process, posix
from helpers.studies import tune_options
from PIL import Image
from scipy import stats
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support

from mnist_lightning.__main__ import main
from mnist_lightning.classifier import Classifier
from mnist_lightning.comparison import loading, page, sections, summary
from mnist_lightning.comparison.significance import (
    accuracy_interval,
    calibration_error,
    compare,
    compare_seeds,
    compare_to_first,
    holm,
    reliability,
    seeds_needed,
    verdict,
)
from mnist_lightning.deployment import page as page_to_draw_on
from mnist_lightning.search.storage import open_storage
from mnist_lightning.system.errors import UserError


@pytest.fixture(scope="module")
def made(data_dir, tmp_path_factory):
    """A folder after ``fit`` (two seeds), ``tune`` and ``report``, and the output of ``report``."""
    cwd = tmp_path_factory.mktemp("made")
    small, output = f"--data.data_dir={data_dir}", io.StringIO()
    tune = tune_options(data_dir, "--n_trials=3", "--executions_per_trial=1", "--refit_epochs=2")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(cwd)
        for arguments in (
            ["fit", small, "--trainer.max_epochs=3", "--seed_everything=7"],
            ["fit", small, "--trainer.max_epochs=3", "--trainer.precision=bf16-mixed"],
            [option for option in tune if option != "--refit=false"],
            ["predict", small, "--name=baseline", "--output=baseline.csv"],
            ["predict", small, "--name=tuned", "--output=tuned.csv"],
        ):
            main(arguments)
        shutil.copytree(cwd / "lightning_logs", cwd / "before")
        output.seek(0)
        output.truncate()
        main(["report"])
    return cwd, output.getvalue()


@pytest.fixture
def reported(made):
    return json.loads((made[0] / "lightning_logs/report/report.json").read_text())


@pytest.fixture
def run(made, tmp_path, monkeypatch, capfd):
    """Run ``report`` in this process on a copy of the runs; return exit code or message, output and folder."""
    shutil.copytree(made[0] / "before", tmp_path / "lightning_logs")
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        code = 0
        try:
            main(["report", *arguments])
        except SystemExit as exit:
            code = exit.code
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return command


def test_the_newest_complete_runs_are_compared(made, reported):
    paths = [model["runs"] for model in reported["models"].values()]
    assert paths == [["lightning_logs/baseline/version_1"], ["lightning_logs/tuned/version_0"]]
    assert list(reported["models"]) == ["baseline", "tuned"]
    assert reported["images"] == 300


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["baseline", "tuned"])
def test_numbers_are_those_that_the_commands_gave(made, reported, name):
    cwd, _ = made
    run = Path(reported["models"][name]["runs"][0])
    metrics = reported["models"][name]["metrics"]
    with (cwd / run / "test.csv").open(newline="") as file:
        for row, weights in zip(csv.DictReader(file), ("last", "best"), strict=True):
            for metric in ("accuracy", "loss", "penalized_loss"):
                (value,) = metrics[f"test/{metric} ({weights} epoch)"]
                assert value == pytest.approx(float(row[f"test/{metric}"]), rel=ROUNDING)
    with (cwd / run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for metric in ("accuracy", "loss", "penalized_loss"):
        (value,) = metrics[f"val/{metric} (last epoch)"]
        assert value == pytest.approx(float(rows[-1][f"val/{metric}"]), rel=ROUNDING)
    assert reported["models"][name]["epochs"] == [len(rows)]
    assert 0 < reported["models"][name]["training_seconds"][0] < 60

    table = pd.read_csv(cwd / f"{name}.csv")
    probabilities = table.filter(like="probability_").to_numpy()
    assert metrics["test/accuracy (last epoch)"][0] == pytest.approx(accuracy_score(table.label, table.predicted))
    assert metrics["test/loss (last epoch)"][0] == pytest.approx(log_loss(table.label, probabilities), rel=ROUNDING)
    model = reported["models"][name]
    assert model["confusion_matrix"] == confusion_matrix(table.label, table.predicted).tolist()
    expected = precision_recall_fscore_support(table.label, table.predicted, zero_division=0)
    for key, values in zip(("precision", "recall", "f1"), expected, strict=False):
        assert model["per_class"][key] == pytest.approx(values.tolist())


def test_the_difference_is_that_of_the_saved_predictions(made, reported):
    right = []
    for name in ("baseline", "tuned"):
        table = pd.read_csv(made[0] / f"{name}.csv")
        right.append(table.label == table.predicted)
    corrected, broken = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    found = reported["differences"]["tuned"]
    assert (found["corrected"], found["broken"]) == (corrected, broken)
    assert found["p_value"] == pytest.approx(stats.binomtest(corrected, corrected + broken).pvalue)
    difference = right[1].mean() - right[0].mean()
    assert found["difference"] == pytest.approx(difference)
    draws = np.random.default_rng(1).integers(300, size=(4000, 300))
    both = right[1].to_numpy().astype(float) - right[0].to_numpy()
    expected = np.quantile(both[draws].mean(axis=1), [0.025, 0.975])
    assert found["interval"] == pytest.approx(expected.tolist(), abs=0.01)
    assert f"corrects {corrected} that baseline gets wrong and breaks {broken}" in reported["verdict"]


def test_one_seed_is_said_to_be_one_seed(made, reported):
    """Check the verdict of the other weights, the advice and the commands against the numbers in report.json."""
    cwd, output = made
    metrics = {name: model["metrics"] for name, model in reported["models"].items()}
    one, two = (metrics[name]["test/accuracy (best epoch)"][0] for name in ("baseline", "tuned"))
    assert "With the weights of the best validation epoch: " in reported["verdict"]
    assert f"({100 * (two - one):+.2f} points, p " in reported["verdict"]
    assert "With other seeds, baseline and tuned may compare differently." in output
    difference = reported["differences"]["tuned"]["difference"]
    needed = seeds_needed(difference, 0.004)
    assert f"it takes {needed} seeds of each model to find a difference of {100 * abs(difference):.2f} points" in output
    value = reported["study"]["best_value"]
    history = pd.read_csv(cwd / "lightning_logs/tuned/version_0/metrics.csv")
    assert (
        f"val/accuracy of {value:.4f} was the choice among 3, so chance played a part; its settings, trained again for "
        f"2 epochs, came to {history['val/accuracy'].max():.4f}." in output
    )
    text = (cwd / "lightning_logs/report/report.html").read_text()
    assert "It takes 20 complete trials to tell which hyper-parameters matter." in text
    assert f"<td>{platform.platform()}</td>" in text
    assert "for seed in 43 44 45; do python -m mnist_lightning fit --config" in text


@posix
@pytest.mark.slow
def test_the_command_for_more_seeds_can_be_pasted(made, tmp_path):
    shutil.copytree(made[0] / "before", tmp_path / "lightning_logs")
    lines = made[1].splitlines()
    start = lines.index("To train three more seeds of each model, and to compare all runs:")
    script = "\n".join(lines[start + 1 : start + 4]).replace("43 44 45", "43")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        ["sh", "-e", "-c", script], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "over 2 seeds against" in found.stdout
    assert "To train three more seeds" not in found.stdout


def test_the_terminal_and_the_csv_show_the_comparison(made, reported):
    cwd, output = made
    table = pd.read_csv(cwd / "lightning_logs/report/comparison.csv").set_index(["quantity", "epoch", "model"])
    found = reported["differences"]["tuned"]
    low, high = found["interval"]
    names = ("baseline", "tuned")
    one, two = (table.loc["test/accuracy", "last", name] for name in names)
    for name, row in zip(names, (one, two), strict=True):
        assert row["mean"] == reported["models"][name]["metrics"]["test/accuracy (last epoch)"][0]
        assert row["runs"] == 1
    assert two[["difference", "low", "high"]].tolist() == pytest.approx([found["difference"], low, high])
    assert one[["deviation", "difference", "low", "high"]].isna().all()
    difference = f"{found['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
    shown = f"test/accuracy (last epoch) {one['mean']:.4f} {two['mean']:.4f} {difference} "
    assert shown in " ".join(output.split())
    (seconds,) = reported["models"]["baseline"]["training_seconds"]
    (value,) = table.loc["training time, s", :, "baseline"]["mean"]
    assert value == pytest.approx(seconds, abs=0.1)
    assert reported["verdict"] in output
    assert output.splitlines()[-1] == "Report: lightning_logs/report/report.html"


class Page(HTMLParser):
    """A parser that collects the parts of the page that the tests check."""

    def __init__(self, text):
        super().__init__()
        self.references, self.open, self.problems = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag not in ("input", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            self.problems.append(tag)


def test_the_page_is_one_file_with_everything(made, reported):
    folder = made[0] / "lightning_logs/report"
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.problems
    assert not page.open
    assert len(text) < 1_000_000
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert "default-src 'none'" in text
    files = sorted(path.stem for path in (folder / "figures").glob("*.png"))
    assert {
        "samples", "only_baseline_not_tuned", "only_tuned_not_baseline", "reliability", "costs",
        "study_optimization_history", "study_parallel_coordinate", "curves", "confusion_matrix_baseline",
        "confusion_matrix_tuned",
    } <= set(files)  # fmt: skip
    for path in (folder / "figures").glob("*.png"):
        assert Image.open(path).size[0] > 200
    assert not list(folder.glob("events*"))  # TensorBoard would show the report as a run
    shown, _, folded = text.partition("keys with the same value")
    assert '<tr><th scope="row">trainer.max_epochs</th><td>3</td><td>2</td></tr>' in shown
    assert '<tr><th scope="row">seed_everything</th><td>42</td><td>42</td></tr>' in folded


def test_the_page_names_a_network_that_it_cannot_hold(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "NETWORKS", None)
    monkeypatch.setattr(page_to_draw_on, "WEIGHT_ROOM", 400_000)  # too little for 32 bits
    monkeypatch.setattr(page_to_draw_on, "TOLERANCE", -1.0)  # no network can be rounded
    run()
    text = (tmp_path / "lightning_logs/report/report.html").read_text("utf-8")
    for name in ("baseline", "tuned"):
        assert f"{name}: its weights do not fit in 32 bits, and in 16 bits the network gives 0 of 300" in text


def test_the_pictures_in_the_docs_say_what_the_page_says(made):
    words_of_page = runpy.run_path(f"{ROOT}/docs/screenshots.py")["words_of_page"]
    page = words_of_page((made[0] / "lightning_logs/report/report.html").read_text("utf-8"))
    # a sentence depends on the results: all of its words must be among those of the page's sources
    sources = [*Path(summary.__file__).parent.glob("*.*"), ROOT / "mnist_lightning/search/space.py"]
    words = {*re.findall("[a-z]+", " ".join([*page, *(path.read_text("utf-8") for path in sources)]).lower())}
    for name in ("report", "report_dark", "report_phone"):
        shown = json.loads(Image.open(f"{ROOT}/docs/pictures/{name}.png").info["words"])
        assert shown[:5] == ["Verdict", "Models", "Draw", "Curves", "Mistakes"]
        changed = [text for text in shown if text not in page]
        assert not [text for text in changed if len(text.split()) < 4]
        assert not {*re.findall("[a-z]+", " ".join(changed).lower())} - words


@pytest.fixture(scope="module")
def browse(made):
    """Run a script in the page in headless Chromium; return the dictionary ``found`` that it fills."""
    return partial(in_browser, (made[0] / "lightning_logs/report/report.html").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(browse, width, is_dark):
    """Check widths, sorting, colors, and that axe-core finds nothing in the page and in an image's card."""
    found = browse(
        audit()
        + """
        const table = document.querySelector("table.sortable"), header = table.querySelectorAll("thead button")[1];
        header.click(); header.click();
        const values = [...table.tBodies[0].rows].map((row) => parseFloat(row.cells[1].textContent.replace(",", "")));
        found.sorted = values.every((value, i) => i === 0 || values[i - 1] >= value);
        found.wide = all_("body *").filter((element) => !element.closest(".scroll *, .u-wrap *, .charts *, .strip *") &&
          element.getBoundingClientRect().right > innerWidth + 1).map((element) => element.outerHTML.slice(0, 80));
        const cell = document.querySelector(".confusion td.deep"), { offsetHeight } = cell;
        cell.textContent = "1121"; // as of 10,000 images
        found.cut = cell.offsetHeight > offsetHeight || cell.scrollWidth > cell.clientWidth;
        found.scrolls = document.documentElement.scrollWidth > innerWidth;
        found.height = document.documentElement.scrollHeight;

        const brightness = (color) => color.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0) / 3;
        const canvas = document.querySelector(".chart canvas");
        const { data } = canvas.getContext("2d").getImageData(0, 0, 50, canvas.height); // the axis and its numbers
        const text = [];
        for (let i = 0; i < data.length; i += 4)
          if (data[i + 3] > 250) text.push((data[i] + data[i + 1] + data[i + 2]) / 3);
        found.dark = [text.reduce((sum, value) => sum + value, 0) / text.length > 128,
          brightness(getComputedStyle(document.body).backgroundColor) < 128,
          getComputedStyle(document.querySelector(".tile")).filter === "none"];

        for (const details of all_("details")) details.open = true;
        found.problems = await audit();
        document.querySelector("#gallery button").click();
        found.problems.push(...await audit(document.getElementById("card")));
        """,
        width,
        *([DARK] if is_dark else []),
    )
    assert found.pop("height") < (6750 if width == 390 else 8000)
    assert found == {
        "sorted": True, "wide": [], "cut": False, "scrolls": False, "dark": [is_dark] * 3, "problems": []
    }  # fmt: skip


TOLD = """
    const told = () => document.getElementById("tip").hidden ? null :
        all_("#tip > *").map((line) => line.textContent.trim());
    const charts = (group) => all_(`[data-charts=${group}] .chart`);
    const press = async (chart, ...keys) => {
        for (const key of keys) chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        await wait();
    };
"""


def test_curves_are_read_by_hovering_and_switched_off_together(browse, reported):
    found = browse(
        TOLD
        + """
        found.hovered = [];
        for (const chart of charts("curves")) {
            const over = chart.querySelector(".u-over"), box = over.getBoundingClientRect();
            const at = { clientX: box.right - 2, clientY: box.top + 50, bubbles: true };
            over.dispatchEvent(new MouseEvent("mouseenter", at));
            over.dispatchEvent(new MouseEvent("mousemove", at));
            await wait();
            found.hovered.push(told());
            over.dispatchEvent(new MouseEvent("mouseleave", at));
        }
        found.left = told();
        await press(charts("curves")[1], "ArrowRight", "ArrowRight");
        found.key = told()[0];
        all_("input[data-model]")[1].click();
        await press(charts("curves")[2], "ArrowRight");
        found.off = told();
        all_("input[data-stage]")[1].click();
        await press(charts("curves")[2], "ArrowRight");
        found.training = told();
        """
    )
    metrics = reported["models"]["baseline"]["metrics"]
    for name, hovered in zip(("loss", "penalized_loss", "accuracy"), found["hovered"], strict=True):
        assert hovered[0] == "epoch 3"
        (value,) = metrics[f"val/{name} (last epoch)"]
        assert hovered[1].startswith("baseline, validation ")
        assert float(hovered[1].split()[-1]) == pytest.approx(value, rel=2e-4)
        assert hovered[4] == "tuned, training –"  # tuned has two epochs
    assert found["left"] is None
    assert found["key"] == "epoch 2"
    assert [line.rpartition(" ")[0] for line in found["off"][1:]] == ["baseline, validation", "baseline, training"]
    assert [line.rpartition(" ")[0] for line in found["training"][1:]] == ["baseline, validation"]


def test_a_trial_is_chosen_in_a_chart_and_in_the_table(browse, made, reported):
    found = browse(
        TOLD
        + """
        const rows = () => all_("tr.chosen").map((row) => row.dataset.trial);
        found.first = rows();
        const [history] = charts("study");
        await press(history, "ArrowRight", "ArrowRight");
        found.told = told();
        await press(history, "Enter");
        found.key = rows();
        found.pressed = all_(".trial[aria-pressed=true]").map((button) => button.textContent);
        all_(".trial")[2].click();
        found.clicked = rows();
        found.charts = ["study", "slices"].map((group) => charts(group).length);
        const [calibration, parameters] = charts("calibration");
        await press(parameters, "ArrowRight");
        found.cost = told();
        """
    )
    trials = pd.read_csv(made[0] / "lightning_logs/report/trials.csv")
    assert found["first"] == [str(reported["study"]["best_trial"])]
    assert found["told"][0] == "trial 1"
    (row,) = trials[trials.trial == 1].to_dict("records")
    assert found["told"][1] == f"val/accuracy: {row['val/accuracy']:.4f}"
    assert f"units.0: {row['units.0']}" in found["told"]
    assert found["key"] == found["pressed"] == ["1"]
    assert found["clicked"] == [str(trials.trial[2])]
    assert found["charts"] == [1, 3]
    smallest = min(reported["models"].items(), key=lambda item: item[1]["parameters"])
    assert found["cost"][0] == smallest[0]


def test_a_click_on_a_confusion_matrix_shows_its_mistakes(browse, made, reported):
    found = browse(
        """
        const captions = () => all_("#gallery figure").map((figure) => figure.innerText.trim().split(/\\s*\\n\\s*/))
            .map((lines) => lines.slice(1));
        found.all = captions();
        const cell = all_(".confusion button[data-model='1']").sort((a, b) => b.textContent - a.textContent)[0];
        found.cell = [cell.dataset.true, cell.dataset.predicted].map(Number);
        cell.focus(); cell.click();
        await wait();
        found.clicked = captions();
        found.status = document.getElementById("count").textContent;
        found.pressed = all_(".confusion [aria-pressed=true]").length;
        found.titles = all_("#gallery button").map((tile) => +tile.title.split(" ").pop());
        document.forms.filter.elements.others.value = "0";
        document.forms.filter.dispatchEvent(new Event("change"));
        found.differing = captions().length;
        """
    )
    table = pd.read_csv(made[0] / "tuned.csv")
    base = pd.read_csv(made[0] / "baseline.csv")
    true, predicted = found["cell"]
    cell = table[(table.label == true) & (table.predicted == predicted)]
    assert sorted(found["titles"]) == cell["index"].tolist()
    assert {caption[1].split()[0] for caption in found["clicked"]} == {str(predicted)}
    sure = [float(caption[1].split()[1]) for caption in found["clicked"]]
    assert sure == sorted(sure, reverse=True)
    assert sure == pytest.approx(sorted(100 * cell[f"probability_{predicted}"], reverse=True), abs=0.06)
    index = found["titles"][0]
    assert found["clicked"][0][0].startswith(f"{base.predicted[index]} ")
    mistakes = int((table.label != table.predicted).sum())
    assert found["status"].startswith(f"{len(cell)} of the {mistakes} mistakes of tuned, the most confident first")
    assert found["pressed"] == 1
    assert found["differing"] == int((base.predicted[cell["index"]] == true).sum())
    assert len(found["all"]) == min(30, int((base.label != base.predicted).sum()))


def test_a_card_shows_an_image_with_the_reasons_and_all_probabilities(browse, made):
    found = browse(
        """
        const card = document.getElementById("card"), bars = () => all_("#card-bars li").map((bar) =>
            [bar.querySelector("b").textContent, ...all_("output", bar).map((one) => parseFloat(one.textContent))]);
        const state = () => ({ title: document.getElementById("card-title").textContent, bars: bars(),
            evidence: all_(".evidence", card).length, said: document.getElementById("card-evidence").textContent });
        all_("#gallery button")[0].focus();
        all_("#gallery button")[0].click();
        found.first = state();
        const colors = getComputedStyle(card.querySelector(".evidence")).backgroundImage;
        const image = Object.assign(new Image(), { src: colors.slice(5, -2) });
        await image.decode();
        const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
        pen.drawImage(image, 0, 0);
        found.strongest = Math.max(...pen.getImageData(0, 0, 14, 14).data.filter((_, i) => i % 4 === 3));
        card.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
        found.second = state();
        card.querySelector("input").click();
        found.alone = state();
        document.getElementById("card-close").click();
        found.open = card.open;
        found.samples = all_("[data-samples] figure").map((figure) => figure.innerText.split(/\\s*\\n\\s*/));
        """
    )
    table, other = (pd.read_csv(made[0] / f"{name}.csv") for name in ("baseline", "tuned"))
    for state in (found["first"], found["second"]):
        index, true = map(int, re.findall(r"\d+", state["title"]))
        assert table.label[index] == true
        assert state["evidence"] == 1
        assert f"Orange pixels speak for {table.predicted[index]}, blue ones for {true}" in state["said"]
        for name, *shares in state["bars"]:
            expected = [100 * one[f"probability_{name}"][index] for one in (table, other)]
            assert shares == pytest.approx(expected, abs=0.06)
        assert len(state["bars"]) == 10
    assert found["first"]["title"] != found["second"]["title"] == found["alone"]["title"]
    assert found["strongest"] == 255
    assert found["alone"]["evidence"] == 0
    assert not found["open"]
    for index, (truth, one, two) in enumerate(found["samples"]):
        assert truth == f"true {table.label[index]}"
        for text, predictions in ((one, table), (two, other)):
            is_right = predictions.predicted[index] == table.label[index]
            assert text.split()[0] == str(predictions.predicted[index])
            assert text.endswith("✓" if is_right else "✗")
    assert len(found["samples"]) == 10


def test_one_draws_on_the_page_and_all_models_answer(browse, made, mnist):
    found = browse(
        as_bytes(mnist.test.images[:200].numpy())
        + """
        const images = Float32Array.from(bytes, (value) => value / 255);
        found.probabilities = [];
        for (const { classify } of networks) {
            const own = [];
            for (let i = 0; i < images.length; i += 784) own.push([...(await classify(images.slice(i, i + 784)))]);
            found.probabilities.push(own);
        }
        const box = pad.getBoundingClientRect();
        const touch = (target, name, x, y) => target.dispatchEvent(new PointerEvent(`pointer${name}`, { bubbles: true,
            pointerId: 5, clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
        touch(pad, "down", 0.55, 0.15);
        touch(window, "move", 0.45, 0.85);
        touch(window, "up", 0.45, 0.85);
        await wait();
        found.said = [...said.children].map((line) => line.textContent.trim());
        found.sums = [0, 1].map((index) => all_("#bars li")
            .reduce((sum, bar) => sum + parseFloat(bar.querySelectorAll("i")[index].style.width), 0));
        found.wrong = !document.getElementById("wrong").hidden;
        """
    )
    for name, probabilities in zip(("baseline", "tuned"), found["probabilities"], strict=True):
        checkpoint = made[0] / f"lightning_logs/{name}/version_{1 if name == 'baseline' else 0}/checkpoints/last.ckpt"
        classifier = Classifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
        with torch.no_grad():
            expected = classifier(mnist.test.scaled(range(200))).softmax(dim=1)
        assert (torch.tensor(probabilities) - expected).abs().max() < 1e-4
        assert (torch.tensor(probabilities).argmax(dim=1) == expected.argmax(dim=1)).all()
    assert [line.split(":")[0] for line in found["said"]] == ["baseline", "tuned"]
    assert all(re.search(r": \d, \d+\.\d %(, unsure)?$", line) for line in found["said"])
    assert found["sums"] == pytest.approx([100, 100], abs=0.01)
    assert not found["wrong"]


def test_the_study_is_told(made, reported):
    study = reported["study"]
    assert study["trials"]["complete"] == 3
    assert study["best_params"].keys() == {
        "model.network.init_args.units.0", "model.network.init_args.l2.1", "model.optimizer.class_path",
    }  # fmt: skip
    l2 = study["best_params"]["model.network.init_args.l2.1"]  # one of two choices: always at an edge
    assert f"l2.1 ({l2})" in study["edges"]
    assert "at the edge of the search space" in study["edges"]
    assert "optimizer" not in study["edges"]


@pytest.mark.slow
def test_the_study_shown_is_the_one_that_made_the_run(run):
    base = "lightning_logs/baseline/version_"
    code, output = run(f"one={base}0", f"two={base}1")  # no study produced these runs
    assert code == 0, output
    page = Path("lightning_logs/report/report.html")
    assert json.loads(page.with_name("report.json").read_text())["study"] is None
    code, output = run()
    assert "tuned is trial" in page.read_text(encoding="utf-8")
    shutil.move("lightning_logs/tune", "lightning_logs/moved")
    code, output = run()
    assert code == 0, output
    assert (
        "tuned is from study tune, which is not in lightning_logs/tune/journal.log. To show the study, add --storage"
        in output
    )
    assert json.loads(page.with_name("report.json").read_text())["study"] is None
    code, output = run("--storage=lightning_logs/moved/journal.log")
    assert code == 0, output
    assert json.loads(page.with_name("report.json").read_text())["study"]["name"] == "tune"
    code, output = run("--study_name=tune")
    assert code == "error: There is no study tune in lightning_logs/tune/journal.log."


def test_old_names_of_options_are_aliases(monkeypatch):
    seen = []
    monkeypatch.setattr(page, "write", lambda *options: seen.append(options))
    main(["report", "--name=one", "--name=two", "--ckpt_path=best", "--study_name=mine"])
    main(["report", "one", "two", "--weights=best", "--study=mine"])
    assert seen[0] == seen[1]
    assert seen[0][:3] == (["one", "two"], "best", "mine")


@pytest.mark.slow
def test_several_seeds_give_means_and_a_test_over_seeds(run, made):
    base = "lightning_logs/baseline/version_"
    code, output = run(f"one={base}0,{base}1", f"other={base}1,lightning_logs/tuned/version_0")
    assert code == 0, output
    found = json.loads(Path("lightning_logs/report/report.json").read_text(encoding="utf-8"))
    values = [found["models"][name]["metrics"]["test/accuracy (last epoch)"] for name in ("one", "other")]
    assert [len(value) for value in values] == [2, 2]
    expected = stats.ttest_ind(values[1], values[0], equal_var=False)
    seeds = found["differences"]["other"]["seeds"]
    assert seeds["p_value"] == pytest.approx(expected.pvalue)
    assert seeds["interval"] == pytest.approx([*expected.confidence_interval()])
    assert seeds["difference"] == pytest.approx(np.mean(values[1]) - np.mean(values[0]))
    mean = f"{np.mean(values[0]):.4f} ± {np.std(values[0], ddof=1):.4f}"
    assert mean in output
    assert f"against {mean} over 2 seeds (Welch's t-test: p = {expected.pvalue:.3f}). In the first runs, " in output
    assert found["study"] is None


@pytest.mark.slow
def test_a_checkpoint_and_the_best_weights_can_be_compared(run):
    base = "lightning_logs/baseline/version_1/checkpoints"
    code, output = run(f"last={base}/last.ckpt", f"best={base}/best.ckpt")
    assert code == 0, output
    code, output = run("--ckpt_path=best")
    assert code == 0, output
    assert json.loads(Path("lightning_logs/report/report.json").read_text(encoding="utf-8"))["weights"] == "best"


@pytest.mark.slow
def test_a_new_metric_of_the_classifier_is_reported(run, monkeypatch):
    metrics = Classifier.metrics
    monkeypatch.setattr(
        Classifier,
        "metrics",
        lambda self, logits, labels, loss: {**metrics(self, logits, labels, loss), "zeros": labels == 0},
    )
    code, output = run()
    assert code == 0, output
    found = json.loads(Path("lightning_logs/report/report.json").read_text(encoding="utf-8"))
    zeros = found["models"]["tuned"]["per_class"]["support"][0] / found["images"]
    assert found["models"]["tuned"]["metrics"]["test/zeros (best epoch)"] == pytest.approx([zeros])
    assert f"test/zeros (last epoch)           {zeros:.4f}  {zeros:.4f}" in re.sub(" {3,}", " " * 11, output)
    assert "zeros on the validation images, last epoch</th>" in Path("lightning_logs/report/report.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_a_checkpoint_cannot_have_a_module_imported(run):
    path = Path("lightning_logs/tuned/version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "this.Classifier"
    torch.save(checkpoint, path)
    message, _ = run()
    assert (
        "last.ckpt cannot be used: model: this.Classifier is not a subclass of mnist_lightning.Classifier." in message
    )
    assert "this" not in sys.modules


def damage(change):
    """Name a change to the runs."""
    return pytest.param(change, id=change.__name__)


def no_run():
    shutil.rmtree("lightning_logs/baseline")
    return [], r"There is no run in lightning_logs/baseline yet\. Start one: python -m mnist_lightning fit"


def no_tuned():
    shutil.rmtree("lightning_logs/tuned")
    return [], r"There is no run in lightning_logs/tuned yet\. Start one: python -m mnist_lightning tune"


def killed_at_once():
    shutil.rmtree("lightning_logs/tuned/version_0/checkpoints")
    Path("lightning_logs/tuned/version_0/test.csv").unlink()
    return [], r"tuned/version_0 was stopped before it finished\. It has no checkpoint"


def killed():
    Path("lightning_logs/tuned/version_0/test.csv").unlink()
    return [], r"stopped before it finished\. Continue it: python -m mnist_lightning fit --ckpt_path"


def no_checkpoint():
    shutil.rmtree("lightning_logs/tuned/version_0/checkpoints")
    return ["baseline", "x=lightning_logs/tuned/version_0"], "has no checkpoint"


def no_path():
    return ["baseline", "x=nowhere"], "no run or checkpoint at nowhere"


def damaged():
    Path("lightning_logs/tuned/version_0/checkpoints/last.ckpt").write_bytes(b"PK damaged")
    return [], "last.ckpt cannot be used: it is damaged"


def other_network():
    path = Path("lightning_logs/tuned/version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["network"]["init_args"]["units"] = [5, 5]
    torch.save(checkpoint, path)
    return [], "its weights do not match its network"


def other_data():
    path = Path("lightning_logs/tuned/version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["datamodule_hyper_parameters"]["data_dir"] = None  # all of MNIST
    torch.save(checkpoint, path)
    return [], "have different test images"


def no_study():
    return ["--storage=lightning_logs/tune/journal.log", "--study=mine"], "no study mine"


def foreign_folder():
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("all I have", encoding="utf-8")
    return ["--output=mine"], "mine holds something other than a report"


@pytest.mark.parametrize("change", list(map(damage, (
    no_run, no_tuned, killed_at_once, killed, no_checkpoint, no_path, damaged, other_network, other_data, no_study,
    foreign_folder,
))))  # fmt: skip
def test_a_mistake_is_said_and_the_old_report_stays(run, change):
    arguments, message = change()
    old = Path("lightning_logs/report")
    old.mkdir()
    (old / "report.json").write_text("{}")
    code, _ = run(*arguments)
    assert re.search(message, str(code)), code
    assert len(str(code).splitlines()) <= 2
    assert (old / "report.json").read_text() == "{}"
    assert sorted(path.name for path in old.iterdir()) == ["report.json"]


@pytest.mark.slow
def test_the_command_itself_says_it_too(command, tmp_path):
    result = command(tmp_path, "report", check=False, data=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: There is no run in lightning_logs/baseline yet")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_other_validation_images_leave_the_test_comparable(run):
    path = Path("lightning_logs/tuned/version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["datamodule_hyper_parameters"]["val_split"] = 0.1
    torch.save(checkpoint, path)
    code, output = run()
    assert code == 0, output
    lines = {line.rpartition("  ")[0].split("  ")[0]: line.split()[-1] for line in output.splitlines() if "/" in line}
    assert lines["val/accuracy (last epoch)"] == lines["val/loss (best epoch)"] == "-"
    assert re.fullmatch(r"[+-]\d\.\d+", lines["test/loss (last epoch)"])
    assert "tuned had different validation images from baseline" in Path("lightning_logs/report/report.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_three_models_are_compared_to_the_first(run):
    base = "lightning_logs/baseline/version_"
    code, output = run(f"a b={base}1", f"a/b={base}0", "tuned")
    assert code == 0, output
    found = json.loads(Path("lightning_logs/report/report.json").read_text(encoding="utf-8"))
    assert [*found["differences"]] == ["a/b", "tuned"]
    p_values = [one["p_value"] for one in found["differences"].values()]
    assert [one["adjusted_p_value"] for one in found["differences"].values()] == pytest.approx(holm(p_values))
    table = pd.read_csv("lightning_logs/report/comparison.csv").set_index(["model", "quantity", "epoch"])
    assert [*table.index.unique("model")] == ["a b", "a/b", "tuned"]
    means = table["mean"].unstack("model").loc[("val/loss", "best")]
    assert table.loc["tuned", "val/loss", "best"]["difference"] == pytest.approx(means["tuned"] - means["a b"])
    assert output.count("after Holm") == 4  # with the weights of either epoch
    files = {path.stem for path in Path("lightning_logs/report/figures").glob("*.png")}
    assert {"only_tuned_not_a_b", "only_a_b_not_tuned", "only_a_b_not_a_b_1", "only_a_b_1_not_a_b"} <= files


@pytest.mark.slow
def test_one_model_has_an_accuracy_and_no_difference(run):
    code, output = run("baseline")
    assert code == 0, output
    found = json.loads(Path("lightning_logs/report/report.json").read_text(encoding="utf-8"))
    assert found["differences"] == {}
    accuracy = found["models"]["baseline"]["metrics"]["test/accuracy (last epoch)"][0]
    low, high = found["models"]["baseline"]["accuracy_interval"]
    assert f"gets {accuracy:.4f} of 300 test images right (95 % interval {low:.4f} to {high:.4f})" in output
    assert low < accuracy < high
    assert pd.read_csv("lightning_logs/report/comparison.csv")["difference"].isna().all()


def test_a_pattern_takes_the_complete_runs_in_natural_order(run, made):
    for number in (2, 10):
        shutil.copytree("lightning_logs/baseline/version_0", f"lightning_logs/baseline/version_{number}")
    shutil.rmtree("lightning_logs/baseline/version_0/checkpoints")
    Path("lightning_logs/baseline/version_1/test.csv").unlink()
    base = "lightning_logs/baseline"
    assert loading.find_runs("all", f"{base}/*") == [Path(f"{base}/version_2"), Path(f"{base}/version_10")]
    code, output = run("all=nowhere/*,lightning_logs/tuned/version_0")
    assert code == "error: all: no complete run matches nowhere/*."
    code, output = run(f"all={base}/version_?,{base}/version_2")
    assert code == 0, output
    assert f"all: incomplete runs are left out: {base}/version_0, {base}/version_1\n" in output
    runs = json.loads(Path("lightning_logs/report/report.json").read_text(encoding="utf-8"))["models"]["all"]["runs"]
    assert runs == [f"{base}/version_2"]
    code, _ = run("a=lightning_logs/tuned/version_0", "a=lightning_logs/tuned/version_0")
    assert code == (
        "error: Each model needs its own name, as NAME=PATH: "
        "a=lightning_logs/tuned/version_0 a=lightning_logs/tuned/version_0"
    )


def test_arguments_of_classes_in_a_list_are_compared_one_by_one():
    def model(name, units, augmentation):
        member = {"class_path": "MLP", "init_args": {"units": units}}
        config = {"model": {"members": [member, member]}, "data": {"augmentation": augmentation, "batch_size": 64}}
        return SimpleNamespace(name=name, runs=[SimpleNamespace(config=config, environment={})])

    models = [model("a", [8, 4], None), model("b", [8], [{"class_path": "Distortion"}])]
    section = sections.hyperparameters(models)
    assert section.table.T.to_dict("list") == {
        "data.augmentation": ["None", "-"],
        "data.augmentation.0.class_path": ["-", "Distortion"],
        "model.members.0.init_args.units": ["[8, 4]", "[8]"],
        "model.members.1.init_args.units": ["[8, 4]", "[8]"],
    }
    (same,) = section.folded.values()
    assert [*same.index] == ["data.batch_size", "model.members.0.class_path", "model.members.1.class_path"]


def test_a_run_is_named_by_its_path(run, made, tmp_path):
    runs = tmp_path / "a=b/lightning_logs"
    shutil.copytree("lightning_logs/baseline", runs / "baseline")
    for number in (7, 8):
        shutil.copytree("lightning_logs/tuned/version_0", runs / f"lr=1/version_{number}")
    best = runs / "baseline/version_0/checkpoints/best.ckpt"
    paths = [str(path) for path in (best, runs / "lr=1/version_7", runs / "lr=1/version_8")]
    models = loading.load_models([*paths, "tuned", "a=lightning_logs/tuned/version_0"], "last", Path("lightning_logs"))
    assert [model.name for model in models] == ["baseline", "lr=1 version_7", "lr=1 version_8", "tuned", "a"]
    assert [str(model.runs[0].path) for model in models[:3]] == paths
    with pytest.raises(UserError, match=r"^There is no run or checkpoint at lightning_logs/tuned/version_9\.$"):
        loading.load_models(["lightning_logs/tuned/version_9"], "last", Path("lightning_logs"))
    (model,) = loading.load_models([str(runs / "baseline")], "last", Path("lightning_logs"))
    assert (model.name, model.runs[0].path.parent) == ("baseline", runs / "baseline")


@pytest.mark.slow
def test_a_study_alone_of_many_trials(tmp_path, monkeypatch, capfd):
    """Check that 500 trials take seconds, and that the page's table is cut."""
    monkeypatch.chdir(tmp_path)
    storage = open_storage("lightning_logs/big/journal.log")
    study = optuna.create_study(storage=storage, study_name="big", direction="maximize")
    units, batch_size = "model.network.init_args.units.0", "data.batch_size"
    rng, trials = np.random.default_rng(0), []
    for params in ({units: int(a), batch_size: int(b)} for a, b in rng.integers(1, 41, (500, 2))):
        value = 0.9 + params[batch_size] / 1000 + float(rng.random()) / 1000
        trial = optuna.create_trial(
            value=value,
            params=params,
            distributions={key: optuna.distributions.IntDistribution(1, 40) for key in params},
            user_attrs={"executions": [{"execution": 0, "score": value, "values": [[0, value]]}]},
        )
        trials.append(trial)
    failed, repeated = (
        optuna.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs=attributes)
        for attributes in ({"error": "ArithmeticError: diverged"}, {})
    )
    study.add_trials([*trials, failed, repeated])
    study.set_user_attr("settings", {"metric": "val/accuracy"})
    start = time.process_time()
    code, output, errors = in_process(capfd, "report", "--study=big")
    assert code == 0, errors
    assert "To train" not in output  # there is no model
    assert time.process_time() - start < 30
    folder = Path("lightning_logs/report")
    text = (folder / "report.html").read_text()
    assert '<h1 id="verdict">Study big</h1>' in text
    assert len(re.findall("<tr data-trial", text)) == 100
    table = pd.read_csv(folder / "trials.csv")
    assert len(table) == 500
    assert table["val/accuracy"].tolist() == sorted((trial.value for trial in trials), reverse=True)
    found = json.loads((folder / "report.json").read_text())
    assert found["models"] == {}
    assert (found["study"]["trials"]["complete"], found["study"]["trials"]["fail"]) == (500, 1)
    charts = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["charts"]
    assert [chart["title"] for chart in charts] == ["history", "by units.0", "by batch_size"]
    assert [*map(len, charts[2]["series"][0].values())] == [len("trials"), len("points"), 500, 500, 500]
    assert summary.searched(study).keys() == trials[0].params.keys()


def test_a_missing_study_is_named_without_the_password_of_its_storage(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "find_study", lambda name, source: None)
    code, _, errors = in_process(capfd, "report", "--study=x", "--storage=postgresql://me:secret@host/database")
    assert (code, errors) == (1, "error: There is no study x in postgresql://me:***@host/database.\n")


@pytest.mark.slow
def test_a_failure_in_the_midst_leaves_the_old_report(run, monkeypatch):
    run()
    before = Path("lightning_logs/report/report.html").read_bytes()
    monkeypatch.setattr(page.jinja2, "Environment", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--weights=best")
    assert Path("lightning_logs/report/report.html").read_bytes() == before
    assert not list(Path("lightning_logs").glob(".report-*"))


def test_what_others_have_put_into_an_old_report_stays(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (
        "figures/accuracy.png",
        "figures/mine.txt",
        "notes.md",
        "more/report.html",
        "more/figures/a.png",
    ):
        (old / path).parent.mkdir(parents=True, exist_ok=True)
        (old / path).write_text(path)
    (new / "figures").mkdir(parents=True)
    page._keep_others(old, new)
    kept = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
    assert kept == ["figures/mine.txt", "more/figures/a.png", "more/report.html", "notes.md"]


# --- statistics ---------------------------------------------------------------------------------------------


def test_a_clear_difference_and_none():
    rng = np.random.default_rng(3)
    first = rng.random(10_000) < 0.93
    better = first | (rng.random(10_000) < 0.4)
    found = compare(first, better)
    assert (found.broken, found.corrected) == (0, int((better & ~first).sum()))
    assert found.p_value < 1e-6
    assert found.interval[0] < found.difference < found.interval[1]
    assert found.interval[0] > 0
    assert verdict("tuned", "baseline", found, 10_000).startswith(
        f"In these runs, tuned is better than baseline by {100 * found.difference:.2f} points"
    )
    back = compare(better, first)
    text = verdict("tuned", "baseline", back, 10_000)
    assert text.startswith(f"In these runs, tuned is worse than baseline by {100 * found.difference:.2f} points")
    assert back.interval == pytest.approx((-found.interval[1], -found.interval[0]), abs=1e-3)
    same = compare(first, first)
    assert (same.p_value, same.difference, same.interval) == (1.0, 0.0, (0.0, 0.0))
    assert verdict("tuned", "baseline", same, 10_000).startswith(
        "The difference between tuned and baseline cannot be told from chance"
    )


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        draw = rng.random(2000)
        first, second = draw < 0.90, (draw > 0.03) & (draw < 0.95)  # the second is better by 0.02
        low, high = compare(first, second, samples=1000).interval
        covered += low <= 0.02 <= high
    assert 0.91 < covered / 300 < 0.99


def test_calibration_error_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]], dtype=np.float32)
    labels = np.array([0, 1, 1, 0])
    confidence, accuracy, weight = reliability(probabilities, labels, bins=10)
    assert confidence == pytest.approx([0.55, 0.7, 0.9])
    assert accuracy.tolist() == [0, 1, 0.5]
    assert weight.tolist() == [0.25, 0.25, 0.5]
    assert calibration_error(probabilities, labels, bins=10) == pytest.approx(0.55 / 4 + 0.3 / 4 + 0.4 / 2)
    sure = np.array([[1.0, 0.0]], dtype=np.float32)
    assert calibration_error(sure, np.array([0])) == 0


def test_seeds_need_two_on_each_side():
    assert compare_seeds([0.9], [0.8, 0.9]) is None
    found = compare_seeds([0.90, 0.91, 0.92], [0.95, 0.96, 0.97])
    expected = stats.ttest_ind([0.95, 0.96, 0.97], [0.90, 0.91, 0.92], equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx([*expected.confidence_interval()])
    assert "is better than a by 5.00 points of mean test accuracy" in verdict(
        "b", "a", compare_to_first([np.array([True])] * 2, [[0.90, 0.91, 0.92], [0.95, 0.96, 0.97]])[0], 1
    )
    assert compare_seeds([0.9, 0.9], [0.9, 0.9]).p_value == 1


@pytest.mark.parametrize(("difference", "deviation"), [(0.008, 0.004), (0.003, 0.004), (-0.02, 0.004), (0.002, 0.001)])
def test_as_many_seeds_as_needed_find_a_difference_in_four_of_five_studies(difference, deviation):
    count = seeds_needed(difference, deviation)
    rng = np.random.default_rng(0)

    def power(runs):
        first, second = rng.normal([[[0.0]], [[difference]]], deviation, (2, 4000, runs))
        return (stats.ttest_ind(first, second, axis=1).pvalue < 0.05).mean()

    assert power(count) > 0.78  # 0.8 less three standard errors of 4,000 draws
    assert count == 2 or power(count - 1) < 0.82


def test_seeds_that_cannot_be_counted():
    assert seeds_needed(0.0001, 0.004) is None
    assert seeds_needed(0.0, 0.004) is None
    assert seeds_needed(0.1, 0.0) == 2


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(p, "holm")
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_intervals_of_three_models_are_wider_than_of_two():
    rng = np.random.default_rng(0)
    first, second, third = (rng.random(2000) < share for share in (0.90, 0.91, 0.92))
    (alone,) = compare_to_first([first, second], [[0.9], [0.91]])
    together, other = compare_to_first([first, second, third], [[0.9], [0.91], [0.92]])
    assert alone.interval[0] > together.interval[0]
    assert alone.interval[1] < together.interval[1]
    assert together.p_value == alone.p_value == alone.adjusted_p_value
    assert [together.adjusted_p_value, other.adjusted_p_value] == holm([together.p_value, other.p_value])


def test_wilson_s_interval_by_hand():
    # Newcombe 1998, Table I, for 81 of 263
    low, high = accuracy_interval(np.arange(263) < 81)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.fixture
def diverged(fitted, tmp_path, monkeypatch):
    """A folder with the run ``ok`` and the run ``diverged``, whose weights are NaN."""
    monkeypatch.chdir(tmp_path)
    for name in ("ok", "diverged"):
        shutil.copytree(fitted[0], f"lightning_logs/{name}/version_0")
    path = Path("lightning_logs/diverged/version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    for values in checkpoint["state_dict"].values():
        values.fill_(math.nan)
    for row in checkpoint["callbacks"]["RunCheckpoint"]["history"]:
        row["val/loss"] = math.inf
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    "models",
    [
        ["ok", "diverged"],
        *[
            pytest.param(models, marks=pytest.mark.slow)
            for models in (
                ["diverged", "ok"],
                ["diverged"],
                ["diverged", "other=lightning_logs/diverged/version_0"],
                ["seeds=lightning_logs/ok/version_0,lightning_logs/diverged/version_0", "diverged"],
            )
        ],
    ],
)
@pytest.mark.usefixtures("diverged")
def test_a_model_that_has_diverged_is_one_like_others(capfd, models):
    code, output, errors = in_process(capfd, "report", *models)
    assert code == 0, errors
    assert "diverged has diverged: where probabilities are not numbers, the first class, 0, is predicted" in output
    assert ("1 of 2 runs of seeds have diverged" in output) == models[0].startswith("seeds")
    assert "nan%" not in output
    folder = Path("lightning_logs/report")
    found = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)["models"]
    assert found["diverged"]["calibration_error"] is None
    assert found["diverged"]["metrics"]["test/loss (last epoch)"] == [None]
    assert "ok" not in found or found["ok"]["calibration_error"] > 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    content = json.loads(data, parse_constant=pytest.fail)  # a browser cannot read NaN
    model = next(model for model in content["models"] if model["name"] == "diverged")
    assert {*model["confidence"]} == {0}


@pytest.mark.parametrize(
    "options",
    [
        ["export", "--output=n.pt2"],
        ["export", "--page=n.html"],
        ["predict"],
        ["predict", "--images=1.png", "--explain"],
    ],
)
def test_nothing_is_said_by_a_network_that_has_diverged(diverged, capfd, data_dir, options):
    picture = Image.new("L", (60, 60), 255)
    picture.paste(0, (27, 10, 33, 50))
    picture.save("1.png")
    before = {*Path().rglob("*")}
    code, _, errors = in_process(capfd, *options, f"--ckpt_path={diverged}", f"--data.data_dir={data_dir}")
    assert code == 1
    assert (
        f"error: The training of {diverged} has diverged: its probabilities are not numbers, so nothing is written."
        in errors
    )
    assert {*Path().rglob("*")} == before
