"""What a relay that turned bad, or a broken neighbour, can ask of a peer.

The real ClientApp, and messages that no relay sends.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from safetensors.torch import load_file

from client_app.oracle import Oracle
from configuration.config import configuration
from strategies.records import arrays_of, config_of, metrics_of, unpack
from tests.app.peers import CHOCO, SEALED
from tests.app.ring import COMMON, SITES, Sites, after, refused
from tests.data import write_keys


def reason(reply: Message) -> str:
    return str(reply.error.reason) if reply.has_error() else ""


def model(sites: Sites, site: int) -> torch.Tensor:
    state = sites.state(site)
    assert state is not None
    return state.x


def test_sites_here_are_those_of_the_app() -> None:
    sites = after(3)
    assert refused(sites.step(0, 3)) == []
    assert not torch.equal(model(sites, 0), model(sites, 1))


# What a site remembers, and for whom.


def test_a_sealed_state_is_not_shown_where_the_configuration_is_another_one() -> None:
    sites = after(3, **SEALED)
    kept = model(sites, 0)
    bare = Sites().config
    changed = sites.context(0, bare)
    changed.state = sites.contexts[0].state
    sites.contexts[0] = changed
    assert "run configuration: another one than in this run's first step" in reason(
        sites.step(0, 3, {}, last=True, cycle_from=1.0)
    )
    assert torch.equal(model(sites, 0), kept)


def test_a_sealed_state_is_forgotten_in_another_run() -> None:
    """Flower keeps contexts by series of runs, and the SuperLink says which runs are one."""
    sites = after(3, **SEALED)
    kept = model(sites, 0)
    bare = Sites().config
    other = sites.context(0, bare, run=2)
    other.state = RecordDict(dict(sites.contexts[0].state))
    sites.contexts[0] = other
    reply = sites.step(0, 3, {}, last=True, cycle_from=1.0)
    shown = reply.content["model"]
    assert isinstance(shown, ArrayRecord)
    assert not torch.equal(unpack(shown["x"]), kept)
    assert config_of(reply)["lost"] is True


def test_a_second_run_of_a_series_begins_as_the_first_did() -> None:
    sites = after(2)
    first = Sites()
    other = sites.context(1, sites.config, run=2)
    other.state = sites.contexts[1].state
    sites.contexts[1] = other
    assert not sites.step(1, 0).has_error()
    first.all_step(0)
    assert torch.equal(model(sites, 1), model(first, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"classes": [str(9 - digit) for digit in range(10)]},
            "classes and moments: another one than in this run's first step",
        ),
        ({"cycle_from": 1e6}, "cycle-from = 1e+06: 0 to 1 is expected"),
        ({"cycle_from": math.nan}, "cycle-from = nan: 0 to 1 is expected"),
        ({"cycle_from": -20.0}, "cycle-from = -20: 0 to 1 is expected"),
        ({"cycle_from": 0.0}, "step 3: 0 of the run is over, and 0.0416667 was before"),
        ({"server_round": 1}, "step 1 comes again"),
        ({"last": True}, "step 3 cannot be the last one: 0.0625 of the run is over"),
    ],
)
def test_what_may_not_change_in_a_run_is_refused(changes: dict[str, Any], message: str) -> None:
    sites = after(3)
    kept = model(sites, 0)
    assert message in reason(sites.step(0, 3, **changes))
    assert torch.equal(model(sites, 0), kept)
    assert not sites.step(0, 3).has_error()


def test_a_state_that_is_not_finite_is_never_kept() -> None:
    rate: dict[str, Any] = {
        "training.lr": 100.0,
        "training.lr-ratio": 1.0,
        "training.weight-decay": 1e6,
    }
    sites = Sites(**rate)
    replies = [sites.step(0, 0)]
    while not replies[-1].has_error() and len(replies) < 50:
        replies.append(sites.step(0, len(replies), {}))
    assert "this site's x is not finite; a smaller training.lr" in reason(replies[-1])
    assert torch.isfinite(model(sites, 0)).all()


@pytest.mark.parametrize("sealing", ["off", "trust-on-first-use"])
def test_half_an_exchange_that_is_not_finite_is_never_kept(
    sealing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = after(1, **{"strategy": "n-saddle", "wire.sealing": sealing})
    gradient = Oracle.gradient
    fields, received = (
        sites.fields(0, 1, cycle_from=0.0),
        {j: sites.delivery(0, 0, j) for j in (1, 3)},
    )
    monkeypatch.setattr(
        Oracle,
        "gradient",
        lambda *args: (gradient(*args)[0], gradient(*args)[1] * math.nan, args[2]),
    )
    assert "in step 1 this site's pending.gradient is not finite" in reason(
        sites.ask(0, "train.cross", fields, received)
    )
    monkeypatch.undo()
    state = sites.state(0)
    assert state is not None
    assert (state.step, state.pending) == (0, None)
    assert refused(sites.ask(0, "train.cross", fields, received)) == []


# The last step.


def test_only_a_step_of_training_ends_what_is_kept_on_disk(tmp_path: Path) -> None:
    sites = Sites({"state": str(tmp_path)})
    sites.all_step(0)
    files = {file.name for file in tmp_path.iterdir()}
    assert len(files) == 4
    sites.ask(0, "query.site", {"last": True, "server-round": 9})
    assert {file.name for file in tmp_path.iterdir()} == files
    for step, changes in (
        (0, {}),
        (0, {"cycle_from": 1.0}),
        (1, {}),
        (1, {"classes": ["0"], "cycle_from": 1.0}),
    ):
        assert sites.step(0, step, last=True, **changes).has_error()
        assert {file.name for file in tmp_path.iterdir()} == files
    assert not sites.step(0, 1, last=True, cycle_from=1.0).has_error()
    assert {file.name for file in tmp_path.iterdir()} == files - {"1-0.state"} | {
        "1-0.before",
        "1-0.ended",
    }
    assert "1 was before" in reason(sites.step(0, 2, {}))  # who ends a run early has ended it


def test_a_step_at_neighbours_models_is_no_last_one() -> None:
    sites = after(1, strategy="n-saddle")
    received = {j: sites.delivery(0, 0, j) for j in (1, 3)}
    for kind, step, expected in (("train.cross", 1, True), ("train.peer", 2, False)):
        fields = sites.fields(0, step, cycle_from=0.0)
        assert sites.ask(0, kind, fields | {"last": True}, received).has_error() is expected
        sites.ask(0, kind, fields, received)


def test_a_finished_model_is_overwritten_by_no_other_run(tmp_path: Path) -> None:
    finished, earlier = tmp_path / "model.safetensors", b"the model of an earlier run"
    finished.write_bytes(earlier)
    sites = Sites({"save": str(finished)})
    assert "step 0 cannot be the last one" in reason(sites.step(0, 0, last=True, cycle_from=1.0))
    assert not sites.step(
        1, 1, {}, last=True, cycle_from=1.0
    ).has_error()  # remembers nothing, has trained on nothing
    assert finished.read_bytes() == earlier
    sites.step(0, 0)
    for _ in range(2):  # once more, as where an answer was lost: it is the same run's
        assert not sites.step(0, 1, {}, last=True, cycle_from=1.0).has_error()
    first = load_file(finished)
    assert (tmp_path / "model-1.safetensors").read_bytes() == earlier
    again = Sites({"save": str(finished)}, seed=2)  # the relay gives it the same id
    series = sites.context(0, sites.config, run=2)
    series.state = sites.contexts[0].state
    sites.contexts[0] = series
    for number, other in ((2, again), (3, sites)):
        other.step(0, 0)
        other.step(0, 1, {}, last=True, cycle_from=1.0)
        assert (tmp_path / f"model-{number}.safetensors").exists()
    kept = load_file(tmp_path / "model-2.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in first.items())
    assert len(list(tmp_path.iterdir())) == 4


# What neighbours sent, and what the relay made of it.


def test_a_payload_without_a_step_is_its_senders_fault() -> None:
    sites = after(1)
    received = {j: sites.delivery(0, 0, j) for j in (1, 3)}
    received[1] = {
        "x/sealed": Array(np.zeros(3, np.uint8)),
        "9999999999/values": Array(np.zeros(3, np.float32)),
    }
    reply = sites.step(0, 1, received)
    assert refused(reply) == [
        "site 1: 'x/sealed' is no part of a step",
        "site 1: '9999999999/values' is no part of a step",
    ]


def test_payloads_that_were_held_back_or_come_too_soon_are_refused() -> None:
    sites = after(20)
    reply = sites.step(0, 20, {1: sites.delivery(0, 19, 1), 3: sites.delivery(0, 0, 3)})
    assert refused(reply) == ["site 3: step 0 came before"]
    late = after(1)
    reply = late.step(0, 20, {1: late.delivery(0, 0, 1)}, rejoin=True)
    assert refused(reply) == ["site 1: step 0 is 20 steps old, at most 16 are of use"]
    reply = late.step(0, 21, {3: late.delivery(0, 0, 3, labelled=9999)})
    assert refused(reply) == ["site 3: step 9999 is not before this peer's step 21"]
    # The refused message blocked nothing.
    assert refused(late.step(0, 22, {3: late.delivery(0, 0, 3, labelled=21)})) == []


def test_what_comes_again_after_a_lost_answer_is_no_fault() -> None:
    sites = after(1)
    assert refused(sites.step(0, 1)) == []
    assert refused(sites.step(0, 1, rejoin=True)) == []
    assert refused(sites.step(0, 1)) == ["site 1: step 0 came before", "site 3: step 0 came before"]


def test_a_difference_without_those_before_it_is_refused() -> None:
    sites = after(3, **CHOCO)
    sites.contexts[0] = sites.context(0, sites.config)  # it remembers nothing
    reply = sites.step(0, 3)
    assert refused(reply) == [
        f"site {j}: step 2 goes on from a step that is missing here" for j in (1, 3)
    ]
    assert config_of(reply)["broken"] == [1, 3]
    whole = after(3, **CHOCO)  # what site 1 offered in step 2 is not delivered
    whole.offered[3] = {1: arrays_of(whole.step(1, 3))}
    reply = whole.step(0, 4, {1: whole.delivery(0, 3, 1)})
    assert refused(reply) == ["site 1: step 3 goes on from a step that is missing here"]


def test_a_sender_whose_newest_difference_is_bad_is_left_out_whole() -> None:
    found = []
    for delivered in ((0, 1), ()):  # of site 1: a good difference and a bad one; nothing
        sites = after(2, **CHOCO)
        sites.contexts[0] = sites.context(0, sites.config)
        received = {
            name: array for step in delivered for name, array in sites.delivery(0, step, 1).items()
        }
        received |= {
            name: Array(np.zeros(3, np.float32))
            for name in received
            if name.startswith("1/") and "codes" in name
        }
        reply = sites.step(0, 2, {1: received})
        assert len(refused(reply)) == (1 if delivered else 0)
        found.append(model(sites, 0))
    assert torch.equal(*found)


def test_one_bad_public_key_costs_its_owner_only() -> None:
    sites = Sites(**SEALED)
    sites.public["key-1"] = bytes(32)
    reply = sites.step(0, 0)
    assert refused(reply) == ["site 1: the public key of site 1 cannot be used"]
    assert {name for name in arrays_of(reply) if name.endswith("/key")} == {"to-3/key"}


@pytest.mark.parametrize(("reader", "sender"), [(2, 3), (2, 1)])
def test_what_is_sealed_for_another_reader_is_refused(reader: int, sender: int) -> None:
    sites = after(1, **SEALED)
    reply = sites.step(0, 1, {sender: sites.delivery(reader, 0, sender)})
    assert len(refused(reply)) == 1
    assert refused(reply)[0].startswith(
        f"site {sender}: step 0 was changed on the way, or is not for this site"
    )


def test_sealed_peers_answer_no_plain_training_and_no_new_keys() -> None:
    sites = after(1, **SEALED)
    x = model(sites, 0)
    for kind, message in (
        ("train", "a peer trains its own model"),
        ("evaluate", "a sealed peer tests no model but its own"),
    ):
        assert message in reason(sites.ask(0, kind, sites.fields(0, 1), {}, x))
    stranger = sites.step(0, 1, key_9=bytes(32), listeners=[9])
    assert "site 9 has a public key, and had none at first" in reason(stranger)


@pytest.mark.parametrize("keys", [{}, {"key-2": bytes(32)}])
def test_keys_that_come_after_the_first_message_are_not_believed(keys: dict[str, bytes]) -> None:
    sites = Sites(**SEALED)
    honest, sites.public = sites.public, keys
    assert not sites.step(0, 0).has_error()
    sites.public = honest
    assert "has a public key, and had none at first" in reason(sites.step(0, 1, {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"key-1": b"short"},
        {"key-1": 5},
        {"nonce-1": b"short"},
        {"nonce-1": "0" * 16},
        {"nonce-1": 1.5},
    ],
)
def test_keys_and_nonces_that_are_none_are_refused(changes: dict[str, Any]) -> None:
    sites = Sites(**SEALED)
    [name] = changes
    assert (
        f"{name} is {changes[name]!r}: {16 if 'nonce' in name else 32} bytes are expected"
        in reason(sites.step(0, 0, **changes))
    )
    assert not sites.step(0, 0).has_error()


@pytest.mark.parametrize("whose", ["the first run's nonces", "the second run's nonces"])
def test_a_whole_run_that_is_replayed_under_its_own_id_is_refused(
    whose: str, tmp_path: Path
) -> None:
    nodes, keys = write_keys(tmp_path / "keys"), {"wire.sealing": "keys"}
    first = after(5, node=nodes, **keys)
    second = Sites(nodes, **keys, **{"training.lr": 0.01})
    assert not {*first.nonces.values()} & {*second.nonces.values()}
    for step in range(6):
        for site in SITES:
            sides = ((site - 1) % 4, (site + 1) % 4)
            received = {j: first.delivery(site, step - 1, j) for j in sides} if step else {}
            nonces = first.nonces if whose.startswith("the first") else second.nonces
            theirs = {f"nonce-{j}": nonces[f"nonce-{j}"] for j in sides}
            reply = second.ask(site, "train.peer", second.fields(site, step) | theirs, received)
            assert len(refused(reply)) == len(received)
            assert all("its key or nonce is another one" in each for each in refused(reply))
    assert refused(first.step(0, 5)) == []  # where they belong, they are good


def test_a_site_that_lost_its_memory_misses_two_exchanges_and_is_used_again_at_once(
    tmp_path: Path,
) -> None:
    sites = after(3, node=write_keys(tmp_path / "keys"), **{"wire.sealing": "keys"})
    sites.contexts[1] = sites.context(1, sites.config)
    problems = []
    for step in range(3, 7):
        nonces = dict(sites.nonces)  # all are called before anybody has answered
        replies = []
        for site in SITES:
            fields = sites.fields(site, step) | {
                name: nonces[name] for name in nonces if name != f"nonce-{site}"
            }
            replies.append(
                sites.ask(
                    site,
                    "train.peer",
                    fields,
                    {
                        j: sites.delivery(site, step - 1, j)
                        for j in ((site - 1) % 4, (site + 1) % 4)
                    },
                )
            )
        sites.offered[step] = {site: arrays_of(reply) for site, reply in enumerate(replies)}
        problems.append([len(refused(reply)) for reply in replies])
    assert problems == [[0, 2, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


# What losses tell.


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_sealed_peers_tell_no_losses_on_a_few_examples(fraction: float) -> None:
    """The loss of a known network on one test example tells what the example is.

    The run says how many of a site's examples are tested.
    """
    sites, changes = Sites(), {**COMMON, **SEALED, "data.test-fraction": fraction}
    sites.contexts[0] = sites.context(0, configuration(**changes))
    for reply in (sites.ask(0, "query.site", {}), sites.step(0, 0, test=True)):
        assert "test examples at this site; allowed, sealed: 16 or more" in reason(reply)


def test_sealed_peers_report_losses_as_means_over_many_batches() -> None:
    """One loss of a known network on one example tells the example."""
    batches: dict[str, Any] = {
        "training.batch-size": 1,
        "training.lr": 1e-30,
        "training.lr-ratio": 1.0,
    }
    sealed, plain = Sites(**SEALED, **batches), Sites(**batches)
    losses: list[float] = []
    of_sealed: Any
    of_plain: Any
    for step in range(200):
        of_sealed, of_plain = (
            metrics_of(each.step(0, step, {}, test=step == 0)) for each in (sealed, plain)
        )
        assert "loss" in of_plain
        assert ("loss" in of_sealed) == ("lr-first" in of_sealed) == ("lr-last" in of_sealed)
        losses.append(of_plain["loss"])
        if "loss" in of_sealed:
            break
    else:
        pytest.fail("no loss was reported")
    assert len(losses) == -(-of_plain["num-examples"] // 2) > 100
    assert of_sealed["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
