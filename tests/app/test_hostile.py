"""Hostile sites: what robust means make of them, and what is written down of them.

In the real server and at real peers.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, Message

from benchmarks.attacks import METHODS, accuracy, defences
from configuration.config import configuration
from server_app.discovery import Site
from server_app.events import Ended, Refused
from server_app.results import MOST_REFUSED, MOST_REFUSED_IN_ALL, RefusedRows
from strategies.records import X, arrays_of, pack, unpack
from tests.app.ring import after, refused
from tests.app.stubs import SITES, SMALL, config_of_run, only, outcome, written

mpl.use("agg")


def replies_of(
    strategy: str, bad: float | None = None, **keys: Any
) -> tuple[list[np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    """What sites send in the first round, and what the server makes of it.

    The last site sends ``bad`` in every number, unless it is None.
    """
    sent: dict[int, np.ndarray[Any, Any]] = {}

    def spoil(site: int, message: Message, content: Any) -> Any:
        if message.metadata.message_type == "train":
            if bad is not None and site == SITES - 1:
                content["arrays"][X] = pack({X: torch.full((14,), bad)})[X]
            sent.setdefault(site, unpack(content["arrays"][X]).numpy().copy())
        return content

    found = outcome(configuration(**SMALL | {"strategy": strategy} | keys), spoil)
    assert found.error is None, found.error
    return [sent[site] for site in range(SITES)], {
        name: value.numpy() for name, value in found.new_models[0].items()
    }


@pytest.mark.parametrize("strategy", ["co-learning", "fedavg", "FedAvg", "FedProx"])
def test_median_of_a_round_is_numpys(strategy: str) -> None:
    sent, kept = replies_of(strategy, None, **{"robust.mean": "median"})
    np.testing.assert_allclose(kept[X], np.median(sent, axis=0), atol=1e-6)
    plain = replies_of(strategy)[1]
    np.testing.assert_allclose(plain[X], np.mean(sent, axis=0), atol=1e-6)


@pytest.mark.parametrize("mean", ["median", "trimmed-mean", "krum"])
@pytest.mark.parametrize("strategy", ["co-learning", "FedAvg"])
def test_hostile_site_takes_no_coordinate_beyond_the_honest(strategy: str, mean: str) -> None:
    sent, kept = replies_of(strategy, 4e6, **{"robust.mean": mean, "max-change": 0.0})
    honest = np.array(sent[:-1])
    assert np.all(kept[X] >= honest.min(0) - 1e-6)
    assert np.all(kept[X] <= honest.max(0) + 1e-6)
    assert replies_of(strategy, 4e6, **{"max-change": 0.0})[1][X].min() > 1e5


@pytest.mark.parametrize("strategy", ["fedavg", "FedAvg"])
def test_site_that_claims_most_examples_does_not_decide_alone(strategy: str) -> None:
    sent: dict[int, np.ndarray[Any, Any]] = {}

    def boastful(site: int, message: Message, content: Any) -> Any:
        if site == 0 and message.metadata.message_type == "query.site":
            content["config"]["train"] = 8000
            content["config"].pop("counts")
        if message.metadata.message_type == "train":
            if site == 0:
                content["metrics"]["num-examples"] = 8000
            sent.setdefault(
                site,
                unpack(arrays_of(Message(content, dst_node_id=1, message_type="train"))[X])
                .numpy()
                .copy(),
            )
        return content

    table = "flower" if strategy == "FedAvg" else "fedavg"
    for most in (0.5, 0.3, 1.0):
        keys = SMALL | {
            "strategy": strategy,
            f"{table}.weighting": "samples",
            "robust.max-share": most,
        }
        found = outcome(configuration(**keys), boastful)
        assert found.error is None, found.error
        share = min(most, 8000 / 8032)
        wanted = share * sent[0] + (1 - share) * np.mean(
            [sent[site] for site in range(1, SITES)], axis=0
        )
        np.testing.assert_allclose(found.new_models[0][X].numpy(), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mean"),
    [
        ("FedAdam", "krum"),
        ("gsgm", "trimmed-mean"),
        ("fedbuff", "median"),
        ("dmsgd", "clipped"),
        ("q-saddle", "trimmed-mean"),
    ],
)
def test_change_reversed_tenfold_destroys_nothing(method: str, mean: str) -> None:
    common: dict[str, Any] = {
        "strategy": method,
        "num_sites": 5,
        "epochs": 4,
        "model.name": "mlp",
        "max-change": 0.0,
        **METHODS[method],
    }
    defended = accuracy(configuration(**common | defences(method, 5)[mean]), "reversed", 1)
    assert accuracy(configuration(**common), "reversed", 1) < 0.5 < defended


# --- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["d-psgd", "dmsgd", "q-saddle"])
def test_peer_refuses_what_is_too_far_and_says_by_which_key(strategy: str) -> None:
    sites = after(2, strategy=strategy)
    far = {
        name: Array(np.full(array.shape, 1e4, np.float32))
        for name, array in sites.delivery(0, 1, 1).items()
    }
    reply = sites.step(0, 2, {1: far, 3: sites.delivery(0, 1, 3)})
    [refused_text] = refused(reply)
    assert refused_text.startswith("site 1: it is ")
    assert "at most 5 times the norm of the own" in refused_text
    assert refused_text.endswith("(max-change)")
    unbound = after(2, strategy=strategy, **{"max-change": 0.0})
    assert refused(unbound.step(0, 2, {1: far, 3: unbound.delivery(0, 1, 3)})) == []


def test_what_peers_refuse_of_each_other_is_an_event_of_the_sender() -> None:
    def spoil(site: int, message: Message, content: Any) -> Any:
        if (
            site == 3
            and message.metadata.message_type == "train.peer"
            and content["config"]["lost"] is False
        ):
            content["config"]["refused"] = [
                "site 2: it is far (max-change)",
                "site 77: x",
                "rub\nbish" * 1000,
            ]
        return content

    found = outcome(configuration(**SMALL | {"strategy": "d-psgd"}), spoil)
    assert found.error is None
    first = [event for event in found.refused_by if event.when == "step 0"]
    assert [(event.site.number, event.rule, event.by) for event in first] == [
        (2, "max-change", "site 3"),
        (3, "", "site 3"),
        (3, "", "site 3"),
    ]
    assert str(first[0]) == "step 0: site 3 refuses what came from site 2: it is far (max-change)"
    assert all(event.reason.isprintable() and len(event.reason) <= 240 for event in first)


# --- what is written down -------------------------------------------------------------------------


def test_what_is_refused_is_listed_with_site_round_and_rule(tmp_path: Path) -> None:
    def spoil(site: int, message: Message, content: Any) -> Any:
        if message.metadata.message_type == "train" and site == 1:
            content["arrays"][X] = pack({X: torch.full((14,), 1e5)})[X]
        if message.metadata.message_type == "train" and site == 2:
            content["metrics"]["loss"] = -1.0
        return content

    written(config_of_run(tmp_path, num_sites=6, epochs=2), spoil)
    table = pd.read_csv(only(tmp_path / "runs") / "refused.csv", keep_default_na=False)
    assert list(table) == ["when", "seconds", "site", "name", "phase", "rule", "reason", "by"]
    rows = (
        table.sort_values(["when", "site"])[["when", "site", "name", "phase", "rule", "by"]]
        .to_numpy()
        .tolist()
    )
    assert rows == [
        [f"round {number}", site, f"site {site}", "training", rule, ""]
        for number in (1, 2)
        for site, rule in ((1, "max-change"), (2, ""))
    ]
    assert table["reason"].str.contains("times the median over the sites").sum() == 2
    assert (table["seconds"] > 0).all()


def test_nothing_is_listed_where_nothing_is_refused(tmp_path: Path) -> None:
    written(config_of_run(tmp_path), lambda site, message, content: content)
    assert not (only(tmp_path / "runs") / "refused.csv").exists()


def test_list_of_what_is_refused_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, sites = (
        RefusedRows(tmp_path),
        [Site(k, k, f"=site {k}", 1, 1, (), b"", b"") for k in range(3)],
    )
    for number in range(MOST_REFUSED + 50):
        sink(Refused(f"round {number}", sites[1], "training", "=cmd|x", "max-change"))
    sink(Refused("round 9", sites[2], "training", "b", by="site 1"))
    table = pd.read_csv(tmp_path / "refused.csv", keep_default_na=False)
    assert len(table) == MOST_REFUSED + 1
    assert table["reason"][MOST_REFUSED - 1] == "'=cmd|x; more of these are not listed"
    assert table["name"][0] == "'=site 1"
    monkeypatch.setattr("server_app.results.MOST_REFUSED_IN_ALL", MOST_REFUSED + 2)
    for _ in range(5):
        sink(Refused("round 9", sites[0], "training", "c"))
    sink(Ended(None))
    assert len(pd.read_csv(tmp_path / "refused.csv")) == MOST_REFUSED + 2
    assert MOST_REFUSED_IN_ALL > MOST_REFUSED
