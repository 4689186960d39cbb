"""The whole run configuration: one frozen value, checked before any site starts work.

A key that has no effect in a run must have its default: a value that somebody set on purpose and
that nobody would read is an error.
"""

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from configuration.checks import mistakes
from configuration.errors import ConfigError, changed, shown, shown_key
from configuration.flower import flatten_dict
from configuration.former import new_key
from configuration.sections import (
    SECTIONS,
    Computing,
    Data,
    Model,
    Partition,
    Results,
    RobustKeys,
    Sampling,
    TopologyKeys,
    Training,
    Wire,
)
from models.tasks import TASKS, Task
from strategies.imported import imported
from strategies.keys import NotNegative, Positive
from strategies.method import ArrivalPlan, Method, PeerPlan, Plan, Run, Section
from strategies.methods import METHODS, find

ROOT = Path(__file__).parent.parent
LONGEST = 1000  # characters of a text


S = TypeVar("S", bound=BaseModel)


class Config(BaseModel):
    """One run; read it with :meth:`read`.

    Attributes:
        keys: the method's own section.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
        alias_generator=lambda field: field.replace("_", "-"),
    )

    strategy: str = "co-learning"
    """a method by name (docs/reference/methods.md), or one's own: package.module:METHOD"""
    num_sites: Annotated[int, Field(ge=1, le=10_000)] = 5
    """in a simulation also: --federation-config "num-supernodes=5\""""
    min_sites: Positive = 2
    """the run stops when fewer sites than this answer"""
    max_change: NotNegative = 5.0
    """a contribution that moves the model by more than so many times the median over sites is
    refused; 0: no bound
    """
    epochs: Positive = 32
    """local epochs of each site in the whole run"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """of everything random"""
    timeout_s: Annotated[float, Field(ge=1, le=1e7)] = 3600.0
    """seconds a site has to answer"""
    patience_s: Annotated[float, Field(ge=0, le=1e7)] = 21_600.0
    """seconds that a run waits for sites where fewer than min-sites are there, or when it begins,
    fewer than num-sites
    """
    keys: SerializeAsAny[Section] = Section()
    training: Training = Training()
    model: Model = Model()
    data: Data = Data()
    partition: Partition = Partition()
    sampling: Sampling = Sampling()
    topology: TopologyKeys = TopologyKeys()
    wire: Wire = Wire()
    robust: RobustKeys = RobustKeys()
    results: Results = Results()
    computing: Computing = Computing()

    @classmethod
    def read(cls, run_config: Mapping[str, Any]) -> Self:
        """Check a run configuration: keys with dots, as Flower hands it over, or nested tables.

        Raises:
            ConfigError: names every key that is wrong, its value and what is allowed.
        """
        flat = flatten(run_config)
        if long := [
            key
            for key, value in flat.items()
            if len(value if isinstance(value, str) else key) > LONGEST
        ]:
            raise ConfigError(
                "\n".join(
                    f"{shown_key(key)} = {shown(flat[key])}: at most {LONGEST} characters"
                    for key in long
                )
            )
        name = flat.get("strategy", cls.model_fields["strategy"].default)
        try:
            method = find(name)
        except ValueError as error:
            raise ConfigError(f"strategy = {shown(name)}: {error}") from None
        if wrong := _section_fault(method):
            raise ConfigError(f"strategy = {shown(name)}: {wrong}")
        former = {key: new for key in flat if (new := new_key(key, method.table))}
        if former:
            raise ConfigError(
                "\n".join(
                    f"{key} = {shown(flat[key])}: this key is now {new}"
                    for key, new in former.items()
                )
            )
        known = (
            SECTIONS
            | {each.table: each.keys for each in METHODS.values()}
            | {method.table: method.keys}
        )
        errors = [
            _unknown(key, value, method) for key, value in flat.items() if not _is_known(key, known)
        ]
        values: dict[str, Any] = {}
        for table, kind in known.items():
            given = {
                key.partition(".")[2]: flat[key]
                for key in flat
                if key.partition(".")[0] == table and _is_known(key, known)
            }
            section = _read(kind, given, f"{table}.", errors)
            if table == method.table:
                values["keys"] = section
            elif table in SECTIONS:
                values[table] = section
            elif section:
                errors += [
                    _of_another(method, table, key, value)
                    for key, value in changed(section).items()
                ]
        top = {
            key.replace("-", "_"): flat[key]
            for key in flat
            if "." not in key and _is_known(key, known)
        }
        found = _read(
            cls,
            top | {key: value for key, value in values.items() if value is not None},
            "",
            errors,
        )
        if errors or found is None or (errors := list(mistakes(found, method))):
            raise ConfigError("\n".join(errors))
        return found

    @cached_property
    def method(self) -> Method[Any]:
        """The method that ``strategy`` names."""
        return find(self.strategy)

    @cached_property
    def task(self) -> Task:
        """The task that ``training.task`` names."""
        return task(self.training.task)

    @cached_property
    def plan(self) -> Plan:
        """The plan that the method makes of its keys."""
        return self.method.plan(self.keys, self.run)

    @property
    def run(self) -> Run:
        """What a plan may depend on beside the method's keys."""
        training = self.training
        return Run(training.rate, training.sam_radius, self.num_sites, self.robust.rule)

    def tables(self) -> dict[str, Any]:
        """The configuration as nested tables, without other methods' sections."""
        tables = self.model_dump(by_alias=True)
        return tables | {self.method.table: tables.pop("keys")}

    def flat(self) -> dict[str, bool | int | float | str]:
        """The configuration as ``--run-config`` takes it, without other methods' sections."""
        return flatten_dict(self.tables())

    def sampled(self, there: int) -> int:
        """How many of the sites that are there take part in a round."""
        return max(min(self.min_sites, there), round(self.sampling.fraction * there))

    @property
    def unit(self) -> str:
        """What the run counts: round, update of the server, or exchange of peers."""
        return {ArrivalPlan: "update", PeerPlan: "exchange"}.get(type(self.plan), "round")


# What may change when a run goes on that was killed.
RESULTS = ("folder", "resume", "checkpoint-minutes", "log", "trackers")
FREE = ("min-sites", "timeout-s", "patience-s", *(f"results.{key}" for key in RESULTS))


def identity(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run configuration that identifies the run; keys have dots."""
    return {key: value for key, value in run_config.items() if key not in FREE}


def task(name: str) -> Task:
    """A task by its name or import path.

    Raises:
        ValueError: there is none.
    """
    return TASKS.get(name) or imported(name, Task, TASKS, "TASK")


def configuration(conf: str | Path | None = None, **changes: Any) -> Config:
    """The configuration of a run: the defaults, then a file of ``conf/``, then ``changes``.

    Keys are those of the run configuration, ``-`` or ``_`` between their words: ``num_sites=10``, a
    table such as ``training={"lr": 0.1}``, or ``**{"training.lr": 0.1}``.

    Raises:
        ConfigError: names every key that is wrong, its value and what is allowed.
    """
    from_file: dict[str, Any] = {}
    if conf is not None:
        path = next((path for path in (Path(conf), ROOT / conf) if path.is_file()), None)
        if path is None:
            raise ConfigError(f"conf = {shown(str(conf))}: there is no such file")
        try:
            from_file = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"conf = {shown(str(conf))}: {error}") from None
    return Config.read(flatten(from_file) | flatten(changes))


def flatten(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as dotted keys with hyphens; of the same key, the last one counts."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        key = key.replace("_", "-")
        found |= (
            {f"{key}.{k}": v for k, v in flatten(value).items()}
            if isinstance(value, Mapping)
            else {key: value}
        )
    return found


def _section_fault(method: Method[Any]) -> str | None:
    """Why a user's method cannot have its section."""
    if not re.fullmatch("[A-Za-z0-9-]+", method.table):
        return (
            f"its section is called {shown(method.table)}; letters, digits and hyphens are expected"
        )
    if method.table in SECTIONS or any(
        method.table == field.alias for field in Config.model_fields.values()
    ):
        return (
            f"its section is called {shown(method.table)}, which every run has; "
            "another name is expected"
        )
    if not (isinstance(method.keys, type) and issubclass(method.keys, Section)):
        return (
            f"its keys are {shown(method.keys)}; "
            "a subclass of strategies.method.Section is expected"
        )
    return None


def _is_known(key: str, known: Mapping[str, type[Section]]) -> bool:
    table, dot, rest = key.rpartition(".")
    fields = known[table].model_fields if table in known else Config.model_fields if not dot else {}
    return any(
        rest == field.alias and rest not in known and rest != "keys" for field in fields.values()
    )


def _unknown(key: str, value: object, method: Method[Any]) -> str:
    """The error for an unknown key, with the most similar key that this run takes, if any.

    Similar is judged by the whole key, or by what comes after the dot.
    """
    own = {method.table: method.keys, **SECTIONS}
    keys = [
        f"{table}.{field.alias}"
        for table, kind in own.items()
        for field in kind.model_fields.values()
    ]
    keys += [
        str(field.alias)
        for name, field in Config.model_fields.items()
        if name not in (*SECTIONS, "keys")
    ]
    last = {each.rpartition(".")[2]: each for each in reversed(keys)}
    close = get_close_matches(key, keys, n=1) or [
        last[each] for each in get_close_matches(key, last, n=1)
    ]
    return f"{shown_key(key)} = {shown(value)}: unknown key" + (
        f"; did you mean {close[0]!r}?" if close else ""
    )


def _read(kind: type[S], given: Mapping[str, Any], prefix: str, errors: list[str]) -> S | None:
    """A section of ``given`` values; what is wrong with them is added to ``errors``."""
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        for each in error.errors():
            key = prefix + ".".join(map(str, each["loc"])).replace("_", "-")
            message = (
                each["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            )
            # Of a whole section: its message names the keys itself.
            whole = each["type"] == "value_error" and not each["loc"]
            errors.append(
                f"{prefix}{message}" if whole else f"{key} = {shown(each['input'])}: {message}"
            )
        return None


def _of_another(method: Method[Any], table: str, key: str, value: object) -> str:
    owners = [name for name, each in METHODS.items() if each.table == table]
    own = (
        f"; did you mean {method.table}.{key}?"
        if key in {field.alias for field in method.keys.model_fields.values()}
        else ""
    )
    takers = f"only {', '.join(owners)}" if len(owners) < 4 else "only a strategy of Flower"
    return (
        f"{table}.{key} = {shown(value)}: "
        f"strategy = {method.name!r} does not take it, {takers}{own}"
    )
