"""How flat the training loss is where a run ended."""

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F

from client_app.site import SiteId, site_data
from client_app.training import prepare
from models.networks import build
from simulation.laboratory import Run


def mean_model(run: Run) -> dict[str, Tensor]:
    """Of all peers."""
    models = list(run.models.values())
    return {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}


def largest_eigenvalue(run: Run, steps: int = 15) -> float:
    """Of the Hessian of the training loss at the mean model, by power iteration."""
    config = run.config
    classes = tuple(str(name) for name in run.sites.columns[4:])
    parts = [
        site_data(config, SiteId(site, config.num_sites, ""), classes, None).train
        for site in range(config.num_sites)
    ]
    each = 2000 // len(parts)
    inputs, labels = (
        prepare(torch.cat([part.x[:each] for part in parts])),
        torch.cat([part.y[:each] for part in parts]),
    )
    network = build(
        config.model.name, tuple(inputs.shape[1:]), len(classes), 0, **config.model.options
    )
    names, at = zip(*mean_model(run).items(), strict=True)

    def gradient(parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        def loss(values: tuple[Tensor, ...]) -> Tensor:
            return F.cross_entropy(
                functional_call(network, dict(zip(names, values, strict=True)), (inputs,)), labels
            )

        found: tuple[Tensor, ...] = grad(loss)(parameters)
        return found

    generator = torch.Generator().manual_seed(1)
    v = tuple(torch.randn(value.shape, generator=generator) for value in at)
    size = 0.0
    for _ in range(steps):
        norm = torch.sqrt(sum((part**2).sum() for part in v))  # type: ignore[arg-type]
        v = tuple(part / norm for part in v)
        product = jvp(gradient, (at,), (v,))[1]
        size = float(sum((a * b).sum() for a, b in zip(v, product, strict=True)))
        v = product
    return size
