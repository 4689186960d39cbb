"""The page to watch, and the read-only server of it.

The page is one HTML document that needs no other file and no network. Flower's bundle of an app
carries neither .js, .css nor .html, so the page's own parts are the fenced blocks of ``page.md``
and the library that draws its charts is ``uplot.json`` (uPlot, MIT; from ``npm pack uplot``).
"""

import json
import math
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET6
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

HERE = Path(__file__).parent
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ADDRESS = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:]+)\]|(?P<host>[A-Za-z0-9.-]+)):(?P<port>\d{1,5})")


class Answer(NamedTuple):
    """An HTTP answer: its content type and its body."""

    kind: str
    body: bytes


Route = Callable[[Mapping[str, str]], Answer | None]
"""Of a query's parameters, what is answered; None where there is no such thing."""


@lru_cache(maxsize=1)
def _parts() -> tuple[str, str, tuple[str, ...]]:
    """The body, the style, and the scripts."""
    own = dict(
        re.findall(
            r"^```(\w+)\n(.*?)^```$", (HERE / "page.md").read_text(), re.MULTILINE | re.DOTALL
        )
    )
    library = json.loads((HERE / "uplot.json").read_text())
    return own["html"], library["style"] + "\n" + own["css"], (library["script"], own["js"])


@lru_cache(maxsize=1)
def policy() -> str:
    """The content security policy: only the document's own scripts and style, by their hashes."""

    def hashes(*texts: str) -> str:
        return " ".join(
            f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts
        )

    _, style, scripts = _parts()
    allowed = f"script-src {hashes(*scripts)}; style-src {hashes(style)}; connect-src 'self'"
    return f"default-src 'none'; {allowed}; img-src data:; base-uri 'none'; form-action 'none'"


def plain(value: Any) -> Any:
    """A value as JSON can hold it: what is not finite is None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def as_json(data: object) -> str:
    """JSON without whitespace."""
    return json.dumps(plain(data), separators=(",", ":"), allow_nan=False)


def document(data: object = None) -> str:
    """The page, with data in it; without, it asks the server that it comes from for them."""
    body, style, scripts = _parts()
    # Nothing in the data can end the element that holds them.
    embedded = (
        as_json(data)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy()}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>Archipelago</title>\n<style>{style}</style>\n</head>\n<body>\n{body}"
        f'<script type="application/json" id="data">{embedded}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n"
    )


def address_of(text: str) -> tuple[str, int]:
    """Host and port of "127.0.0.1:8081" or "[::1]:8081".

    Raises:
        ValueError: it is none.
    """
    found = ADDRESS.fullmatch(text)
    if not found or int(found["port"]) > 65535:
        raise ValueError(
            f"{text!r}: an address with a port is expected, such as 127.0.0.1:8081 or [::1]:8081"
        )
    return found["six"] or found["host"], int(found["port"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], routes: Mapping[str, Route]) -> None:
        self.routes, self.loopback = routes, address[0] in LOOPBACK
        if ":" in address[0]:
            self.address_family = AF_INET6
        super().__init__(address, _Handler)
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.address = f"http://{host}:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Log nothing where a browser closes its connection."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "archipelago", ""
    timeout = 10  # seconds without a byte

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        # A page elsewhere whose name points here (DNS rebinding).
        if self.server.loopback and name not in LOOPBACK:
            self._send(403, Answer("text/plain", b"ask for it by 127.0.0.1 or localhost\n"))
            return
        query = {
            key: values[-1]
            for key, values in parse_qs(address.query, keep_blank_values=True).items()
        }
        route = self.server.routes.get(address.path)
        try:
            found = route(query) if route else None
        except Exception as error:  # such as a file that is damaged
            self._send(
                500,
                Answer("text/plain; charset=utf-8", f"{type(error).__name__}: {error}\n".encode()),
            )
            return
        self._send(200 if found else 404, found or Answer("text/plain", b"there is no such page\n"))

    do_HEAD = do_GET

    def _send(self, status: int, answer: Answer) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": answer.kind,
            "Content-Length": str(len(answer.body)),
            "Content-Security-Policy": f"{policy()}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, *_: object) -> None:
        """Log no requests."""


def server(
    address: tuple[str, int],
    data: Callable[[Mapping[str, str]], object],
    metrics: Callable[[], bytes],
) -> _Server:
    """An HTTP server of the page at ``/``, its data at ``/data`` and metrics at ``/metrics``.

    It reads and never writes.

    Args:
        address: host and port; at a loopback address it answers only who asks for it by such a
            name.
        data: of a query's parameters; None where there is none.
        metrics: in Prometheus' text format.
    """

    def serve_data(query: Mapping[str, str]) -> Answer | None:
        found = data(query)
        return None if found is None else Answer("application/json", as_json(found).encode())

    routes: dict[str, Route] = {
        "/": lambda _: Answer("text/html; charset=utf-8", document().encode()),
        "/data": serve_data,
        "/metrics": lambda _: Answer("text/plain; version=0.0.4; charset=utf-8", metrics()),
    }
    return _Server(address, routes)
