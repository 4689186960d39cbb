"""Sources, on files that the tests make."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torchvision.io import write_png

from datasets.sources import Examples, SourceError, load, log_mel


def read(source: str, path: Path | str, **changes: Any) -> Examples:
    arguments: dict[str, Any] = {"label": "label", "group": "", "image_size": 8, "audio_seconds": 0.5, "text_buckets": 64} | changes
    return load(source, str(path), **arguments)


def test_digits_are_the_real_ones() -> None:
    examples = read("digits", "")
    assert examples.x.shape == (1797, 1, 8, 8)
    assert (examples.x.dtype, int(examples.x.max())) == (torch.uint8, 255)
    assert torch.bincount(examples.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for site in ("north", "south"):
        for label, colour in (("cat", 250), ("dog", 5)):
            (tmp_path / site / label).mkdir(parents=True)
            for index in range(3):
                picture = torch.full((3, 16, 12), colour, dtype=torch.uint8)
                write_png(picture, str(tmp_path / site / label / f"{index}.png"))
    return tmp_path


def test_image_folder(pictures: Path) -> None:
    examples = read("image-folder", pictures / "north")
    assert examples.x.shape == (6, 3, 8, 8)
    assert (examples.classes, examples.y.tolist(), examples.group) == (("cat", "dog"), [0, 0, 0, 1, 1, 1], None)
    assert examples.x.float().mean((1, 2, 3)).tolist() == [250.0] * 3 + [5.0] * 3


def test_top_folders_are_natural_sites(pictures: Path) -> None:
    examples = read("image-folder", pictures)
    assert examples.group is not None
    assert (examples.groups, examples.classes) == (("north", "south"), ("cat", "dog"))
    assert torch.bincount(examples.group).tolist() == [6, 6]


def test_natural_sites_by_regular_expression(pictures: Path) -> None:
    examples = read("image-folder", pictures / "north", group=r"(\d)\.png")
    assert examples.groups == ("0", "1", "2")


def test_picture_that_is_none_is_named(pictures: Path) -> None:
    (pictures / "north" / "cat" / "broken.png").write_text("not a picture")
    with pytest.raises(SourceError, match=r"broken\.png is not a picture"):
        read("image-folder", pictures)


def tone(frequency: float, rate: int, seconds: float) -> Any:
    return np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def test_log_mel_is_loudest_where_the_tone_is() -> None:
    """The centre of mel filter i of 40 over 0..4 kHz is at 2146.06 (i + 1) / 41 mel."""
    for frequency in (500.0, 1500.0, 3000.0):
        spectrum = log_mel(torch.from_numpy(tone(frequency, 8000, 1)).float()[None])[0]
        mel = 2595 * np.log10(1 + frequency / 700)
        assert abs(int(spectrum.mean(1).argmax()) - (mel * 41 / 2146.06 - 1)) <= 1


def test_audio_folder_reads_any_rate_width_and_number_of_channels(tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    (tmp_path / "high").mkdir()
    low, high = tone(400, 8000, 0.4), tone(2000, 22050, 0.9)
    wavfile.write(tmp_path / "low" / "a.wav", 8000, (low * 32000).astype(np.int16))
    wavfile.write(tmp_path / "low" / "b.wav", 8000, (low * 100 + 128).astype(np.uint8))
    wavfile.write(tmp_path / "high" / "c.wav", 22050, np.stack([high, high], 1).astype(np.float32))
    examples = read("audio-folder", tmp_path)
    assert examples.x.shape == (3, 1, 40, 32)  # 0.5 s at 8 kHz, a frame every 16 ms
    assert (examples.classes, examples.y.tolist()) == (("high", "low"), [0, 1, 1])
    loudest = examples.x[:, 0, :, 5:20].mean(2).argmax(1).tolist()
    assert loudest[0] > loudest[1] + 10
    assert abs(loudest[1] - loudest[2]) <= 1


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_csv_keeps_missing_values_for_the_site(tmp_path: Path) -> None:
    examples = read("csv", write(tmp_path / "t.csv", "age,label,dose\n50,sick,1.5\n,well,2.5\n70,sick,\n"))
    assert (examples.columns, examples.classes, examples.y.tolist()) == (("age", "dose"), ("sick", "well"), [0, 1, 0])
    assert examples.x.isnan().tolist() == [[False, False], [True, False], [False, True]]
    assert examples.group is None


def test_label_may_be_an_expression_whose_columns_are_no_features(tmp_path: Path) -> None:
    examples = read("csv", write(tmp_path / "t.csv", "age,target\n50,0\n60,3\n70,1\n"), label="target > 0")
    assert (examples.columns, examples.classes, examples.y.tolist()) == (("age",), ("False", "True"), [0, 1, 1])


def test_files_of_a_folder_are_natural_sites_and_so_is_a_column(tmp_path: Path) -> None:
    write(tmp_path / "rome.csv", "a,ward,label\n1,x,0\n2,y,1\n")
    write(tmp_path / "oslo.csv", "a,ward,label\n3,x,0\n")
    examples = read("csv", tmp_path, group="ward")
    assert (examples.groups, examples.columns) == (("x", "y"), ("a",))
    write(tmp_path / "rome.csv", "a,label\n1,0\n2,1\n")
    write(tmp_path / "oslo.csv", "a,label\n3,0\n")
    examples = read("csv", tmp_path)
    assert examples.group is not None
    assert (examples.groups, examples.group.tolist()) == (("oslo", "rome"), [0, 1, 1])


def test_text_becomes_bags_of_norm_one(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'label,text\nham,"see you, later"\nspam,WIN WIN now\nham,see you\n')
    examples = read("text-csv", path)
    assert examples.x.shape == (3, 64)
    torch.testing.assert_close(examples.x.float().norm(dim=1), torch.ones(3), rtol=1e-3, atol=0)  # float16
    similarity = examples.x.float() @ examples.x.float().T
    assert similarity[0, 2] > similarity[0, 1]


def my_own(path: str) -> Examples:
    assert path == "somewhere"
    return Examples(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), ("no", "yes"))


def wrong_labels(path: str) -> Examples:
    return Examples(torch.zeros(4, 3), torch.tensor([0, 1, 0, 2]), ("no", "yes"))


def not_examples(path: str) -> Any:
    return torch.zeros(3)


def test_own_source_by_import_path() -> None:
    assert read("tests.unit.test_sources:my_own", "somewhere").classes == ("no", "yes")


@pytest.mark.parametrize(
    ("source", "text", "changes", "message"),
    [
        ("csv", "a,label\nx,1\n", {}, "columns a are not numeric"),
        ("csv", "a,b\n1,1\n", {}, "label = 'label' is no column of .* expression of its columns: a, b"),
        ("csv", "a,label\n1,\n", {}, "label = 'label': 1 rows of .* have none"),
        ("csv", "label\n1\n", {}, "no column is left"),
        ("csv", "a,label\n1,1\n", {"group": "ward"}, "group = 'ward' is no column"),
        ("csv", "", {}, "is not a table"),
        ("text-csv", "body,label\nx,1\n", {}, "there is no column 'text'; columns: body, label"),
        ("tests.unit.test_sources:missing", "", {}, "data = 'tests.unit.test_sources:missing': .*missing"),
        ("tests.unit.test_sources:wrong_labels", "", {}, "y must lie between 0 and 1"),
        ("tests.unit.test_sources:not_examples", "", {}, "must return datasets.sources.Examples, it returned Tensor"),
    ],
)
def test_mistake_in_the_data_is_named(tmp_path: Path, source: str, text: str, changes: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(source, write(tmp_path / "t.csv", text), **changes)


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="data-path = '': this source needs"):
        read("csv", "")
    with pytest.raises(SourceError, match="there is no such file or folder"):
        read("csv", tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"no file ends in \.png"):
        read("image-folder", tmp_path)
    with pytest.raises(SourceError, match=r"no file ends in \.csv"):
        read("csv", tmp_path)
    (tmp_path / "a").mkdir()
    wavfile.write(tmp_path / "a" / "a.wav", 8000, np.zeros(9, dtype=np.int16))
    with pytest.raises(SourceError, match=r"group = '\(x\)' finds nothing in 'a/a.wav'"):
        read("audio-folder", tmp_path, group="(x)")


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_torchvision_set_that_is_not_there_says_where_it_looked(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    def no_network(*arguments: Any, **keywords: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(SourceError, match=f"is not under {tmp_path}.*name its folder with data-path"):
        read(name, tmp_path)
