"""Sealed payloads: who can open what, and what is refused."""

import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord, Context, RecordDict

from client_app.sealing import Header, Keyring, SealError, keyring, public_key

PRIVATE = [X25519PrivateKey.from_private_bytes(bytes([number + 1]) * 32) for number in range(4)]
PUBLIC = {number: key.public_key().public_bytes_raw() for number, key in enumerate(PRIVATE)}
RINGS = [Keyring(number, key, PUBLIC) for number, key in enumerate(PRIVATE)]
HEADER = Header(run=7, sender=0, step=3, kind="model")
DATA = b"the model of a hospital" * 100


def sealed() -> tuple[bytes, dict[int, bytes]]:
    return RINGS[0].seal(DATA, [1, 2], HEADER)


def test_neighbours_open_what_was_sealed_for_them() -> None:
    data, keys = sealed()
    assert set(keys) == {1, 2}
    assert all(RINGS[reader].open(data, keys[reader], HEADER) == DATA for reader in keys)


def test_nothing_of_the_data_can_be_read_and_no_two_are_alike() -> None:
    data, keys = sealed()
    assert b"hospital" not in data
    assert len(data) == len(DATA) + 16
    assert all(len(key) == 12 + 32 + 16 for key in keys.values())
    assert sealed()[0] != data


@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_changed_byte_is_refused(place: int) -> None:
    data, keys = sealed()
    wrong = bytearray(data)
    wrong[place] ^= 1
    with pytest.raises(SealError, match="step 3 was changed on the way"):
        RINGS[1].open(bytes(wrong), keys[1], HEADER)
    wrong = bytearray(keys[1])
    wrong[place] ^= 1
    with pytest.raises(SealError, match="was changed"):
        RINGS[1].open(data, bytes(wrong), HEADER)


@pytest.mark.parametrize(
    "header",
    [HEADER._replace(run=8), HEADER._replace(sender=2), HEADER._replace(step=4), HEADER._replace(kind="gradient")],
)
def test_another_run_sender_step_or_kind_is_refused(header: Header) -> None:
    data, keys = sealed()
    with pytest.raises(SealError):
        RINGS[1].open(data, keys[1], header)


def test_what_is_for_another_one_is_refused() -> None:
    data, keys = sealed()
    with pytest.raises(SealError):
        RINGS[3].open(data, keys[1], HEADER)
    with pytest.raises(SealError):
        RINGS[2].open(data, keys[1], HEADER)
    other, other_keys = RINGS[0].seal(b"something else", [1, 2], HEADER)
    with pytest.raises(SealError):  # the content of one with the key of the other
        RINGS[1].open(other, keys[1], HEADER)
    assert RINGS[1].open(other, other_keys[1], HEADER) == b"something else"


def test_who_has_not_the_senders_key_cannot_pretend_to_be_the_sender() -> None:
    data, keys = Keyring(0, PRIVATE[3], PUBLIC).seal(DATA, [1], HEADER)
    with pytest.raises(SealError):
        RINGS[1].open(data, keys[1], HEADER)


def test_unknown_reader_is_named() -> None:
    with pytest.raises(SealError, match="no public key of site 9 is known"):
        RINGS[0].seal(DATA, [9], HEADER)


def context(**node: Any) -> Context:
    return Context(run_id=7, node_id=1, node_config=node, state=RecordDict(), run_config={})


def test_keys_from_files(tmp_path: Path) -> None:
    """As the operator makes them: the program writes the private key for its owner only and prints the public one."""
    made = subprocess.run(
        [sys.executable, "-m", "client_app.sealing", str(tmp_path / "own.key")], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "own.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "peers.toml").write_text(f'0 = "{made.stdout.strip()}"\n1 = "{b64encode(PUBLIC[1]).decode()}"\n')
    node = {"private-key": str(tmp_path / "own.key"), "peer-keys": str(tmp_path / "peers.toml")}
    own = keyring(context(**node), "keys", 0, {})
    (tmp_path / "other.key").write_bytes(b64encode(PRIVATE[1].private_bytes_raw()))
    other = keyring(context(**node | {"private-key": str(tmp_path / "other.key")}), "keys", 1, {})
    data, keys = own.seal(DATA, [1], HEADER)
    assert other.open(data, keys[1], HEADER) == DATA
    again = subprocess.run(
        [sys.executable, "-m", "client_app.sealing", str(tmp_path / "own.key")], capture_output=True, check=False
    )
    assert again.returncode != 0  # an existing key is never overwritten


def test_missing_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SealError, match="--node-config has no private-key and no peer-keys"):
        keyring(context(), "keys", 0, {})
    (tmp_path / "own.key").write_text("no key")
    with pytest.raises(SealError, match=r"private-key = .*own\.key"):
        keyring(context(**{"private-key": str(tmp_path / "own.key"), "peer-keys": "nowhere"}), "keys", 0, {})


def test_first_use_is_trusted_and_kept_to() -> None:
    here = context()
    first = public_key(here)
    assert public_key(here) == first
    keyring(here, "trust-on-first-use", 0, ConfigRecord({"key-1": PUBLIC[1]}))
    keyring(here, "trust-on-first-use", 0, ConfigRecord({"key-1": PUBLIC[1]}))
    with pytest.raises(SealError, match="site 1 has another public key than at first"):
        keyring(here, "trust-on-first-use", 0, ConfigRecord({"key-1": PUBLIC[2]}))
