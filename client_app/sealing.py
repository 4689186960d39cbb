"""Sealed payloads: what peers exchange is encrypted end to end.

So the relay can neither read, change, swap nor replay it.

A payload is encrypted once, with a content key of its own (AES-256-GCM); that key is wrapped for
each reader with a key that only the two of them can compute (X25519; HKDF-SHA256 with the run, both
numbers, both public keys and both nonces; AES-256-GCM). Both are authenticated together with the
run, the sender, its step and the kind of payload, the wrapped key also with the reader and the
SHA-256 of what it opens: a reader who knows a content key cannot seal anything else with it in the
sender's name. A reader takes each step of a sender once, in order.

A nonce is what a site draws for a run at the run's first message, and again if it lost its memory.
The site sends it when it describes itself and with each answer, and the relay passes it on: a
payload opens at a site only if it was sealed for the nonce that this site has now. So nothing of an
earlier run does, whatever the relay calls it; a wrong nonce costs a payload, as if it had been
dropped.

Whose public key is whose, a site reads from a file of its own
(``--node-config 'private-key="..." peer-keys="..."'``), which lists for each site number its public
key. It should list neighbours only: the graph comes from the run, and whoever is listed may be made
one. With ``sealing = "trust-on-first-use"`` sites make keys of their own, the relay passes the
public ones on, and a site keeps to those of the first message: that protects from a relay that
turns bad later, not from one that was bad at first. A site that lost its memory trusts the next
message again; where ``state`` names a folder it does not lose it (:mod:`client_app.memory`).

Keys of files stay the same from run to run, so there is no forward secrecy: who records what is
sent and gets a site's private key later opens all that was sent to or from this site.
"""

import os
import tomllib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import Array, ConfigRecord, Context
from safetensors.torch import load, save

from strategies.codecs import Payload
from strategies.protocol import NONCE
from strategies.records import TO, pack_bytes, unpack_bytes

GCM_NONCE = 12  # bytes
# A content key is used once, so its nonce need not be another one each time.
FIRST = bytes(GCM_NONCE)
SEALED, KEY = "sealed", "key"  # the parts of a sealed payload
KEYS = "peer-keys"  # the record in the context's state, and the key in a site's configuration
DRAWN = "run-nonce"  # the record in the context's state


class SealError(ValueError):
    """A payload was changed, repeated, or is not for this site; or a key is missing or changed."""


class Header(NamedTuple):
    """The run, sender, step and kind that a sealed payload is bound to."""

    run: int
    sender: int
    step: int
    kind: str

    def bytes(self, reader: int | None = None, sealed: bytes = b"") -> bytes:
        """The header as the bytes that are authenticated.

        That is with the data or, for a ``reader``, with the key that opens what was ``sealed``.
        """
        text = f"archipelago:{self.run}:{self.sender}:{self.step}:{self.kind}:"
        return (
            text.encode()
            if reader is None
            else f"{text}{reader}:{sha256(sealed).hexdigest()}".encode()
        )


class Keyring:
    """A site's private key, its neighbours' public ones, and everybody's nonces in a run."""

    def __init__(
        self,
        number: int,
        private: X25519PrivateKey,
        public: Mapping[int, bytes],
        nonces: Mapping[int, bytes],
    ) -> None:
        self._number, self._private, self._public, self._nonces = number, private, public, nonces

    def _shared(self, other: int, run: int) -> AESGCM:
        """The secret that only this site and ``other`` can compute.

        Raises:
            SealError: the public key or the nonce of ``other`` is not known, or the key is none.
        """
        if other not in self._public:
            raise SealError(f"no public key of site {other} is known")
        if other not in self._nonces:
            raise SealError(f"no nonce of site {other} is known")
        try:
            secret = self._private.exchange(X25519PublicKey.from_public_bytes(self._public[other]))
        except ValueError:  # too short, or one of the few with which every secret is the same
            raise SealError(f"the public key of site {other} cannot be used") from None
        both = sorted({self._number: _public_of(self._private), other: self._public[other]}.items())
        text = ":".join(f"{site}:{key.hex()}:{self._nonces[site].hex()}" for site, key in both)
        return AESGCM(
            HKDF(
                hashes.SHA256(), 32, None, f"archipelago content key:{run}:{text}".encode()
            ).derive(secret)
        )

    def has_key(self, other: int) -> bool:
        """Whether there is a public key of a site."""
        return other in self._public

    def seal(
        self, data: bytes, readers: Iterable[int], header: Header
    ) -> tuple[bytes, dict[int, bytes], dict[int, str]]:
        """The sealed data; for each reader the key that opens them, or why there is none."""
        content = AESGCM.generate_key(256)
        sealed = AESGCM(content).encrypt(FIRST, data, header.bytes())
        wrapped, problems = dict[int, bytes](), dict[int, str]()
        for reader in readers:
            nonce = os.urandom(GCM_NONCE)
            try:
                key = self._shared(reader, header.run).encrypt(
                    nonce, content, header.bytes(reader, sealed)
                )
                wrapped[reader] = nonce + key
            except SealError as error:  # costs that neighbour the payload, and nobody else
                problems[reader] = str(error)
        return sealed, wrapped, problems

    def open(self, sealed: bytes, wrapped: bytes, header: Header) -> bytes:
        """The data of a payload from ``header.sender``.

        Raises:
            SealError: it was changed, or is not what the header says, or not for this site.
        """
        shared = self._shared(header.sender, header.run)
        try:
            content = shared.decrypt(
                wrapped[:GCM_NONCE], wrapped[GCM_NONCE:], header.bytes(self._number, sealed)
            )
            return AESGCM(content).decrypt(FIRST, sealed, header.bytes())
        except (InvalidTag, ValueError):  # of another length, too
            raise SealError(
                f"step {header.step} was changed on the way, or is not for this site, step or run, "
                "or its key or nonce is another one"
            ) from None


def seal(
    ring: Keyring, name: str, payload: Payload, readers: Iterable[int], header: Header
) -> tuple[dict[str, Array], dict[int, str]]:
    """A payload as sealed arrays, which are sent under ``name``.

    Also the readers that cannot have it, and why.
    """
    data = save({part: value.detach().cpu().contiguous() for part, value in payload.items()})
    sealed, keys, problems = ring.seal(data, readers, header)
    arrays = {f"{name}/{SEALED}": pack_bytes(sealed)} | {
        f"{TO}{reader}/{KEY}": pack_bytes(key) for reader, key in keys.items()
    }
    return arrays, problems


def unseal(ring: Keyring, arrays: Mapping[str, Array], header: Header) -> Payload:
    """The payload of sealed arrays, on the CPU.

    Raises:
        SealError: it is not sealed for this site, or was changed.
    """
    if {SEALED, KEY} - set(arrays):
        raise SealError(f"step {header.step} is not sealed for this site")
    return load(ring.open(unpack_bytes(arrays[SEALED]), unpack_bytes(arrays[KEY]), header))


def _public_of(private: X25519PrivateKey) -> bytes:
    return private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def public_key(context: Context) -> bytes:
    """This site's public key where keys are trusted on first use.

    The private one is made now if there is none.
    """
    record = _own(context)
    private = X25519PrivateKey.from_private_bytes(bytes(record["private"]))  # type: ignore[arg-type]
    return _public_of(private)


def _own(context: Context) -> ConfigRecord:
    record = context.state.get(KEYS)
    if not isinstance(record, ConfigRecord):
        made = X25519PrivateKey.generate().private_bytes(
            Encoding.Raw, PrivateFormat.Raw, NoEncryption()
        )
        record = ConfigRecord({"private": made})
        context.state[KEYS] = record
    return record


def nonce_of(context: Context) -> bytes:
    """This site's nonce in the run, drawn now if there is none."""
    record, run = context.state.get(DRAWN), str(context.run_id)
    # Flower keeps a context from run to run of a series.
    if not isinstance(record, ConfigRecord) or record["run"] != run:
        record = context.state[DRAWN] = ConfigRecord({"run": run, "nonce": os.urandom(NONCE)})
    return bytes(record["nonce"])  # type: ignore[arg-type]


def keyring(
    context: Context,
    sealing: str,
    number: int,
    keys: Mapping[int, bytes],
    nonces: Mapping[int, bytes],
) -> Keyring:
    """The keys of a site.

    Args:
        context: of the message.
        sealing: ``keys`` or ``trust-on-first-use``.
        number: of this site.
        keys: public keys of other sites that the message brings; of use with trust on first use
            only.
        nonces: of other sites, that the message brings.

    Raises:
        SealError: the files cannot be read, or a site has another key than before.
    """
    nonces = {**nonces, number: nonce_of(context)}
    if sealing == "keys":
        return _from_files(context, number, nonces)
    record = _own(context)
    pinned = "pinned" in record
    for site, key in keys.items():
        if record.get(f"key-{site}", key) != key:
            raise SealError(f"site {site} has another public key than at first: refused")
        if f"key-{site}" not in record and pinned:
            raise SealError(f"site {site} has a public key, and had none at first: refused")
        record[f"key-{site}"] = key
    record["pinned"] = True  # whom the first message does not name, no later one can
    known = {
        int(name.removeprefix("key-")): bytes(value)  # type: ignore[arg-type]
        for name, value in record.items()
        if name.startswith("key-")
    }
    return Keyring(
        number,
        X25519PrivateKey.from_private_bytes(bytes(record["private"])),  # type: ignore[arg-type]
        known,
        nonces,
    )


def _from_files(context: Context, number: int, nonces: Mapping[int, bytes]) -> Keyring:
    node = context.node_config
    missing = [key for key in ("private-key", KEYS) if key not in node]
    if missing:
        raise SealError(
            f"sealing = 'keys': --node-config has no {' and no '.join(missing)}; "
            "python -m client_app.sealing makes a key, "
            "and in a simulation sealing = 'trust-on-first-use' needs none"
        )
    try:
        file = Path(str(node["private-key"]))
        if (mode := file.stat().st_mode & 0o777) & 0o077 and os.name == "posix":
            raise ValueError(
                f"others may read the private key, its mode is {mode:o}: chmod 600 {file}"
            )
        private = X25519PrivateKey.from_private_bytes(b64decode(file.read_text()))
        listed = tomllib.loads(Path(str(node[KEYS])).read_text())
        public = {int(site): b64decode(str(key)) for site, key in listed.items()}
        if wrong := [site for site, key in public.items() if len(key) != 32]:
            raise ValueError(
                f"the key of site {wrong[0]} is no X25519 public key of 32 bytes in base64"
            )
        if other := [
            site for site, key in public.items() if (key == _public_of(private)) != (site == number)
        ]:
            whose = (
                f"that of site {other[0]}"
                if other[0] != number
                else "not the one that peer-keys lists for it"
            )
            raise ValueError(f"this is site {number}, its private key is {whose}")
    except (OSError, ValueError) as error:
        raise SealError(
            f"private-key = {node['private-key']!r}, peer-keys = {node[KEYS]!r}: {error}"
        ) from None
    return Keyring(number, private, public, nonces)


def new_key() -> tuple[bytes, str]:
    """A private key as its file holds it, and the public one as others list it, both in base64."""
    private = X25519PrivateKey.generate()
    return b64encode(
        private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    ), b64encode(_public_of(private)).decode()


def main() -> None:
    """Write a new private key into the file named on the command line; print the public one.

    Only the file's owner can read it.
    """
    import sys

    if len(sys.argv) != 2:
        raise SystemExit("python -m client_app.sealing PRIVATE-KEY-FILE")
    private, public = new_key()
    descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
    print(public)


if __name__ == "__main__":
    main()
