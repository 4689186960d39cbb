"""Makes the files of each party of a deployment, from the templates in this folder.

    python -m deploy server NAME...           on the server, with the names and IPs that sites call
    python -m deploy site NUMBER NAME SERVER  on a site's machine
    python -m deploy backup FOLDER            on either: what cannot be made again, into FOLDER

The guide is docs/how-to/deploy.md. Nothing that is there is overwritten: to make a key or a file
again, move it away and repeat the command. Private keys stay on the machine that makes them, each
readable by the one user who needs it; what is to be handed over is printed.
"""

import argparse
import datetime
import grp
import ipaddress
import os
import pwd
import re
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HERE = Path(__file__).parent
FOLDER = Path("/etc/archipelago")
STATE = Path("/var/lib/archipelago")
DATABASE = Path("/var/lib/flower/state.db")
NUM_BACKUPS = 7  # back-ups
CA_DAYS, SERVER_DAYS = 3650, 730
# Of a SuperNode's API on its own machine; one more for each site: a machine may have several.
NODE_PORT = 9094
Key = ec.EllipticCurvePrivateKey


class DeployError(ValueError):
    """Something that was asked for cannot be made; the message says why and what is allowed."""


class Kit:
    """A folder that is filled.

    Args:
        folder: it is made if it is not there.

    Raises:
        DeployError: a user or a group is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            users = {name: pwd.getpwnam(name) for name in ("archipelago", "flower")}
            clients = grp.getgrnam("site-clients").gr_gid
        except KeyError as error:
            raise DeployError(
                f"{error.args[0]}: docs/how-to/deploy.md says how to make users and groups"
            ) from None
        self._owner = {name: user.pw_uid for name, user in users.items()} | {"root": os.geteuid()}
        self._group = {name: user.pw_gid for name, user in users.items()} | {"root": os.getegid()}
        ids = {name: f"{user.pw_uid}:{user.pw_gid}" for name, user in users.items()}
        self.ids = {**ids, "uid": self._owner["archipelago"], "clients": clients}
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """The path of a file in the folder."""
        return self._folder / name

    def has(self, name: str) -> bool:
        """Whether a file is there already; print it if so."""
        if found := self.path(name).exists():
            print(f"kept     {self.path(name)}")
        return found

    def write(
        self, name: str, content: bytes, mode: int = 0o644, owner: str = "root", group: str = ""
    ) -> None:
        """Write a new file, never for a moment more open than ``mode``."""
        path = self.path(name)
        path.parent.mkdir(mode=0o755, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            os.fchown(file.fileno(), self._owner[owner], self._group[group or owner])
            os.fchmod(file.fileno(), mode)
        print(f"written  {path}")

    def fill(self, templates: str, values: Mapping[str, object]) -> None:
        """The files of a folder of templates, in which ``@key@`` is a value."""
        for template in sorted((HERE / templates).iterdir()):
            name = "flwr/config.toml" if template.name == "flwr.toml" else template.name
            if not self.has(name):
                text = re.sub(r"@(\w+)@", lambda key: str(values[key[1]]), template.read_text())
                self.write(name, text.encode())

    def hand_over(self, *names: str) -> None:
        """Print which files others need, and the digests to compare."""
        print("\nTo hand over, and to compare by another way than it comes:")
        for name in names:
            print(
                f"{self.path(name)}\n  SHA-256 {sha256(self.path(name).read_bytes()).hexdigest()}"
            )


def make_server(kit: Kit, names: list[str]) -> None:
    """Make an authority, the server's certificate by it, and the server's files.

    Also the secret between SuperLink and SuperExec.
    """
    alternatives = [_name(name) for name in dict.fromkeys([*names, "localhost", "127.0.0.1"])]
    if not kit.has("ca.key"):
        authority = ec.generate_private_key(ec.SECP256R1())
        kit.write("ca.key", _pem(authority), 0o600)
        kit.write(
            "ca.crt",
            _certificate(authority, authority, f"Archipelago of {names[0]}", CA_DAYS, None),
        )
    if not kit.has("server.crt"):
        authority = load_pem_private_key(kit.path("ca.key").read_bytes(), None)  # type: ignore[assignment]
        if not kit.has("server.key"):
            kit.write("server.key", _pem(ec.generate_private_key(ec.SECP256R1())), 0o600, "flower")
        key = load_pem_private_key(kit.path("server.key").read_bytes(), None)
        assert isinstance(key, Key)
        issuer = x509.load_pem_x509_certificate(kit.path("ca.crt").read_bytes())
        kit.write(
            "server.crt", _certificate(key, authority, names[0], SERVER_DAYS, alternatives, issuer)
        )
    if not kit.has("superexec.secret"):
        kit.write(
            "superexec.secret", secrets.token_hex(32).encode(), 0o640, "flower", "archipelago"
        )
    kit.fill("server", kit.ids)
    kit.fill("both", {})
    kit.hand_over("ca.crt")


def make_site(kit: Kit, number: int, name: str, server: str) -> None:
    """A SuperNode's key, a key for sealed runs, and the site's files."""
    _name(server)
    if not 0 <= number < 10**6:
        raise DeployError(f"number = {number}: 0 to 999999 is allowed")
    if not name.isprintable() or '"' in name or "\\" in name:
        raise DeployError(
            f"name = {name!r}: printable characters other than quotes and backslashes are allowed"
        )
    if not kit.has("node"):
        # Of the kinds that Flower takes, the one that its own guide makes.
        node = ec.generate_private_key(ec.SECP384R1())
        kit.write(
            "node",
            node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
            0o600,
            "flower",
        )
        public = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        _renew(kit, f"hand-over/site-{number}.pub", public + b"\n")
    if not kit.has("sealing.key"):
        from client_app.sealing import new_key  # with PyTorch, for which nothing else waits

        private, shown = new_key()
        kit.write("sealing.key", private, 0o600, "archipelago")
        _renew(kit, f"hand-over/site-{number}.sealing", f'{number} = "{shown}"\n'.encode())
    if not kit.has("peers.toml"):
        kit.write("peers.toml", b"# Neighbours' public keys, a line of their .sealing file each.\n")
    kit.fill(
        "site",
        {
            **kit.ids,
            "number": number,
            "name": name,
            "server": server,
            "port": NODE_PORT + number % 1000,
        },
    )
    kit.fill("both", {})
    kit.hand_over(f"hand-over/site-{number}.pub", f"hand-over/site-{number}.sealing")


def back_up(folder: Path) -> Path:
    """Back up keys, configuration, state and results of this machine, and Flower's database.

    The database is as of one moment.

    Returns:
        the file, which holds private keys; the newest ``NUM_BACKUPS`` of the folder stay.
    """
    os.umask(0o077)
    folder.mkdir(parents=True, exist_ok=True)
    moment = datetime.datetime.now(datetime.UTC)
    target = folder / f"archipelago-{moment:%Y%m%d-%H%M%S}.tar.gz"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        parts = [
            "--directory=/",
            *(str(path.relative_to("/")) for path in (FOLDER, STATE) if path.exists()),
        ]
        if DATABASE.exists():
            copy = Path(scratch) / DATABASE.relative_to("/")
            copy.parent.mkdir(parents=True)
            with (
                closing(sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True)) as source,
                closing(sqlite3.connect(copy)) as found,
            ):
                source.backup(found)
            shutil.copystat(DATABASE, copy)
            os.chown(copy, DATABASE.stat().st_uid, DATABASE.stat().st_gid)
            parts += [f"--directory={scratch}", str(DATABASE.relative_to("/"))]
        made = Path(scratch) / "tar"
        # 1: a file changed while it was read; all that is to be whole is written beside its place
        # and moved there.
        if (
            code := subprocess.run(
                ["tar", "--create", "--gzip", "--ignore-failed-read", f"--file={made}", *parts]
            ).returncode
        ) > 1:
            raise DeployError(f"{target}: tar ended with {code}")
        made.rename(target)
    for old in sorted(folder.glob("archipelago-*.tar.gz"))[:-NUM_BACKUPS]:
        old.unlink()
    return target


def _renew(kit: Kit, name: str, content: bytes) -> None:
    """The public part of a key that was just made: that of an earlier one has no use."""
    kit.path(name).unlink(missing_ok=True)
    kit.write(name, content)


def _name(name: str) -> x509.GeneralName:
    """A DNS name or an IP address as it stands in a certificate.

    Raises:
        DeployError: it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        label = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
        if not re.fullmatch(rf"{label}(\.{label})*", name) or len(name) > 253:
            raise DeployError(
                f"{name!r}: a DNS name such as server.example.org or an IP address is expected"
            ) from None
        return x509.DNSName(name)


def _pem(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _certificate(
    key: Key,
    authority: Key,
    name: str,
    days: int,
    alternatives: list[x509.GeneralName] | None,
    issuer: x509.Certificate | None = None,
) -> bytes:
    """A certificate in PEM: of a server with its names, or, without these, of an authority."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    now, ca = datetime.datetime.now(datetime.UTC), alternatives is None
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    builder = (
        x509.CertificateBuilder(
            issuer.subject if issuer else subject,
            subject,
            key.public_key(),
            x509.random_serial_number(),
        )
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
    )
    if alternatives is not None:
        builder = builder.add_extension(
            x509.SubjectAlternativeName(alternatives), critical=False
        ).add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        help="where the files go; what stands in them says %(default)s",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("server")
    server.add_argument("names", nargs="+", metavar="NAME")
    site = commands.add_parser("site")
    site.add_argument("number", type=int, metavar="NUMBER")
    site.add_argument("name", metavar="NAME")
    site.add_argument("server", metavar="SERVER")
    commands.add_parser("backup").add_argument("into", type=Path, metavar="FOLDER")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "server":
            make_server(Kit(asked.folder), asked.names)
        elif asked.command == "site":
            make_site(Kit(asked.folder), asked.number, asked.name, asked.server)
        else:
            print(back_up(asked.into))
    except (DeployError, OSError, sqlite3.Error) as error:
        sys.exit(
            f"{type(error).__name__}: {error}" if isinstance(error, sqlite3.Error) else str(error)
        )


if __name__ == "__main__":
    main()
