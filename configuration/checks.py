"""Checks of keys that do not go together, and of keys without effect."""

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from configuration.errors import changed, shown
from configuration.sections import SECTIONS
from datasets.partitions import PARTITIONS
from datasets.sources import SOURCES
from models.networks import custom_network
from models.tasks import TASKS
from strategies.codecs import CODECS, codec, trial
from strategies.keys import Only
from strategies.method import (
    AlonePlan,
    ArrivalPlan,
    ForeignPlan,
    Method,
    PeerPlan,
    Plan,
    RoundPlan,
    Run,
    Section,
)
from strategies.methods import METHODS
from strategies.peer.algorithm import LinkAlgorithm
from strategies.topology import TOPOLOGIES

if TYPE_CHECKING:
    from configuration.config import Config

RADIUS = 0.0123  # of sharpness-aware training, by which plans that take one are told from others
MOST_PEERS = 1000  # the mixing matrix, and the check that it connects them, grow with the square
DIRECTED = "gradients go back where models came from, against its links; or gradients = 'model'"
VARYING = "neighbours change, it needs them to hear everything; allowed: 'none', 'deep-squeeze'"
ROUNDS = (RoundPlan, AlonePlan, ForeignPlan)
# Keys of the sections of every run that have no effect with a kind of plan; a section's name
# stands for all of its keys.
BETWEEN_PEERS = {"topology", "wire.cross-codec", "wire.sealing", "wire.collect-models"}
OF_ROUNDS = {"sampling", "results.personalise-epochs"}
UNUSED: dict[type, set[str]] = {
    **{kind: {*BETWEEN_PEERS, "results.evaluate-every"} for kind in ROUNDS},
    AlonePlan: {"topology", "wire", "robust", *OF_ROUNDS, "results.evaluate-every"},
    ArrivalPlan: {*BETWEEN_PEERS, *OF_ROUNDS, "robust.max-share", "training.lr-steps"},
    PeerPlan: {
        "wire.down-codec",
        "robust.max-share",
        *OF_ROUNDS,
        *(f"training.{key}" for key in ("lr-steps", "optimizer", "momentum", "nesterov")),
    },
}


def mistakes(config: "Config", method: Method[Any]) -> Iterator[str]:
    """The mistakes of keys that do not fit together, a line each."""
    try:
        plan = config.plan
        probe = method.plan(config.keys, config.run._replace(sam_radius=RADIUS))
    except ValueError as error:
        yield str(error)
        return
    except Exception as error:  # of one's own
        yield (
            f"strategy = {shown(config.strategy)}: its plan fails: {type(error).__name__}: {error}"
        )
        return
    if not isinstance(plan, tuple(KINDS)):
        yield (
            f"strategy = {shown(config.strategy)}: its plan is {type(plan).__name__}; "
            "a RoundPlan, ArrivalPlan, ... is expected"
        )
        return
    yield from _without_effect(config, method, probe)
    yield from _run(config)
    yield from _data(config)
    yield from _codecs(config)
    yield from _robust(config, plan)
    if isinstance(plan, PeerPlan):
        yield from _peers(config, plan)


@cache
def unused(name: str) -> frozenset[str]:
    """The keys of the sections of every run that have no effect with a method."""
    return _unused(METHODS[name], _plan(METHODS[name]))


def _plan(method: Method[Any]) -> Plan | None:
    try:
        return method.plan(method.keys(), Run(1.0, RADIUS))
    except ValueError:  # an argument that has no default
        return None


KINDS = {
    RoundPlan: "rounds",
    AlonePlan: "sites alone",
    ForeignPlan: "rounds, by Flower",
    ArrivalPlan: "arrivals",
    PeerPlan: "peers",
}


def kind_of(method: Method[Any]) -> str:
    """Which driver runs a method, in words."""
    plan = _plan(method)
    return KINDS[type(plan) if plan else ForeignPlan]


def _unused(method: Method[Any], plan: Plan | None) -> frozenset[str]:
    """The keys without effect, given the method's plan for a radius of :data:`RADIUS`."""
    sections = UNUSED[type(plan) if plan else ForeignPlan]
    if isinstance(plan, PeerPlan) and plan.gradient.rho != RADIUS:  # its own, or none
        sections = sections | {"training.sam-radius"}
    whole = {
        f"{name}.{field.alias}"
        for name in sections & SECTIONS.keys()
        for field in SECTIONS[name].model_fields.values()
    }
    return method.unused | (sections - SECTIONS.keys()) | whole


def _without_effect(config: "Config", method: Method[Any], probe: Plan) -> Iterator[str]:
    """Keys that are not as shipped and that nobody would read."""
    none = _unused(method, probe)
    for name in SECTIONS:
        for key, value in changed(getattr(config, name)).items():
            if (whole := f"{name}.{key}") in none:
                takers = [each for each in METHODS if whole not in unused(each)]
                yield (
                    f"{whole} = {shown(value)}: has no effect with strategy = {method.name!r}; "
                    f"taken by {', '.join(takers)}"
                )
    for name, section in {
        **{name: getattr(config, name) for name in SECTIONS},
        method.table: config.keys,
    }.items():
        yield from _only(name, section)


def _only(table: str, section: Section) -> Iterator[str]:
    fields = type(section).model_fields
    names = {str(field.alias): name for name, field in fields.items()}
    for key, value in changed(section).items():
        for rule in fields[names[key]].metadata:
            if not isinstance(rule, Only):
                continue
            for other, values in rule.values.items():
                there = getattr(section, other)
                if there not in values and not (rule.own and ":" in str(there)):
                    allowed = ", ".join(map(str, values))
                    where = f"{table}.{fields[other].alias}"
                    yield (
                        f"{table}.{key} = {shown(value)}: has no effect with {where} = {there!r}; "
                        f"only with {allowed}"
                    )


def _run(config: "Config") -> Iterator[str]:
    training, keys = config.training, config.keys
    if config.min_sites > config.num_sites:
        yield f"min-sites = {config.min_sites}: at most num-sites, which is {config.num_sites}"
    local_epochs = changed(keys).get("local-epochs", 0)
    if local_epochs > config.epochs:
        yield (
            f"{config.method.table}.local-epochs = {local_epochs}: "
            f"at most epochs, which is {config.epochs}"
        )
    for table, section in (("training", training), (config.method.table, keys)):
        if getattr(section, "nesterov", False) and not getattr(section, "momentum", 0):
            yield f"{table}.nesterov = True: needs {table}.momentum above 0"
    if (
        isinstance(config.plan, ArrivalPlan)
        and config.plan.steps == 1
        and not training.nesterov
        and "momentum" in changed(training)
    ):
        table = config.method.table
        yield (
            f"training.momentum = {training.momentum:g}: "
            f"has no effect with {table}.local-steps = 1, where it is reset each time"
        )
    if training.lr_ratio == 1:
        for key in ("lr-shape", "lr-steps"):
            if key in changed(training):
                yield (
                    f"training.{key} = {changed(training)[key]!r}: "
                    "has no effect with training.lr-ratio = 1"
                )
    try:
        task = config.task
    except ValueError as error:
        yield f"training.task = {shown(training.task)}: {error}"
        return
    if config.results.details and task.means is None:
        yield f"results.details = True: has no effect with training.task = {training.task!r}"
    if ":" in config.model.name and not config.model.name.startswith("torchvision:"):
        try:
            custom_network(config.model.name)
        except ValueError as error:
            yield str(error)
    model = config.model
    if model.name == "gpt" and model.width % model.heads:
        yield f"model.heads = {model.heads}: must divide model.width, which is {model.width}"
    if model.name == "mlp" and config.computing.channels_last:
        yield "computing.channels-last = True: only for a convolutional model; allowed: False"


def _data(config: "Config") -> Iterator[str]:
    data, partition = config.data, config.partition
    try:
        target = config.task.target
    except ValueError:
        return  # said above
    source = SOURCES.get(data.source)
    if source and target not in source.targets:
        fit = ", ".join(repr(name) for name, task in TASKS.items() if task.target in source.targets)
        yield (
            f"training.task = {config.training.task!r}: "
            f"not what data.source = {data.source!r} is for; allowed: {fit}"
        )
    if partition.kind in PARTITIONS and PARTITIONS[partition.kind].by_class and target != "class":
        kinds = ", ".join(name for name, kind in PARTITIONS.items() if not kind.by_class)
        yield (
            f"partition.kind = {partition.kind!r}: "
            f"examples of {config.training.task} have no classes; allowed: {kinds}"
        )
    if data.augment != "none" and target == "map":
        yield (
            f"data.augment = {data.augment!r}: "
            "maps are not flipped and cropped with their pictures; allowed: 'none'"
        )
    if (
        data.test_part == "official"
        and data.source in SOURCES
        and not SOURCES[data.source].official_test
    ):
        yield (
            f"data.test-part = 'official': {data.source} has no official test part; allowed: 'own'"
        )
    if data.augment != "none" and data.source in SOURCES and not SOURCES[data.source].pictures:
        yield (
            f"data.augment = {data.augment!r}: only pictures can be flipped and cropped, "
            f"not {data.source}; allowed: 'none'"
        )
    if config.computing.workers and data.source in SOURCES and not SOURCES[data.source].lazy:
        lazy = ", ".join(name for name, each in SOURCES.items() if each.lazy)
        reason = f"has no effect with data.source = {data.source!r}, which is in memory"
        yield (
            f"computing.workers = {config.computing.workers}: {reason}; "
            f"only with {lazy}, package.module:NAME"
        )
    if partition.iid_fraction and partition.kind == "iid":
        yield (
            f"partition.iid-fraction = {partition.iid_fraction:g}: "
            "has no effect with partition.kind = 'iid'"
        )


def _codecs(config: "Config") -> Iterator[str]:
    wire = config.wire
    for key, each in (("wire.codec", wire.codec), ("wire.cross-codec", wire.cross_codec)):
        try:
            found = codec(each, (3, 5), key, bits=wire.bits, share=wire.share)
            if wrong := None if each in CODECS else trial(found, 8):
                yield f"{key} = {each!r}: {wrong}"
        except ValueError as error:
            yield str(error)
    if wire.codec in CODECS and CODECS[wire.codec].biased and wire.error_feedback == "none":
        yield (
            f"wire.error-feedback = 'none': codec = {wire.codec!r} loses what it leaves out; "
            "allowed: 'deep-squeeze', 'choco'"
        )
    if wire.error_feedback != "none" and wire.codec == "identity":
        yield (
            f"wire.error-feedback = {wire.error_feedback!r}: "
            "has no effect with wire.codec = 'identity'"
        )
    if wire.error_feedback == "choco" and not isinstance(config.plan, PeerPlan):
        yield (
            f"wire.error-feedback = 'choco': {config.strategy} has no neighbours; "
            "allowed: 'none', 'deep-squeeze'"
        )
    for key in ("bits", "share"):
        readers = [each for each, kind in CODECS.items() if key in kind.keys]
        if key in changed(wire) and not set(readers) & {wire.codec, wire.cross_codec}:
            only = ", ".join(readers)
            yield (
                f"wire.{key} = {changed(wire)[key]}: "
                f"has no effect with wire.codec = {wire.codec!r}; only with {only}"
            )


def _robust(config: "Config", plan: Plan) -> Iterator[str]:
    robust, name, table = config.robust, config.strategy, config.method.table
    if (
        "max-share" in changed(robust)
        and getattr(plan, "weighting", "") == "equal"
        and isinstance(plan, RoundPlan)
    ):
        yield (
            f"robust.max-share = {robust.max_share:g}: "
            f"has no effect with {table}.weighting = 'equal'"
        )
    if not robust.rule.on:
        return
    setting, allowed, rows, what = (
        f"robust.mean = {robust.mean!r}",
        ("median", "trimmed-mean", "krum"),
        config.sampled(config.num_sites),
        "num-sites" if config.sampling.fraction == 1 else "sites in a round",
    )
    match plan:
        case ArrivalPlan(window=0):
            yield (
                f"{setting}: {name} takes one contribution at a time; "
                "allowed: 'mean', or strategy = 'gsgm' (not dc-asgd), 'fedbuff'"
            )
            return
        case ForeignPlan(averages=False):
            yield f"{setting}: {name} is no mean of models; allowed: 'mean'"
            return
        case PeerPlan(algorithm=LinkAlgorithm()) | PeerPlan(accumulates_errors=True):
            yield f"{setting}: {name} needs the sum of all that is sent; allowed: 'mean'"
            return
        case ArrivalPlan():
            rows, what = (
                plan.window,
                f"{table}.{'window' if hasattr(config.keys, 'window') else 'buffer-size'}",
            )
            if rows > config.num_sites:
                yield (
                    f"{what} = {rows}: {setting} takes one contribution a site; "
                    f"at most num-sites, which is {config.num_sites}"
                )
        case PeerPlan():
            allowed = ("median", "trimmed-mean", "clipped")
            if config.wire.error_feedback != "none":
                yield (
                    f"{setting}: not with wire.error-feedback = {config.wire.error_feedback!r}; "
                    "allowed: 'none'"
                )
        case _ if "weighting" in changed(config.keys):
            yield (
                f"{table}.weighting = 'samples': has no effect with {setting}: "
                "all sites count the same"
            )
    if robust.mean not in allowed:
        yield (
            f"{setting}: not with strategy = {name!r}; "
            f"allowed: 'mean', {', '.join(map(repr, allowed))}"
        )
    least = robust.rule.majority + 2 * (robust.mean == "krum")
    if rows < least and not isinstance(plan, PeerPlan):
        against = "" if robust.mean == "median" else f" against robust.faulty = {robust.faulty}"
        yield f"{what} = {rows}: {setting}{against} needs at least {least}"


def _peers(config: "Config", plan: PeerPlan) -> Iterator[str]:
    wire, topology, name = config.wire, config.topology.name, config.strategy
    if config.max_change != type(config).model_fields["max_change"].default and isinstance(
        plan.algorithm, LinkAlgorithm
    ):
        yield (
            f"max-change = {config.max_change:g}: has no effect with strategy = {name!r}: "
            "what neighbours send are no models"
        )
    if config.num_sites < 2:
        yield f"num-sites = {config.num_sites}: {name} needs peers to exchange with; at least 2"
    if config.num_sites > MOST_PEERS:
        yield f"num-sites = {config.num_sites}: {name} takes at most {MOST_PEERS} peers"
    if wire.error_feedback != "none" and isinstance(plan.algorithm, LinkAlgorithm):
        yield (
            f"wire.error-feedback = {wire.error_feedback!r}: "
            f"{name} offers each neighbour something else; allowed: 'none'"
        )
    if wire.error_feedback == "choco" and topology in TOPOLOGIES and TOPOLOGIES[topology].varying:
        yield f"wire.error-feedback = 'choco': {VARYING}"
    if wire.cross_codec != "identity" and plan.gradient.messages < 2:
        yield (
            f"wire.cross-codec = {wire.cross_codec!r}: has no effect where no gradients are sent; "
            "with ngm and n-saddle they are"
        )
    if plan.accumulates_errors and not (wire.codec in CODECS and CODECS[wire.codec].rounds):
        allowed = ", ".join(repr(each) for each, kind in CODECS.items() if kind.rounds)
        yield f"wire.codec = {wire.codec!r}: {name} would carry on every error; allowed: {allowed}"
    if topology in TOPOLOGIES and TOPOLOGIES[topology].directed and plan.gradient.messages > 1:
        yield f"topology.name = {topology!r}: {DIRECTED}"
    if plan.gradient.perturbed_by == "owner-of-model" and wire.codec != "identity":
        yield (
            f"wire.codec = {wire.codec!r}: "
            f"{name}.perturbed-by = 'owner-of-model' needs wire.codec = 'identity'"
        )
