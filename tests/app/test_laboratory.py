"""The laboratory: what simulate and compare return, and that it can be trusted.

Also what they do when something goes wrong.
"""

import math
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from configuration.config import configuration, flatten
from configuration.errors import ConfigError
from server_app.discovery import RunError
from simulation.laboratory import Comparison, Run, compare, simulate
from simulation.world import Lognormal, World
from tests.conftest import ROOT, RunApp

SMALL: dict[str, Any] = {
    "num_sites": 3,
    "epochs": 4,
    "co-learning.local-epochs": 1,
    "co-learning.epsilon": 0.0,
    "model.name": "mlp",
    "progress": False,
}
ROUGH = World(
    samples_per_s=Lognormal(median=200, sigma=1),
    bandwidth_mbps=1,
    latency_ms=Lognormal(median=50, sigma=0.5),
    jitter=0.5,
)


def same(a: Run, b: Run) -> bool:
    return a.metrics.equals(b.metrics) and all(
        torch.equal(a.model[name], b.model[name]) for name in a.model
    )


def test_same_seed_same_history_bit_for_bit_and_another_seed_another() -> None:
    first, again, other = (simulate(**SMALL, world=ROUGH, seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    # Another seed makes another world, too.
    assert other.summary["hours"] != pytest.approx(first.summary["hours"], rel=0.01)


def test_world_changes_the_time_and_nothing_else_where_all_sites_take_part() -> None:
    fast, slow = simulate(**SMALL), simulate(**SMALL, world=ROUGH)
    assert all(torch.equal(fast.model[name], slow.model[name]) for name in fast.model)
    assert slow.summary["hours"] > 2 * fast.summary["hours"]
    assert list(fast.history["accuracy"]) == list(slow.history["accuracy"])


def test_it_is_the_app_that_runs(run_app: RunApp) -> None:
    written = run_app(co_learning={"epsilon": 0.0}, epochs=4)
    run = simulate(**SMALL)
    pd.testing.assert_frame_equal(run.metrics, Run.load(written.folder).metrics)
    assert all(torch.equal(run.model[name], written.model[name]) for name in run.model)


def test_time_of_a_round_by_hand() -> None:
    world = World(samples_per_s=[100, 200, 400], bandwidth_mbps=0.8, latency_ms=250)
    run = simulate(**SMALL, world=world)
    rows = run.metrics[
        (run.metrics["split"] == "train")
        & (run.metrics["metric"] == "samples")
        & (run.metrics["round"] == 1)
    ]
    each = rows[rows["site"] != "all"]
    seconds = 0.5 + (each["bytes_up"] + each["bytes_down"]) / 1e5 + each["value"] / [100, 200, 400]
    assert list(each["value"]) == [479, 479, 479]
    assert rows["seconds"].unique() == pytest.approx([seconds.max()], abs=1e-3)


def test_sam_takes_twice_the_time() -> None:
    world = World(samples_per_s=10, bandwidth_mbps=1e6, latency_ms=0)
    plain, sharp = (
        simulate(**SMALL, world=world, training={"sam_radius": rho}).metrics.query(
            "split == 'train'"
        )
        for rho in (0.0, 0.05)
    )
    assert sharp["seconds"].iloc[0] == pytest.approx(2 * plain["seconds"].iloc[0], rel=1e-4)


def test_site_that_dies_is_left_out_and_one_that_comes_back_takes_part_again() -> None:
    world = World(samples_per_s=100, offline={1: [(12.0, 200.0)], 2: [(5.0, math.inf)]})
    run = simulate(**(SMALL | {"num_sites": 4, "epochs": 60}), world=world)
    trained = run.metrics[(run.metrics["split"] == "train") & (run.metrics["metric"] == "loss")]
    rounds = {site: set(rows["round"]) for site, rows in trained.groupby("site")}
    everybody = set(range(1, 61))
    assert run.finished
    assert rounds["0"] == rounds["3"] == rounds["all"] == everybody
    assert rounds["2"] == set() or max(rounds["2"]) < 3
    missed = everybody - rounds["1"]
    assert missed == set(range(min(missed), max(missed) + 1))
    assert max(rounds["1"]) == 60
    assert 2 <= len(missed) < 50


def test_run_that_cannot_go_on_ends_at_once_and_says_so() -> None:
    dead = World(samples_per_s=100, offline={site: [(20.0, math.inf)] for site in (0, 1)})
    with pytest.raises(RunError, match=r"round \d: 1 sites .* min-sites = 2: stopped"):
        simulate(**SMALL, world=dead)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.lr": -1.0}, "training.lr = -1.0: must be greater than or equal to 0"),
        (
            {"local_epoch": 3},
            "local-epoch = 3: unknown key; did you mean 'co-learning.local-epochs'",
        ),
        (
            {"seed": 3},
            "{'seed': 3}: a dictionary of the run configuration is expected, without seed",
        ),
        ({"conf": "conf/nothing.toml"}, "conf = 'conf/nothing.toml': there is no such file"),
        (
            {"world": World(samples_per_s=[1, 2])},
            r"samples_per_s = \[1.0, 2.0\]: 2 values for 3 sites",
        ),
    ],
)
def test_wrong_configuration_is_named_before_anything_runs(
    changes: dict[str, Any], message: str
) -> None:
    common = SMALL | {key: changes[key] for key in changes if key == "world"}
    own = {key: value for key, value in changes.items() if key != "world"}
    with pytest.raises(ConfigError, match=f"bad: {message}"):
        compare({"bad": own}, **common)


def test_files_of_conf_are_the_base_of_a_run() -> None:
    config = configuration("conf/krum.toml", num_sites=9)
    written = flatten(tomllib.loads((ROOT / "conf/krum.toml").read_text()))
    assert {key: config.flat()[key] for key in written} == written
    assert config.num_sites == 9


def test_interrupted_run_holds_what_it_had_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from client_app import training

    calls, train = iter(range(1000)), training.train

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 7:  # in the third round of three sites
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(training, "train", interrupted)
    with pytest.warns(UserWarning, match="co-learning was interrupted"):
        run = simulate(**SMALL)
    assert not run.finished
    assert list(run.history["round"]) == [1]  # the second is tested with the third
    assert run.summary["accuracy"] > 0.5
    assert run.model
    assert run.plot().axes


def test_interrupted_before_the_first_round_is_an_empty_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("server_app.app.discover", interrupted)
    with pytest.warns(UserWarning, match="interrupted"):
        run = simulate(**SMALL)
    assert run.metrics.empty
    assert run.summary.empty
    with pytest.raises(ValueError, match="this run has the models none yet"):
        _ = run.model


STRATEGIES: dict[str, dict[str, Any]] = {"Co-learning": {}, "sites alone": {"strategy": "local"}}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(STRATEGIES, seeds=2, world=ROUGH, processes=1, **SMALL)


@pytest.mark.slow
def test_number_of_processes_changes_no_result(comparison: Comparison) -> None:
    several = compare(STRATEGIES, seeds=2, world=ROUGH, processes=2, **SMALL)
    assert several.runs.keys() == comparison.runs.keys()
    for name, runs in comparison.runs.items():
        for run, other in zip(runs, several.runs[name], strict=True):
            assert run.metrics.equals(other.metrics)
            assert run.models.keys() == other.models.keys()
            assert all(
                torch.equal(run.models[m][k], other.models[m][k])
                for m in run.models
                for k in run.models[m]
            )


def test_run_that_fails_is_left_out_of_a_comparison_by_name() -> None:
    strategies = {"fine": {}, "lost": {"data.source": "csv", "data.path": "/nowhere"}}
    with pytest.warns(
        UserWarning, match=r"lost, seed 1: 0 sites can take part.*no such file.*left out"
    ):
        found = compare(strategies, seeds=1, processes=1, **SMALL)
    assert list(found.runs) == ["fine"]
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(RunError, match="lost, seed 1: 0 sites can take part"),
    ):
        compare({"lost": strategies["lost"]}, seeds=1, processes=1, **SMALL)


FEW = SMALL | {"data.source": "tests.own_data:few", "epochs": 1}


@pytest.mark.slow
def test_process_that_is_killed_takes_no_other_run_with_it(tmp_path: Path) -> None:
    """By signal 9, as for want of memory: always, and once."""
    deadly = {"data.source": "tests.own_data:deadly", "data.path": str(tmp_path / "none")}
    strategies = {"fine": {}, "lost": deadly, "sites alone": {"strategy": "local"}}
    keys = {key: value for key, value in FEW.items() if "co-learning" not in key}
    with pytest.warns(UserWarning, match=r"lost, seed 1: its process was killed, twice.*left out"):
        found = compare(strategies, seeds=1, processes=2, folder=tmp_path / "runs", **keys)
    assert list(found.runs) == ["fine", "sites alone"]
    assert [each.partition(": its")[0] for each in found.missing] == ["lost, seed 1"]
    assert "missing: lost, seed 1: its process was killed" in repr(found)
    assert "missing: lost, seed 1" in found._repr_html_()
    (tmp_path / "times").write_text("1")
    once = compare(
        {"fine": {}, "lost": deadly | {"data.path": str(tmp_path / "times")}},
        seeds=1,
        processes=2,
        **keys,
    )
    assert once.missing == ()
    assert same(once.runs["fine"][0], found.runs["fine"][0])
    assert same(once.runs["lost"][0], found.runs["fine"][0])
    assert (tmp_path / "times").read_text() == ""


def test_interrupted_comparison_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client_app import training

    calls, train = iter(range(1000)), training.train

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 4:  # in the second run of three sites
            raise KeyboardInterrupt
        return train(*arguments)

    keys = {key: value for key, value in FEW.items() if "co-learning" not in key}
    keys |= {"strategy": "fedavg", "fedavg.local-epochs": 1, "folder": tmp_path, "processes": 1}
    monkeypatch.setattr(training, "train", interrupted)
    with pytest.warns(UserWarning, match="interrupted: 1 of 3 runs are finished"):
        part = compare({"a": {}}, seeds=3, **keys)
    assert part.missing == ("a, seed 2: interrupted", "a, seed 3: interrupted")
    loaded = Comparison.load(tmp_path)
    assert [run.config.seed for run in loaded.runs["a"]] == [1]
    assert loaded.missing == ("a, seed-2: it is not over",)
    whole = compare({"a": {}}, seeds=3, **keys)
    assert whole.missing == ()
    assert Comparison.load(tmp_path).missing == ()
    assert same(whole.runs["a"][0], part.runs["a"][0])


def test_run_that_diverges_does_not_spoil_the_table() -> None:
    diverging = {"strategy": "FedAdam", "flower.arguments": "eta=1e38"}
    with pytest.warns(UserWarning, match="diverging, seed 1: round 1: FedAdam: the model diverged"):
        found = compare(
            {"fine": {}, "diverging": diverging}, seeds=1, processes=1, **(SMALL | {"epochs": 1})
        )
    text = found.text()
    assert list(text.index) == ["fine"]
    assert float(str(text.loc["fine", "accuracy"])) > 0.3
    assert list(text.columns[:3]) == ["accuracy", "loss", "rounds"]


def test_saved_comparison_loads_as_it_was(comparison: Comparison, tmp_path: Path) -> None:
    loaded = Comparison.load(comparison.save(tmp_path / "c"))
    pd.testing.assert_frame_equal(loaded.table(), comparison.table().loc[sorted(comparison.runs)])
    run, before = loaded.runs["sites alone"][1], comparison.runs["sites alone"][1]
    assert run.config == before.config
    assert run.finished
    pd.testing.assert_frame_equal(run.sites, before.sites)
    assert set(run.models) == {"model-0", "model-1", "model-2"}
    with pytest.raises(FileNotFoundError, match=r"no STRATEGY/RUN/config\.toml"):
        Comparison.load(tmp_path)


def personal(run: Run) -> pd.DataFrame:
    return run.metrics.query("split == 'personal'").pivot_table(
        index="site", columns="metric", values="value"
    )


def test_personal_model_of_one_site_is_that_of_a_round_more() -> None:
    keys = FEW | {"strategy": "fedavg", "num_sites": 1, "min_sites": 1, "fedavg.local-epochs": 1}
    keys = {key: value for key, value in keys.items() if "co-learning" not in key}
    keys |= {"training.lr-ratio": 1.0, "model.name": "cnn", "model.norm": "batch"}
    run = simulate(**keys, results={"personalise_epochs": 1})
    more = simulate(**keys | {"epochs": 2})
    assert personal(run).loc["all", "loss"] == more.summary["loss"]
    assert personal(run).loc["0", "accuracy"] == more.summary["accuracy"]
    assert run.summary["loss"] == more.history["loss"].iloc[0] != more.summary["loss"]


def test_personal_models_know_their_sites_better_and_the_common_one_stays_as_it_is(
    tmp_path: Path,
) -> None:
    keys = SMALL | {"partition.kind": "classes", "partition.classes-per-site": 4}
    common = simulate(**keys)
    found = compare({"personal": {"results.personalise-epochs": 2}}, seeds=1, processes=1, **keys)
    (run,) = found.runs["personal"]
    assert all(torch.equal(run.model[name], value) for name, value in common.model.items())
    assert common.metrics.equals(run.metrics.query("split != 'personal'"))
    own, of_common = personal(run)["accuracy"], run.summary["accuracy"]
    assert own["all"] > of_common + 0.05
    assert own["all"] == pytest.approx(own.drop("all").mean(), abs=0.01)
    assert found.table()["personal accuracy", "mean"].item() == own["all"]
    assert Run.load(run.save(tmp_path)).summary.equals(run.summary)


def test_a_folder_a_user_is_a_site_each_and_a_sample_of_them_trains(tmp_path: Path) -> None:
    for user in range(6):
        for number in range(4 + user):
            folder = tmp_path / f"f{user // 3}{user}" / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 255 * (number % 2)).save(folder / f"{number}.png")
    keys = FEW | {"data.source": "image-folder", "data.path": str(tmp_path), "epochs": 4}
    keys |= {"partition.kind": "natural", "data.image-size": 8}
    run = simulate(**keys | {"num_sites": 6, "sampling.fraction": 0.5})
    assert list(run.sites["name"]) == ["f00", "f01", "f02", "f13", "f14", "f15"]
    assert list(run.sites["train"] + run.sites["test"]) == [4, 5, 6, 7, 8, 9]
    trained = run.metrics.query("split == 'train' and metric == 'loss' and site != 'all'")
    assert set(trained.groupby("round").size()) == {3}
    together = simulate(**keys | {"num_sites": 2, "data.group": "^(f.)"})
    assert list(together.sites["name"]) == ["f0", "f1"]
    assert list(together.sites["train"] + together.sites["test"]) == [15, 24]


def artificial(seed: int, accuracies: list[float], seconds: float, megabytes: float) -> Run:
    """A run with one row a round."""
    rows = [
        (
            number + 1,
            seconds * (number + 1),
            1e6 * megabytes * (number + 1),
            0,
            "all",
            "test",
            "accuracy",
            accuracy,
        )
        for number, accuracy in enumerate(accuracies)
    ]
    rows += [(*row[:6], "loss", 1 - float(row[7])) for row in rows]
    columns = ["round", "seconds", "bytes_up", "bytes_down", "site", "split", "metric", "value"]
    return Run(
        configuration(seed=seed), pd.DataFrame(rows, columns=columns), {}, pd.DataFrame(), True
    )


def test_table_by_hand() -> None:
    runs = [
        artificial(1, [0.5, 0.7, 0.9, 0.8], 1800, 3),
        artificial(2, [0.2, 0.4, 0.6, 0.6], 3600, 3),
    ]
    table = Comparison({"a": runs}).table(target=0.7).loc["a"]
    assert table["accuracy", "mean"] == pytest.approx(0.7)
    assert table["accuracy", "s.e."] == pytest.approx(0.1)
    assert table["hours", "mean"] == pytest.approx(3)
    assert table["sigma", "mean"] == pytest.approx(0.025)
    assert table["jump", "mean"] == pytest.approx(0.05)
    assert table["rounds to 0.7", "mean"] == 2
    assert table["hours to 0.7", "mean"] == 1
    assert table["megabytes to 0.7", "mean"] == 6
    assert table["reached 0.7", "mean"] == 0.5
    text = Comparison({"a": runs}).text(target=0.7).loc["a"]
    assert text["accuracy"] == "0.70 ± 0.10"
    assert text["rounds"] == "4"


def test_table_for_a_paper() -> None:
    runs = {
        "a_1": [artificial(1, [0.5, 0.8], 1800, 3), artificial(2, [0.2, 0.6], 3600, 3)],
        "b & c": [artificial(1, [0.5, 0.9], 3600, 3)],
    }
    said = Comparison(runs).latex(target=0.7)
    lines = [line.strip() for line in said.splitlines()]
    assert r"\begin{tabular}{lrrrrrrrrrrr}" in lines
    assert {r"\toprule", r"\midrule", r"\bottomrule"} <= set(lines)
    assert "over seeds 1, 2; of b \\& c 1. Best in bold." in said
    names, first, second = (
        [cell.strip() for cell in line.removesuffix(r"\\").split("&")]
        for line in (each.replace(r"b \& c", "b") for each in lines)
        if line.endswith(r"\\")
    )
    table = {name: cells for name, *cells in zip(names[1:], first[1:], second[1:], strict=True)}
    assert [first[0], second[0]] == [r"a\_1", "b"]
    assert table["accuracy"] == [r"0.70 $\pm$ 0.10", r"\textbf{0.9}"]
    assert table["loss"] == [r"0.30 $\pm$ 0.10", r"\textbf{0.1}"]
    assert table["hours"] == [r"\textbf{1.50} $\pm$ 0.50", "2"]
    assert table["rounds"] == ["2", "2"]
    assert table["reached 0.7"] == [r"0.50 $\pm$ 0.50", r"\textbf{1}"]


def test_target_nobody_names_is_95_percent_of_the_best() -> None:
    comparison = Comparison(
        {"a": [artificial(1, [0.5, 0.8], 1, 1)], "b": [artificial(1, [0.3, 0.4], 1, 1)]}
    )
    assert "rounds to 0.76" in comparison.table().columns
    assert comparison.table()["reached 0.76", "mean"].to_dict() == {"a": 1, "b": 0}


def test_plots_show_every_strategy_by_round_hour_and_megabyte(comparison: Comparison) -> None:
    figure = comparison.plot()
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels[0] == "round"
    assert labels[1].startswith("time (")
    assert labels[2] == "sent and received (MB)"
    for axes in figure.axes:
        assert len(axes.lines) == 2
    end = comparison.table()["accuracy", "mean"].to_list()
    assert [line.get_ydata()[-1] for line in figure.axes[0].lines] == pytest.approx(end)  # type: ignore[index]
    best_first = [name for _, name in sorted(zip(end, STRATEGIES, strict=True), reverse=True)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == best_first
    with pytest.raises(ValueError, match=r"metric = 'nothing': measured were accuracy, .*loss"):
        comparison.plot("nothing")
    assert comparison.runs["Co-learning"][0].plot_sites().axes


def test_scale_is_that_of_the_later_part_of_all_lines() -> None:
    runs = {"a": [0.1, 0.8, 0.82, 0.84, 0.86], "b": [0.1, 0.5, 0.9, 0.89, 0.88]}
    figure = Comparison({k: [artificial(1, v, 1, 1)] for k, v in runs.items()}).plot()
    low, high = figure.axes[0].get_ylim()
    assert 0.5 < low < 0.6
    assert 0.9 < high < 0.95


def test_costs_to_a_target_and_who_is_best_in_both() -> None:
    """In time and bytes a, b, d need (1, 3), (2, 1), (2, 3); c does not get there."""
    found = Comparison(
        {
            "a": [artificial(1, [0.9], 3600, 3)],
            "b": [artificial(1, [0.9], 7200, 1)],
            "c": [artificial(1, [0.3], 1, 1)],
            "d": [artificial(1, [0.9], 7200, 3)],
        }
    ).plot_cost(target=0.9)
    (axes,) = found.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("hours to 0.9", "megabytes to 0.9")
    front, *points = (line.get_xydata().tolist() for line in axes.lines)  # type: ignore[union-attr]
    unit = front[0][0]
    assert [[x / unit, y / front[1][1]] for x, y in front] == [[1, 3], [2, 1]]
    assert len(points) == 3
    assert [text.get_text() for text in found.legends[0].get_texts()] == ["a", "b", "d"]


def test_progress_shows_the_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    run = simulate(**(SMALL | {"progress": True}))
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert f"accuracy={run.summary['accuracy']:.4f}" in shown
