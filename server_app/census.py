"""The sites of a run: who is there, what they hold, and whether it fits together."""

from collections.abc import Mapping, Sequence
from logging import WARNING
from typing import NamedTuple

from flwr.app import Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from configuration.config import Config
from datasets.site import Moments, merge
from server_app.exchange import clock_of, exchange, why
from strategies.method import ArrivalPlan, PeerPlan, RoundPlan
from strategies.records import code_version, config_of


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


def an_epoch(federation: "Federation", batch_size: int) -> float:
    """Batches of an epoch, the mean over the sites."""
    return sum(-(-site.num_train // batch_size) for site in federation.sites) / len(federation.sites)


def budget(config: Config, plan: ArrivalPlan | PeerPlan, batches: float) -> tuple[int, int]:
    """How often the steps of a plan fit into the epochs of a run of ``batches`` an epoch; and from test to test.

    Raises:
        RunError: not once, or not as often as the plan waits for.
    """
    whole, table = config.epochs * batches, config.method.table
    if whole < plan.steps:
        raise RunError(f"{table}.local-steps = {plan.steps}: epochs = {config.epochs} have {whole:g} batches; at most these")
    total = round(whole / plan.steps)
    if isinstance(plan, ArrivalPlan) and total < plan.least:
        raise RunError(f"epochs = {config.epochs}: {total} contributions, and {config.strategy} needs {plan.least} for a step")
    return total, config.results.evaluate_every or max(1, round(batches / plan.steps))


class Site(NamedTuple):
    """One data center.

    Attributes:
        number: counts from 0.
        node: Flower's id.
        name: for people.
        num_train, num_test: its examples.
        counts: its examples of each class; empty for a deployed site, which keeps that to itself.
        key: its public key where keys are trusted on first use; else empty.
    """

    number: int
    node: int
    name: str
    num_train: int
    num_test: int
    counts: tuple[int, ...]
    key: bytes


class Federation(NamedTuple):
    """The sites that take part, by number, and what they have in common.

    Attributes:
        sites: in the order of their numbers.
        classes: of all sites.
        shape: of one example, as the network takes it.
        moments: of the columns of a table, over all sites; None for other data.
        notes: what sites say about their data, each with the site's name before it.
    """

    sites: tuple[Site, ...]
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    moments: Moments | None
    notes: tuple[str, ...]

    def agreed(self) -> dict[str, list[str] | list[float]]:
        """What every message tells the sites about each other."""
        told: dict[str, list[str] | list[float]] = {"classes": list(self.classes)}
        return told | ({} if self.moments is None else {key: list(value) for key, value in self.moments._asdict().items()})


def take_census(grid: Grid, config: Config) -> Federation:
    """Wait for the sites, ask each what it holds, and make sure that they fit together.

    A site that cannot answer is left out with a warning as long as ``min-sites`` remain.

    Raises:
        RunError: too few sites, two with the same number, examples that differ in shape, or other code than the server's.
    """
    nodes = _wait_for(grid, config)
    if len(nodes) > config.num_sites:
        raise RunError(f"num-sites = {config.num_sites}, but {len(nodes)} sites are connected: set num-sites to their number")
    answers: dict[int, Mapping[str, object]] = {}
    failures = []
    for node, reply in exchange(grid, [Message(RecordDict(), node, "query.site") for node in nodes], config.timeout_s):
        if reply.has_error():
            failures.append(why(reply))
        else:
            answers[node] = config_of(reply)
    for failure in sorted(set(failures)):
        log(WARNING, "%d of %d sites cannot take part: %s", failures.count(failure), len(nodes), failure)
    if len(answers) < config.min_sites:
        reasons = "; ".join(sorted(set(failures)))
        raise RunError(f"{len(answers)} sites can take part, min-sites = {config.min_sites}. {reasons}")
    return _fit_together(answers, config)


def _wait_for(grid: Grid, config: Config) -> list[int]:
    clock = clock_of(grid)
    start, said, asked = clock.now(), -1, False
    while len(nodes := list(grid.get_node_ids())) < config.num_sites:
        waited = clock.now() - start
        # A simulation of too few sites will never have more: say so soon.
        if nodes and not asked and waited > min(config.timeout_s, 15):
            asked = True
            if 0 < (there := _simulated_sites(grid, nodes[0], config)) < config.num_sites:
                raise RunError(
                    f"num-sites = {config.num_sites}, but the simulation has {there} sites: "
                    f'add --federation-config "num-supernodes={config.num_sites}"'
                )
        if waited >= config.timeout_s:
            if len(nodes) >= config.min_sites:
                log(WARNING, "%d of %d sites are connected after %g s: going on", len(nodes), config.num_sites, config.timeout_s)
                break
            raise RunError(f"{len(nodes)} of {config.num_sites} sites are connected after timeout-s = {config.timeout_s:g}")
        if len(nodes) != said:
            said = len(nodes)
            log(WARNING, "waiting for sites: %d of %d are connected", said, config.num_sites)
        clock.wait(0.5, config.timeout_s - waited)
    return nodes


def _simulated_sites(grid: Grid, node: int, config: Config) -> int:
    """How many sites the simulation has that ``node`` belongs to; 0 for a deployed site or one that does not answer."""
    [(_, reply)] = exchange(grid, [Message(RecordDict(), node, "query.site")], config.timeout_s)
    sites = 0 if reply.has_error() else config_of(reply)["sites"]
    assert isinstance(sites, int)
    return sites


def _counts(answer: Mapping[str, object], classes: Sequence[str]) -> tuple[int, ...]:
    """A site's examples of each of ``classes``; empty where it does not tell."""
    if "counts" not in answer:
        return ()
    own = dict(zip(answer["classes"], answer["counts"], strict=True))  # type: ignore[call-overload]
    return tuple(own.get(name, 0) for name in classes)


def _fit_together(answers: Mapping[int, Mapping[str, object]], config: Config) -> Federation:
    ordered = sorted(answers.items(), key=lambda item: item[1]["site"])  # type: ignore[arg-type, return-value]
    numbers = [answer["site"] for _, answer in ordered]
    if len(set(numbers)) < len(numbers):
        raise RunError(f"two sites have the same number: {numbers}; give each its own site=... in --node-config")
    reference_name, reference = ordered[0][1]["name"], ordered[0][1]
    for _, answer in ordered:
        if answer["code"] != code_version():
            raise RunError(
                f"{answer['name']} runs other code than the server. In a simulation the SuperLink was started in a folder with "
                "packages of the same names: stop it and start it elsewhere; in a deployment update the site"
            )
        for key, what in (("shape", "shape of an example"), ("columns", "columns")):
            if answer[key] != reference[key]:
                raise RunError(f"the {what} differ: {reference_name} has {reference[key]}, {answer['name']} has {answer[key]}")
    classes = sorted({str(name) for _, answer in ordered for name in answer["classes"]})  # type: ignore[attr-defined]
    known = [str(name) for name in reference["classes"]]  # type: ignore[attr-defined]
    if set(known) == set(classes):
        classes = known  # numbers before letters and the like: a source's own order is the better one
    sites = tuple(
        Site(
            int(answer["site"]),  # type: ignore[call-overload]
            node,
            str(answer["name"]),
            int(answer["train"]),  # type: ignore[call-overload]
            int(answer["test"]),  # type: ignore[call-overload]
            _counts(answer, classes),
            bytes(answer.get("public-key", b"")),  # type: ignore[call-overload]
        )
        for node, answer in ordered
    )
    if isinstance(config.plan, PeerPlan) and (wrong := [site.number for site in sites if site.number >= config.num_sites]):
        raise RunError(f"site {wrong[0]}: peers are numbered 0 to {config.num_sites - 1}, below num-sites")
    if isinstance(config.plan, RoundPlan) and config.plan.pooled:
        sites = sites[:1]  # the one place that holds everybody's data
    notes = tuple(f"{answer['name']}: {note}" for _, answer in ordered for note in answer["notes"])  # type: ignore[attr-defined]
    shape: tuple[int, ...] = tuple(reference["shape"])  # type: ignore[arg-type]
    common = None
    if reference["columns"]:
        common = merge([Moments(*(tuple(answer[key]) for key in Moments._fields)) for _, answer in ordered])  # type: ignore[arg-type]
        shape = (2 * shape[0],)  # the values, and which of them are missing
    return Federation(sites, tuple(classes), shape, common, notes)
