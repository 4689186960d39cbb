"""Sealed payloads: who can open what, and what is refused."""

import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.app import Context, RecordDict

from client_app.sealing import Header, Keyring, SealError, keyring, nonce_of, public_key

PRIVATE = [X25519PrivateKey.from_private_bytes(bytes([number + 1]) * 32) for number in range(4)]
PUBLIC = {number: key.public_key().public_bytes_raw() for number, key in enumerate(PRIVATE)}
NONCES = {number: bytes([number + 9]) * 16 for number in range(4)}
RINGS = [Keyring(number, key, PUBLIC, NONCES) for number, key in enumerate(PRIVATE)]
HEADER = Header(run=7, sender=0, step=3, kind="model")
DATA = b"the model of a hospital" * 100


def sealed(data: bytes = DATA) -> tuple[bytes, dict[int, bytes]]:
    found, keys, problems = RINGS[0].seal(data, [1, 2], HEADER)
    assert problems == {}
    return found, keys


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
    [
        HEADER._replace(run=8),
        HEADER._replace(sender=2),
        HEADER._replace(step=4),
        HEADER._replace(kind="gradient"),
    ],
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
    other, other_keys = sealed(b"something else")
    with pytest.raises(SealError):  # the content of one with the key of the other
        RINGS[1].open(other, keys[1], HEADER)
    assert RINGS[1].open(other, other_keys[1], HEADER) == b"something else"


def test_who_has_not_the_senders_key_cannot_pretend_to_be_the_sender() -> None:
    data, keys, _ = Keyring(0, PRIVATE[3], PUBLIC, NONCES).seal(DATA, [1], HEADER)
    with pytest.raises(SealError):
        RINGS[1].open(data, keys[1], HEADER)


def test_a_reader_and_the_relay_cannot_forge_the_senders_payload() -> None:
    """Reader 1 knows the content key, and seals other data with it.

    They reach reader 2 with the genuine key of 2.
    """
    data, keys = sealed()
    secret = PRIVATE[1].exchange(PRIVATE[0].public_key())
    both = f"0:{PUBLIC[0].hex()}:{NONCES[0].hex()}:1:{PUBLIC[1].hex()}:{NONCES[1].hex()}"
    shared = HKDF(hashes.SHA256(), 32, None, f"archipelago content key:7:{both}".encode()).derive(
        secret
    )
    bound = f"archipelago:7:0:3:model:1:{sha256(data).hexdigest()}".encode()
    content = AESGCM(shared).decrypt(keys[1][:12], keys[1][12:], bound)
    assert AESGCM(content).decrypt(bytes(12), data, b"archipelago:7:0:3:model:") == DATA
    forged = AESGCM(content).encrypt(bytes(12), b"another model" * 100, b"archipelago:7:0:3:model:")
    with pytest.raises(SealError, match="step 3 was changed on the way"):
        RINGS[2].open(forged, keys[2], HEADER)


@pytest.mark.parametrize("site", [0, 1])
def test_what_was_sealed_for_another_nonce_is_refused(site: int) -> None:
    """A payload of an earlier run with the same id; one of the two has drawn a new nonce since."""
    data, keys = sealed()
    with pytest.raises(SealError, match="its key or nonce is another one"):
        Keyring(1, PRIVATE[1], PUBLIC, NONCES | {site: bytes(16)}).open(data, keys[1], HEADER)
    without = Keyring(1, PRIVATE[1], PUBLIC, {1: NONCES[1]})
    with pytest.raises(SealError, match="no nonce of site 0 is known"):
        without.open(data, keys[1], HEADER)
    assert without.seal(DATA, [2], HEADER._replace(sender=1))[2] == {
        2: "no nonce of site 2 is known"
    }


def test_a_nonce_is_drawn_for_a_run_and_again_after_a_loss_of_memory() -> None:
    here = context()
    first = nonce_of(here)
    assert len(first) == 16
    assert nonce_of(here) == first
    here.run_id = 8
    second = nonce_of(here)
    here.state = RecordDict()
    assert len({first, second, nonce_of(here)}) == 3


@pytest.mark.parametrize(
    "bad", [bytes(32), b"\x01" + bytes(31), b"short"], ids=["zero", "low order", "short"]
)
def test_a_bad_public_key_costs_its_owner_only(bad: bytes) -> None:
    ring = Keyring(0, PRIVATE[0], PUBLIC | {1: bad}, NONCES)
    data, keys, problems = ring.seal(DATA, [1, 2, 9], HEADER)
    assert problems == {
        1: "the public key of site 1 cannot be used",
        9: "no public key of site 9 is known",
    }
    assert RINGS[2].open(data, keys[2], HEADER) == DATA
    with pytest.raises(SealError, match="the public key of site 1 cannot be used"):
        ring.open(data, keys[2], HEADER._replace(sender=1))


@pytest.mark.parametrize("wrapped", [b"", b"123", bytes(12)])
def test_a_key_of_another_length_is_refused(wrapped: bytes) -> None:
    with pytest.raises(SealError, match="step 3 was changed on the way"):
        RINGS[1].open(sealed()[0], wrapped, HEADER)


def context(**node: Any) -> Context:
    return Context(run_id=7, node_id=1, node_config=node, state=RecordDict(), run_config={})


def write_private(path: Path, site: int, mode: int = 0o600) -> None:
    path.write_bytes(b64encode(PRIVATE[site].private_bytes_raw()))
    path.chmod(mode)


@pytest.mark.slow
def test_keys_from_files(tmp_path: Path) -> None:
    """As the operator makes them.

    The program writes the private key for its owner only and prints the public one.
    """
    made = subprocess.run(
        [sys.executable, "-m", "client_app.sealing", str(tmp_path / "own.key")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "own.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "peers.toml").write_text(
        f'0 = "{made.stdout.strip()}"\n1 = "{b64encode(PUBLIC[1]).decode()}"\n'
    )
    node = {"private-key": str(tmp_path / "own.key"), "peer-keys": str(tmp_path / "peers.toml")}
    write_private(tmp_path / "other.key", 1)
    here, there = context(**node), context(**node | {"private-key": str(tmp_path / "other.key")})
    own, other = (
        keyring(here, "keys", 0, {}, {1: nonce_of(there)}),
        keyring(there, "keys", 1, {}, {0: nonce_of(here)}),
    )
    data, keys, _ = own.seal(DATA, [1], HEADER)
    assert other.open(data, keys[1], HEADER) == DATA
    again = subprocess.run(
        [sys.executable, "-m", "client_app.sealing", str(tmp_path / "own.key")],
        capture_output=True,
        check=False,
    )
    assert again.returncode != 0  # an existing key is never overwritten


def test_missing_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SealError, match="--node-config has no private-key and no peer-keys"):
        keyring(context(), "keys", 0, {}, {})
    (tmp_path / "own.key").write_text("no key")
    (tmp_path / "own.key").chmod(0o600)
    with pytest.raises(SealError, match=r"private-key = .*own\.key"):
        keyring(
            context(**{"private-key": str(tmp_path / "own.key"), "peer-keys": "nowhere"}),
            "keys",
            0,
            {},
            {},
        )


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_private_key_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    write_private(tmp_path / "own.key", 0, mode)
    (tmp_path / "peers.toml").write_text(f'1 = "{b64encode(PUBLIC[1]).decode()}"\n')
    node = {"private-key": str(tmp_path / "own.key"), "peer-keys": str(tmp_path / "peers.toml")}
    with pytest.raises(SealError, match=rf"its mode is {mode:o}: chmod 600 {tmp_path}/own.key"):
        keyring(context(**node), "keys", 0, {}, {})
    (tmp_path / "own.key").chmod(0o600)
    assert keyring(context(**node), "keys", 0, {}, {}).has_key(1)


def test_a_private_key_of_another_site_is_refused(tmp_path: Path) -> None:
    write_private(tmp_path / "1.key", 1)
    node = {"private-key": str(tmp_path / "1.key"), "peer-keys": str(tmp_path / "peers.toml")}
    (tmp_path / "peers.toml").write_text(f'1 = "{b64encode(PUBLIC[1]).decode()}"\n')
    with pytest.raises(SealError, match="this is site 0, its private key is that of site 1"):
        keyring(context(**node), "keys", 0, {}, {})
    (tmp_path / "peers.toml").write_text(f'0 = "{b64encode(PUBLIC[0]).decode()}"\n')
    with pytest.raises(
        SealError,
        match="this is site 0, its private key is not the one that peer-keys lists for it",
    ):
        keyring(context(**node), "keys", 0, {}, {})


def test_first_use_is_trusted_and_kept_to() -> None:
    here = context()
    first = public_key(here)
    assert public_key(here) == first
    keyring(here, "trust-on-first-use", 0, {1: PUBLIC[1]}, {})
    keyring(here, "trust-on-first-use", 0, {1: PUBLIC[1]}, {})
    with pytest.raises(SealError, match="site 1 has another public key than at first"):
        keyring(here, "trust-on-first-use", 0, {1: PUBLIC[2]}, {})


@pytest.mark.parametrize("first", [{}, {2: PUBLIC[2]}])
def test_a_key_that_the_first_message_does_not_bring_is_not_believed_later(
    first: dict[int, bytes],
) -> None:
    here = context()
    keyring(here, "trust-on-first-use", 0, first, {})
    with pytest.raises(SealError, match="site 1 has a public key, and had none at first"):
        keyring(here, "trust-on-first-use", 0, {1: PUBLIC[1]}, {})
    assert not keyring(here, "trust-on-first-use", 0, {}, {}).has_key(1)
