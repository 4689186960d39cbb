"""The sites of a run: who is there, what they hold, and whether it fits together."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from logging import WARNING
from statistics import median
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from configuration.config import Config
from configuration.flower import log
from datasets.errors import SourceError
from datasets.site import Moments, merge
from models.pretrained import digest
from server_app.exchange import clock_of, exchange, gone
from server_app.roster import grouped_reasons
from strategies.method import ArrivalPlan, PeerPlan, RoundPlan
from strategies.protocol import Agreed, InvalidReply, SiteCard, Started, printable, read_card
from strategies.records import CONFIG, code_version

LOG_EVERY_S = 60.0
RETRY_S = 5.0
RETURN_S = 120.0  # in which Flower has all sites again after a server was away
MOST = 1000  # times the median of the sites' examples: they say how long a run is, and weigh
OTHER_CODE = (
    "it runs other code than the server. In a simulation the SuperLink was started in a folder "
    "with packages of the same names: stop it and start it elsewhere; in a deployment update the "
    "site"
)


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


def budget(config: Config, plan: ArrivalPlan | PeerPlan, batches: float) -> tuple[int, int]:
    """How often the steps of a plan fit into the epochs of a run; and from test to test.

    ``batches`` are those of an epoch.

    Raises:
        RunError: not once, or not as often as the plan waits for.
    """
    whole, table = config.epochs * batches, config.method.table
    if whole < plan.steps:
        raise RunError(
            f"{table}.local-steps = {plan.steps}: epochs = {config.epochs} have {whole:g} batches; "
            "at most these"
        )
    total = round(whole / plan.steps)
    if isinstance(plan, ArrivalPlan) and total < plan.least:
        raise RunError(
            f"epochs = {config.epochs}: {total} contributions, "
            f"and {config.strategy} needs {plan.least} for a step"
        )
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
        nonce: its own in this run, where payloads are sealed; else empty.
    """

    number: int
    node: int
    name: str
    num_train: int
    num_test: int
    counts: tuple[int, ...]
    key: bytes
    nonce: bytes

    def batches(self, batch_size: int) -> int:
        """How many batches an epoch of this site has."""
        return -(-self.num_train // batch_size)


class Federation(NamedTuple):
    """The sites that take part, by number, and what they have in common.

    Attributes:
        sites: in the order of their numbers.
        classes: of all sites.
        shape: of one example, as the network takes it.
        moments: over all sites, of the columns of a table and of numbers to predict; None where
            there are none.
        notes: what sites say about their data, each with the site's name before it.
        columns: of a table; empty for other data.
        started: of a run that goes on, when that was.
    """

    sites: tuple[Site, ...]
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    moments: Moments | None
    notes: tuple[str, ...]
    columns: tuple[str, ...] = ()
    started: Started | None = None

    def agreed(self) -> Agreed:
        """What every message says about all sites."""
        return Agreed(
            self.classes, () if self.moments is None else tuple(self.moments), self.started
        )


def an_epoch(federation: Federation, batch_size: int) -> float:
    """Batches of an epoch, the mean over the sites."""
    return sum(site.batches(batch_size) for site in federation.sites) / len(federation.sites)


def discover(grid: Grid, config: Config, before: Federation | None = None) -> Federation:
    """Wait for the sites, ask each what it holds, and make sure that they fit together.

    A site that cannot answer, whose answer cannot be used, or that does not fit the others is left
    out with a warning as long as ``min-sites`` remain. In a run that goes on, ``before`` are its
    sites, with the time of its start: one that is not there now may come back.

    Raises:
        RunError: more sites than ``num-sites``, or fewer than ``min-sites`` that can take part.
    """
    nodes = _wait_for(grid, config, before)
    if len(nodes) > config.num_sites:
        raise RunError(
            f"num-sites = {config.num_sites}, but {len(nodes)} sites are connected: "
            "set num-sites to their number"
        )
    cards: dict[int, SiteCard] = {}
    failures: list[str] = []
    content = RecordDict(
        {CONFIG: ConfigRecord(before.started.config())} if before and before.started else {}
    )
    for node, reply in _ask(grid, nodes, content, config):
        try:
            cards[node] = read_card(reply)
        except InvalidReply as invalid:
            failures.append(str(invalid) if reply.has_error() else f"node {node}: {invalid}")
    misfits = _misfits(cards, config)
    reasons = {failure: failures.count(failure) for failure in sorted(set(failures))}
    if misfits:
        reasons[
            grouped_reasons(
                {f"{cards[node].name} (node {node})": reason for node, reason in misfits.items()}
            )
        ] = len(misfits)
    for reason, sites in reasons.items():
        log(WARNING, "%d of %d sites cannot take part: %s", sites, len(nodes), reason)
    fitting = {node: card for node, card in cards.items() if node not in misfits}
    if len(fitting) < config.min_sites:
        raise RunError(
            f"{len(fitting)} sites can take part, min-sites = {config.min_sites}. "
            f"{'; '.join(reasons)}"
        )
    found = _federation(fitting, config)
    return found if before is None else _resumed(before, found)


def _ask(
    grid: Grid, nodes: list[int], content: RecordDict, config: Config
) -> Iterator[tuple[int, Message]]:
    """Each node's last answer.

    A silent one, such as a service that is starting, is asked again for a while.
    """
    clock = clock_of(grid)
    deadline = clock.now() + min(config.patience_s, RETURN_S)
    while nodes:
        silent = []
        for node, reply in exchange(
            grid, [Message(content, node, "query.site") for node in nodes], config.timeout_s
        ):
            if gone(reply) and clock.now() < deadline and node in set(grid.get_node_ids()):
                silent.append(node)
            else:
                yield node, reply
        if silent:
            clock.wait(RETRY_S, max(0.0, deadline - clock.now()))
        nodes = silent


def _resumed(before: Federation, now: Federation) -> Federation:
    """The sites of a run that goes on: those that are connected with their present node and key."""
    there = {site.number: site for site in now.sites}
    for site in now.sites:
        if site.number not in {old.number for old in before.sites}:
            log(
                WARNING,
                "%s (site %d) was not part of this run before: it is left out",
                site.name,
                site.number,
            )
    sites = []
    for old in before.sites:
        new = there.get(old.number)
        if new and (new.num_train, new.num_test) != (old.num_train, old.num_test):
            log(WARNING, "%s (site %d) has other data than before", new.name, new.number)
        sites.append(old._replace(node=new.node, key=new.key, nonce=new.nonce) if new else old)
    return before._replace(sites=tuple(sites))


def _wait_for(grid: Grid, config: Config, before: Federation | None) -> list[int]:
    clock, wanted = clock_of(grid), len(before.sites) if before else config.num_sites
    start, logged, asked, log_at = clock.now(), -1, False, 0.0
    while len(nodes := list(grid.get_node_ids())) < wanted:
        waited = clock.now() - start
        # A simulation of too few sites will never have more: say so soon.
        if nodes and not asked and waited > min(config.patience_s, 15):
            asked = True
            if 0 < (there := _simulated_sites(grid, nodes[0], config)) < config.num_sites:
                raise RunError(
                    f"num-sites = {config.num_sites}, but the simulation has {there} sites: "
                    f'add --federation-config "num-supernodes={config.num_sites}"'
                )
        enough = len(nodes) >= config.min_sites
        if waited >= (min(config.patience_s, RETURN_S) if before and enough else config.patience_s):
            if enough:
                log(
                    WARNING,
                    "%d of %d sites are connected after %.0f s: going on",
                    len(nodes),
                    wanted,
                    waited,
                )
                break
            raise RunError(
                f"{len(nodes)} of {wanted} sites are connected "
                f"after patience-s = {config.patience_s:g}"
            )
        if len(nodes) != logged or clock.now() >= log_at:
            logged, log_at = len(nodes), clock.now() + LOG_EVERY_S
            log(WARNING, "waiting for sites: %d of %d are connected", logged, wanted)
        clock.wait(0.5, config.patience_s - waited)
    return nodes


def _simulated_sites(grid: Grid, node: int, config: Config) -> int:
    """How many sites the simulation of ``node`` has.

    It is 0 for a deployed site or one that does not answer.
    """
    [(_, reply)] = exchange(grid, [Message(RecordDict(), node, "query.site")], config.timeout_s)
    try:
        return read_card(reply).sites
    except InvalidReply:
        return 0


def _counts(card: SiteCard, classes: Sequence[str]) -> tuple[int, ...]:
    """A site's examples of each of ``classes``; empty where it does not tell."""
    if card.counts is None:
        return ()
    own = dict(zip(card.classes, card.counts, strict=True))
    return tuple(own.get(name, 0) for name in classes)


def _misfits(cards: Mapping[int, SiteCard], config: Config) -> dict[int, str]:
    """Why sites cannot take part with the others, by node.

    Of two that cannot both be right, none is believed, unless most sites say as it does.
    """
    found = {node: OTHER_CODE for node, card in cards.items() if card.code != code_version()}
    if config.model.initial:
        initial = digest(config.model.initial)
        found |= {
            node: "its model.initial is another file"
            for node, card in cards.items()
            if card.initial != initial
        }
    target = config.task.target
    expected = {
        node: len(card.columns) + len(card.classes) * (target == "numbers")
        for node, card in cards.items()
    }
    found |= {
        node: f"it tells {len(card.known or ())} moments, {expected[node]} are expected"
        for node, card in cards.items()
        if len(card.known or ()) != expected[node]
    }
    for node, card in cards.items():
        if node not in found and card.known:
            try:
                Moments(*card.moments).check((*card.columns, *card.classes)[: len(card.known)])
            except SourceError as error:
                found[node] = printable(str(error), 240)
    kinds = {node: _kind(card, target) for node, card in cards.items() if node not in found}
    usual, votes = Counter(kinds.values()).most_common(1)[0] if kinds else (None, 0)
    for node, kind in kinds.items():
        if 2 * votes <= len(kinds) or kind != usual:
            others = ", ".join(sorted({other.text for other in kinds.values() if other != kind}))
            found[node] = printable(f"it has {kind.text}, others have {others}", 1000)
    if config.wire.sealing == "trust-on-first-use":
        keyless = {
            node: "it tells no public key (wire.sealing)"
            for node, card in cards.items()
            if card.public_key is None
        }
        found = keyless | found
    if config.wire.sealing != "off":
        found = {
            node: "it tells no nonce (wire.sealing)"
            for node, card in cards.items()
            if card.nonce is None
        } | found
    usual_size = (
        median(card.train for node, card in cards.items() if node not in found)
        if len(found) < len(cards)
        else 0
    )
    for node, card in cards.items():
        if node not in found and card.train > MOST * usual_size:
            found[node] = (
                f"it says it has {card.train:,} training examples, "
                f"more than {MOST:,} times the median of {usual_size:,g}"
            )
    numbers = {node: card.site for node, card in cards.items() if node not in found}
    for node, number in numbers.items():
        if list(numbers.values()).count(number) > 1:
            found[node] = (
                f"two sites have the number {number}; give each its own site=... in --node-config"
            )
        elif isinstance(config.plan, PeerPlan) and number >= config.num_sites:
            found[node] = (
                f"its number is {number}; "
                f"peers are numbered 0 to {config.num_sites - 1}, below num-sites"
            )
    return found


class _Kind(NamedTuple):
    """What must be the same at all sites.

    ``text`` alone would not distinguish the name "a, b" from "a" and "b".
    """

    text: str
    names: tuple[tuple[str, ...], ...]


def _kind(card: SiteCard, target: str) -> _Kind:
    kind = (
        f"the columns {', '.join(card.columns)}"
        if card.columns
        else f"examples of shape {card.shape}"
    )
    if target not in ("labels", "numbers", "tokens"):
        return _Kind(kind, (tuple(card.columns),))
    return _Kind(
        f"{kind} and {', '.join(card.classes)} to predict",
        (tuple(card.columns), tuple(card.classes)),
    )


def _federation(cards: Mapping[int, SiteCard], config: Config) -> Federation:
    ordered = sorted(cards.items(), key=lambda item: item[1].site)
    reference = ordered[0][1]
    classes = sorted({name for _, card in ordered for name in card.classes})
    if set(reference.classes) == set(classes):
        # Numbers before letters and the like: a source's own order is the better one.
        classes = reference.classes
    sites = tuple(
        Site(
            card.site,
            node,
            card.name,
            card.train,
            card.test,
            _counts(card, classes),
            card.public_key or b"",
            card.nonce or b"",
        )
        for node, card in ordered
    )
    if isinstance(config.plan, RoundPlan) and config.plan.pooled:
        sites = sites[:1]  # the one place that holds everybody's data
    notes = tuple(
        f"{card.name}: {printable(note, 500)}" for _, card in ordered for note in card.notes
    )
    if config.task.target == "class" and len(classes) == 1:
        notes = (
            *notes,
            f"all examples are of the class {printable(classes[0], 100)}: "
            "there is nothing to tell apart",
        )
    shape, common = tuple(reference.shape), None
    if reference.known:
        common = merge([Moments(*card.moments) for _, card in ordered])
    if reference.columns:
        shape = (2 * shape[0],)  # the values, and which of them are missing
    return Federation(sites, tuple(classes), shape, common, notes, tuple(reference.columns))
