"""Language: streams of bytes and of tokens, cut into windows."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client_app import training
from client_app.site import SiteId, site_data
from configuration.config import Config, configuration
from configuration.errors import ConfigError
from datasets.examples import TOKEN, Examples
from datasets.lazy import read
from datasets.sources import SourceError, load

NOTHING = {
    "label": "label",
    "group": "",
    "image_size": 8,
    "audio_seconds": 1.0,
    "text_buckets": 8,
    "target": "tokens",
}


def language(
    source: str, path: Path, context: int = 4, vocabulary: int = 256, group: str = ""
) -> Examples:
    more: dict[str, Any] = {**NOTHING, "group": group}
    return load(source, str(path), context=context, vocabulary=vocabulary, **more)


def windows(examples: Examples) -> tuple[list[list[int]], list[list[int]]]:
    x, y = read(examples.x, examples.y, torch.arange(len(examples.y)))
    assert (x.dtype, y.dtype, examples.classes) == (torch.int64, torch.int64, TOKEN)
    return x.tolist(), y.tolist()


def test_documents_are_bytes_with_a_zero_between_them_cut_into_windows_that_share_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "texts.csv").write_text('text,other\n"ab",1\n"ü",2\n"cdef",3\n')
    stream = [*b"ab\0", *"ü".encode(), *b"\0cdef"]
    x, y = windows(language("text-bytes", tmp_path / "texts.csv"))
    assert x == [stream[0:4], stream[4:8]]
    assert y == [stream[1:5], stream[5:9]]


def test_column_names_the_natural_sites_and_no_window_holds_bytes_of_two(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text,topic\n" + "aaaaa,sport\nbbbbb,world\n" * 4)
    examples = language("text-bytes", tmp_path, group="topic")
    x, _ = windows(examples)
    assert examples.groups == ("sport", "world")
    assert examples.group is not None
    assert examples.group.tolist() == [0] * 5 + [1] * 5  # 23 bytes of each
    assert {tuple(sorted(set(window) - {0})) for window in x} == {tuple(b"a"), tuple(b"b")}


def test_folder_of_text_files_has_its_top_folders_as_sites(tmp_path: Path) -> None:
    for name, letter in (("x/1", "a"), ("x/2", "b"), ("y/1", "c")):
        file = tmp_path / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(letter * 8)
    examples = language("text-bytes", tmp_path)
    assert examples.groups == ("x", "y")
    assert [bytes(window) for window in windows(examples)[0]] == [
        b"aaaa",
        b"aaaa",
        b"\0bbb",
        b"bbbb",
        b"cccc",
    ]
    (tmp_path / "x/1.txt").write_bytes(b"\xff")
    with pytest.raises(SourceError, match=r"x/1.txt' is not a text in UTF-8 that can be read"):
        language("text-bytes", tmp_path)


def test_files_named_train_and_test_are_the_official_parts(tmp_path: Path) -> None:
    np.arange(9, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(100, 105, dtype="<u2").tofile(tmp_path / "val.bin")
    examples = language("tokens", tmp_path)
    assert windows(examples)[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [100, 101, 102, 103]]
    assert (examples.test is not None and examples.test.tolist(), examples.group) == (
        [False, False, True],
        None,
    )
    (tmp_path / "train.csv").write_text("text\n" + "aaaaaaaa\n" * 2)
    (tmp_path / "test.csv").write_text("text\n" + "bbbbbbbb\n" * 2)
    texts = language("text-bytes", tmp_path)
    assert texts.test is not None
    assert [set(x) - {0} for x in windows(texts)[0]] == [
        {ord("b") if test else ord("a")} for test in texts.test.tolist()
    ]
    for source in ("tokens", "text-bytes"):
        config = run(
            tmp_path,
            **{"data.source": source, "data.test-part": "official", "num-sites": 1, "min-sites": 1},
        )
        data = site_data(config, SiteId(0, 1, ""), TOKEN, None)
        assert len(data.test.y) == (1 if source == "tokens" else int(texts.test.sum()))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32"])
def test_files_of_tokens_are_natural_sites(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.arange(ord(name), ord(name) + 10, dtype=kind))
    examples = language("tokens", tmp_path, vocabulary=200)
    x, y = windows(examples)
    assert (x[0], y[0], x[2], y[3]) == (
        [97, 98, 99, 100],
        [98, 99, 100, 101],
        [98, 99, 100, 101],
        [103, 104, 105, 106],
    )
    assert (examples.groups, examples.group is not None and examples.group.tolist()) == (
        ("a", "b"),
        [0, 0, 1, 1],
    )


def test_what_is_wrong_with_tokens_is_said_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    np.save(file, np.array([1, 2, 3, 4, 300, 5, 6, 7, 8], dtype=np.uint16))
    with pytest.raises(SourceError, match=r"a.npy' holds the token 300: data.vocabulary = 256"):
        windows(language("tokens", file))
    with pytest.raises(
        SourceError, match=re.escape("0 windows of data.context + 1 = 65 tokens in 9; at least 2")
    ):
        language("tokens", file, context=64)
    np.save(file, np.zeros((3, 3), dtype=np.int64))
    with pytest.raises(
        SourceError,
        match=r"a.npy' is not a file of tokens .* int64 \[3, 3\]; allowed: one row of uint16",
    ):
        language("tokens", file)
    with pytest.raises(SourceError, match=r"no file ends in .bin, .npy"):
        language("tokens", Path(__file__))


def run(path: Path, **keys: object) -> Config:
    common = {
        "training.task": "language",
        "data.source": "text-bytes",
        "data.path": str(path),
        "data.context": 4,
        "num-sites": 2,
    }
    return configuration(None, **common | keys)


def test_batches_and_chunks_of_a_site_are_int64_and_its_partition_needs_no_classes(
    tmp_path: Path,
) -> None:
    (tmp_path / "texts.csv").write_text("text,topic\n" + "aaaaa,sport\nbbbbb,world\n" * 40)
    for kind, group in (("iid", ""), ("sizes", ""), ("natural", "topic")):
        config = run(tmp_path, **{"partition.kind": kind, "data.group": group})
        data = site_data(config, SiteId(0, 2, ""), TOKEN, None)
        batches = list(training.batches(data.train, 8, torch.Generator().manual_seed(1), None))
        assert {(x.dtype, x.shape[1:], y.dtype, y.shape[1:]) for x, y in batches} == {
            (torch.int64, (4,), torch.int64, (4,))
        }
        assert all(
            torch.equal(x[:, 1:], y[:, :-1]) for x, y in [*batches, *training.chunks(data.test)]
        )
        assert sum(len(y) for _, y in batches) == len(data.train.y)
    for kind in ("dirichlet", "dirichlet-equal", "classes"):
        with pytest.raises(
            ConfigError,
            match=f"partition.kind = '{kind}': .* no classes; allowed: iid, sizes, natural",
        ):
            run(tmp_path, **{"partition.kind": kind})
