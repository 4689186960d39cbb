"""Claims: what they declare fits together, and verdicts follow from numbers."""

import dataclasses
import gzip
import math
import zipfile
from itertools import product
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torchvision.io import encode_jpeg

from benchmarks.claims import __main__ as command
from benchmarks.claims import data, figures, page, tuning
from benchmarks.claims.__main__ import CLAIMS, changed, claim_of, part
from benchmarks.claims.claim import (
    Candidate,
    Censored,
    Claim,
    Judgement,
    Measure,
    Record,
    Setting,
    Size,
    cells,
    interval,
    judge,
    jump,
    last,
    meanwhile,
    sigma,
    steps,
    until,
)
from benchmarks.claims.runner import check, identity
from configuration.errors import ConfigError
from server_app.discovery import RunError

SIZES = [(name, size) for name in CLAIMS for size in ("quick", "full")]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_all_cells_of_all_claims_can_be_configured(name: str, size: str) -> None:
    claim = claim_of(name)
    check(cells(claim.size(size), "data"), seeds=1)


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_candidate_has_the_same_budget(name: str, size: str) -> None:
    candidates = claim_of(name).size(size).candidates
    assert {math.prod(map(len, each.space.values())) for each in candidates} == {6}
    for candidate in candidates:
        assert all(len(set(values)) == len(values) for values in candidate.space.values())


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_claim_names_is_there(name: str) -> None:
    claim = claim_of(name)
    settings, candidates = set(), set()
    for size in (claim.quick, claim.full):
        there = {setting.name: setting for setting in size.settings}
        assert len(there) == len(size.settings)
        for setting in size.settings:
            shown = set(setting.candidates) or {each.name for each in size.candidates}
            if setting.tuned_in:
                origin = there[setting.tuned_in]
                assert not origin.tuned_in
                assert not origin.candidates or shown <= set(origin.candidates)
        settings |= set(there)
        candidates |= {candidate.name for candidate in size.candidates}
    measures = {measure.name for measure in claim.measures}
    for judgement in claim.judgements:
        assert judgement.measure in measures
        assert {judgement.better, judgement.than} <= candidates
        assert set(judgement.settings) <= settings


def test_a_key_that_is_wrong_is_named_with_its_cell_before_anything_runs() -> None:
    setting = Setting("here", {"num-sites": 3})
    candidate = Candidate("FedAvg", {"strategy": "fedavg"}, {"training.lr": [0.1, -1.0]})
    with pytest.raises(ConfigError, match=r"here, FedAvg: training\.lr = -1\.0"):
        check(cells(Size((setting,), (candidate,), 1), ""), seeds=1)


def test_a_graph_on_which_peers_cannot_run_is_found_before_anything_runs() -> None:
    keys = {"num-sites": 16, "topology.name": "bipartite"}
    peers = {"strategy": "dmsgd", "dmsgd.consensus-weight": 1.0}
    size = Size((Setting("here", keys),), (Candidate("DMSGD", peers, {}),), 1)
    with pytest.raises(ConfigError, match=r"here, DMSGD: .*disagreement grows"):
        check(cells(size, ""), seeds=1)


def test_keys_that_have_no_effect_with_a_method_are_left_out_of_its_cell() -> None:
    setting = Setting("here", {"topology.name": "torus", "num-sites": 9})
    both = tuple(Candidate(name, {"strategy": name}, {}) for name in ("fedavg", "d-psgd"))
    server, peers = cells(Size((setting,), both, 1), "")
    assert server.keys == {"strategy": "fedavg", "num-sites": 9}
    assert peers.config(1).topology.name == "torus"
    assert (server.engine, peers.engine) == ("batched", "batched")


def test_where_data_lie_makes_no_other_run_and_every_other_key_does() -> None:
    size = claim_of("gsgm").quick
    here, there = (cells(size, folder)[0] for folder in ("here", "there"))
    assert here.keys["data.path"] != there.keys["data.path"]
    same = identity(here.config(1), here, None)
    assert identity(there.config(1), there, None) == same
    assert identity(here.config(2), here, None) != same
    assert identity(here.config(1), here, _nothing) != same
    mine = changed(size, size.candidates[0].name, 'data.path="mine"').candidates[-1]
    (own,) = cells(Size(size.settings[:1], (mine,), 1), "here")
    assert identity(own.config(1), own, None) != same


def _nothing(run: Any) -> dict[str, float]:
    return {}


# Numbers.


def record(headline: list[float], **columns: list[float]) -> Record:
    table = pd.DataFrame({"accuracy": headline, "round": range(1, len(headline) + 1), **columns})
    return Record(table, {}, "accuracy", True, "", "", 0.0)


def test_measures_by_hand() -> None:
    run = record([0.1, 0.5, 0.4, 0.8, 0.6], megabytes=[1, 2, 3, 4, 5])
    setting = Setting("", {}, target=0.5)
    assert last()(run, setting) == 0.6
    assert last(tests=2)(run, setting) == pytest.approx(0.7)
    assert sigma(run, setting) == pytest.approx(np.std([0.4, 0.8, 0.6]))
    assert jump(run, setting) == pytest.approx(0.3)
    assert until("megabytes")(run, setting) == 2
    assert until("megabytes", 10)(run, setting) == 20
    assert not isinstance(until("megabytes")(run, setting), Censored)
    never = until("megabytes", 10)(run, Setting("", {}, target=0.9))
    assert (never, type(never)) == (50, Censored)
    assert until("megabytes", target=0.6)(run, setting) == 4


def test_a_run_is_measured_when_another_was_over() -> None:
    run = record([0.1, 0.5, 0.4, 0.8, 0.6], hours=[1, 2, 3, 4, 5])
    setting = Setting("", {})
    for ends, tests, value in ((4, 2, 0.6), (3.9, 1, 0.4), (9, 1, 0.6), (2, 5, 0.3)):
        beside = record([0.0, 0.0], hours=[0.5, ends])
        assert meanwhile("hours", tests)(run, setting, beside) == pytest.approx(value)
    assert math.isnan(meanwhile("hours", 1)(run, setting, record([0.0], hours=[0.5])))


def test_steps_are_even_on_a_log_scale() -> None:
    assert steps(0.01, 1, 3) == [0.01, 0.1, 1.0]
    assert steps(0.01, 0.16, 3) == [0.01, 0.04, 0.16]


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    a, b = pd.Series([0.81, 0.84, 0.79, 0.83]), pd.Series([0.80, 0.80, 0.78, 0.79])
    found, reference = interval(a - b), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert found.error == pytest.approx(np.std(a - b, ddof=1) / 2)


Values = dict[tuple[str, str], list[float]]


def results(values: Values, ends: float = math.inf) -> pd.DataFrame:
    """Tidy; ``ends``: where a run ended without its target, shown as it."""
    rows = [
        (setting, candidate, seed, "m", value, value == ends)
        for (setting, candidate), runs in values.items()
        for seed, value in enumerate(runs, 1)
    ]
    columns = ["setting", "candidate", "seed", "measure", "value", "censored"]
    return pd.DataFrame(rows, columns=columns)


def words(judgement: Judgement, values: Values, ends: float = math.inf, **kind: Any) -> list[str]:
    measure = Measure("m", "", lambda *_: 0.0, **kind)
    return [verdict.word for verdict in judge(judgement, measure, results(values, ends))]


OLD = [0.70, 0.75, 0.72, 0.74]


@pytest.mark.parametrize(
    ("gain", "by", "word"),
    [
        ([0.05, 0.06, 0.05, 0.06], 0.0, "holds"),
        ([0.05, 0.06, 0.05, 0.06], 0.2, "does not hold"),
        ([0.05, 0.06, 0.05, 0.06], 0.055, "undecided"),
        ([0.2, -0.2, 0.1, -0.05], 0.0, "undecided"),
        ([0.0, 0.0, 0.0, 0.0], 0.0, "does not hold"),
        ([-0.001, -0.002, -0.001, 0.0], -0.005, "holds"),
    ],
)
def test_a_verdict_is_where_the_interval_is(gain: list[float], by: float, word: str) -> None:
    values = {("s", "new"): [a + b for a, b in zip(OLD, gain, strict=True)], ("s", "old"): OLD}
    judgement = Judgement("", "m", "new", "old", by)
    assert words(judgement, values) == [word]
    # Of a measure of which less is better, the other way round.
    turned = {
        ("s", "new"): [1 - each for each in values["s", "new"]],
        ("s", "old"): [1 - each for each in OLD],
    }
    assert words(judgement, turned, larger=False) == [word]


def test_a_share_is_of_geometric_means() -> None:
    values = {("s", "new"): [1.0, 2.0, 4.4], ("s", "old"): [2.0, 4.0, 8.0]}
    judgement = Judgement("", "m", "new", "old", 0.2, relative=True)
    measure = Measure("m", "", lambda *_: 0.0, larger=False)
    (verdict,) = judge(judgement, measure, results(values))
    logs = np.log([0.5, 0.5, 0.55])
    assert verdict.by.mean == pytest.approx(1 - math.exp(logs.mean()))
    reach = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / math.sqrt(3)
    assert verdict.by.low == pytest.approx(1 - math.exp(logs.mean() + reach))
    assert verdict.word == "holds"
    error = logs.std(ddof=1) / math.sqrt(3)
    assert verdict.apart == pytest.approx((math.log(0.8) - logs.mean()) / error)
    assert verdict.p == pytest.approx(stats.ttest_1samp(logs, math.log(0.8)).pvalue)


@pytest.mark.parametrize(
    ("new", "old", "word", "bounds", "missing"),
    [
        ([9.0] * 3, [2.0, 3.0, 2.5], "does not hold", 3, 0),
        ([2.0, 3.0, 2.5], [9.0] * 3, "holds", 3, 0),
        ([9.0, 6.0, 9.0], [2.0, 3.0, 2.5], "does not hold", 2, 0),
        ([2.0, 9.0, 2.5], [9.0, 9.0, 9.0], "undecided", 2, 1),
        # Ahead for certain, or behind, if the bound were the cost.
        ([4.0, 4.1, 9.0], [8.0, 8.2, 18.0], "undecided", 1, 0),
        ([8.0, 8.2, 18.0], [4.0, 4.1, 9.0], "undecided", 1, 0),
        ([9.0] * 3, [9.0] * 3, "undecided", 0, 3),
        ([9.0], [2.0], "undecided", 1, 0),
    ],
)
def test_a_cost_of_which_a_bound_is_known_decides_nothing_in_favour_of_its_run(
    new: list[float], old: list[float], word: str, bounds: int, missing: int
) -> None:
    judgement = Judgement("", "m", "new", "old", 0.1, relative=True)
    measure = Measure("m", "", lambda *_: 0.0, larger=False)
    values = {("s", "new"): new, ("s", "old"): old}
    (verdict,) = judge(judgement, measure, results(values, ends=9.0))
    assert (verdict.word, verdict.bounds, verdict.missing) == (word, bounds, missing)


def test_no_cost_is_drawn_of_who_did_not_always_get_there() -> None:
    values = {("s", "a"): [1.0, math.inf], ("s", "b"): [1.0, 2.0], ("s", "c"): [1.0, math.nan]}
    shown = figures.reached(results(values)).set_index(["candidate", "seed"])["value"]
    assert shown.dropna().to_dict() == {("b", 1): 1, ("b", 2): 2, ("c", 1): 1}


def test_costs_say_who_never_got_there() -> None:
    values = {("s", "a"): [1.0, 2.0], ("s", "b"): [math.nan, 2.0], ("s", "c"): [math.nan] * 2}
    size = Size((Setting("s", {}),), tuple(Candidate(name, {}, {}) for name in "abc"), 2)
    twice = pd.concat([results(values).assign(measure=measure) for measure in ("x", "y")])
    figure = figures.costs(size, twice, "x", "y")
    (axes,) = figure.axes
    assert axes.get_title() == "s; not there: c"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_one_seed_decides_nothing() -> None:
    measure, values = Measure("m", "", lambda *_: 0.0), {("s", "a"): [0.9], ("s", "b"): [0.1]}
    (verdict,) = judge(Judgement("", "m", "a", "b"), measure, results(values))
    assert page._cell(verdict) == "**undecided**: +0.800 (one pair)"


def test_a_failed_run_leaves_undecided_and_one_that_is_not_made_is_left_out() -> None:
    judgement = Judgement("", "m", "a", "b")
    values = {("s", "a"): [0.9, 0.91, 0.9, 0.92], ("s", "b"): [0.1, 0.12, 0.11, math.nan]}
    assert words(judgement, values) == ["undecided"]
    values["s", "b"].pop()
    assert words(judgement, values) == ["holds"]


def test_the_range_over_settings_is_paired_over_seeds() -> None:
    values = {
        ("s", "flat"): [0.80, 0.82, 0.81],
        ("t", "flat"): [0.81, 0.83, 0.82],
        ("s", "steep"): [0.5, 0.52, 0.49],
        ("t", "steep"): [0.8, 0.81, 0.8],
        ("u", "flat"): [0.1, 0.1, 0.1],  # there, the other was not run
    }
    judgement = Judgement("", "m", "flat", "steep", over="range")
    measure = Measure("m", "", lambda *_: 0.0)
    (verdict,) = judge(judgement, measure, results(values))
    assert verdict.word == "holds"
    assert verdict.where == "range over s; t"
    assert verdict.by.mean == pytest.approx(np.mean([0.3 - 0.01, 0.29 - 0.01, 0.31 - 0.01]))
    for who in ("flat", "steep"):
        values["s", who].pop()  # the last seed is not through: its range is not that of one setting
    (verdict,) = judge(judgement, measure, results(values))
    assert (verdict.word, verdict.missing) == ("undecided", 1)
    assert verdict.by.mean == pytest.approx(np.mean([0.3 - 0.01, 0.29 - 0.01]))


def test_settings_that_a_judgement_names_are_the_only_ones() -> None:
    values = {(where, who): OLD for where in "stu" for who in ("a", "b")}
    judgement = Judgement("", "m", "a", "b", settings=("u", "s", "nowhere"))
    measure = Measure("m", "", lambda *_: 0.0)
    assert [each.where for each in judge(judgement, measure, results(values))] == ["u", "s"]


# Tuning.


class Searched:
    """Stands in for a search: what a peak of the headline at ``peak`` would give."""

    def __init__(self, space: dict[str, list[Any]], peak: dict[str, float], done: int) -> None:
        points = [dict(zip(space, each, strict=True)) for each in product(*space.values())][:done]
        values = [-sum(abs(math.log(each[key] / peak[key])) for key in peak) for each in points]
        self._found = sorted(zip(values, range(len(points)), points, strict=True), reverse=True)
        self.headline = "accuracy"

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"accuracy": [value for value, *_ in self._found]})

    @property
    def best(self) -> dict[str, Any]:
        return self._found[0][2]


TUNED = Candidate(
    "CDMSGD", {"strategy": "cdmsgd"}, {"training.lr": [0.01, 0.02], "cdmsgd.momentum": [0.5, 0.9]}
)
PLAN = Size((Setting("here", {}),), (TUNED,), 1)


def searching(
    monkeypatch: pytest.MonkeyPatch, peak: dict[str, float], done: int = 100
) -> list[dict[str, Any]]:
    """The searches that are called for."""
    calls: list[dict[str, Any]] = []

    def search(**keys: Any) -> Searched:
        calls.append(keys)
        return Searched(keys["space"], peak, done)

    monkeypatch.setattr(tuning, "search", search)
    return calls


def test_a_grid_gets_wider_until_its_best_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells(PLAN, "")
    calls = searching(monkeypatch, {"training.lr": 0.045, "cdmsgd.momentum": 0.95})
    choice = tuning.tuned(cell, PLAN, tmp_path, 1)
    # A momentum of 0.9 * 0.9 / 0.5 is not allowed: the next is 1 - 0.1 * 0.1 / 0.5.
    momenta = [0.5, 0.9, 0.98]
    assert choice.grid == {"training.lr": [0.01, 0.02, 0.04, 0.08], "cdmsgd.momentum": momenta}
    assert choice.keys == {"training.lr": 0.04, "cdmsgd.momentum": 0.98}
    assert choice.border == ["cdmsgd.momentum"]  # it got wider often enough; which is said
    assert choice.trials == 4 + 2 + 2 + 4
    assert [call["space"]["training.lr"] for call in calls][:3] == [[0.01, 0.02], [0.04], [0.08]]
    assert all(min(call["seeds"]) > 100 for call in calls)
    assert tuning.tuned(cell, PLAN, tmp_path, 1) == choice  # it is kept
    assert len(calls) == 1 + tuning.WIDER


def test_a_grid_does_not_get_wider_than_where_another_method_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratio = "training.lr-ratio"
    cycle = Candidate("CLR", {"strategy": "co-learning"}, {ratio: [0.1, 0.32]}, {ratio: 1.0})
    free = dataclasses.replace(cycle, below={})
    chosen = {}
    for each in (cycle, free):
        (cell,) = cells(Size(PLAN.settings, (each,), 1), "")
        searching(monkeypatch, {ratio: 1.0})
        chosen[each.name, bool(each.below)] = tuning.tuned(cell, PLAN, tmp_path, 1).keys[ratio]
    assert chosen["CLR", False] == 1.0
    assert 0.32 < chosen["CLR", True] < 1.0


def test_a_grid_does_not_get_wider_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells(PLAN, "")
    searching(monkeypatch, {"training.lr": 1000.0, "cdmsgd.momentum": 0.5})
    choice = tuning.tuned(cell, PLAN, tmp_path, 1)
    assert choice.keys["training.lr"] == 0.02 * 2**tuning.WIDER
    assert set(choice.border) == {"training.lr", "cdmsgd.momentum"}


def test_a_search_that_was_interrupted_chooses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells(PLAN, "")
    searching(monkeypatch, {"training.lr": 0.01}, done=3)
    with pytest.raises(KeyboardInterrupt):
        tuning.tuned(cell, PLAN, tmp_path, 1)
    assert tuning.known(cell, PLAN, tmp_path) is None


def test_what_was_chosen_by_other_rules_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells(PLAN, "")
    calls = searching(monkeypatch, {"training.lr": 0.015, "cdmsgd.momentum": 0.7})
    tuning.tuned(cell, PLAN, tmp_path, 1)
    monkeypatch.setattr(tuning, "RULES", tuning.RULES + 1)
    count = len(calls)
    tuning.tuned(cell, PLAN, tmp_path, 1)
    assert len(calls) == 2 * count


def test_where_every_trial_fails_the_claim_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(**_: Any) -> None:
        raise RunError("all trials failed")

    monkeypatch.setattr(tuning, "search", search)
    (cell,) = cells(PLAN, "")
    choice = tuning.tuned(cell, PLAN, tmp_path, 1)
    assert math.isnan(choice.value)
    assert choice.keys == {"training.lr": 0.01, "cdmsgd.momentum": 0.5}


def test_the_first_trial_that_does_not_fail_is_better_than_all_that_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = {"training.lr": 0.005, "cdmsgd.momentum": 0.5}

    def search(**keys: Any) -> Searched:
        if 0.01 in keys["space"]["training.lr"]:
            raise RunError("all trials failed")
        return Searched(keys["space"], peak, 100)

    monkeypatch.setattr(tuning, "search", search)
    (cell,) = cells(PLAN, "")
    choice = tuning.tuned(cell, PLAN, tmp_path, 1)
    assert choice.keys["training.lr"] == 0.005
    assert not math.isnan(choice.value)


# Data.


def test_fashion_is_halved_and_its_test_part_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "TRAINED", 3)
    monkeypatch.setattr(data, "TESTED", 2)
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(1)
    pixels = {name: generator.integers(0, 256, (4, 28, 28), np.uint8) for name in ("train", "t10k")}
    for name, of in pixels.items():
        with gzip.open(raw / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + of.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(bytes(8) + bytes([3, 1, 4, 1]))  # unpacked
    found = data.fashion_small(str(tmp_path))
    assert isinstance(found.x, torch.Tensor)
    assert found.x.shape == (5, 1, 14, 14)
    assert found.test.tolist() == [False, False, False, True, True]
    assert found.y.tolist() == [3, 1, 4, 3, 1]
    for picture, name, number in ((0, "train", 0), (4, "t10k", 1)):
        mean = pixels[name][number, 2:4, 4:6].astype(float).mean()
        assert int(found.x[picture, 0, 1, 2]) == pytest.approx(mean, abs=0.5)


def test_cifar_is_drawn_from_both_parts_and_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_KEPT", joblib.Memory(None))
    monkeypatch.setattr(data, "TRAINED", 16)  # of which it takes a quarter
    monkeypatch.setattr(data, "TESTED", 3)
    arrays: dict[str, Any] = {"classes": np.array(["cat", "dog"])}
    for name, count in (("train", 6), ("test", 4)):
        grey = [torch.full((3, 32, 32), 10 * number, dtype=torch.uint8) for number in range(count)]
        files = [encode_jpeg(picture).numpy() for picture in grey]
        arrays[f"{name}_data"] = np.concatenate(files)
        arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{name}_labels"] = np.arange(count) // (count // 2)  # class by class
    np.savez(tmp_path / "cifar10.npz", **arrays)
    found = data.cifar_small(str(tmp_path / "cifar10.npz"))
    assert isinstance(found.x, torch.Tensor)
    assert found.x.shape == (7, 3, 16, 16)
    assert found.test.tolist() == [False] * 4 + [True] * 3
    numbers = (found.x[:, 0, 0, 0].float() / 10).round().long()
    assert len(set(numbers[:4].tolist())) == 4
    assert found.y.tolist() == [*(numbers[:4] // 3).tolist(), *(numbers[4:] // 2).tolist()]


def test_a_path_in_a_zip_file_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "UNPACKED", tmp_path / "unpacked")
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("train.csv", "label,text\n")
    path = Path(data.located(str(tmp_path), "texts.zip/train.csv"))
    assert not path.exists()
    data.unpack(str(tmp_path), "texts.zip/train.csv")
    assert path.read_text() == "label,text\n"
    (tmp_path / "texts.zip").unlink()
    data.unpack(str(tmp_path), "texts.zip/train.csv")  # nothing is read again
    assert Path(data.located("", "texts.zip/")) == path.parent  # the whole of it
    assert data.located(str(tmp_path), ".") == str(tmp_path)


def test_every_claim_is_listed_and_has_its_own_question() -> None:
    claims = [claim_of(name) for name in CLAIMS]
    assert all(isinstance(claim, Claim) for claim in claims)
    assert len({claim.question for claim in claims}) == len(CLAIMS)


def test_a_part_of_a_claim_has_the_settings_that_are_named() -> None:
    size = claim_of("co-learning").quick
    chosen = part(size, ["digits, 5 sites"])
    assert [setting.name for setting in chosen.settings] == ["digits, 5 sites"]
    assert chosen.candidates == size.candidates
    assert part(size, []) == size
    assert part(size, 2 * ["digits, 5 sites"]) == chosen
    with pytest.raises(ConfigError, match="'digits': allowed: 'digits, 5 sites', "):
        part(size, ["digits"])
    with pytest.raises(ConfigError, match="is tuned in 'Fashion-MNIST, 5 sites': name that, too"):
        part(size, ["Fashion-MNIST, 10 sites"])


def test_a_candidate_with_other_keys_stands_beside_those_that_are_there() -> None:
    size = claim_of("gsgm").quick
    more = changed(size, "GSGM, refill", "gsgm.momentum=0.5 gsgm.window=1")
    assert more.candidates[:-1] == size.candidates
    own = more.candidates[-1]
    assert own.name == "GSGM, refill, gsgm.momentum=0.5 gsgm.window=1"
    assert {"gsgm.momentum": 0.5, "gsgm.window": 1, "gsgm.schedule": "refill"}.items() <= dict(
        own.keys
    ).items()
    assert set(own.space) == {"training.lr"}  # what it fixes is not tuned
    for setting in more.settings:
        assert own.name in (setting.candidates or [own.name])
    check(cells(more, ""), seeds=1)
    with pytest.raises(ConfigError, match="is there already"):
        changed(more, "GSGM, refill", "gsgm.momentum=0.5 gsgm.window=1")
    with pytest.raises(ConfigError, match="'GSGM': allowed: 'ASGD', "):
        changed(size, "GSGM", "gsgm.momentum=0.5")
    with pytest.raises(ConfigError, match="no key=value"):
        changed(size, "ASGD", "faster")


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ("--size full", True),
        ("--size quick", False),
        ("--size full --seeds 2", False),
        ("--size full --change D-PSGD training.lr=0.1", False),
    ],
)
def test_what_a_person_read_stands_on_the_page_that_was_read(
    monkeypatch: pytest.MonkeyPatch, arguments: str, read: bool
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        command, "measure", lambda name, claim, size, **keys: told.append(claim.reading)
    )
    monkeypatch.setattr("sys.argv", ["claims", "dmsgd", *arguments.split()])
    command.main()
    assert told == [claim_of("dmsgd").reading if read else ""]
