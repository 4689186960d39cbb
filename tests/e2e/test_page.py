"""The page in a browser: headless Chromium on folders of real runs.

``apt-get install chromium`` has it on Debian.
"""

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
from flwr.app import Message

from client_app.app import app as client_app
from client_app.policy import SiteFile
from client_app.status import Status
from page import server
from server_app import plots
from server_app.app import app as server_app
from server_app.overview import overview, runs
from server_app.results import Pictures
from server_app.watch import data
from simulation.grid import run_in_process
from strategies.protocol import read_card, write_card
from tests.conftest import default_config, own

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.e2e
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
HOSTILE = "<script>alert(1)</script>"


def hostile(site: int, message: Message, reply: Message) -> Message:
    """Site 1 has a name that is HTML."""
    if site == 1 and message.metadata.message_type == "query.site":
        reply.content = write_card(read_card(reply).model_copy(update={"name": HOSTILE}))
    return reply


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (it is of the group dev)"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Co-learning and one of peers; a site's name is HTML."""
    found = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pictures, "draw_curves", lambda pictures: None)
        patch.setattr(plots, "save", lambda *arguments: None)
        for strategy in ("co-learning", "dmsgd"):
            small = {
                "strategy": strategy,
                "num-sites": 3,
                "epochs": 3,
                "model.name": "mlp",
                "results.folder": str(found),
            }
            config = default_config() | small | own(strategy, local_epochs=1)
            run_in_process(server_app, client_app, 3, config, hostile)
    return found


@pytest.fixture
def address(root: Path) -> Iterator[str]:
    with serving(partial(data, root)) as found:
        yield found


@contextmanager
def serving(data: Callable[[Mapping[str, str]], object]) -> Iterator[str]:
    """The page of some data; its address."""
    served = server(("127.0.0.1", 0), data, lambda: b"")
    thread = Thread(target=served.serve_forever, args=[0.01])
    thread.start()
    yield served.address
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.fixture(params=["light-1280", "dark-390"])
def page(browser: "Browser", request: pytest.FixtureRequest) -> "Iterator[Page]":
    """A window, wide and light or narrow and dark; nothing may be complained of in its console."""
    scheme, width = request.param.split("-")
    context = browser.new_context(
        viewport={"width": int(width), "height": 900}, color_scheme=scheme
    )
    found, complaints = context.new_page(), list[str]()
    found.on(
        "console",
        lambda message: (
            complaints.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
    yield found
    assert complaints == []
    context.close()


def run_of(root: Path, method: str) -> str:
    return next(name for name in runs(root) if name.endswith(method))


def cells(page: "Page", caption: str) -> list[list[str]]:
    table = page.locator("table", has=page.locator("caption", has_text=caption))
    return [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]


def fits(page: "Page") -> bool:
    """Whether the page itself need not be moved sideways; wide tables have bars of their own."""
    found: Any = page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    return bool(found)


def test_runs_their_values_and_their_comparison(
    page: "Page", address: str, root: Path, tmp_path: Path
) -> None:
    page.goto(address)
    page.get_by_role("heading", name="Runs").wait_for()
    assert fits(page)
    listed = cells(page, "the newest first")
    assert [row[0] for row in listed] == list(runs(root))
    first = run_of(root, "co-learning")
    page.get_by_role("link", name=first).click()
    page.get_by_role("heading", name=first).wait_for()
    expected = overview(root / first)
    sites = cells(page, "3 sites")
    assert sites[1][0] == HOSTILE
    assert [float(row[7]) for row in sites] == pytest.approx(
        [each["metrics"]["test accuracy"] for each in expected["sites"]], rel=1e-3
    )
    assert page.locator("figure canvas").count() >= 4
    assert fits(page)
    page.get_by_label("bytes").check()
    page.locator("figure .u-legend", has_text="sent and received").first.wait_for()
    # By its key alone: the first thing to reach leads past the header, and the log opens.
    page.locator("summary", has_text="Log").focus()
    page.keyboard.press("Enter")
    assert cells(page, "newest first")[0][2] == "ended"
    page.goto(f"{address}/#run={run_of(root, 'dmsgd')}")
    page.get_by_role("img", name="graph of 3 peers with 3 links").wait_for()
    page.locator("summary", has_text="Bytes a link").click()
    assert len(cells(page, "6 links")) == 6
    page.goto(f"{address}/#")
    page.get_by_role("heading", name="Runs").wait_for()
    for box in page.get_by_role("checkbox").all():
        box.check()
    page.get_by_role("button", name="Compare chosen runs").click()
    page.get_by_role("heading", name="What differs").wait_for()
    assert "strategy" in [row[0] for row in cells(page, "keys of the configuration")]
    assert fits(page)


def test_run_that_goes_on_is_followed(page: "Page", address: str, root: Path) -> None:
    finished = root / run_of(root, "co-learning")
    going = root / "going"
    shutil.copytree(finished, going)
    events = going / "events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    events.write_text("".join(lines[:2]))
    try:
        page.clock.install()
        with events.open("a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # as the run does
            page.goto(f"{address}/#run=going")
            page.locator(".state", has_text="running").wait_for()
            log.writelines(lines[2:])
        page.clock.run_for(6000)
        page.locator(".state", has_text="finished").wait_for()
    finally:
        shutil.rmtree(going)


def test_report_needs_no_server_and_no_network(page: "Page", root: Path) -> None:
    name = run_of(root, "co-learning")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((root / name / "report.html").as_uri())
    page.get_by_role("heading", name=name).wait_for()
    assert page.locator("figure canvas").count() >= 4
    assert cells(page, "3 sites")[1][0] == HOSTILE
    assert page.locator("main script").count() == 0
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert fits(page)


def test_page_of_a_site(page: "Page") -> None:
    site = SiteFile.model_validate(
        {"site": 1, "name": "clinic A", "socket": "s", "data": {"source": "digits"}}
    )
    status = Status(site, (1200, 300), {"smallest-batch": "8"}, lambda: ("nothing", 1.0))
    line = {
        "time": "2026-11-27T00:00:00Z",
        "run": 2**60 + 1,
        "round": 4,
        "kind": "train",
        "strategy": HOSTILE,
    }
    status.add({**line, "way": "in", "bytes": 1000})
    status.add({**line, "way": "out", "bytes": 900, "seconds": 2.0, "norms": {"x": 0.5}})
    with serving(status.data) as address:
        page.goto(address)
        page.get_by_role("heading", name="clinic A").wait_for()
        answered, asked = cells(page, "as the audit log has them")
        assert (asked[1], answered[1]) == ("asked", "answered")
        assert (asked[2], asked[5]) == (str(2**60 + 1), HOSTILE)
        assert answered[6:9] == ["900 B", "2.0 s", "x 0.5"]
        assert cells(page, "[policy]") == [["smallest-batch", "8"]]
        assert fits(page)


def test_every_text_has_enough_contrast(page: "Page", address: str, root: Path) -> None:
    """At least 4.5 to 1 against what is behind it (WCAG 2.2, 1.4.3)."""
    page.goto(f"{address}/#run={run_of(root, 'co-learning')}")
    page.locator("figure canvas").first.wait_for()
    poor = page.evaluate(
        """() => {
          const channels = text => text.match(/[\\d.]+/g).map(Number);
          const luminance = rgb => rgb.slice(0, 3).map(c => c / 255)\
.map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
          const behind = node => {
            for (; node; node = node.parentElement) {
              const found = channels(getComputedStyle(node).backgroundColor);
              if (found.length < 4 || found[3] > 0) return found;
            }
            return [255, 255, 255];
          };
          const poor = [];
          for (const node of document.querySelectorAll("body *")) {
            if (![...node.childNodes].some(\
child => child.nodeType === 3 && child.textContent.trim())) continue;
            if (!node.checkVisibility() || \
node.matches("script, style, option, button:disabled, svg *")) continue;
            const [a, b] = [luminance(channels(getComputedStyle(node).color)), \
luminance(behind(node))].sort((x, y) => y - x);
            if ((a + .05) / (b + .05) < 4.5) \
poor.push([node.tagName, node.textContent.slice(0, 30), (a + .05) / (b + .05)]);
          }
          return poor;
        }"""
    )
    assert poor == []
