"""The table of results: each config trained with several seeds, and what it gives on the test images.

Run by hand, in a folder where the runs can stay: python benchmarks/results.py

Existing runs are not repeated, and stopped runs are continued: repeat the command after a stop, or to add configs and
seeds. All numbers are appended to results.csv next to this file, with the digest of the config. A config that was
changed after its test accuracy was seen is refused: validation selects, and the test images are used only once. --check
only prints the table from results.csv.

--time measures the first epoch of each config, in bfloat16 if the processor supports it and in float32, with the
threads of the config, and writes them to times.csv. Nothing else should run on the machine.
"""

import argparse
import csv
import hashlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from mnist_lightning.classifier import Classifier
from mnist_lightning.training.precision import has_bf16

HERE = Path(__file__).resolve().parent
SEEDS = (42, 1, 2, 3, 4)
CONFIGS = {
    "baseline": "the notebook under Keras: 95.3 ± 0.5",
    "mlp": "MLPs with dropout: 98.9 to 99.06",
    "augmented_mlp": "one with elastic distortions: 99.65",
    "thirty_seconds": "",
    "small_cnn": "of this size: 99.4 to 99.5",
    "cnn": "single CNNs: 99.7 to 99.83",
    "ensemble": "three CNNs: 99.87",
    "fashion_mlp": "MLPs: 88 to 90",
    "fashion_cnn": "CNNs: 93 to 95",
}
"""From the name of a config to the published reference, in percent."""
COLUMNS = (
    *("config", "digest", "seed", "parameters", "epochs", "threads", "precision", "seconds"),
    *("val/accuracy", "test/accuracy"),
)
TIMES = ("config", "precision", "threads", "seconds_per_epoch")
ROUNDS = 3
"""How often an epoch is timed; the table has the median."""


def digest_of(config: Path) -> str:
    """Return a digest of the values of a config, without its comments."""
    return hashlib.blake2b(repr(yaml.safe_load(config.read_text(encoding="utf-8"))).encode(), digest_size=4).hexdigest()


def train(config: Path, seed: int, threads: int) -> dict[str, Any]:
    """Train a config with a seed, or find its run; return a row of the table."""
    folder = Path("lightning_logs", f"results_{config.stem}_{digest_of(config)}_{seed}")
    done = next(folder.glob("version_*/test.csv"), None)
    if done is None:
        command = [sys.executable, "-m", "mnist_lightning", "fit", "--config", str(config), "--name", folder.name]
        command += ["--num_threads", str(threads)]
        stopped = [*folder.glob("version_*/checkpoints/last.ckpt")]
        command += ["--ckpt_path", "last"] if stopped else ["--seed_everything", str(seed)]
        subprocess.run(command, check=True)
        done = next(folder.glob("version_*/test.csv"))
    checkpoint = done.parent / "checkpoints/last.ckpt"
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]["RunCheckpoint"]
    network = Classifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    last = state["history"][-1]
    with done.open(newline="") as file:
        test = next(csv.DictReader(file))
    values = (
        config.stem,
        digest_of(config),
        seed,
        sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        last["epoch"] + 1,
        threads,
        state["config"]["trainer"]["precision"],
        round(state["seconds"], 1),
        round(last["val/accuracy"], 6),
        round(float(test["test/accuracy"]), 6),
    )
    return dict(zip(COLUMNS, map(str, values), strict=True))


def time_epochs(configs: list[str]) -> list[dict[str, Any]]:
    """Time the first epoch of each config, in turn, in each precision that this processor supports."""
    seconds: dict[tuple[str, str], list[float]] = {}
    threads = {}
    for _ in range(ROUNDS):
        for name in configs:
            config = HERE.parent / f"configs/{name}.yaml"
            given = yaml.safe_load(config.read_text(encoding="utf-8"))
            threads[name] = given.get("num_threads", 1)
            is_mixed = given["trainer"].get("precision") == "auto" and has_bf16("cpu")
            for precision in ("bf16-mixed", "32-true") if is_mixed else ("32-true",):
                with tempfile.TemporaryDirectory() as folder:
                    command = [sys.executable, "-m", "mnist_lightning", "fit", "--config", str(config)]
                    command += ["--trainer.max_epochs=1", f"--trainer.precision={precision}"]
                    command += ["--trainer.accelerator=cpu", "--trainer.limit_test_batches=0"]
                    subprocess.run(
                        command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                    )
                    (checkpoint,) = Path(folder).glob("lightning_logs/*/version_0/checkpoints/last.ckpt")
                    state = torch.load(checkpoint, weights_only=True)["callbacks"]["RunCheckpoint"]
                seconds.setdefault((name, precision), []).append(state["seconds"])
                print(name, precision, round(state["seconds"], 2), flush=True)
    return [
        {
            "config": name,
            "precision": precision,
            "threads": threads[name],
            "seconds_per_epoch": round(statistics.median(values), 2),
        }
        for (name, precision), values in seconds.items()
    ]


def training(times: list[dict[str, str]], name: str, epochs: int) -> str:
    """Return the time of a training, for the table."""
    took = {}
    for row in times:
        if row["config"] == name:
            seconds = epochs * float(row["seconds_per_epoch"])
            took[row["precision"]] = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
            cores = "one core" if row["threads"] == "1" else f"{row['threads']} cores"
    if not took:
        return "-"
    return f"{took.get('bf16-mixed', took['32-true'])}, {cores}" + (
        f" (float32: {took['32-true']})" if len(took) > 1 else ""
    )


def table(rows: list[dict[str, str]], times: list[dict[str, str]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| config | parameters | epochs | training | test accuracy | seeds | reference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, reference in CONFIGS.items():
        own = [row for row in rows if row["config"] == name]
        if own:
            accuracies = [100 * float(row["test/accuracy"]) for row in own]
            spread = f" ± {statistics.stdev(accuracies):.2f}" if len(own) > 1 else ""
            took = training(times, name, int(own[0]["epochs"]))
            lines.append(
                f"| `{name}` | {int(own[0]['parameters']):,} | {own[0]['epochs']} | {took} | "
                f"{statistics.mean(accuracies):.2f}{spread} | {len(own)} | {reference} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Train the missing runs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS), metavar="NAME", help="configs to train (all)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (5)")
    parser.add_argument("--threads", type=int, default=1, help="of a training (1: two commands can run side by side)")
    parser.add_argument("--check", action="store_true", help="train nothing")
    parser.add_argument("--time", action="store_true", help="time an epoch of each config instead")
    options = parser.parse_args()
    if options.time:
        with (HERE / "times.csv").open(newline="", encoding="utf-8") as source:
            kept = [row for row in csv.DictReader(source) if row["config"] not in options.configs]
        measured = time_epochs(options.configs)
        with (HERE / "times.csv").open("w", newline="", encoding="utf-8") as target:
            times_writer = csv.DictWriter(target, TIMES, lineterminator="\n")
            times_writer.writeheader()
            times_writer.writerows([*kept, *measured])
        return
    file = HERE / "results.csv"
    rows = list(csv.DictReader(file.open(newline=""))) if file.exists() else []
    for name in [] if options.check else options.configs:
        config = HERE.parent / f"configs/{name}.yaml"
        seen = {row["digest"] for row in rows if row["config"] == name}
        if seen - {digest_of(config)}:
            sys.exit(
                f"{config} was changed after its results on the test images were seen. Give the changed config another "
                f"name, or remove its rows from {file} and say so."
            )
        for seed in SEEDS[: options.seeds]:
            if not any(row["config"] == name and row["seed"] == str(seed) for row in rows):
                rows.append(train(config, seed, options.threads))
                with file.open("a", newline="") as target:
                    writer = csv.DictWriter(target, COLUMNS, lineterminator="\n")
                    if target.tell() == 0:
                        writer.writeheader()
                    writer.writerow(rows[-1])
    times = csv.DictReader((HERE / "times.csv").open(newline="", encoding="utf-8"))
    print(table(rows, [*times]))


if __name__ == "__main__":
    main()
