"""The deployment kit's files, and the command that starts a run, with a made-up ``flwr``."""

import grp
import json
import os
import pwd
import re
import sqlite3
import sys
import tarfile
import time
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from client_app.policy import read_site
from deploy import __main__ as kit
from deploy import run as start
from deploy.run import Exit

NAMES = ["server.example.org", "192.0.2.7"]


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's users are this one."""
    me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(os.getegid())
    monkeypatch.setattr(pwd, "getpwnam", lambda _: me)
    monkeypatch.setattr(grp, "getgrnam", lambda _: group)


@pytest.fixture
def folder(tmp_path: Path, users: None) -> Path:
    """The files of a server and of two sites."""
    kit.main(["--folder", str(tmp_path / "server"), "server", *NAMES])
    for site in range(2):
        kit.main(
            ["--folder", str(tmp_path / str(site)), "site", str(site), f"clinic {site}", NAMES[0]]
        )
    return tmp_path


def names(certificate: Path, authority: Path, name: str) -> bool:
    """Whether a client that knows an authority takes a certificate for a name."""
    store = Store([x509.load_pem_x509_certificate(authority.read_bytes())])
    subject = x509.DNSName(name) if name[0].isalpha() else x509.IPAddress(ip_address(name))
    try:
        PolicyBuilder().store(store).build_server_verifier(subject).verify(
            x509.load_pem_x509_certificate(certificate.read_bytes()), []
        )
    except VerificationError:
        return False
    return True


@pytest.mark.parametrize("name", [*NAMES, "localhost", "127.0.0.1"])
def test_certificate_is_taken_for_each_name_and_no_other(folder: Path, name: str) -> None:
    ours, other = folder / "server", folder / "other"
    assert names(ours / "server.crt", ours / "ca.crt", name)
    assert not names(
        ours / "server.crt",
        ours / "ca.crt",
        f"not-{name}" if name[0].isalpha() else "192.0.2.8",
    )
    kit.main(["--folder", str(other), "server", name])
    assert not names(ours / "server.crt", other / "ca.crt", name)
    leaf = x509.load_pem_x509_certificate((ours / "server.crt").read_bytes())
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_private_keys_are_their_owners_alone(folder: Path) -> None:
    found = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    modes = {name: path.stat().st_mode & 0o777 for name, path in found.items()}
    secret = {
        "server/ca.key",
        "server/server.key",
        *(f"{site}/{name}" for site in range(2) for name in ("node", "sealing.key")),
    }
    assert {name for name, mode in modes.items() if mode == 0o600} == secret
    assert {name for name, mode in modes.items() if mode == 0o640} == {"server/superexec.secret"}
    assert {
        mode for name, mode in modes.items() if name not in {*secret, "server/superexec.secret"}
    } == {0o644}
    private = [found[name].read_text() for name in secret]
    assert len(set(private)) == len(secret)
    for name in found.keys() - secret:
        text = found[name].read_text()
        assert "PRIVATE KEY" not in text
        assert not any(key.strip() in text for key in private)
        assert not re.search(r"@\w+@", text)  # a template's key without a value


def test_nothing_that_is_there_is_overwritten(folder: Path) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    (folder / "0/site.toml").write_text("mine")
    before = content()
    kit.main(["--folder", str(folder / "server"), "server", "another.example.org"])
    kit.main(["--folder", str(folder / "0"), "site", "0", "another", "another.example.org"])
    assert content() == before
    (folder / "0/node").unlink()
    (folder / "server/server.crt").unlink()
    kit.main(["--folder", str(folder / "0"), "site", "0", "clinic 0", NAMES[0]])
    kit.main(["--folder", str(folder / "server"), "server", "another.example.org"])
    changed = {
        path.relative_to(folder).as_posix()
        for path, text in content().items()
        if text != before[path]
    }
    assert changed == {"0/node", "0/hand-over/site-0.pub", "server/server.crt"}
    assert names(folder / "server/server.crt", folder / "server/ca.crt", "another.example.org")


def test_site_file_says_what_was_asked(folder: Path) -> None:
    site = read_site(folder / "1/site.toml")
    assert (site.site, site.name, site.private_key) == (1, "clinic 1", "")
    sealed = folder / "1/sealed.toml"
    sealed.write_text(
        re.sub(
            r"^# (private-key|peer-keys|save) ",
            r"\1 ",
            (folder / "1/site.toml").read_text(),
            flags=re.MULTILINE,
        )
    )
    assert read_site(sealed).private_key == "/etc/archipelago/sealing.key"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["server", "under_score.example.org"], "'under_score.example.org': a DNS name"),
        (["server", "server.example.org", "https://server"], "'https://server': a DNS name"),
        (["site", "1000000", "A", "server"], "number = 1000000: 0 to 999999 is allowed"),
        (["site", "0", 'A"\nsocket = "x', "server"], "printable characters"),
        (["site", "0", "A", "server:8000"], "'server:8000': a DNS name"),
    ],
)
def test_wrong_names_are_said(users: None, tmp_path: Path, arguments: list[str], text: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(text)):
        kit.main(["--folder", str(tmp_path / "none"), *arguments])
    assert not list(tmp_path.rglob("*.key"))


def test_missing_user_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(name: str) -> None:
        raise KeyError(f"getpwnam(): name not found: {name!r}")

    monkeypatch.setattr(pwd, "getpwnam", nobody)
    with pytest.raises(SystemExit, match=r"name not found: 'archipelago'.*deploy\.md"):
        kit.main(["--folder", str(tmp_path), "server", "server"])


def exec_start(unit: Path) -> str:
    """What a unit starts."""
    text = re.sub(r"\\\n\s*", "", unit.read_text())
    (found,) = re.findall("^ExecStart=(.*)$", text, re.MULTILINE)
    return str(found).replace("/opt/archipelago/.venv/bin/", "")


@pytest.mark.parametrize(
    ("party", "service", "unit"),
    [
        ("server", "superlink", "superlink"),
        ("server", "superexec", "superexec"),
        ("1", "service", "site"),
        ("1", "supernode", "supernode"),
    ],
)
def test_containers_start_what_units_start(
    folder: Path, party: str, service: str, unit: str
) -> None:
    file = folder / party / f"archipelago-{unit}.service"
    container = yaml.safe_load((folder / party / "compose.yaml").read_text())["services"][service]
    command = (
        exec_start(file) if unit != "supernode" else exec_start(file).replace(" --port 9095", "")
    )
    assert container["command"] == command
    assert f"User={container['user']}" in file.read_text()


def test_containers_reach_no_more_than_units(folder: Path) -> None:
    server = yaml.safe_load((folder / "server/compose.yaml").read_text())["services"]
    assert {name: each["ports"] for name, each in server.items() if "ports" in each} == {
        "superlink": ["8000:8000"]
    }
    users = dict.fromkeys(
        ("ARCHIPELAGO", "FLOWER"), f"{os.geteuid()}:{pwd.getpwuid(os.geteuid()).pw_gid}"
    )
    assert server["superlink"]["build"]["args"] == {
        **users,
        "CLIENTS": str(os.getegid()),
        "TORCH": "${TORCH:-}",
    }
    assert (
        "listen 8000 ssl" in (folder / "server/nginx.conf").read_text()
    )  # the proxy's, in the same network
    site = yaml.safe_load((folder / "1/compose.yaml").read_text())["services"]
    assert site["service"]["network_mode"] == "none"
    seen = {volume.partition(":")[0] for volume in site["supernode"]["volumes"]}
    assert seen == {"/etc/archipelago/ca.crt", "/etc/archipelago/node", "/var/lib/flower", "socket"}


def test_back_up_has_the_database_as_it_is_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "FOLDER": tmp_path / "etc",
        "STATE": tmp_path / "state",
        "DATABASE": tmp_path / "flower/state.db",
    }
    for name, place in places.items():
        monkeypatch.setattr(kit, name, place)
        place.parent.mkdir(exist_ok=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/node").write_text("key")
    (tmp_path / "etc/node").chmod(0o600)
    with closing(sqlite3.connect(places["DATABASE"])) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE nodes (id)")
        database.execute("INSERT INTO nodes VALUES (7)")
        database.commit()  # in the write-ahead log only
        database.execute("INSERT INTO nodes VALUES (8)")  # not in the database yet
        before = os.umask(0o022)
        try:
            found = kit.back_up(tmp_path / "backups")
        finally:
            os.umask(before)
    assert found.stat().st_mode & 0o777 == 0o600
    with tarfile.open(found) as tar:
        tar.extractall(tmp_path / "back", filter="tar")
    back = tmp_path / "back" / tmp_path.relative_to("/")
    assert (back / "etc/node").read_text() == "key"
    assert (back / "etc/node").stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(back / "flower/state.db")) as database:
        assert database.execute("SELECT id FROM nodes").fetchall() == [(7,)]


def test_the_newest_back_ups_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FOLDER", "STATE", "DATABASE"):
        monkeypatch.setattr(kit, name, tmp_path / name)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "backups").mkdir()
    old = [tmp_path / f"backups/archipelago-2025010{day}-000000.tar.gz" for day in range(1, 9)]
    for file in old:
        file.touch()
    found = kit.back_up(tmp_path / "backups")
    assert set((tmp_path / "backups").iterdir()) == {*old[-6:], found}


# The start command.

FLWR = """#!{python}
import json, sys
from pathlib import Path
home, verb = Path({home!r}), sys.argv[1]
with (home / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
calls = [json.loads(line) for line in (home / "calls").read_text().splitlines()]
number = sum(call[0] == "run" for call in calls) - 1
run = json.loads((home / "runs").read_text())[number]
asked = sum(call[0] == verb for call in calls[\
max(at for at, call in enumerate(calls) if call[0] == "run"):])
if verb == "list":
    if asked <= run.get("away", 0):
        sys.exit("Error: connection refused")
    if "lost" in run:
        sys.exit("Error: [code: 16] Run ID not found.")
    print(json.dumps({{"success": True, "runs": [{{"status": run["status"], \
"status-details": run.get("details", "")}}]}}))
else:
    print("\\x1b[34mUsing SuperLink: clinics (server:1)\\x1b[0m")
    if verb == "run":
        if "refused" in run:
            sys.exit(run["refused"])
        print(f"Successfully started run {{number + 7}}")
    print("\\x1b[92mINFO \\x1b[0m:      Starting logstream for run_id `7`")
    print("".join(run["log"][: run.get("cut") if verb == "run" else None]), end="")
"""
TRACE = [
    "\x1b[91mERROR \x1b[0m:     ServerApp raised an exception\n",
    "Traceback (most recent call last):\n",
    '  File "app.py", line 1, in main\n',
]


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``flower(run, ...)``: what each ``flwr run`` will come to; ``flower.calls()``."""
    program = tmp_path / "flwr"
    program.write_text(FLWR.format(python=sys.executable, home=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    class Flower:
        def __call__(self, *runs: dict[str, Any]) -> None:
            (tmp_path / "runs").write_text(json.dumps(runs))

        def calls(self, verb: str) -> list[list[str]]:
            calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
            return [call for call in calls if call[0] == verb]

        def waits(self) -> list[float]:
            return waits

    return Flower()


def failed(kind: str, message: str) -> dict[str, Any]:
    """A run that ends with an exception."""
    log = ["round 1\n", *TRACE, f"{kind}: {message}\n"]
    return {
        "log": log,
        "status": "finished:failed",
        "details": f"ServerApp failed with exception: {message}",
    }


@pytest.mark.parametrize(
    ("run", "code", "last", "trace"),
    [
        ({"log": ["round 1\n"], "status": "finished:completed"}, Exit.FINISHED, "", False),
        (
            {"log": ["round 1\n"], "status": "finished:stopped"},
            Exit.STOPPED,
            "the run was stopped",
            False,
        ),
        (
            failed("configuration.errors.ConfigError", "seed = 1: no\nlr = 2: no"),
            Exit.REFUSED,
            "seed = 1: no\nlr = 2: no",
            False,
        ),
        (
            failed("server_app.discovery.RunError", "2 sites (of 3)"),
            Exit.ENDED,
            "2 sites (of 3)",
            False,
        ),
        (
            failed("ValueError", "server_app.discovery.RunError"),
            Exit.ERROR,
            "server_app.discovery.RunError",
            True,
        ),
        (
            {"log": [], "refused": "Error: connection refused"},
            Exit.ERROR,
            "Error: connection refused",
            False,
        ),
    ],
)
def test_exit_code_says_how_a_run_ended(
    flower: Any,
    capfd: pytest.CaptureFixture[str],
    run: dict[str, Any],
    code: Exit,
    last: str,
    trace: bool,
) -> None:
    flower(run)
    assert start.main(["--", "--run-config", "seed=3", ".", "clinics"]) == code
    out, err = capfd.readouterr()
    assert err.strip() == last
    assert ("Traceback" in out) == trace
    assert out.count("round 1\n") == len([line for line in run["log"] if line == "round 1\n"])
    (command,) = flower.calls("run")
    assert command[1:4] == [".", "clinics", "--stream"]
    assert "seed=3" in command[-1]
    assert all("clinics" in call for call in flower.calls("list")) if "refused" not in run else True


def test_log_goes_on_where_it_was_when_the_superlink_was_away(
    flower: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    flower(
        {
            "log": [f"round {number}\n" for number in range(5)],
            "cut": 2,
            "away": 3,
            "status": "finished:completed",
        }
    )
    assert start.main([]) == Exit.FINISHED
    out, err = capfd.readouterr()
    assert re.findall(r"round \d", out) == [f"round {number}" for number in range(5)]
    assert err.count("the SuperLink does not answer") == 1


@pytest.mark.parametrize(
    "end",
    [
        {"details": "No heartbeat received from the task"},
        {"details": "Task failed with unknown error."},
        {"lost": True},
    ],
)
def test_killed_run_is_started_again_from_its_checkpoint(
    flower: Any, capfd: pytest.CaptureFixture[str], end: dict[str, Any]
) -> None:
    killed = {"log": ["round 1\n"], "status": "finished:failed", **end}
    flower(killed, killed, {"log": ["round 2\n"], "status": "finished:completed"})
    assert start.main(["-c", "epochs=3", "-c", 'model.name="mlp"']) == Exit.FINISHED
    configurations = [call[-1] for call in flower.calls("run")]
    assert ['results.resume="auto"' in each for each in configurations] == [False, True, True]
    assert all("epochs=3" in each and 'model.name="mlp"' in each for each in configurations)
    assert [wait for wait in flower.waits() if wait > start.ASK_S] == [5.0, 10.0]


def test_it_is_not_started_again_for_ever(flower: Any) -> None:
    killed = {
        "log": [],
        "status": "finished:failed",
        "details": "No heartbeat received from the task",
    }
    flower(*[killed] * (start.RESTARTS + 1))
    assert start.main([]) == Exit.CRASHED
    assert max(flower.waits()) == start.LONGEST_WAIT_S


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--run-config", "training.lr=-1.0"],
            "training.lr = -1.0: must be greater than or equal to 0",
        ),
        (["--run-config", "num-site=3"], "num-site = 3: unknown key"),
        (["--run-config", "seed = 3"], "no key=value"),
        (["--run-config", "/nowhere/run.toml"], "'/nowhere/run.toml': there is no such file"),
    ],
)
def test_wrong_configuration_is_refused_before_anything_starts(
    flower: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
) -> None:
    assert start.main(["--", *arguments]) == Exit.REFUSED
    assert text in capfd.readouterr().err
    assert not (tmp_path / "calls").exists()


def test_configuration_from_a_file(flower: Any, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('strategy = "gsgm"\n[gsgm]\nwindow = 5\n')
    flower({"log": [], "status": "finished:completed"})
    assert start.main(["-c", str(tmp_path / "run.toml")]) == Exit.FINISHED
    (command,) = flower.calls("run")
    assert 'strategy="gsgm"' in command[-1]
    assert "gsgm.window=5" in command[-1]
