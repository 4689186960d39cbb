"""What goes wrong at a site costs the site its round, never the run."""

import logging
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from torch.nn import functional as F

from client_app.app import app as client_app
from configuration.config import Config
from configuration.errors import ConfigError
from models.tasks import Task
from server_app.app import app as server_app
from server_app.discovery import Federation, RunError, Site, discover
from server_app.events import Event, Refused
from server_app.exchange import clock_of
from server_app.report import Report
from simulation.grid import VirtualGrid, run_in_process
from simulation.world import World
from strategies.protocol import SiteCard, write_card
from strategies.records import code_version, pack
from tests.app.stubs import Sites
from tests.conftest import RunApp, default_config, read_run

Tamper = Callable[[int, Message, Message], Message | None]


def changed(reply: Message, **records: Any) -> Message:
    """The reply with other records, or without those that are None."""
    content = {
        name: record
        for name, record in {**dict(reply.content), **records}.items()
        if record is not None
    }
    other = Message(RecordDict(content), reply_to=_QUESTION[0])
    other.metadata.__dict__.update(reply.metadata.__dict__)
    return other


_QUESTION: list[Message] = []


def spoil(site: int, spoiled: Callable[[Message], Message | None], kind: str = "train") -> Tamper:
    """One site's replies of one kind go wrong."""

    def tamper(number: int, message: Message, reply: Message) -> Message | None:
        _QUESTION[:] = [message]
        return spoiled(reply) if number == site and message.metadata.message_type == kind else reply

    return tamper


def vector(reply: Message) -> torch.Tensor:
    return torch.from_numpy(reply.content.array_records["arrays"]["x"].numpy()).clone()


def with_value(value: float) -> Callable[[Message], Message]:
    def spoiled(reply: Message) -> Message:
        x = vector(reply)
        x[7] = value
        return changed(reply, arrays=pack({"x": x}))

    return spoiled


def with_metric(key: str, value: Any) -> Callable[[Message], Message]:
    return lambda reply: changed(
        reply, metrics=MetricRecord({**reply.content.metric_records["metrics"], key: value})
    )


SPOILED: dict[str, tuple[Callable[[Message], Message | None], str]] = {
    "raises": (
        lambda reply: Message(Error(2, "ValueError: boom"), reply_to=_QUESTION[0]),
        "ValueError: boom",
    ),
    "is lost": (lambda reply: None, "no answer within timeout-s = 3600"),
    "NaN": (with_value(float("nan")), "the model holds NaN or infinite values"),
    "infinite": (with_value(float("-inf")), "the model holds NaN or infinite values"),
    "huge": (with_value(1e9), "the model diverged: it holds 1e+09"),
    "shape": (
        lambda reply: changed(reply, arrays=pack({"x": torch.zeros(3)})),
        "x is 'float32' of shape (3,), float32 of shape",
    ),
    "dtype": (
        lambda reply: changed(reply, arrays=pack({"x": vector(reply).double()})),
        "x is 'float64' of shape",
    ),
    "lies": (
        lambda reply: changed(
            reply,
            arrays=ArrayRecord(
                {
                    "x": Array(
                        "float32",
                        tuple(vector(reply).shape),
                        "numpy.ndarray",
                        pack({"x": torch.zeros(3)})["x"].data,
                    )
                }
            ),
        ),
        "x holds 140 bytes that are not float32 of shape (",
    ),
    "garbage": (
        lambda reply: changed(
            reply,
            arrays=ArrayRecord(
                {"x": Array("float32", tuple(vector(reply).shape), "numpy.ndarray", b"zzz")}
            ),
        ),
        "x holds 3 bytes that are not float32 of shape (",
    ),
    "names": (
        lambda reply: changed(reply, arrays=pack({"y": vector(reply)})),
        "holds the arrays ['y'], ['x'] are expected",
    ),
    "no model": (
        lambda reply: changed(reply, arrays=None),
        "holds the records ['metrics'], ['arrays', 'metrics'] are expected",
    ),
    "no metrics": (
        lambda reply: changed(reply, metrics=None),
        "holds the records ['arrays'], ['arrays', 'metrics'] are expected",
    ),
    "no examples": (
        with_metric("num-examples", 0),
        "num-examples is 0: must be greater than or equal to 1",
    ),
    "more examples": (
        with_metric("num-examples", 10**9),
        "num-examples is 1000000000, at first the site said 479",
    ),
    "NaN loss": (with_metric("loss", float("nan")), "loss is nan: must be a finite number"),
    "whole number as text": (
        with_metric("samples", [1]),
        "samples is [1]: must be a valid integer",
    ),
    "unknown metric": (with_metric("weight", 1.0), "'weight' is unknown"),
    "far": (
        with_value(1e6),
        "x: it moves the model by 1e+06; at most 5 times the median over the sites, ",
    ),
}


@pytest.mark.parametrize("strategy", ["co-learning", "Krum"])
@pytest.mark.parametrize("case", SPOILED)
def test_reply_that_cannot_be_used_is_left_out_with_its_reason(
    case: str, strategy: str, run_app: RunApp, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled, reason = SPOILED[case]
    with caplog.at_level(logging.WARNING, "flwr"):
        run = run_app(spoil(1, spoiled), strategy=strategy, epochs=1)
    (warning,) = [
        record.getMessage() for record in caplog.records if "is left out" in record.getMessage()
    ]
    assert warning.startswith("round 1: site 1 (site 1) is left out of the training: ")
    assert reason in warning
    trained = run.metrics[(run.metrics["split"] == "train") & (run.metrics["metric"] == "loss")]
    assert list(trained["site"]) == ["0", "2", "all"]
    assert all(value.isfinite().all() for value in run.model.values())


def test_round_without_a_site_is_the_mean_of_the_others(run_app: RunApp) -> None:
    lost = run_app(spoil(2, lambda reply: None), epochs=1)
    models: list[torch.Tensor] = []

    def listen(number: int, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and number < 2:
            models.append(vector(reply))
        return reply

    run_app(listen, epochs=1)
    names = ("1.weight", "1.bias", "3.weight", "3.bias")  # the order of the network
    torch.testing.assert_close(
        torch.cat([lost.model[name].reshape(-1) for name in names]), torch.stack(models).mean(0)
    )


def test_site_that_fails_the_test_only_is_left_out_of_the_test(
    run_app: RunApp, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_app(spoil(0, SPOILED["raises"][0], "evaluate"), epochs=1)
    assert "round 1: site 0 (site 0) is left out of the test: ValueError: boom" in caplog.text
    tested = run.metrics[(run.metrics["split"] == "test") & (run.metrics["metric"] == "accuracy")]
    assert list(tested["site"]) == ["1", "2", "all"]


def test_site_comes_back(run_app: RunApp) -> None:
    rounds = iter([None, True, True])

    def first_lost(reply: Message) -> Message | None:
        return reply if next(rounds) else None

    run = run_app(spoil(1, first_lost), epochs=3, co_learning={"epsilon": 0.0})
    trained = run.metrics[
        (run.metrics["site"] == "1")
        & (run.metrics["split"] == "train")
        & (run.metrics["metric"] == "loss")
    ]
    assert list(trained["round"]) == [2, 3]


@pytest.mark.parametrize("strategy", ["co-learning", "local", "FedMedian"])
def test_too_few_sites_stop_the_run_and_leave_what_was_reached(
    strategy: str, run_app: RunApp, tmp_path: Path
) -> None:
    count = iter(range(100))

    def second_round_lost(number: int, message: Message, reply: Message) -> Message | None:
        # A round of three sites has three messages, after three for the discovery.
        return (
            None
            if next(count) >= 6 and number > 0 and message.metadata.message_type == "train"
            else reply
        )

    with pytest.raises(
        RunError, match="round 2: 1 sites sent a model that can be used, min-sites = 2: stopped"
    ):
        run_app(second_round_lost, draw=True, strategy=strategy, epochs=3)
    (folder,) = (tmp_path / "runs").iterdir()
    run = read_run(folder)
    assert len(run.trace("accuracy")) == 1
    assert list(folder.glob("model*.safetensors"))
    assert (folder / "curves.png").stat().st_size > 10_000


def messages_sent(changes: dict[str, Any], tmp_path: Path) -> int:
    config = default_config() | {"num-sites": 2, "results.folder": str(tmp_path / "runs")} | changes
    grid = VirtualGrid(client_app, World().sites(2, 0), config)
    sent: list[Message] = []
    push = grid.push_messages

    def counted(messages: Iterable[Message]) -> Iterable[str]:
        sent.extend(messages := list(messages))
        return push(messages)

    grid.push_messages = counted  # type: ignore[method-assign]
    with pytest.raises((ConfigError, RunError, ValueError)):
        server_app(
            grid,
            Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config),
        )
    return len(sent)


def test_wrong_configuration_stops_before_the_first_message(tmp_path: Path) -> None:
    assert messages_sent({"training.lr": -1.0}, tmp_path) == 0
    assert messages_sent({"results.folder": "/proc/runs"}, tmp_path) == 0
    assert not (tmp_path / "runs").exists()


def test_wrong_data_or_model_stops_before_any_site_trains(tmp_path: Path) -> None:
    # The two messages are those that ask what sites have.
    assert messages_sent({"data.source": "csv", "data.path": "/nowhere"}, tmp_path) == 2
    assert messages_sent({"model.name": "vgg11"}, tmp_path) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.source": "csv", "data.path": "/nowhere"},
            "0 sites can take part, min-sites = 2. SourceError: data.path = '/nowhere'",
        ),
        (
            {"partition.kind": "natural"},
            "PartitionError: partition.kind = 'natural': the data have no natural sites",
        ),
        (
            {"partition.kind": "classes", "partition.classes-per-site": 1},
            "classes-per-site = 1: 3 sites would leave out some",
        ),
        (
            {"computing.device": "cuda:99"},
            "0 sites can take part, min-sites = 2. ConfigError: computing.device = 'cuda:99'",
        ),
        (
            {"model.name": "vgg11"},
            "model.name = 'vgg11' needs pictures of at least 32 x 32 pixels, these have 8 x 8",
        ),
    ],
)
def test_what_only_the_data_can_tell_is_named_before_training(
    changes: dict[str, Any], message: str, run_app: RunApp
) -> None:
    with pytest.raises((RunError, ValueError)) as error:
        run_app(**changes)
    assert message in str(error.value)


def test_more_sites_than_configured_is_an_error(tmp_path: Path) -> None:
    config = default_config() | {"num-sites": 2, "results.folder": str(tmp_path)}
    with pytest.raises(RunError, match="num-sites = 2, but 3 sites are connected"):
        run_in_process(server_app, client_app, 3, config)


def test_fewer_sites_than_configured_names_the_flag(tmp_path: Path) -> None:
    config = default_config() | {"num-sites": 3, "results.folder": str(tmp_path)}
    with pytest.raises(
        RunError, match=r'num-sites = 3, but the simulation has 2 sites: add .*"num-supernodes=3"'
    ):
        run_in_process(server_app, client_app, 2, config)


def discovery(change: Callable[[int, dict[str, Any]], None]) -> Tamper:
    """Sites that describe themselves in another way."""

    def tamper(number: int, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "query.site":
            change(number, reply.content.config_records["config"])  # type: ignore[arg-type]
        return reply

    return tamper


MISFITS: list[tuple[str, Any, str]] = [
    ("code", "other", r"site 1 \(node \d+\): it runs other code than the server"),
    (
        "shape",
        [3, 8, 8],
        (
            r"site 1 \(node \d+\): it has examples of shape \[3, 8, 8\], "
            r"others have examples of shape \[1, 8, 8\]"
        ),
    ),
    (
        "train",
        10**12,
        (
            r"site 1 \(node \d+\): it says it has 1,000,000,000,000 training examples, "
            r"more than 1,000 times the median"
        ),
    ),
    (
        "columns",
        ["age"],
        r"site 1 \(node \d+\): it has the columns age, others have examples of shape \[1, 8, 8\]",
    ),
    (
        "site",
        0,
        (
            r"site 0 \(node \d+\), site 1 \(node \d+\): two sites have the number 0; "
            r"give each its own site="
        ),
    ),
]


def test_names_with_commas_and_moments_beyond_bounds_end_no_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One site that tells them would, as no run can be made of what all tell together."""
    keys = {
        "training.task": "regression",
        "data.source": "csv",
        "data.path": "table",
        "model.name": "mlp",
    }
    config = Config.read(keys | {"num-sites": 4, "min-sites": 2})

    def card(site: int, names: list[str], mean: float = 0.0) -> SiteCard:
        moments = [1.0] * (1 + len(names))
        fields = {
            "classes": names,
            "columns": ["c"],
            "shape": [1],
            "known": moments,
            "mean": [mean] * len(moments),
        }
        fields |= {
            "site": site,
            "sites": 0,
            "name": f"site {site}",
            "train": 9,
            "test": 9,
            "notes": [],
            "code": code_version(),
        }
        return SiteCard.model_validate(fields | {"variance": moments})

    cards = [
        card(0, ["a", "b"]),
        card(1, ["a", "b"]),
        card(2, ["a, b"]),
        card(3, ["a", "b"], 1e25),
    ]
    found = discover(Sites(config, lambda site, *_: write_card(cards[site])), config)
    assert [site.number for site in found.sites] == [0, 1]
    assert found.classes == ("a", "b")
    assert re.search("site 3 .*are no moments of values within", caplog.text)


FRAGILE = Task(
    "class",
    partial(F.cross_entropy, reduction="none"),
    means=lambda outputs, y: outputs.sum(0)[:1],
    metrics=lambda loss, means, targets: {"inverse": 1 / means[0]},
)


def test_metrics_that_fail_with_what_a_site_reports_cost_the_site_its_test() -> None:
    config = Config.read({"training.task": "tests.app.test_robustness:FRAGILE"})
    sites = tuple(
        Site(number, number + 1, f"site {number}", 9, 9, (), b"", b"") for number in range(2)
    )
    events: list[Event] = []
    report = Report(
        Federation(sites, ("a", "b"), (1, 8, 8), None, ()),
        config,
        events.append,
        clock_of(object()),  # type: ignore[arg-type]
        "round",
    )
    found: dict[int, dict[str, float | list[float]]]
    found = {
        node: {"loss": 1.0, "means": [mean], "num-examples": 9.0}
        for node, mean in ((1, 0.0), (2, 0.5))
    }
    assert report.test(1, found, report.snapshot())["inverse"] == 2
    [refused] = [event for event in events if isinstance(event, Refused)]
    assert (
        refused.reason
        == "training.task makes no metrics of it: ZeroDivisionError: float division by zero"
    )


def misfit(key: str, value: Any) -> Tamper:
    def change(number: int, record: dict[str, Any]) -> None:
        if number == 1:
            record[key] = value
            if key == "train":
                del record["counts"]
            if key == "columns":  # as a table tells it
                record.update({"shape": [1], "known": [1.0], "mean": [0.0], "variance": [1.0]})

    return discovery(change)


@pytest.mark.parametrize(("key", "value", "message"), MISFITS)
def test_sites_that_do_not_fit_together_are_named(
    key: str, value: Any, message: str, run_app: RunApp
) -> None:
    with pytest.raises(RunError, match=rf"\d sites can take part, min-sites = 3\. {message}"):
        run_app(misfit(key, value), **{"min-sites": 3})


@pytest.mark.parametrize(("key", "value", "message"), MISFITS[:4])
def test_most_sites_go_on_without_the_one_that_does_not_fit(
    key: str, value: Any, message: str, run_app: RunApp
) -> None:
    assert set(run_app(misfit(key, value), epochs=1).metrics["site"]) == {"all", "0", "2"}


def test_of_two_sites_that_differ_none_is_believed(run_app: RunApp) -> None:
    with pytest.raises(
        RunError, match=r"0 sites can take part, .* site 0 .*: it has .*; site 1 .*: it has "
    ):
        run_app(misfit("shape", [3, 8, 8]), **{"num-sites": 2, "min-sites": 1})


def test_classes_of_all_sites_are_put_together(run_app: RunApp) -> None:
    def change(number: int, record: dict[str, Any]) -> None:
        if number == 1:
            record["classes"] = [*record["classes"], "eleven"]
            record["counts"] = [*record["counts"], 0]

    run = run_app(discovery(change), epochs=1)
    assert run.model["3.weight"].shape[0] == 11


def test_handler_that_ends_the_process_is_an_answer(
    run_app: RunApp, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def leave(*arguments: Any, **keywords: Any) -> None:
        raise SystemExit(3)

    monkeypatch.setattr("client_app.training.train", leave)
    with pytest.raises(RunError, match="0 sites sent a model"):
        run_app()


def test_killed_run_leaves_its_rows(run_app: RunApp, tmp_path: Path) -> None:
    """Rows are on disk before the next message goes out: read the file from inside the run."""
    seen: list[int] = []

    def look(number: int, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            (folder,) = (tmp_path / "runs").iterdir()
            seen.append(len(pd.read_csv(folder / "metrics.csv")["round"].unique()))
            assert (folder / "config.toml").exists()
            assert (folder / "sites.png").exists()
            assert (folder / "model.safetensors").exists() == (seen[-1] > 0)
        return reply

    run_app(look, draw=True, epochs=3, co_learning={"epsilon": 0.0})
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]
