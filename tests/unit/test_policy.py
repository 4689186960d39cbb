"""The operator's file: what of it is not there is said before any request comes.

There is no way around a rule.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import MetricRecord
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from client_app import framing, policy, service
from client_app.framing import FrameError
from client_app.policy import (
    PolicyError,
    SiteFile,
    check_holdings,
    check_machine,
    check_paths,
    check_processes,
    check_run,
    read_site,
    withhold,
)
from client_app.ranks import Ranks
from client_app.site import SiteId, raw_data
from configuration.config import Config, configuration
from tests.data import write_numbers

PRIVACY = {"clip-norm": 1.0, "noise-multiplier": 8.0, "epsilon": 8.0, "delta": 0.001}


def site(folder: Path, **keys: Any) -> SiteFile:
    return SiteFile.model_validate(
        {"site": 0, "socket": str(folder / "s"), "data": {"source": "digits"}} | keys
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"socket": ""}, "socket = '': a path of 1 to 107 bytes"),
        ({"socket": "/tmp/" + "a" * 103}, "a path of 1 to 107 bytes is expected"),
        ({"socket": "HERE/file"}, "something else is there"),  # it was deleted
        ({"socket": "HERE/file/s"}, "file/s': this user must not write there"),
        ({"audit": "HERE/none/audit"}, "audit': its folder is not there"),
        ({"audit": "HERE"}, "audit = '"),
        ({"state": "HERE/file"}, "state = '"),
        ({"save": "HERE/file/model"}, "save = '"),
        ({"group": "no such group"}, "group = 'no such group': there is no such group"),
        ({"policy": {"models": ["mlq"]}}, "policy.models = 'mlq': allowed: cnn, mlp"),
        (
            {"policy": {"import-paths": ["no.such:THING"]}},
            "policy.import-paths = 'no.such:THING': it cannot be imported",
        ),
        (
            {"policy": {"import-paths": ["json:no"]}},
            "policy.import-paths = 'json:no': it cannot be imported",
        ),
    ],
    ids=str,
)
def test_what_is_not_there_is_named_with_its_key(
    keys: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    check_machine(
        site(tmp_path, state=str(tmp_path / "new" / "state"), audit=str(tmp_path / "audit"))
    )
    (tmp_path / "file").write_text("keep me")
    here = {
        key: value.replace("HERE", str(tmp_path)) if isinstance(value, str) else value
        for key, value in keys.items()
    }
    with pytest.raises(PolicyError) as error:
        check_machine(site(tmp_path, **here))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"policy": {"strategies": ["fedvag"]}}, "policy.strategies: 'fedvag' is no method; allow"),
        ({"policy": {"tasks": ["guess"]}}, "policy.tasks: 'guess' is no task; allowed: classifi"),
        ({"private-key": "key"}, "private-key and peer-keys belong together"),
        ({"name": "a" * 100}, "name: "),
        ({"page": "nowhere"}, "page: "),
        ({"privacy": PRIVACY}, "privacy needs state, a folder in which"),
        ({"privacy": PRIVACY, "state": "s"}, "privacy: metrics leave without noise"),
        ({"policy": {"sealing": "keys"}}, "policy.sealing = 'keys' needs private-key and peer-"),
        ({"polici": {}}, "polici: {}: unknown key"),
        ({"site": "one"}, "site: 'one': "),
    ],
    ids=str,
)
def test_what_does_not_go_together_in_the_file_is_named(
    keys: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "site.toml"
    right = {"site": 0, "socket": "s", "data": {"source": "digits"}}
    file.write_text(tomli_w.dumps(right))
    assert read_site(file).site == 0
    file.write_text(tomli_w.dumps(right | keys))
    with pytest.raises(PolicyError) as error:
        read_site(file)
    assert str(error.value).startswith(f"{file}: {expected}")


@pytest.mark.parametrize(
    ("rules", "asked", "refused"),
    [
        ({"strategies": ["fedavg"]}, {"strategy": "gsgm"}, "strategy = 'gsgm'"),
        ({"models": ["mlp"]}, {"model.name": "cnn"}, "model.name = 'cnn'"),
        ({"tasks": ["language"]}, {}, "training.task = 'classification'"),
        ({"sealing": "keys"}, {"strategy": "dmsgd"}, "wire.sealing = 'off'"),
        ({"smallest-batch": 33}, {}, "training.batch-size = 32"),
    ],
    ids=str,
)
def test_a_run_that_breaks_a_rule_is_refused_with_the_rule(
    rules: dict[str, Any], asked: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    check_run(site(tmp_path).policy, configuration(**asked))
    with pytest.raises(PolicyError) as error:
        check_run(site(tmp_path, policy=rules).policy, configuration(**asked))
    assert refused in str(error.value)
    assert next(iter(rules)) in str(error.value)


def test_shards_need_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "SHARDS", False)
    with pytest.raises(PolicyError, match=r"sharding = True: torch 2.15 or newer is needed, here"):
        check_processes(site(tmp_path, sharding=True), 2)
    monkeypatch.setattr(policy, "SHARDS", True)
    check_processes(site(tmp_path), 1)
    check_processes(site(tmp_path, sharding=True), 2)
    with pytest.raises(
        PolicyError,
        match="sharding = True: there is one process; allowed: false, or torchrun with 2",
    ):
        check_processes(site(tmp_path, sharding=True), 1)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"policy": {"smallest-batch": 243}},
            "policy.smallest-batch = 243: this site has 242 training examples",
        ),
        ({"policy": {"smallest-examples": 243}}, "policy.smallest-examples = 243"),
        (
            {"privacy": {"clip-norm": 1, "noise-multiplier": 8, "epsilon": 8, "delta": 0.01}},
            "privacy.delta = 0.01: less than 1 / 242",
        ),
    ],
    ids=str,
)
def test_rules_fit_what_the_site_holds(keys: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as error:
        check_holdings(
            SiteFile.model_validate(
                site(tmp_path).model_dump(by_alias=True, exclude_none=True) | keys, strict=False
            ),
            242,
        )
    assert expected in str(error.value)


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e12", "1e-9"])
def test_seconds_are_such_as_a_clock_takes(seconds: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        f'site = 0\nsocket = "s"\n[data]\nsource = "digits"\n[policy]\nseconds = {seconds}\n'
    )
    with pytest.raises(PolicyError, match=r"policy\.seconds"):
        read_site(tmp_path / "site.toml")


@pytest.mark.parametrize(
    "asked",
    [
        {"wire.cross_codec": "this:x"},
        {"wire": {"cross-codec": "this:x"}},
        {"wire.cross-codec": "this:x"},
    ],
    ids=str,
)
def test_no_spelling_of_a_key_is_a_way_around_import_paths(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    found = site(tmp_path)
    with pytest.raises(PolicyError, match="import-paths"):
        check_paths(found.policy, found.run_config(asked))


def test_a_site_says_for_which_tasks_its_data_are(tmp_path: Path) -> None:
    write_numbers(tmp_path / "table.csv")
    data = {"source": "csv", "path": str(tmp_path / "table.csv"), "label": "pressure"}
    found = site(tmp_path, data=data)
    assert "to predict: pressure (regression; these names leave the site)" in service.report(found)
    only = site(tmp_path, data=data, policy={"tasks": ["classification"]})
    with pytest.raises(ValueError, match="240 different classes, at most 100 may leave a site"):
        service.report(only)
    with pytest.raises(
        PolicyError,
        match=r"training.task = 'regression': this site's policy has tasks = \['classification'\]",
    ):
        check_run(only.policy, Config.read(found.run_config({"training.task": "regression"})))


def test_of_what_metrics_are_made_leaves_only_where_the_policy_has_it_and_rounded(
    tmp_path: Path,
) -> None:
    record: dict[str, Any] = {"loss": 0.123456, "means": [0.123456, 12.3456], "num-examples": 100}
    for metrics, left in (
        (["loss", "means"], {"loss": 0.123, "means": [0.123, 12.35], "num-examples": 100}),
        (["means"], None),
    ):
        found, policy = MetricRecord(record), site(tmp_path, policy={"metrics": metrics}).policy
        withhold(policy, found, 100)
        assert dict(found) == (left or {"means": [0.123, 12.35], "num-examples": 100})
        withhold(policy, few := MetricRecord(record), 31)
        assert dict(few) == {"num-examples": 100}
    withhold(site(tmp_path).policy, found := MetricRecord(record), 100)
    assert "means" not in found


@pytest.mark.parametrize(
    "asked", [{"data": {"path": "/etc"}}, {"data.image_size": 8}, {"data.path": "/etc"}], ids=str
)
def test_no_spelling_of_a_key_is_a_way_to_other_data(asked: dict[str, Any], tmp_path: Path) -> None:
    assert site(tmp_path).run_config(asked) == site(tmp_path).run_config({})


def test_a_large_loss_tells_no_more_digits_than_a_small_one(tmp_path: Path) -> None:
    for value, expected in (
        (0.83619, 0.836),
        (8.3619, 8.362),
        (836.19123, 836.2),
        (8361912.3, 8362000.0),
        (1e30 / 3, 3.333e29),
    ):
        metrics = MetricRecord({"loss": value})
        withhold(site(tmp_path).policy, metrics, 100)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-12)


def test_the_test_part_of_a_deployed_site_is_the_same_in_all_runs() -> None:
    """A run's seed must not choose the split: many splits would reveal each example.

    Moments of many halves are as many equations for it; and a test example was trained on.
    """
    one, other = (raw_data(configuration(seed=seed), SiteId(0, None, "")) for seed in (1, 2))
    assert one.train.y.tolist() == other.train.y.tolist()
    assert (
        raw_data(configuration(seed=1), SiteId(1, None, "")).train.y.tolist()
        != one.train.y.tolist()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": "../x"},
        {"run": 2**64},
        {"run": -1},
        {"node": True},
        {"kind": "q" * 65},
        {"kind": "a\n"},
        {"run-config": []},
    ],
    ids=str,
)
def test_a_head_is_that_of_a_message(wrong: dict[str, Any]) -> None:
    right = {"kind": "query.site", "run": 2**63, "node": 5, "run-config": {}}
    framing.check_head(right)
    with pytest.raises(FrameError):
        framing.check_head(right | wrong)


@pytest.mark.parametrize("text", ["", "[[1", "[[1]]", "{}x", "3", '[["a", 1, "b"]]'])
def test_damaged_list_of_runs_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(PolicyError, match=r"runs\.json is damaged"):
        service.Service(site(tmp_path, state=str(tmp_path)), Ranks())


def test_a_clock_that_is_set_back_ends_no_runs_for_years(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, now = tmp_path / "runs.json", time.time()
    file.write_text(json.dumps([[now + 1e9, 1, "x"]]))
    recent_runs = service.RecentRuns(file)
    with pytest.raises(PolicyError, match="runs-a-day = 1"):
        recent_runs.add(2, "x", 1)
    monkeypatch.setattr(time, "time", lambda: now + 90_000)
    recent_runs.add(2, "x", 1)


def test_temporary_files_lie_where_nobody_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile unpickles what it finds in a folder of a known name for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(sys, "argv", ["service", str(tmp_path / "missing.toml")])
    with pytest.raises(SystemExit, match=r"missing\.toml"):
        service.main()
    assert Path(default_cache_dir()).is_relative_to(tmp_path)
    assert (tmp_path / "archipelago" / "temporary").stat().st_mode & 0o777 == 0o700
