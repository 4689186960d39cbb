"""Data larger than memory.

The same models wherever examples are and whoever reads them; errors that name what is wrong.
"""

import gc
import multiprocessing
import os
import signal
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from client_app import oracle, training
from client_app.oracle import nth_batch, order_of
from client_app.site import SiteId, site_data
from configuration.config import configuration
from configuration.errors import ConfigError
from datasets import lazy
from datasets.errors import SourceError
from datasets.lazy import Items, Lazy
from datasets.site import Moments, Part, SiteData
from datasets.tables import parquet
from server_app.discovery import RunError
from simulation.laboratory import simulate
from tests.data import write_audio
from tests.own_data import CLASSES, Numbers, Stuck, read_ahead

# More workers than there are cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
STREAMED = {"data.memory-gb": 1e-9}
OWN: dict[str, Any] = {"model.name": "mlp", "num-sites": 2, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of two classes, one of them grey."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for number in range(60):
        pixels = generator.integers(0, 128, (12, 12, 3)) + 127 * (number % 2)
        file = root / CLASSES[number % 2] / "images" / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).convert("RGB" if number else "L").save(file)
    return root


def pictures(folder: Path, **changes: Any) -> dict[str, Any]:
    keys = {
        "data.source": "image-folder",
        "data.path": str(folder),
        "data.image-size": 8,
        "model.name": "mlp",
    }
    return (
        keys
        | {
            "num-sites": 2,
            "epochs": 2,
            "training.batch-size": 8,
            "progress": False,
            "computing.device": "cpu",
        }
        | changes
    )


def vectors(**keys: Any) -> Tensor:
    run = simulate(**keys)
    assert run.finished
    return torch.cat(
        [value.double().reshape(-1) for model in run.models.values() for value in model.values()]
    )


def test_model_is_the_same_streamed_and_with_any_number_of_workers(folder: Path) -> None:
    keys = pictures(folder) | {
        "strategy": "fedavg",
        "fedavg.local-epochs": 1,
        "data.augment": "flip-crop",
    }
    in_memory = vectors(**keys)
    for workers in (0, 1, 3):
        streamed = keys | STREAMED | {"computing.workers": workers}
        assert torch.equal(vectors(**streamed), in_memory)
    torch.testing.assert_close(vectors(**streamed, engine="batched"), in_memory)


def test_peers_have_the_same_model_streamed_and_in_one_pass(folder: Path) -> None:
    keys = pictures(folder) | {"strategy": "d-psgd", "epochs": 1}
    in_memory = vectors(**keys)
    assert torch.equal(vectors(**keys | STREAMED | {"computing.workers": 1}), in_memory)
    torch.testing.assert_close(vectors(**keys | STREAMED | {"engine": "batched"}), in_memory)


def data_of(**keys: Any) -> tuple[Any, SiteData]:
    config = configuration(None, **{key: value for key, value in keys.items() if key != "progress"})
    return config, site_data(config, SiteId(0, 2, ""), CLASSES, None)


def test_nth_batch_is_the_same_at_random_and_one_after_the_other(folder: Path) -> None:
    config, memory = data_of(**pictures(folder))
    other, streamed = data_of(**pictures(folder, **STREAMED, **{"computing.workers": 2}))
    assert isinstance(streamed.train.x, Lazy)
    for number in (5, 0, 1, 2, 3, 1, 2, 9):
        wanted, found = (
            nth_batch(each, 0, data.train, number)
            for each, data in ((config, memory), (other, streamed))
        )
        assert torch.equal(wanted[0], found[0])
        assert torch.equal(wanted[1], found[1])
        if number == 2:  # a test in between takes the readers away
            assert [len(y) for _, y in training.chunks(streamed.test)] == [6]
    lazy.close()


def test_a_peer_draws_each_order_once_and_keeps_few(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = data_of(**pictures(folder), seed=17)
    drawn: list[weakref.ref[torch.Tensor]] = []

    def watched(*key: Any) -> torch.Tensor:
        order = order_of(*key)
        drawn.append(weakref.ref(order))
        return order

    monkeypatch.setattr(oracle, "order_of", watched)
    epochs, an_epoch = 5, training.num_batches(len(data.train.y), config.training.batch_size)
    for number in range(epochs * an_epoch):
        nth_batch(config, 0, data.train, number)
    assert len(drawn) == epochs
    assert [order() is not None for order in drawn] == [False, False, False, True, True]


def test_two_readings_side_by_side_lose_nothing(folder: Path) -> None:
    _, memory = data_of(**pictures(folder))
    _, streamed = data_of(**pictures(folder, **STREAMED))
    streamed = streamed._replace(
        train=streamed.train._replace(x=replace(streamed.train.x, workers=3))
    )
    lists = torch.arange(24).split(4)
    both = [lazy.stream(*streamed.train, lists), lazy.stream(*streamed.train, reversed(lists))]
    found = [[next(each) for each in both] for _ in lists]
    for number, (forward, backward) in enumerate(found):
        assert torch.equal(forward[0], memory.train.x[lists[number]])
        assert torch.equal(backward[0], memory.train.x[lists[-1 - number]])
    lazy.close()


def test_pictures_are_streamed_when_they_would_exceed_memory_gb(folder: Path) -> None:
    size = 60 * 3 * 8 * 8 / 2**30
    for memory, is_lazy in ((size * 0.99, True), (size * 1.01, False)):
        _, data = data_of(**pictures(folder, **{"data.memory-gb": memory}))
        assert isinstance(data.train.x, Lazy) == is_lazy
        assert tuple(data.train.x.shape) == (24, 3, 8, 8)


def test_grey_pictures_stay_grey_when_streamed(tmp_path: Path) -> None:
    for number in range(8):
        file = tmp_path / CLASSES[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(file)
    _, data = data_of(**pictures(tmp_path, **STREAMED))
    assert tuple(data.train.x.shape) == (3, 1, 8, 8)
    assert next(training.chunks(data.train))[0].shape == (3, 1, 8, 8)


def whole(data: SiteData) -> Part:
    """The data of all sites."""
    rows = torch.arange(len(data.train.x.reader))
    return Part(replace(data.train.x, rows=rows), rows % 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_picture_in_a_stream_ends_in_an_error_that_names_it(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    for file in folder.rglob("*.png"):
        copy = tmp_path / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes() if file.stem != "31" else file.read_bytes()[:-30])
    _, data = data_of(**pictures(tmp_path, **STREAMED, **{"computing.workers": workers}))
    batches = training.batches(whole(data), 4, torch.Generator().manual_seed(3), None)
    with pytest.raises(
        SourceError, match=r"^'.*light/images/31.png' is not a picture that can be read: \w+"
    ):
        list(batches)
    lazy.close()


def test_sounds_are_the_same_streamed(tmp_path: Path) -> None:
    write_audio(tmp_path)
    keys = pictures(tmp_path) | {
        "data.source": "audio-folder",
        "data.audio-seconds": 0.5,
        "epochs": 1,
    }
    del keys["data.image-size"]
    assert torch.equal(vectors(**keys | STREAMED), vectors(**keys))


def write_tables(folder: Path) -> None:
    """Two files of 120 rows in all, in row groups of 20; a value is missing."""
    generator = np.random.default_rng(1)
    for name in "ab":
        rows = pd.DataFrame(
            generator.normal(size=(60, 3)).astype(np.float32), columns=["p", "q", "r"]
        )
        rows["label"] = np.where(rows["p"] > 0, "light", "dark")
        rows.loc[3, "q"] = np.nan
        rows.to_parquet(folder / f"{name}.parquet", row_group_size=20)


def test_parquet_files_are_the_same_in_memory_and_decoded_into_a_mapped_file(
    tmp_path: Path,
) -> None:
    write_tables(tmp_path)
    keys = pictures(tmp_path) | {
        "data.source": "parquet",
        "partition.kind": "natural",
        "strategy": "fedavg",
    }
    del keys["data.image-size"]
    _, memory = data_of(**keys)
    _, streamed = data_of(**keys | STREAMED)
    assert isinstance(streamed.train.x, Lazy)
    wanted = torch.cat([x for x, _ in training.chunks(memory.train)])
    assert torch.equal(
        torch.cat([x for x, _ in training.chunks(streamed.train)]).nan_to_num(9),
        wanted.nan_to_num(9),
    )
    assert torch.equal(vectors(**keys | STREAMED), vectors(**keys))
    by_file = pd.read_parquet(tmp_path / "a.parquet").assign(p="text")
    by_file.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a.parquet'?: columns p are not numeric"):
        until_it_is_seen(keys)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match=r"a.parquet' is not a table that can be read"):
        until_it_is_seen(keys)


def until_it_is_seen(keys: dict[str, Any]) -> None:
    """Read streamed data until their change is seen: a look at the files holds for a moment."""
    while True:
        data_of(**keys | STREAMED)
        time.sleep(0.05)


# The processes that read.


def test_processes_that_read_end_with_a_parent_that_is_killed() -> None:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    parent = context.Process(target=read_ahead, args=[theirs])
    parent.start()
    readers = ours.recv()
    assert len(readers) == 2
    os.kill(parent.pid or 0, signal.SIGKILL)
    parent.join()
    while any(psutil.pid_exists(reader) for reader in readers):
        time.sleep(0.05)


def readers_there() -> set[int | None]:
    """Those of this process; other tests leave joblib's."""
    return {
        process.pid for process in multiprocessing.active_children() if "Loky" not in process.name
    }


def test_stream_that_somebody_holds_keeps_no_process_after_the_end() -> None:
    """As a peer does that reads one batch after the other, when its run is over."""
    x = replace(
        lazy.all_examples(Items(Numbers(60, labelled=False), labelled=False), (3,)), workers=1
    )
    batches = lazy.stream(x, torch.arange(60), torch.arange(60).split(4))
    next(batches)
    lazy.close()
    assert not readers_there()
    assert next(batches)[1].tolist() == [4, 5, 6, 7]
    lazy.close()


def test_deadline_while_a_batch_is_awaited_ends_the_readers_and_others_read_next() -> None:
    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    try:
        x = replace(
            lazy.all_examples(Items(Stuck(12, labelled=False), labelled=False), (3,)), workers=1
        )
        y = torch.arange(12)
        batches = lazy.stream(x, y, y.split(4))
        assert [next(batches)[1].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        readers = readers_there()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError):
            next(batches)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert next(lazy.stream(x, y, y[:8].split(4)))[1].tolist() == [0, 1, 2, 3]
    del batches
    gc.collect()
    assert not readers & readers_there()
    lazy.close()


# One's own.


def mine(name: str, **changes: Any) -> dict[str, Any]:
    keys = {
        "data.source": f"tests.own_data:{name}",
        "model.name": "mlp",
        "progress": False,
        "strategy": "fedavg",
    }
    return (
        keys
        | {"num-sites": 2, "epochs": 2, "training.batch-size": 8, "computing.device": "cpu"}
        | changes
    )


def test_own_data_set_is_the_same_with_its_labels_and_for_any_number_of_workers() -> None:
    wanted = vectors(**mine("labelled"))
    assert torch.equal(vectors(**mine("labelled", **{"computing.workers": 2})), wanted)
    assert torch.equal(vectors(**mine("with_labels")), wanted)
    assert torch.equal(vectors(**mine("labelled")), wanted)
    run = simulate(**mine("with_labels", **{"partition.kind": "dirichlet", "epochs": 8}))
    assert run.summary["accuracy"] > 0.8


def test_own_data_set_without_labels_in_memory_cannot_be_partitioned_by_class() -> None:
    with pytest.raises(
        Exception,
        match=r"partition.kind = 'dirichlet': the examples have no classes; allowed: "
        r"iid, sizes, natural",
    ):
        simulate(**mine("labelled", **{"partition.kind": "dirichlet"}))


def test_item_that_cannot_be_read_is_named() -> None:
    with pytest.raises(
        Exception,
        match=r"SourceError: example [67][0-9] of the data set cannot be read: KeyError: 'lost'",
    ):
        simulate(**mine("lost", epochs=2))


def test_class_of_an_item_that_has_no_name_is_refused() -> None:
    with pytest.raises(RunError, match=r"items of the data set hold y = 1; allowed: 0 to 0"):
        simulate(**OWN | {"data.source": "tests.own_data:beyond"})


def test_numbers_to_predict_come_as_a_tensor() -> None:
    with pytest.raises(RunError, match="numbers to predict come as a tensor y"):
        simulate(**OWN | {"data.source": "tests.own_data:labelled", "training.task": "regression"})


def test_what_a_killed_process_decoded_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pd.DataFrame({"age": range(60), "ill": [0, 1] * 30}).to_parquet(
        file := tmp_path / "table.parquet"
    )
    parquet(file, "ill", "", 1e-9)
    [decoded] = (tmp_path / "cache").rglob("*.float32")
    decoded.unlink()
    for name, age in (("old", 7200), ("young", 0)):
        part = decoded.with_name(f"{decoded.name.rpartition('-')[0]}-{name}")
        part.mkdir()
        (part / "rows").touch()
        os.utime(part / "rows", (time.time() - age,) * 2)
    parquet(file, "ill", "", 1e-9)
    assert [path.parent.name.rpartition("-")[2] for path in decoded.parent.glob("*/rows")] == [
        "young"
    ]


def test_parts_and_sites_of_a_table_have_one_reader(tmp_path: Path) -> None:
    """With each reader other processes would be started: two times a round and site."""
    pd.DataFrame({"age": range(60), "ill": [0, 1] * 30}).to_parquet(tmp_path / "table.parquet")
    keys: dict[str, Any] = {
        "data.source": "parquet",
        "data.path": str(tmp_path),
        "data.label": "ill",
        "model.name": "mlp",
    }
    config, common = (
        configuration(None, **keys | STREAMED | {"num-sites": 2}),
        Moments((60.0,), (29.5,), (300.0,)),
    )
    parts = [
        part
        for site in range(2)
        for part in site_data(config, SiteId(site, 2, ""), ("0", "1"), common)[:2]
    ]
    assert len({part.x.reader for part in parts}) == 1


def test_iterable_data_set_is_read_in_its_order_once_an_epoch() -> None:
    official = {"data.test-part": "official"}
    config = configuration(
        None, **{key: value for key, value in mine("flow", **official).items() if key != "progress"}
    )
    data = site_data(config, SiteId(0, 2, ""), CLASSES, None)
    for _ in range(2):
        batches = list(training.batches(data.train, 5, torch.Generator().manual_seed(1), None))
        places = torch.cat([x[:, 2] for x, _ in batches])
        assert [len(y) for _, y in batches] == [5, 5, 5, 5, 4]
        assert torch.equal(places, places.sort().values)
    other = site_data(config, SiteId(1, 2, ""), CLASSES, None)
    rest = torch.cat([x[:, 2] for x, _ in training.chunks(other.train)])
    torch.testing.assert_close(torch.cat([places, rest]).sort().values * 48, torch.arange(48.0))
    wanted = vectors(**mine("flow", **official))
    assert torch.equal(vectors(**mine("flow", **official, **{"computing.workers": 3})), wanted)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "flow",
            {},
            "data.test-part = 'own': an IterableDataset cannot be split; allowed: 'official'",
        ),
        (
            "untested",
            {},
            "beside an IterableDataset of .x, y., y is None and test a map-style Dataset",
        ),
        ("endless", {}, "Endless: a torch Dataset needs a length"),
        (
            "flow",
            {"strategy": "d-psgd", "data.test-part": "official"},
            "strategy = 'd-psgd': an IterableDataset is read from its",
        ),
        (
            "flow",
            {"strategy": "diloco", "data.test-part": "official"},
            "allowed: methods with local-epochs",
        ),
    ],
)
def test_what_an_iterable_data_set_cannot_do_is_said(
    name: str, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(Exception, match=expected):
        simulate(**mine(name, **changes))


def test_workers_without_effect_are_an_error() -> None:
    with pytest.raises(
        ConfigError,
        match=r"computing.workers = 2: has no effect with data.source = 'digits', "
        r"which is in memory",
    ):
        configuration(None, **{"computing.workers": 2})
