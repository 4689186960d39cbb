"""Networks that start from a file, of which only some parameters are trained and sent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors.torch import load_file, save_file

from configuration.config import configuration
from configuration.errors import ConfigError
from models.flat import FlatModel
from models.networks import build
from models.pretrained import digest, freeze, start_from
from server_app.discovery import RunError
from simulation.laboratory import simulate
from tests.app.stubs import NETWORK, Answer, network, outcome

SHORT: dict[str, Any] = {"num_sites": 3, "epochs": 2, "progress": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network that knows digits a little, without its last layer."""
    folder = simulate(**SHORT | {"epochs": 1}, strategy="fedavg").save(
        tmp_path_factory.mktemp("before")
    )
    state = {
        name: value
        for name, value in load_file(folder / "model.safetensors").items()
        if not name.startswith("11.")
    }
    save_file(state | {"more": torch.zeros(3)}, folder / "part.safetensors")
    return str(folder / "part.safetensors")


@pytest.mark.parametrize("strategy", ["co-learning", "scaffold", "ensemble", "gsgm", "dmsgd"])
def test_what_is_not_trained_stays_and_is_not_sent(strategy: str, checkpoint: str) -> None:
    run = simulate(
        **SHORT, strategy=strategy, model={"initial": checkpoint, "trainable": "11.* 9.bias"}
    )
    before = load_file(checkpoint)
    for state in run.models.values():
        for name, value in state.items():
            if name in before:
                assert torch.equal(value, before[name]) == (name != "9.bias"), name
    sent = sum(
        value.numel()
        for name, value in next(iter(run.models.values())).items()
        if name.startswith(("11.", "9.bias"))
    )
    whole = simulate(**SHORT, strategy=strategy)
    of_all = sum(value.numel() for value in next(iter(whole.models.values())).values())
    share = run.summary["megabytes"] / whole.summary["megabytes"]
    assert share < 3 * sent / of_all + 0.1
    assert run.summary["accuracy"] > 0.3


def test_it_starts_where_the_file_ends(checkpoint: str) -> None:
    cold, warm = simulate(**SHORT), simulate(**SHORT, model={"initial": checkpoint})
    assert warm.history["accuracy"].iloc[0] > cold.history["accuracy"].iloc[0] + 0.02


def test_what_does_not_fit_is_said(checkpoint: str, tmp_path: Path) -> None:
    text = start_from(build("cnn", (1, 8, 8), 10, 1), checkpoint)
    assert (
        "10 of 12 tensors taken; 2 left as initialised, not in the file: 11.weight, 11.bias" in text
    )
    assert "1 in the file, but not in the network: more" in text
    other = start_from(build("cnn", (3, 8, 8), 10, 1), checkpoint)
    assert "1 of another shape, left as initialised: 0.weight" in other
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"nothing of it fits; the network has 1\.weight, .*, the file a"
    ):
        start_from(build("mlp", (1, 8, 8), 10, 1), str(tmp_path / "a.safetensors"))
    for path in (str(tmp_path / "none"), str(Path(__file__))):
        with pytest.raises(ValueError, match=r"model\.initial = "):
            start_from(build("mlp", (1, 8, 8), 10, 1), path)


@pytest.mark.parametrize(("key", "value"), [("initial", "/nowhere"), ("trainable", "layer9.*")])
def test_mistakes_end_the_run_with_the_key(key: str, value: str) -> None:
    with pytest.raises((ConfigError, RunError, ValueError)) as error:
        simulate(**SHORT, model={key: value})
    assert f"model.{key} = {value!r}" in str(error.value)


def test_batch_norm_that_is_not_trained_keeps_its_statistics() -> None:
    network = build("torchvision:resnet18", (3, 32, 32), 10, 1)
    freeze(network, "fc.*")
    model, before = (
        FlatModel(network),
        {name: value.clone() for name, value in network.state_dict().items()},
    )
    assert (model.x.numel(), model.num_stats) == (5130, 0)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    trained = network.train()(x)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.testing.assert_close(trained, network.eval()(x))


def test_statistics_of_what_is_trained_are_sent() -> None:
    network = build("torchvision:resnet18", (3, 32, 32), 10, 1)
    freeze(network, "layer4.* fc.*")
    model = FlatModel(network)
    assert all(name.startswith("layer4.") for name in model.buffer_names)
    assert 0 < int(model.variances.sum()) == model.num_stats // 2


def test_sites_with_another_file_or_none_are_left_out(tmp_path: Path) -> None:
    file = str(tmp_path / "initial.safetensors")
    save_file(network((1, 2, 2), 2).state_dict(), file)

    def spoil(site: int, message: Message, content: RecordDict) -> Answer:
        if message.metadata.message_type == "query.site" and site != 2:
            content.config_records["config"]["initial"] = "0" * 64 if site == 1 else digest(file)
        return content

    config = configuration(
        strategy="fedavg", num_sites=4, epochs=1, model={"name": NETWORK, "initial": file}
    )
    found = outcome(config, spoil)
    assert found.error is None
    assert [site.number for site in found.federation.sites] == [0, 3]


def test_file_that_is_not_there_ends_the_run_before_a_site_is_asked() -> None:
    asked: list[int] = []

    def watch(site: int, message: Message, content: RecordDict) -> Answer:
        asked.append(site)
        return content

    found = outcome(configuration(num_sites=4, model={"initial": "/nowhere"}), watch)
    assert "model.initial = '/nowhere'" in str(found.error)
    assert asked == []
