"""Write the files of a report: the page, JSON, CSV and PNG."""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from mnist_lightning import __version__
from mnist_lightning.comparison.charts import model_charts, study_charts
from mnist_lightning.comparison.gallery import gallery
from mnist_lightning.comparison.loading import load_models, load_study
from mnist_lightning.comparison.plots import model_figures, study_figures
from mnist_lightning.comparison.sections import origins, sections
from mnist_lightning.comparison.summary import Report
from mnist_lightning.comparison.table import numbers
from mnist_lightning.search.study import best_trial, trial_numbers
from mnist_lightning.system.console import fill_terminal, show_status, terminal_width
from mnist_lightning.system.errors import UserError
from mnist_lightning.training.figures import render as render_figure


def write(
    models: Sequence[str], weights: str, study: str | None, storage: str | None, logs: Path, output: Path | None
) -> Report:
    """Write the report, print its table, and return it.

    Args:
        models: Any number of NAME or NAME=PATH,PATH,..., where a path may be a pattern; empty for only the study.
        weights: ``last`` or ``best``.
        study: Name of the study, or None for the study that produced the last model that has one.
        storage: Storage of the study, or None for the journal in its folder.
        logs: Folder of the runs.
        output: Folder of the report, or None for ``report`` in ``logs``.

    Raises:
        UserError: If a run or the study is missing or damaged, or the models cannot be compared.
    """
    output = output or logs / "report"
    if output.exists() and any(output.iterdir()) and not (output / "report.json").is_file():
        raise UserError(f"{output} holds something other than a report: choose another --output.")
    loaded = load_models(models, weights, logs)
    show_status("Reading the study …")
    found = load_study(study, storage, logs, loaded)
    if not loaded and found is None:
        raise UserError(f"The study {study} has no complete trial yet.")
    show_status("Comparing …")
    report = Report(loaded, found)
    show_status("Drawing …")
    save(report, output)
    show_status("")
    if loaded:
        print(f"{report.quantities.rename_axis(None).to_string(line_width=terminal_width())}\n")
    print("\n".join(map(fill_terminal, [*report.verdict, *report.notes])))
    if report.commands:
        print("\nTo train three more seeds of each model, and to compare all runs:\n  " + "\n  ".join(report.commands))
    print(f"\nReport: {output / 'report.html'}")
    report.path = (output / "report.html").absolute()
    return report


def render(report: Report) -> str:
    """Render the page: one file that loads no others."""
    folder = Path(__file__).parent
    draw, style, script, *libraries = [
        Markup((folder / name).read_text(encoding="utf-8"))  # noqa: S704
        for name in ("../deployment/draw.css", "page.css", "page.js", "uplot/uPlot.min.css", "uplot/uPlot.iife.min.js")
    ]
    data, sprites = content(report)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # a trial's values stay in their order
    return environment.from_string((folder / "page.html").read_text(encoding="utf-8")).render(
        report=report,
        sections=sections(report),
        origins=origins(report.models),
        made=f"{datetime.now().astimezone():%d %B %Y, %H:%M %Z}",
        version=__version__,
        styles=[libraries[0], draw, style],
        scripts=[libraries[1], script],
        data=data,
        sprites=sprites,
    )


def content(report: Report) -> tuple[dict[str, Any], list[str]]:
    """Return the data that the page's script reads, in plain types, and the sprites, as URLs."""
    data: dict[str, Any] = {"models": [], "charts": [], "gallery": None, "trials": {}}
    sprites: list[str] = []
    if models := report.models:
        data["gallery"], answers, sprites = gallery(models)
        data["models"] = [
            {"name": model.name, "color": model.page_color, **answer}
            for model, answer in zip(models, answers, strict=True)
        ]
        data["charts"] += model_charts(models)
    if report.study and report.trials is not None:
        data["charts"] += study_charts(report.study)
        data["trials"] = report.trials.to_dict("index")
        data["best"] = best_trial(report.study).number
    return data, sprites


def save(report: Report, output: Path) -> None:
    """Write all files to a temporary folder first: an old report stays until the new one is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=output.parent) as temporary:
        new = Path(temporary, "new")
        (new / "figures").mkdir(parents=True)
        (new / "report.json").write_text(
            json.dumps(_plain(report.to_json()), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        if report.models:
            numbers(report.models, report.comparisons).to_csv(new / "comparison.csv", index=False)
        if report.study:
            trial_numbers(report.study).to_csv(new / "trials.csv", index=False)
        (new / "report.html").write_text(render(report), encoding="utf-8")
        drawn = model_figures(report.models) if report.models else {}
        drawn |= study_figures(report.study) if report.study else {}
        for name, figure in drawn.items():
            Image.fromarray(render_figure(figure)).save(new / f"figures/{name}.png")
        if output.exists():
            _keep_others(output, new)
            output.rename(Path(temporary, "old"))
        new.rename(output)


def _plain(content: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by None."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [*map(_plain, content)]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _keep_others(old: Path, new: Path) -> None:
    """Copy the files in an old report's folder that do not belong to a report."""
    for path in old.rglob("*"):
        name = path.relative_to(old)
        is_of_report = str(name) in ("report.html", "report.json", "comparison.csv", "trials.csv") or (
            (name.parent, name.suffix) == (Path("figures"), ".png")
        )
        if path.is_dir():
            (new / name).mkdir(exist_ok=True)
        elif not is_of_report:
            shutil.copy2(path, new / name)
