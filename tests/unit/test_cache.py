"""Decoded data on disk: written once, equal to what was decoded, and never older than the files."""

import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from client_app.site import SiteId, origin_of, raw_data, site_data
from configuration.config import configuration
from datasets import cache, sources
from datasets.sources import SOURCES, Examples, SourceError, fingerprint, load
from tests.conftest import ROOT
from tests.data import write_audio, write_texts

KEYS: dict[str, Any] = {
    "label": "label",
    "group": "",
    "image_size": 8,
    "audio_seconds": 0.5,
    "text_buckets": 64,
}
REAL = dict(SOURCES)


def read(source: str, path: Path | str, **changes: Any) -> Examples:
    return load(source, str(path), **(KEYS | changes))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of entries, not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "archipelago" / "decoded"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of sources, one for each time that one decoded."""
    calls: list[str] = []

    def counting(name: str, read: Callable[..., Examples]) -> Callable[..., Examples]:
        def counted(*arguments: Any, **keys: Any) -> Examples:
            calls.append(name)
            return read(*arguments, **keys)

        counted.__signature__ = signature(read)  # type: ignore[attr-defined]
        return counted

    for name, source in (REAL | {"mnist": REAL["mnist"]._replace(read=official)}).items():
        monkeypatch.setitem(SOURCES, name, source._replace(read=counting(name, source.read)))
    return calls


def table(folder: Path, rows: int = 4) -> Path:
    """Two files: NaN, a natural site each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("oslo", "rome"):
        (folder / f"{name}.csv").write_text(
            "a,b,label\n" + "".join(f"{n}.5,{'' if n == 1 else n},{n % 2}\n" for n in range(rows))
        )
    return folder


def pictures(folder: Path) -> Path:
    for number in range(8):
        at = folder / "north" / "cd"[number % 2]
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 12, 3), number * 30, dtype=np.uint8)).save(
            at / f"{number}.png"
        )
    return folder


def write_official(folder: Path) -> Path:
    """In the place of a data set of torchvision, with a file beside it that is another's."""
    for name in ("MNIST/raw", "CIFAR10"):
        (folder / name).mkdir(parents=True)
        (folder / name / "all").write_bytes(bytes(range(40)))
    return folder


def official(path: str) -> Examples:
    """Its examples, with a part for tests."""
    x = torch.frombuffer(
        bytearray((Path(path) / "MNIST/raw/all").read_bytes()), dtype=torch.uint8
    ).reshape(-1, 1, 2, 2)
    return Examples(x, torch.arange(len(x)) % 2, ("a", "b"), test=torch.arange(len(x)) > 2)


def write_nothing(folder: Path) -> Path:
    return folder


WRITE = {
    "digits": write_nothing,
    "image-folder": pictures,
    "audio-folder": write_audio,
    "csv": table,
    "text-csv": write_texts,
    "mnist": write_official,
}


def entries(home: Path) -> list[Path]:
    return [path for path in sorted(home.iterdir()) if path.suffix != ".lock"]


def assert_same(found: Examples, expected: Examples) -> None:
    for name, one, other in zip(Examples._fields, found, expected, strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            assert (one.dtype, one.shape, one.stride()) == (
                other.dtype,
                other.shape,
                other.stride(),
            ), name
            assert one.is_contiguous(), name
            assert one.numpy().tobytes() == other.numpy().tobytes(), name
        else:
            assert one == other, name


@pytest.mark.parametrize("source", WRITE)
def test_mapped_and_decoded_are_the_same_bits(
    source: str, home: Path, tmp_path: Path, decoded: list[str], monkeypatch: Any
) -> None:
    data = tmp_path / "data"
    WRITE[source](data)
    first, second, third = (read(source, data) for _ in range(3))
    assert decoded == [source]
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.warns(RuntimeWarning, match="/dev/null"):
        without = read(source, data)
    assert decoded == [source] * 2
    for found in (first, second, third):
        assert_same(found, without)


def test_of_a_torchvision_set_its_own_files_count_alone(
    home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    data = write_official(tmp_path / "data")
    read("mnist", data)
    (data / "CIFAR10" / "all").write_bytes(b"another")
    read("mnist", data)
    assert decoded == ["mnist"]
    (data / "MNIST" / "raw" / "all").write_bytes(bytes(range(80)))
    assert len(read("mnist", data).y) == 20


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "MNIST"),
        ("fashion-mnist", "FashionMNIST"),
        ("cifar10", "CIFAR10"),
        ("cifar100", "CIFAR100"),
    ],
)
def test_torchvision_keeps_its_files_where_they_are_looked_for(
    name: str, folder: str, tmp_path: Path
) -> None:
    build = getattr(torchvision.datasets, folder)
    below = getattr(build, "base_folder", f"{folder}/raw")
    assert SOURCES[name].files(str(tmp_path)) == tmp_path / below
    assert SOURCES[name].files("") == Path("~/.cache/archipelago").expanduser() / below


def test_files_are_for_their_owner_alone(home: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        read("csv", table(tmp_path / "data"))
    finally:
        os.umask(before)
    assert home.stat().st_mode & 0o777 == 0o700
    assert len(list(home.iterdir())) == 2  # the entry and its lock
    assert [path.stat().st_mode & 0o777 for path in home.iterdir()] == [0o600] * 2
    home.chmod(0o755)
    read("csv", tmp_path / "data", label="a > 1")
    assert home.stat().st_mode & 0o777 == 0o700


def test_a_write_stays_with_its_process(home: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "data")
    read("csv", path)
    first, second = read("csv", path), read("csv", path)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(entries(home)[0]) in maps.read_text()
    expected = second.x.clone()
    first.x.fill_(7)
    assert torch.equal(second.x.nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(read("csv", path).x.nan_to_num(-1), expected.nan_to_num(-1))


def test_options_that_a_source_takes_make_an_entry_and_others_do_not(
    home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    path = pictures(tmp_path / "data")
    assert read("image-folder", path).x.shape[-1] == 8
    assert read("image-folder", path, image_size=4).x.shape[-1] == 4
    assert read("image-folder", path, group="(c|d)").groups == ("c", "d")
    assert len(decoded) == len(entries(home)) == 3
    assert read("image-folder", path, label="x", text_buckets=3).groups == ("north",)
    assert read("image-folder", path, image_size=4).x.shape[-1] == 4
    assert len(decoded) == 3


def test_a_path_is_the_same_however_it_is_written(
    home: Path, tmp_path: Path, decoded: list[str], monkeypatch: Any
) -> None:
    table(tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    for path in ("data", "link", str(tmp_path / "data"), "./data/../data"):
        read("csv", path)
    assert decoded == ["csv"]


def change(file: Path) -> None:
    file.write_text("a,b,label\n5,6,0\n7,8,1\n")


def touch(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def link(file: Path) -> None:
    file.unlink()
    file.symlink_to("../elsewhere")


CHANGES: dict[str, Callable[[Path], object]] = {
    "changed": lambda data: change(data / "rome.csv"),
    "touched": lambda data: touch(data / "rome.csv"),
    "added": lambda data: change(data / "bonn.csv"),
    "removed": lambda data: (data / "rome.csv").unlink(),
    "renamed": lambda data: (data / "rome.csv").rename(data / "bonn.csv"),
    "replaced by a link": lambda data: link(data / "rome.csv"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_files_are_decoded_and_replace_their_entry_only(
    what: str, home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    data = table(tmp_path / "data")
    change(tmp_path / "elsewhere")
    read("csv", data)
    (old,) = entries(home)
    read("csv", data, label="a > 1")
    (other,) = {*entries(home)} - {old}
    CHANGES[what](data)
    found = read("csv", data)
    assert len(decoded) == 3
    assert_same(found, REAL["csv"].read(path=data, label="label", group="")._replace(x=found.x))
    assert other in entries(home)
    assert old not in entries(home)
    assert len(entries(home)) == 2
    assert_same(read("csv", data), found)
    assert len(decoded) == 3


def test_what_a_link_leads_to_counts(home: Path, tmp_path: Path, decoded: list[str]) -> None:
    data = table(tmp_path / "data")
    change(tmp_path / "elsewhere")
    link(data / "rome.csv")
    read("csv", data)
    touch(tmp_path / "elsewhere")
    read("csv", data)
    assert len(decoded) == 2


def test_other_decoders_and_other_libraries_are_other_entries(
    home: Path, tmp_path: Path, decoded: list[str], monkeypatch: Any
) -> None:
    for source in ("digits", "csv"):
        read(source, table(tmp_path / "data"))
    monkeypatch.setattr(cache, "CODE", "another")
    for source in ("digits", "csv"):
        read(source, tmp_path / "data")
        read(source, tmp_path / "data")
    assert decoded == ["digits", "csv"] * 2
    assert len(entries(home)) == 2


def test_code_is_that_of_decoders_and_of_their_libraries(monkeypatch: Any) -> None:
    def loaded() -> str:
        """The code of a process that starts now."""
        return str(run_path(cache.__file__)["CODE"])

    assert loaded() == cache.CODE
    read_text = Path.read_text
    for name in ("folders.py", "examples.py", "sources.py"):
        with monkeypatch.context() as patch:
            patch.setattr(
                Path,
                "read_text",
                lambda path, encoding, name=name: (
                    read_text(path, encoding) + "#" * (path.name == name)
                ),
            )
            assert loaded() != cache.CODE
    for name in ("scikit-learn", "pillow"):
        with monkeypatch.context() as patch:
            patch.setattr(
                metadata,
                "version",
                lambda library, name=name: "0" if library == name else version(library),
            )
            assert loaded() != cache.CODE


def test_digits_from_disk_import_no_scikit_learn(home: Path) -> None:
    read("digits", "")
    script = (
        "from datasets.sources import load; import sys; "
        f"print(len(load('digits', '', **{KEYS}).y), 'sklearn' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1797", "False"]


def own(path: str) -> Examples:
    return Examples(
        torch.full((4, 3), float(Path(path).read_text())), torch.tensor([0, 1, 0, 1]), ("no", "yes")
    )


def test_a_function_of_ones_own_is_always_called(home: Path, tmp_path: Path) -> None:
    (tmp_path / "number").write_text("1")
    os.utime(tmp_path / "number", (0, 0))
    assert read("tests.unit.test_cache:own", tmp_path / "number").x[0, 0] == 1
    (tmp_path / "number").write_text("2")
    os.utime(tmp_path / "number", (0, 0))
    assert read("tests.unit.test_cache:own", tmp_path / "number").x[0, 0] == 2
    assert not home.exists()


def test_an_error_is_raised_again_and_nothing_is_kept(
    home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    data = table(tmp_path / "data")
    for _ in range(2):
        with pytest.raises(SourceError, match="is no column"):
            read("csv", data, label="nothing")
        with pytest.raises(SourceError, match="there is no such file"):
            read("csv", tmp_path / "nowhere")
    assert decoded == ["csv"] * 2
    assert entries(home) == []


def test_files_that_change_while_they_are_decoded_are_not_kept(
    home: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """As a data set of torchvision that is downloaded, too."""
    data, real = table(tmp_path / "data"), SOURCES["csv"].read

    def disturbed(path: str, label: str, group: str) -> Examples:
        found = real(path, label, group)
        change(data / "rome.csv")
        return found

    monkeypatch.setitem(SOURCES, "csv", SOURCES["csv"]._replace(read=disturbed))
    read("csv", data)
    assert entries(home) == []
    monkeypatch.setitem(SOURCES, "csv", SOURCES["csv"]._replace(read=real))
    assert len(read("csv", data).y) == 6


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "truncated": lambda data: data[:-1],
    "cut in the header": lambda data: data[:20],
    "garbage": lambda data: os.urandom(len(data)),
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_decoded_again_and_replaced(
    damage: str, home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    data = table(tmp_path / "data")
    expected = read("csv", data)
    (entry,) = entries(home)
    whole = entry.read_bytes()
    entry.unlink()  # it is mapped: nobody may cut a file that is
    entry.write_bytes(DAMAGES[damage](whole))
    assert_same(read("csv", data), expected)
    assert decoded == ["csv"] * 2
    assert entries(home) == [entry]
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("names", ["", "no JSON", "[]", "{}", '{"classes": 1}'])
def test_an_entry_with_other_names_is_decoded_again(
    names: str, home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    data = table(tmp_path / "data")
    read("csv", data)
    (entry,) = entries(home)
    tensors = {name: tensor.clone() for name, tensor in load_file(entry).items()}
    entry.unlink()
    save_file(tensors, entry, {"names": names} if names else None)
    assert read("csv", data).classes == ("0", "1")
    assert decoded == ["csv"] * 2


def test_a_folder_that_is_none_costs_the_cache_and_a_warning(
    home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    data = table(tmp_path / "data")
    home.parent.mkdir(parents=True)
    home.write_text("a file: not even root may write into it")
    with pytest.warns(RuntimeWarning, match=str(home)) as warned:
        found = read("csv", data)
    assert len(warned) == 1
    home.unlink()
    assert_same(read("csv", data), found)
    assert decoded == ["csv"] * 2


def test_a_read_only_folder_gives_what_it_holds_and_takes_no_more(
    decoded: list[str], monkeypatch: Any
) -> None:
    root, nobody = os.geteuid() == 0, 65534  # root may write everywhere
    with TemporaryDirectory() as outside:  # pytest's own folders are closed to others
        Path(outside).chmod(0o711)
        monkeypatch.setenv("XDG_CACHE_HOME", outside)
        home = Path(outside, "archipelago", "decoded")
        data = table(Path(outside, "data"))
        read("csv", data)
        for path in (home, *entries(home)) if root else ():
            os.chown(path, nobody, nobody)
        home.chmod(0o500)
        try:
            if root:
                os.seteuid(nobody)
            read("csv", data)
            assert decoded == ["csv"]
            with pytest.warns(RuntimeWarning, match=str(home)) as warned:
                read("csv", data, label="a > 1")
            assert len(warned) == 1
        finally:
            if root:
                os.seteuid(0)
            home.chmod(0o700)
        assert len(entries(home)) == 1


def test_a_full_disk_costs_the_cache_and_a_warning(
    home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    data = pictures(tmp_path / "data")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.warns(RuntimeWarning, match=str(home)) as warned:
            found = read("image-folder", data, image_size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(warned) == 1
    assert entries(home) == []
    assert_same(read("image-folder", data, image_size=64), found)
    assert decoded == ["image-folder"] * 2


def test_no_home_costs_the_cache_and_a_warning(decoded: list[str], monkeypatch: Any) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.warns(RuntimeWarning, match="home directory"):
        assert len(read("digits", "").y) == 1797
    assert decoded == ["digits"]


def test_the_time_limit_of_a_caller_is_not_taken_for_a_disk_that_fails(
    home: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def late(*_: Any, **__: Any) -> None:
        raise TimeoutError("out of time")

    monkeypatch.setattr(cache, "FileLock", late)
    with pytest.raises(TimeoutError, match="out of time"):
        read("csv", table(tmp_path / "data"))


WORKER = """
import os, sys, time
from pathlib import Path
from datasets import cache, sources
from datasets.sources import SOURCES, load
path, log, how = sys.argv[1:]
real = SOURCES["csv"].read

def counted(path, label, group, target):
    with open(log, "a") as file:
        file.write("decoded\\n")
    time.sleep(0.5)
    return real(path, label, group, target)

SOURCES["csv"] = SOURCES["csv"]._replace(read=counted)
if how == "killed":
    def half(tensors, file, metadata):
        Path(file).write_bytes(b"x" * 100)
        Path(file).with_name(".tmp0").write_bytes(b"x" * 100)
        os.kill(os.getpid(), 9)
    cache.save_file = half
print("ready", flush=True)
sys.stdin.readline()
found = load("csv", path, label="label", group="", image_size=8, audio_seconds=1.0, text_buckets=8)
print(found.x.tolist(), found.y.tolist(), found.classes, found.groups)
"""


def start(path: Path, log: Path, how: str = "") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WORKER, str(path), str(log), how]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_of_five_processes_at_once_one_decodes(home: Path, tmp_path: Path) -> None:
    data, log = table(tmp_path / "data"), tmp_path / "log"
    workers = [start(data, log) for _ in range(5)]
    assert {worker.stdout.readline() for worker in workers if worker.stdout} == {"ready\n"}
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    warned = {worker.communicate()[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0] * 5
    assert log.read_text() == "decoded\n"
    found = read("csv", data)
    assert warned == {f"{found.x.tolist()} {found.y.tolist()} {found.classes} {found.groups}\n"}
    assert [entry.suffix for entry in entries(home)] == [".safetensors"]


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_counts(
    home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    data, log = table(tmp_path / "data"), tmp_path / "log"
    killed = start(data, log, "killed")
    killed.communicate("\n")
    assert killed.returncode == -signal.SIGKILL
    (left,) = entries(home)
    assert left.is_dir()
    assert len(read("csv", data).y) == 8
    assert log.read_text() == "decoded\n"
    assert decoded == ["csv"]
    assert [entry.suffix for entry in entries(home)] == [".safetensors"]


# In a process that lives long.


def test_two_runs_of_a_process_share_the_decoded_data(
    home: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = table(tmp_path / "data", 40)
    configs = [
        configuration(
            strategy=strategy,
            seed=seed,
            num_sites=2,
            data={"source": "csv", "path": str(data)},
            model={"name": "mlp"},
        )
        for strategy, seed in (("fedavg", 1), ("dmsgd", 2))
    ]
    loads: list[str] = []

    def counted(source: str, *arguments: Any, **keys: Any) -> Examples:
        loads.append(source)
        return load(source, *arguments, **keys)

    monkeypatch.setattr(sources, "load", counted)
    for config in configs:
        raw_data(config, SiteId(0, 2, ""))
    assert decoded == loads == ["csv"]


@pytest.mark.parametrize("num_sites", [None, 1])
def test_a_changed_file_is_noticed_by_a_process_that_lives_on(
    num_sites: int | None, home: Path, tmp_path: Path
) -> None:
    data = table(tmp_path / "data", 10) / "rome.csv"
    config = configuration(
        num_sites=2, data={"source": "csv", "path": str(data)}, model={"name": "mlp"}
    )
    site = SiteId(0, num_sites, str(data))

    def size() -> int:
        both = [raw_data(config, site), site_data(config, site, ("0", "1"), None)]
        (found,) = {len(each.train.y) + len(each.test.y) for each in both}
        return found

    assert size() == 10
    assert site_data(config, site, ("0", "1"), None) is site_data(config, site, ("0", "1"), None)
    before = origin_of(config, site)
    table(tmp_path / "data", 20)
    for _ in range(6000):  # a look at the files holds for a moment
        if origin_of(config, site) != before:
            break
        time.sleep(0.01)
    assert size() == 20


def test_looks_at_the_files_take_a_small_part_of_the_time(tmp_path: Path, monkeypatch: Any) -> None:
    clock, looks = [100.0], []
    config = configuration(data={"source": "csv", "path": str(tmp_path)})

    def look(source: str, path: str) -> str:
        looks.append(clock[0])
        clock[0] += 2
        return ""

    monkeypatch.setattr(sources, "fingerprint", look)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for moment in (100, 103, 139, 140, 150, 179, 180):
        clock[0] = max(clock[0], moment)
        origin_of(config, SiteId(0, 2, ""))
    assert looks == [100, 140, 180]


def test_tests_keep_nothing_where_their_user_does(cache_home: Path) -> None:
    assert os.environ["XDG_CACHE_HOME"] == str(cache_home)
    assert Path("~/.cache").expanduser() not in cache_home.parents
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read("digits", "")
    assert list(cache_home.glob("archipelago/decoded/digits-*.safetensors"))


def test_fingerprint_of_what_may_have_no_files(tmp_path: Path) -> None:
    assert {
        fingerprint("digits", ""),
        fingerprint("my:own", ""),
        fingerprint("my:own", "s3://x"),
    } == {""}
    before = fingerprint("my:own", str(tmp_path))
    change(tmp_path / "new")
    assert fingerprint("my:own", str(tmp_path)) != before
