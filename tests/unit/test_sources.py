"""Sources, on files that the tests make."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from torchvision.io import write_png

from datasets.sources import SOURCES, Examples, SourceError, check, load, log_mel
from datasets.tables import csv


def read(source: str, path: Path | str, **changes: Any) -> Examples:
    arguments: dict[str, Any] = {
        "label": "label",
        "group": "",
        "image_size": 8,
        "audio_seconds": 0.5,
        "text_buckets": 64,
    } | changes
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
    assert (examples.classes, examples.y.tolist(), examples.group) == (
        ("cat", "dog"),
        [0, 0, 0, 1, 1, 1],
        None,
    )
    assert examples.x.float().mean((1, 2, 3)).tolist() == [250.0] * 3 + [5.0] * 3


def test_top_folders_are_natural_sites(pictures: Path) -> None:
    examples = read("image-folder", pictures)
    assert examples.group is not None
    assert (examples.groups, examples.classes) == (("north", "south"), ("cat", "dog"))
    assert torch.bincount(examples.group).tolist() == [6, 6]


def write_pictures(root: Path, *paths: str, mode: str = "RGB") -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (9, 7), 77 if mode == "L" else (9, 99, 199)).save(root / path)
    return root


CLASSES = ("cat/a.png", "cat/b.png", "dog/a.png")


@pytest.mark.parametrize("parts", [("train", "test"), ("training", "val")])
@pytest.mark.parametrize("below", ["", "north/"])
def test_folders_train_and_test_are_the_official_parts(
    parts: tuple[str, str], below: str, tmp_path: Path
) -> None:
    paths = [f"{part}/{below}{path}" for part in parts for path in CLASSES]
    examples = read("image-folder", write_pictures(tmp_path, *paths))
    assert examples.classes == ("cat", "dog")
    assert examples.groups == (("north",) if below else ())
    assert examples.test is not None
    assert examples.test.tolist() == [path.startswith(parts[1]) for path in sorted(paths)]


def test_one_name_of_all_lowest_folders_is_no_class(tmp_path: Path) -> None:
    """As Tiny-ImageNet has them."""
    examples = read(
        "image-folder",
        write_pictures(tmp_path, *(path.replace("/", "/images/") for path in CLASSES)),
    )
    assert (examples.classes, examples.group) == (("cat", "dog"), None)


def test_folders_at_different_depths_are_asked_about(tmp_path: Path) -> None:
    write_pictures(tmp_path, *CLASSES, "north/cat/c.png", "north/dog/c.png")
    with pytest.raises(
        SourceError,
        match=r"is it CLASS/file or SITE/CLASS/file\? '(cat|dog)/.*' and 'north/dog/c.png' lie at",
    ):
        read("image-folder", tmp_path)


def test_pictures_stay_grey_where_all_are(tmp_path: Path) -> None:
    grey = write_pictures(tmp_path, *CLASSES, mode="L")
    assert read("image-folder", grey).x.unique().tolist() == [77]
    assert read("image-folder", grey).x.shape == (3, 1, 8, 8)
    assert read("image-folder", grey, channels=3).x.shape == (3, 3, 8, 8)
    write_pictures(tmp_path, "dog/b.png")
    assert read("image-folder", grey).x.shape == (4, 3, 8, 8)
    assert read("image-folder", grey, channels=1).x.shape == (4, 1, 8, 8)


def test_natural_sites_by_regular_expression(pictures: Path) -> None:
    examples = read("image-folder", pictures / "north", group=r"(\d)\.png")
    assert examples.groups == ("0", "1", "2")


def test_picture_that_is_none_is_named(pictures: Path) -> None:
    (pictures / "north" / "cat" / "broken.png").write_text("not a picture")
    with pytest.raises(SourceError, match=r"broken\.png' is not a picture"):
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


def test_a_label_made_of_missing_values_is_refused(tmp_path: Path) -> None:
    """A comparison would make no of them."""
    (tmp_path / "table.csv").write_text("age,dose\n1,2\n2,\n3,4\n4,\n")
    for label in ("dose", "dose > 3", "age > 2 or dose > 3"):
        with pytest.raises(SourceError, match=f"data.label = '{label}': 2 rows of .* have none"):
            csv(tmp_path / "table.csv", label, "")


def test_csv_keeps_missing_values_for_the_site(tmp_path: Path) -> None:
    examples = read(
        "csv", write(tmp_path / "t.csv", "age,label,dose\n50,sick,1.5\n,well,2.5\n70,sick,\n")
    )
    assert (examples.columns, examples.classes, examples.y.tolist()) == (
        ("age", "dose"),
        ("sick", "well"),
        [0, 1, 0],
    )
    assert examples.x.isnan().tolist() == [[False, False], [True, False], [False, True]]
    assert examples.group is None


def test_label_may_be_an_expression_whose_columns_are_no_features(tmp_path: Path) -> None:
    examples = read(
        "csv", write(tmp_path / "t.csv", "age,target\n50,0\n60,3\n70,1\n"), label="target > 0"
    )
    assert (examples.columns, examples.classes, examples.y.tolist()) == (
        ("age",),
        ("False", "True"),
        [0, 1, 1],
    )


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


def test_text_becomes_bags_of_mean_square_one(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv", 'label,text\nham,"see you, later"\nspam,WIN WIN now\nham,see you\n'
    )
    examples = read("text-csv", path)
    assert examples.x.shape == (3, 64)
    # In float16.
    torch.testing.assert_close(
        examples.x.float().square().mean(1), torch.ones(3), rtol=2e-3, atol=0
    )
    similarity = examples.x.float() @ examples.x.float().T
    assert similarity[0, 2] > similarity[0, 1]


def my_own(path: str) -> Examples:
    assert path == "somewhere"
    return Examples(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), ("no", "yes"))


NUMBER = 1


def not_examples(path: str) -> Any:
    return torch.zeros(3)


def test_files_with_other_columns_name_these(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age,pulse,label\n1,2,0\n")
    for columns, text in (
        ("age,puls,label", "puls, pulse"),
        ("pulse,age,label", "their order"),
    ):
        (tmp_path / "b.csv").write_text(f"{columns}\n1,2,1\n")
        with pytest.raises(SourceError, match=rf"b.csv' has other columns than .*a.csv': {text}$"):
            read("csv", tmp_path)


def test_own_source_by_import_path() -> None:
    assert read("tests.unit.test_sources:my_own", "somewhere").classes == ("no", "yes")


@pytest.mark.parametrize(
    ("source", "text", "changes", "message"),
    [
        ("csv", "a,label\nx,1\ny,0\n", {}, "columns a are not numeric"),
        (
            "csv",
            "a,b\n1,1\n2,1\n",
            {},
            r"data\.label = 'label' is no column of .* of its columns: a, b; ",
        ),
        ("csv", "a,label\n1,\n2,1\n", {}, r"data\.label = 'label': 1 rows of .* have none"),
        ("csv", "label\n1\n2\n", {}, "no column is left"),
        ("csv", "a,label\n1,1\n2,2\n", {"group": "ward"}, r"data\.group = 'ward' is no column"),
        ("csv", "", {}, "is not a table"),
        (
            "csv",
            '"a\nb",label\n1,1\n2,1\n',
            {},
            "columns: name 1 of 1 holds characters that cannot be printed",
        ),
        (
            "text-csv",
            "body,label\nx,1\ny,1\n",
            {},
            "there is no column 'text'; columns: body, label",
        ),
        (
            "jpeg",
            "",
            {},
            r"data\.source = 'jpeg': allowed: digits, mnist, .*, package.module:function",
        ),
        ("tests.unit.test_sources:missing", "", {}, r"data\.source = 'tests.*:missing': .*missing"),
        (
            "tests.unit.nowhere:load",
            "",
            {},
            r"data\.source = 'tests.*:load': ModuleNotFoundError: No module",
        ),
        ("tests.unit.test_sources:NUMBER", "", {}, r"data\.source = .* is no function but int"),
        (
            "tests.unit.test_sources:not_examples",
            "",
            {},
            "must return datasets.sources.Examples, .* Tensor",
        ),
    ],
)
def test_mistake_in_the_data_is_named(
    tmp_path: Path, source: str, text: str, changes: Any, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        read(source, write(tmp_path / "t.csv", text), **changes)


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data\.path = '': this source needs"):
        read("csv", "")
    with pytest.raises(SourceError, match="there is no such file or folder"):
        read("csv", tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"data\.path = '~nobody/x': there is no such"):
        read("csv", "~nobody/x")
    with pytest.raises(SourceError, match="100000 characters"):
        read("csv", "x" * 100_000)
    with pytest.raises(SourceError, match=r"no file ends in \.png"):
        read("image-folder", tmp_path)
    with pytest.raises(SourceError, match=r"no file ends in \.csv"):
        read("csv", tmp_path)
    (tmp_path / "a").mkdir()
    wavfile.write(tmp_path / "a" / "a.wav", 8000, np.zeros(9, dtype=np.int16))
    with pytest.raises(SourceError, match=r"group = '\(x\)' finds nothing in 'a/a.wav'"):
        read("audio-folder", tmp_path, group="(x)")


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_torchvision_set_that_is_not_there_says_where_it_looked(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def no_network(*arguments: Any, **keywords: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(
        SourceError, match=f"is not under '{tmp_path}'.*name its folder with data.path"
    ):
        read(name, tmp_path)


GOOD = Examples(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), ("no", "yes"))
TABLE = GOOD._replace(columns=("a", "b", "c"))
NO_TENSOR: Any = np.zeros((4, 3))
NO_TEXT: Any = ("no", 1)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (GOOD._replace(x=NO_TENSOR), "must be tensors, they are ndarray, Tensor"),
        (GOOD._replace(x=torch.zeros(3, 3)), "same number of examples"),
        (GOOD._replace(x=torch.zeros(4)), "same number of examples"),
        (
            GOOD._replace(y=torch.zeros(4)),
            r"training.task needs y \[n\] int64, a class each; got y \(4,\) of torch.float32",
        ),
        (
            GOOD._replace(y=torch.tensor([0, 1, 0, 2])),
            "y must lie between 0 and 1, it goes from 0 to 2",
        ),
        (
            GOOD._replace(y=torch.tensor([0, 1, 0, -1])),
            "y must lie between 0 and 1, it goes from -1 to 1",
        ),
        (
            Examples(torch.zeros(1, 3), torch.tensor([0]), ("no",)),
            "1 examples are too few: at least 2",
        ),
        (
            GOOD._replace(x=torch.zeros(4, 3, dtype=torch.int32)),
            "x must be uint8 or float, it is torch.int32",
        ),
        (GOOD._replace(x=torch.full((4, 3), np.nan)), "x holds values that are not within"),
        (
            GOOD._replace(x=torch.full((4, 3), 1e300, dtype=torch.float64)),
            "x holds values that are not within",
        ),
        (
            TABLE._replace(x=torch.tensor([[0, 1, np.inf]] * 4)),
            "column 'c' holds values that are not within",
        ),
        (TABLE._replace(x=torch.zeros(4, 2)), r"x must be \[n, 3\] like columns"),
        (GOOD._replace(test=torch.zeros(4)), r"test must be \[4\] bool"),
        (
            GOOD._replace(group=torch.zeros(3, dtype=torch.int64), groups=("a",)),
            r"group must be \[4\] int64",
        ),
        (
            GOOD._replace(group=torch.ones(4, dtype=torch.int64), groups=("a",)),
            "group must lie between 0 and 0",
        ),
        (GOOD._replace(classes=("no", "no")), "classes: two names are alike"),
        (GOOD._replace(classes=NO_TEXT), "classes: name 2 of 2 is no text but int"),
        (
            GOOD._replace(classes=("no", "")),
            "classes: name 2 of 2 has 0 characters; allowed: 1 to 64",
        ),
        (GOOD._replace(classes=("no", "x" * 65)), "classes: name 2 of 2 has 65 characters"),
        (
            GOOD._replace(classes=("no", "\x1b[31m")),
            "classes: name 2 of 2 holds characters that cannot be printed",
        ),
        (
            GOOD._replace(classes=tuple(map(str, range(101)))),
            "classes: 101 different classes, at most 100 may leave",
        ),
        (GOOD._replace(groups=("a\nb",)), "groups: name 1 of 1 holds characters"),
        (TABLE._replace(columns=("a", "b", "c\r")), "columns: name 3 of 3 holds characters"),
        (TABLE._replace(columns=("a", "b", "c" * 201)), "columns: name 3 of 3 has 201 characters"),
    ],
)
def test_data_set_that_training_would_stumble_over_is_refused(examples: Any, message: str) -> None:
    with pytest.raises(SourceError, match=rf"data\.source = 'my:own'.*{message}"):
        check(examples, "my:own")


def test_data_set_with_everything_passes() -> None:
    x = torch.tensor([[1.0, np.nan, -1e18]] * 4)
    whole = TABLE._replace(
        x=x, group=torch.tensor([0, 0, 1, 1]), groups=("a", "b"), test=torch.arange(4) > 2
    )
    assert check(whole, "my:own") is whole
    assert check(GOOD._replace(classes=tuple(map(str, range(100)))), "my:own").y is GOOD.y


SECRET = "the patient of bed 7 "


@pytest.mark.parametrize(
    ("label", "values", "message"),
    [
        ("age", range(2000, 2101), "101 different classes, at most 100 may leave a site"),
        ("age * 100 + age % 2", range(2000, 2101), "101 different classes"),
        ("age", [f"{SECRET}{number}" for number in range(101)], "101 different classes"),
        ("age", [SECRET * 4, SECRET], "name 2 of 2 has 84 characters; allowed: 1 to 64"),
        ("age", [SECRET + "\n", "x"], "name 1 of 2 holds characters that cannot be printed"),
        ("age", [SECRET + "\x1b[2J", "x"], "name 1 of 2 holds characters that cannot be printed"),
        ("age", [SECRET + "\u202e", "x"], "name 1 of 2 holds characters that cannot be printed"),
    ],
)
@pytest.mark.parametrize("source", ["csv", "text-csv"])
def test_labels_that_would_carry_a_table_out_are_refused_and_not_repeated(
    tmp_path: Path, source: str, label: str, values: Any, message: str
) -> None:
    pd.DataFrame({"age": values, "text": "x"}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(SourceError, match=message) as error:
        read(source, tmp_path / "t.csv", label=label)
    assert SECRET.strip() not in str(error.value)
    assert "2000" not in str(error.value)


def test_a_hundred_classes_are_allowed(tmp_path: Path) -> None:
    pd.DataFrame({"age": range(100), "label": range(100)}).to_csv(tmp_path / "t.csv", index=False)
    assert len(read("csv", tmp_path / "t.csv").classes) == 100


def test_names_of_groups_and_files_that_would_be_names_of_sites_are_bounded(tmp_path: Path) -> None:
    pd.DataFrame({"ward": ["x" * 65, "y"], "a": [1, 2], "label": [0, 1]}).to_csv(
        tmp_path / "t.csv", index=False
    )
    with pytest.raises(SourceError, match=r"data\.group = 'ward': name 1 of 2 has 65 characters"):
        read("csv", tmp_path, group="ward")
    for name in ("ok.csv", "a\tb.csv"):
        (tmp_path / name).write_text("a,label\n1,0\n")
    (tmp_path / "t.csv").unlink()
    with pytest.raises(SourceError, match="files as sites: name 1 of 2 holds characters"):
        read("csv", tmp_path)


def test_folders_that_would_be_names_of_classes_and_sites_are_bounded(tmp_path: Path) -> None:
    for number in range(101):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
        wavfile.write(tmp_path / "many" / str(number) / "a.wav", 8000, np.zeros(9, dtype=np.int16))
    with pytest.raises(SourceError, match="folders as classes: 101 different classes"):
        read("audio-folder", tmp_path / "many")
    (tmp_path / "many" / "100" / "a.wav").unlink()
    assert len(read("audio-folder", tmp_path / "many").classes) == 100
    (tmp_path / "many" / "99").rename(tmp_path / "many" / "99\n")
    with pytest.raises(SourceError, match="folders as classes: name 100 of 100 holds characters"):
        read("audio-folder", tmp_path / "many")
    for name in "cd":
        (tmp_path / "odd" / "\x1b[2J" / name).mkdir(parents=True)
        wavfile.write(
            tmp_path / "odd" / "\x1b[2J" / name / "a.wav", 8000, np.zeros(9, dtype=np.int16)
        )
    with pytest.raises(SourceError, match="folders as sites: name 1 of 1 holds characters"):
        read("audio-folder", tmp_path / "odd")


def test_label_does_not_cost_a_feature_whose_name_is_a_part_of_its_own(tmp_path: Path) -> None:
    pd.DataFrame({"rate": [1, 2], "heart rate": [3, 4]}).to_csv(tmp_path / "t.csv", index=False)
    assert read("csv", tmp_path / "t.csv", label="heart rate").columns == ("rate",)
    assert read("csv", tmp_path / "t.csv", label="`heart rate` > 3").columns == ("rate",)


def test_sources_say_which_keys_they_take_and_what_they_hold() -> None:
    assert SOURCES["digits"].keys == ()
    assert SOURCES["cifar100"].keys == ("path",)
    assert SOURCES["image-folder"].keys == ("path", "group", "image_size", "channels", "memory_gb")
    assert SOURCES["audio-folder"].keys == ("path", "group", "audio_seconds", "memory_gb")
    assert SOURCES["csv"].keys == ("path", "label", "group", "target")
    assert SOURCES["text-csv"].keys == ("path", "label", "group", "text_buckets")
    torchvision = ("mnist", "fashion-mnist", "cifar10", "cifar100")
    official = (*torchvision, "image-folder", "audio-folder", "text-bytes", "tokens")
    assert tuple(name for name, source in SOURCES.items() if source.official_test) == official
    pictures = ("digits", *torchvision, "image-folder")
    assert tuple(name for name, source in SOURCES.items() if source.pictures) == pictures
