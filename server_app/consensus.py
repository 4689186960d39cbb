"""What a run of peers ends with where the server may see their models: how far apart they are, and what their mean is worth."""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from configuration.config import Config
from server_app.census import Federation
from server_app.exchange import exchange
from server_app.report import Report, numbers
from server_app.results import History
from strategies.averaging.average import NUM_EXAMPLES, weighted_metrics
from strategies.records import ARRAYS, CONFIG, METRICS, STATS, X, metrics_of, pack, unpack


def consensus_distance(x: Tensor) -> float:
    """``sqrt(1/n sum_i |x_i - mean|^2)`` of models [n, d]."""
    return float((x - x.mean(0)).square().sum(1).mean().sqrt())


def conclude(
    grid: Grid,
    models: Mapping[int, ArrayRecord],
    federation: Federation,
    config: Config,
    history: History,
    report: Report,
    exchanges: int,
) -> None:
    """Keep the peers' last models, and write down their consensus distance and how their mean does on everybody's test parts."""
    if not models:
        return
    some = next(iter(models.values()))
    rows: dict[str, list[Tensor]] = {name: [] for name in some}
    for site in federation.sites:
        for name, array in some.items():
            known = models.get(site.number)
            rows[name].append(torch.full_like(unpack(array), torch.nan) if known is None else unpack(known[name]))
    history.keep(pack({name: torch.stack(vectors) for name, vectors in rows.items()}))
    there = torch.tensor([site.number in models for site in federation.sites])
    means = {name: torch.stack(vectors)[there].double().mean(0).float() for name, vectors in rows.items()}
    found = {"consensus-distance": consensus_distance(torch.stack(rows[X])[there])}
    told = ConfigRecord({"server-round": exchanges, **federation.agreed()})
    mean = pack({X: means[X], STATS: means.get(STATS, torch.empty(0))})
    messages = [
        Message(RecordDict({ARRAYS: mean, CONFIG: told}), site.node, "evaluate")
        for site in federation.sites
        if site.number in models
    ]
    for message in messages:
        report.sent(message)
    replies = exchange(grid, messages, config.timeout_s)
    answers = [reply for node, reply in replies if report.received(node, reply, None, exchanges)]
    if answers:
        tested = numbers(weighted_metrics([RecordDict({METRICS: metrics_of(reply)}) for reply in answers], NUM_EXAMPLES))
        found |= {f"{name}-of-mean": value for name, value in tested.items() if name in ("accuracy", "loss")}
    report.write(exchanges, "consensus", {}, found)
