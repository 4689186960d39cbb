"""Local training: our loop against a plain loop of PyTorch that does the same steps, side by side.

    python -m benchmarks.local_training

Small CNN on digits (batch 32) and ResNet-20 on pictures of CIFAR-10's size (batch 64), on a GPU
where there is one. The plain loop is what a careful engineer writes: tensors on the device,
``set_to_none``, torch's SGD.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from itertools import chain

import torch
from torch.nn import functional as F

from benchmarks.timing import in_turns
from client_app import training
from datasets.site import Part
from datasets.sources import digits
from models.flat import FlatModel
from models.networks import build
from strategies.schedules import decay, progress


def plain_loop(
    name: str, part: Part, batch_size: int, epochs: int, device: torch.device
) -> Callable[[], None]:
    """Epochs of shuffled batches, an exponential decay, SGD with momentum."""
    network = build(name, tuple(part.x.shape[1:]), 10, 1, norm="batch").to(device)
    sgd = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=1e-4)
    x, y = part
    steps = math.ceil(len(y) / batch_size)

    def run() -> None:
        total = torch.zeros((), device=device)
        for epoch in range(epochs):
            order = torch.randperm(len(y)).to(device)
            for step, chosen in enumerate(order.tensor_split(steps)):
                sgd.param_groups[0]["lr"] = 0.05 * 0.25 ** (
                    (epoch * steps + step) / (epochs * steps)
                )
                sgd.zero_grad()
                loss = F.cross_entropy(network(x[chosen].float() / 63.75 - 2), y[chosen])
                loss.backward()
                sgd.step()
                total += loss.detach()
        total.item()

    return run


def our_loop(
    name: str, part: Part, batch_size: int, epochs: int, device: torch.device
) -> Callable[[], None]:
    """A function that runs epochs of the ClientApp's loop."""
    model = FlatModel(build(name, tuple(part.x.shape[1:]), 10, 1, norm="batch"), device)
    gradient = training.plain(
        model, lambda batch: F.cross_entropy(model.network(batch[0]), batch[1])
    )
    sgd = training.optimizers("sgd", model, 0.05, 0.9, False, 1e-4)
    steps = training.num_batches(len(part.y), batch_size)
    generator = torch.Generator().manual_seed(1)

    def run() -> None:
        training.train(
            model,
            gradient,
            sgd,
            chain.from_iterable(
                training.batches(part, batch_size, generator, None) for _ in range(epochs)
            ),
            lambda step: (
                0.05 * decay("exponential", 0.25, progress(step, steps * epochs, steps, "batch"))
            ),
            0.0,
        )

    return run


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = digits()
    pictures = torch.randint(0, 256, (640, 3, 32, 32), dtype=torch.uint8)
    cases = {
        "small CNN, digits": ("cnn", Part(examples.x, examples.y), 32, 2),
        "ResNet-20, CIFAR-10 size": (
            "resnet20",
            Part(pictures, torch.randint(0, 10, (640,))),
            64,
            1,
        ),
    }
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for title, (name, part, batch_size, epochs) in cases.items():
        part = Part(part.x.to(device), part.y.to(device))
        loops = {"plain": plain_loop, "ours": our_loop}
        runs = {
            label: make(name, part, batch_size, epochs, device) for label, make in loops.items()
        }
        times = in_turns(runs, arguments.repeats)
        plain, ours = (statistics.median(times[label]) for label in ("plain", "ours"))
        batches = epochs * math.ceil(len(part.y) / batch_size)
        each = [1000 * seconds / batches for seconds in (plain, ours)]
        print(
            f"{title}: plain loop {each[0]:.2f} ms a batch, "
            f"ours {each[1]:.2f}, ratio {ours / plain:.3f}"
        )


if __name__ == "__main__":
    main()
