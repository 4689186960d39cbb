"""The sections that belong to every run.

A method's own keys stand in a section of its name, see its file in ``strategies/``.

Each key has its type, its default and a line that says what it does; ``pyproject.toml`` and the
reference of keys are made of these by ``make docs``. ``Only`` marks a key that has an effect only
with some values of a key beside it.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, Field

from datasets.partitions import PARTITIONS
from datasets.sources import SOURCES
from models.networks import NETWORKS, torchvision_names
from models.tasks import TASKS
from strategies.codecs import CODECS
from strategies.keys import Decay, NotNegative, Only, Positive, Share
from strategies.method import Section
from strategies.robust import Kind, Robust
from strategies.topology import TOPOLOGIES

TRACKERS = ("tensorboard", "mlflow")
UNDIRECTED = tuple(name for name, kind in TOPOLOGIES.items() if not kind.directed)


class _Entry(Protocol):
    @property
    def keys(self) -> tuple[str, ...]: ...


def _taking(table: Mapping[str, _Entry], key: str) -> tuple[str, ...]:
    """The names of a table whose entries take a key."""
    return tuple(name for name, entry in table.items() if key in entry.keys)


def _one_of(*allowed: str, more: Callable[[], tuple[str, ...]] = tuple) -> AfterValidator:
    """One of ``allowed`` names, or of ``more`` (looked up when needed), or an import path."""

    def check(name: str) -> str:
        module, colon, value = name.partition(":")
        if name in allowed or (colon and module != "torchvision" and value.isidentifier()):
            return name
        names = (*allowed, *(more() if colon else ()))
        if name in names:
            return name
        guess = get_close_matches(name, names, n=1)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        kinds = (
            *allowed,
            *(("torchvision:NAME",) if more is not tuple else ()),
            "package.module:NAME",
        )
        raise ValueError(f"allowed: {', '.join(kinds)}{hint}")

    return AfterValidator(check)


def _names(*allowed: str) -> AfterValidator:
    """Names of ``allowed`` ones, with blanks between them."""

    def check(names: str) -> str:
        if any(name not in allowed for name in names.split()):
            raise ValueError(f"allowed: {', '.join(allowed)}, with blanks between them, or nothing")
        return names

    return AfterValidator(check)


class Training(Section):
    """Training at the sites, of every method."""

    task: Annotated[str, _one_of(*TASKS)] = "classification"
    """classification, multi-label, regression, language, segmentation, or one's own:
    package.module:TASK
    """
    lr: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """learning rate at the start of a cycle (a round in Co-learning, the run elsewhere); 0: 0.05 of
    sgd, else 0.001
    """
    lr_ratio: Share = 0.25
    """rate at the end of a cycle over that at its start; 1: constant"""
    lr_shape: Literal["exponential", "linear", "cosine"] = "exponential"
    """exponential, linear, cosine"""
    lr_steps: Literal["batch", "epoch"] = "batch"
    """how often the rate moves: batch, epoch"""
    lr_warmup: Decay = 0.0
    """share of a cycle during which the rate rises linearly to lr, batch by batch; then it decays
    over the rest; 0: none
    """
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """sgd, adamw, muon (of hidden matrices and kernels, the rest by adamw)"""
    momentum: Decay = 0.9
    """of sgd and muon; beta1 of adamw"""
    nesterov: Annotated[bool, Only(optimizer=("sgd",))] = False
    """look ahead"""
    weight_decay: NotNegative = 1e-4
    """factor of the pull towards 0"""
    batch_size: Positive = 32
    """examples of a batch"""
    clip_norm: NotNegative = 1.0
    """largest gradient norm; 0: no clipping"""
    sam_radius: NotNegative = 0.0
    """radius of sharpness-aware minimization; 0: off"""

    @property
    def rate(self) -> float:
        """The learning rate at the start of a cycle."""
        return self.lr or (0.05 if self.optimizer == "sgd" else 0.001)


class Model(Section):
    """The network."""

    name: Annotated[str, _one_of(*NETWORKS, more=torchvision_names)] = "cnn"
    """cnn, mlp, lenet5, resnet20, vgg11, unet, gpt, torchvision:NAME, or one's own:
    package.module:NAME
    """
    norm: Annotated[Literal["batch", "group", "evonorm"], Only(name=_taking(NETWORKS, "norm"))] = (
        "batch"
    )
    """batch, group, evonorm"""
    layers: Annotated[int, Field(ge=1, le=256), Only(name=_taking(NETWORKS, "layers"))] = 4
    """of a transformer"""
    width: Annotated[int, Field(ge=1, le=2**16), Only(name=_taking(NETWORKS, "width"))] = 128
    """of a transformer: numbers by which a token is represented"""
    heads: Annotated[int, Field(ge=1, le=1000), Only(name=_taking(NETWORKS, "heads"))] = 4
    """of attention; must divide width"""
    initial: str = ""
    """safetensors file to start from, by names; empty: random"""
    trainable: str = ""
    """shell patterns of parameters' names, such as "fc.* layer4.*": only these train and cross the
    wire; empty: all
    """

    @property
    def options(self) -> dict[str, Any]:
        """What a network by name may take."""
        return self.model_dump(exclude={"name", "initial", "trainable"})


class Data(Section):
    """What sites hold."""

    source: Annotated[str, _one_of(*SOURCES)] = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, image-folder, csv, parquet, text-bytes,
    tokens, ..., package.module:NAME
    """
    path: str = ""
    """file or folder; for torchvision's sets the root"""
    label: Annotated[str, Field(min_length=1), Only(source=_taking(SOURCES, "label"))] = "label"
    """the label's column, or an expression of columns such as "target > 0\""""
    group: Annotated[str, Only(source=_taking(SOURCES, "group"))] = ""
    """natural sites: a column, or a regular expression on the path; empty: CSV file or top folder
    """
    image_size: Annotated[
        int, Field(ge=1, le=4096), Only(source=_taking(SOURCES, "image_size"))
    ] = 32
    """pictures are resized to this many pixels a side"""
    channels: Annotated[Literal[0, 1, 3], Only(source=_taking(SOURCES, "channels"))] = 0
    """1: grey; 3: coloured; 0: as they are"""
    audio_seconds: Annotated[
        float, Field(gt=0, le=3600), Only(source=_taking(SOURCES, "audio_seconds"))
    ] = 1.0
    """clips are cut or padded to this length"""
    text_buckets: Annotated[
        int, Field(ge=1, le=2**22), Only(source=_taking(SOURCES, "text_buckets"))
    ] = 16384
    """length of the hashed bag of n-grams"""
    context: Annotated[int, Field(ge=1, le=2**20), Only(source=_taking(SOURCES, "context"))] = 128
    """tokens (bytes of text-bytes) from which the next ones are predicted"""
    token_bytes: Annotated[float, Field(gt=0, le=1000), Only(source=("tokens",))] = 1.0
    """bytes of text that a token stands for, on average: for bits a byte"""
    vocabulary: Annotated[
        int, Field(ge=2, le=2**24), Only(source=_taking(SOURCES, "vocabulary"))
    ] = 256
    """different tokens that there may be; of text-bytes 256"""
    memory_gb: Annotated[float, Field(gt=0, le=1e6), Only(source=_taking(SOURCES, "memory_gb"))] = (
        4.0
    )
    """examples that would take more memory (in 2^30 bytes) are read when a batch needs them"""
    test_part: Literal["own", "pooled", "official"] = "own"
    """own: each site splits off a part; pooled: these are put together and spread evenly; official:
    the data set's
    """
    test_fraction: Annotated[float, Field(gt=0, lt=1), Only(test_part=("own", "pooled"))] = 0.2
    """of each site's examples"""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """to choose keys by: a share of each site's training examples, on which sites test instead of
    their test part; 0: none
    """
    augment: Literal["none", "flip-crop"] = "none"
    """none, flip-crop"""


class Partition(Section):
    """Who gets what in a simulation."""

    kind: Annotated[str, _one_of(*PARTITIONS)] = "iid"
    """iid, dirichlet, dirichlet-equal, classes, sizes, natural, or one's own: package.module:NAME
    """
    alpha: Annotated[float, Field(gt=0, le=1e6), Only(kind=_taking(PARTITIONS, "alpha"))] = 0.5
    """smaller is more skewed"""
    classes_per_site: Annotated[Positive, Only(kind=_taking(PARTITIONS, "classes_per_site"))] = 2
    """so many"""
    size_ratio: Annotated[
        float, Field(ge=1, le=1e6), Only(kind=_taking(PARTITIONS, "size_ratio"))
    ] = 10.0
    """examples of the largest site over those of the smallest"""
    iid_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """so much of the data is spread by chance, the rest as kind says"""


class Sampling(Section):
    """Who takes part in a round."""

    fraction: Share = 1.0
    """of the sites that are there so many train, and test, in a round: drawn by chance, at least
    min-sites; after the last round all test
    """


class TopologyKeys(Section):
    """Who exchanges with whom, of peers."""

    name: Annotated[str, _one_of(*TOPOLOGIES)] = "ring"
    """ring, path, star, complete, torus, matching, exponential, edges, ..., or one's own:
    package.module:function
    """
    mixing: Annotated[Literal["metropolis", "uniform"], Only(own=True, name=UNDIRECTED)] = (
        "metropolis"
    )
    """weights of neighbours: metropolis, uniform (regular graphs)"""
    lazy: bool = False
    """halve the weights of all neighbours"""
    degree: Annotated[Positive, Only(name=_taking(TOPOLOGIES, "degree"))] = 4
    """neighbours of a peer"""
    stride: Annotated[Positive, Only(name=_taking(TOPOLOGIES, "stride"))] = 4
    """peers 1 and so many apart are neighbours"""
    edges: Annotated[str, Only(name=_taking(TOPOLOGIES, "edges"))] = ""
    """a file on the server with "i j" or "i j weight" a line"""
    averaging_rate: Share = 1.0
    """gamma: how far a peer goes to its neighbours' mean; with a lossy codec well below 1"""


class Wire(Section):
    """What crosses the wire."""

    codec: Annotated[str, _one_of(*CODECS)] = "identity"
    """of offers to peers and updates to a server: identity, fp16, bf16, qsgd, top-k, random-k,
    sign, or package.module:function
    """
    down_codec: Literal["identity", "fp16", "bf16"] = "identity"
    """of the model that a server sends to train on; sites then answer with how far they moved it"""
    bits: Literal[2, 4, 8, 16] = 8
    """of qsgd, the sign included: 2, 4, 8, 16"""
    share: Share = 0.1
    """of top-k and random-k: of so many numbers of each layer"""
    error_feedback: Literal["none", "deep-squeeze", "choco"] = "none"
    """none, deep-squeeze; between peers also choco"""
    cross_codec: Annotated[str, _one_of(*CODECS)] = "identity"
    """of cross-gradients (ngm, n-saddle), with error feedback for each neighbour"""
    sealing: Literal["off", "keys", "trust-on-first-use"] = "off"
    """end-to-end encryption: off, keys (each site has a list of its neighbours'),
    trust-on-first-use
    """
    collect_models: Annotated[bool, Only(sealing=("off",))] = True
    """at the end the server gets every peer's model, saves it and tests their mean; never when
    sealed
    """


class RobustKeys(Section):
    """Against broken and hostile sites, beside max-change."""

    mean: Kind = "mean"
    """of rounds and of gsgm and fedbuff: mean, median, trimmed-mean, krum; of peers: mean, median,
    trimmed-mean, clipped
    """
    faulty: Annotated[Positive, Only(mean=("trimmed-mean", "krum", "clipped"))] = 1
    """so many sites, or of each peer so many neighbours, may be hostile"""
    max_share: Share = 0.5
    """no site's share in a mean that is weighted by examples is larger"""

    @property
    def rule(self) -> Robust:
        """Which mean."""
        return Robust(self.mean, self.faulty)


class Results(Section):
    """What a run leaves."""

    folder: Annotated[str, Field(min_length=1)] = "runs"
    """each run makes a folder in it"""
    details: bool = False
    """tests also tell the metrics of each class and, of a classification, how well probabilities
    are calibrated
    """
    personalise_epochs: Annotated[int, Field(ge=0, le=10**6)] = 0
    """after the last round each site trains the model by itself for so many local epochs, and tests
    what it has then, which stays there; 0: none
    """
    evaluate_every: Annotated[int, Field(ge=0, le=10**9)] = 0
    """updates or exchanges from test to test; 0: one pass over the data"""
    checkpoint_minutes: Annotated[float, Field(ge=0, le=1e6)] = 10.0
    """a run can go on from every round or test, and asynchronous ones at least from so many minutes
    ago; 0: never
    """
    resume: str = ""
    """go on with a run that was killed: its folder, or auto for the newest of this configuration,
    or a new one
    """
    log: Literal["text", "json"] = "text"
    """of the console: text, or json: events and log as lines of JSON with run, round and site"""
    trackers: Annotated[str, _names(*TRACKERS)] = ""
    """experiment trackers that get the metrics, such as "tensorboard mlflow"; each is an extra to
    install
    """


class Computing(Section):
    """What sites compute on."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")] = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """processes, at most one a core, that read ahead what is not in memory; 0: the training process
    reads
    """
    precision: Literal["float32", "bfloat16"] = "float32"
    """float32, bfloat16 (autocast)"""
    channels_last: bool = False
    """memory layout of pictures"""
    compile: bool = False
    """torch.compile"""
    checkpointing: bool = False
    """a network's blocks are computed twice, to save memory"""
    micro_batch: Annotated[int, Field(ge=0, le=10**9)] = 0
    """to save memory, a gradient is summed over parts of so many examples (BatchNorm sees these),
    and tests take as many; 0: all
    """


SECTIONS: dict[str, type[Section]] = {
    "training": Training,
    "model": Model,
    "data": Data,
    "partition": Partition,
    "sampling": Sampling,
    "topology": TopologyKeys,
    "wire": Wire,
    "robust": RobustKeys,
    "results": Results,
    "computing": Computing,
}
