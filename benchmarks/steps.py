"""What a training step takes: networks in float32 and bfloat16, eager and compiled, optimizers, augmentation.

Run by hand, with nothing else running: python benchmarks/steps.py [--threads 2]

All variants of a network take turns; the table has medians. The benchmark uses a GPU if there is one.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lightning.augmentation import Distortion, Erasing
from mnist_lightning.networks import CNN, MLP

BATCH, ROUNDS, STEPS = 128, 5, 20
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "the notebook's MLP (109,386 weights)": partial(MLP, l2=0.0),
    "MLP [800, 800], batch normalization": partial(MLP, [800, 800], 0.5, 0.0, normalization="batch"),
    "CNN [8, 16, 16]": partial(CNN, [8, 16, 16]),
    "CNN [32, 64, 128]": CNN,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(step: Callable[[], object], count: int = STEPS) -> float:
    """Return the mean seconds of a step over several steps."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def trainer(network: nn.Module, images: Tensor, labels: Tensor, bf16: bool, fused: bool) -> Callable[[], None]:
    """Return a function that trains for one step."""
    optimizer = torch.optim.AdamW(network.parameters(), fused=fused or None)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Print a line for each network, and one for each augmentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.compiler.config.force_disable_caches = True  # earlier compilations would be reused
    images = torch.rand(BATCH, 1, 28, 28, device=DEVICE)
    labels = torch.randint(0, 10, (BATCH,), device=DEVICE)
    variants = {
        "float32": (False, False, False),
        "fused AdamW": (False, True, False),
        "bf16, fused": (True, True, False),
        "compiled, fused": (False, True, True),
        "compiled, bf16, fused": (True, True, True),
    }
    print(f"ms per step of {BATCH} images, {torch.get_num_threads()} threads, {DEVICE.type}; medians of {ROUNDS}")
    print("|".join(["network", *variants, "s to compile"]))
    for name, make in NETWORKS.items():
        steps, first = {}, 0.0
        for variant, (bf16, fused, compiled) in variants.items():
            network = make().to(DEVICE)
            if compiled:
                network.compile()
            steps[variant] = trainer(network, images, labels, bf16, fused)
            first = max(first, seconds_of(steps[variant], count=1))  # the first step compiles
        times: dict[str, list[float]] = {variant: [] for variant in steps}
        for _ in range(ROUNDS):
            for variant, step in steps.items():
                times[variant].append(1e3 * seconds_of(step))
        medians = [f"{statistics.median(values):.1f}" for values in times.values()]
        print("|".join([name, *medians, f"{first:.0f}"]), flush=True)
    for augmentation in (Distortion(), Distortion(alpha=0.0), Erasing()):
        augment = partial(augmentation, images, labels)
        augment()
        median = statistics.median(1e3 * seconds_of(augment) for _ in range(ROUNDS))
        print(f"{type(augmentation).__name__}|{median:.1f}")


if __name__ == "__main__":
    main()
