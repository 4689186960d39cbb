"""The end of a run of peers whose models the server may see.

It reports how far apart the models are, and how well their mean does.
"""

from collections.abc import Mapping
from functools import partial

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from configuration.config import Config
from server_app.discovery import Federation
from server_app.events import NewModel
from server_app.exchange import exchange
from server_app.report import Measure, Report
from strategies.protocol import InvalidReply, Order, read_tested, write_order
from strategies.records import ARRAYS, CONFIG, X, pack


def consensus_distance(x: Tensor) -> float:
    """``sqrt(1/n sum_i |x_i - mean|^2)`` of models [n, d]."""
    return float((x - x.mean(0)).square().sum(1).mean().sqrt())


def report_consensus(
    grid: Grid,
    models: Mapping[int, Mapping[str, Tensor]],
    federation: Federation,
    config: Config,
    report: Report,
    exchanges: int,
) -> None:
    """Keep the peers' last models; report their consensus distance and the test of their mean.

    The mean is tested on the test parts of all peers.
    """
    if not models:
        return
    some = next(iter(models.values()))
    rows = {
        name: torch.stack(
            [
                models[site.number][name]
                if site.number in models
                else torch.full_like(like, torch.nan)
                for site in federation.sites
            ]
        )
        for name, like in some.items()
    }
    report.emit(NewModel(pack(rows)))
    there = torch.tensor([site.number in models for site in federation.sites])
    found = {"consensus-distance": consensus_distance(rows[X][there])}
    mean = pack({name: vectors[there].double().mean(0).float() for name, vectors in rows.items()})
    order = write_order(Order(exchanges, federation.agreed()))
    tested = [site for site in federation.sites if site.number in models]
    messages = [
        Message(RecordDict({ARRAYS: mean, CONFIG: order}), site.node, "evaluate") for site in tested
    ]
    report.sent(messages)
    measure, num_test = (
        Measure.of(config, federation),
        {site.node: site.num_test for site in tested},
    )
    answers = [
        report.receive(
            node,
            reply,
            exchanges,
            "test",
            partial(read_tested, num_examples=num_test[node], means=measure.means),
        )
        for node, reply in exchange(grid, messages, config.timeout_s)
    ]
    means = measure.combined(
        [answer.named() for answer in answers if not isinstance(answer, InvalidReply)]
    )
    found |= {
        f"{name}-of-mean": value
        for name, value in means.items()
        if name in ("accuracy", "loss", measure.task.headline)
    }
    report.write(exchanges, "consensus", {}, found)
