"""A site's own page: what was asked of it, what left, its rules, and the privacy that is spent.

No data, no keys, no models. It shows what the audit log holds, and the numbers that the service has
in memory; ``/metrics`` has them for Prometheus.
"""

import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from client_app.policy import Policy, PolicyError, SiteFile
from client_app.privacy import Account
from page import address_of, server

NEWEST = 100  # requests on the page
TAIL = 2**17  # bytes at the end of the audit log, of requests before this service started
RULES = {field.alias for field in Policy.model_fields.values()}


class Status(Collector):
    """What the page shows of a service.

    Args:
        site: the operator's file.
        examples: for training, and for tests.
        rules: of the policy, in words.
        doing: what the service does, and for how many seconds.
    """

    def __init__(
        self,
        site: SiteFile,
        examples: tuple[int, int],
        rules: Mapping[str, str],
        doing: Callable[[], tuple[str, float]],
    ) -> None:
        self._site, self._examples, self._rules, self._doing = site, examples, rules, doing
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._lock = Lock()
        self._newest: deque[dict[str, Any]] = deque(_tail(site.audit), NEWEST)
        self._requests: Counter[str] = Counter()  # in, out
        self._bytes: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()  # by rule
        self._last: dict[str, Any] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Add a line of the audit log."""
        with self._lock:
            self._newest.append(line)
            self._requests[line["way"]] += 1
            self._bytes[line["way"]] += line["bytes"]
            if line["round"] is not None:
                self._last = line
            if "rule" in line:
                self._refused[rule_of(str(line["rule"]))] += 1

    def spent(self) -> dict[str, float] | None:
        """Epsilon so far, the budget, and delta; None where nothing is added to what leaves."""
        if (privacy := self._site.privacy) is None:
            return None
        spent = Account(Path(self._site.state), privacy.delta).epsilon()
        return {"spent": spent, "epsilon": privacy.epsilon, "delta": privacy.delta}

    def data(self, _: Mapping[str, str]) -> dict[str, Any]:
        """The data of the page, as JSON can hold them."""
        doing, seconds = self._doing()
        privacy = self.spent()
        with self._lock:
            counts = {
                # The numbers of runs are too large for JavaScript.
                "newest": [{**line, "run": str(line["run"])} for line in reversed(self._newest)],
                "requests": self._requests["in"],
                "bytes": {way: self._bytes[way] for way in ("in", "out")},
                "refused": dict(self._refused),
            }
        train, test = self._examples
        about = {
            "site": self._site.site,
            "name": self._site.name,
            "since": self._since,
            "doing": doing,
            "seconds": round(seconds),
        }
        return {
            "site": about
            | counts
            | {"train": train, "test": test, "policy": self._rules, "privacy": privacy}
        }

    def collect(self) -> Iterable[Metric]:
        """The metrics of this site for Prometheus."""
        site = str(self._site.site)
        up = GaugeMetricFamily(
            "archipelago_site_up", "1 while the service answers requests", labels=["site"]
        )
        up.add_metric([site], 1.0)
        yield up
        with self._lock:
            requests, sent, refused, last = (
                dict(self._requests),
                dict(self._bytes),
                dict(self._refused),
                self._last,
            )
        for name, help, values in (
            ("requests", "requests and answers", requests),
            ("bytes", "arrays of requests and answers", sent),
        ):
            family = CounterMetricFamily(f"archipelago_{name}", help, labels=["site", "direction"])
            for way in ("in", "out"):
                family.add_metric([site, way], values.get(way, 0))
            yield family
        family = CounterMetricFamily(
            "archipelago_refused", "requests that break a rule", labels=["site", "rule"]
        )
        for rule, count in refused.items():
            family.add_metric([site, rule], count)
        yield family
        if last:
            yield GaugeMetricFamily(
                "archipelago_round", "of the newest request", float(last["round"])
            )
        for part, count in zip(("train", "test"), self._examples, strict=True):
            yield GaugeMetricFamily(
                f"archipelago_{part}_examples", "that the site holds", float(count)
            )
        if privacy := self.spent():
            yield GaugeMetricFamily(
                "archipelago_epsilon_spent", "of differential privacy, so far", privacy["spent"]
            )
            yield GaugeMetricFamily(
                "archipelago_epsilon_budget", "of differential privacy, in all", privacy["epsilon"]
            )

    def serve(self) -> None:
        """Answer browsers and Prometheus, in a thread, until the process ends.

        Raises:
            PolicyError: nobody can listen there.
        """
        registry = CollectorRegistry()
        registry.register(self)
        try:
            served = server(
                address_of(self._site.page), self.data, lambda: generate_latest(registry)
            )
        except OSError as error:
            raise PolicyError(f"page = {self._site.page!r}: {error}") from None
        Thread(target=served.serve_forever, daemon=True).start()


def rule_of(reason: str) -> str:
    """The policy's key that an answer names; of few different ones, for whoever counts."""
    if "BudgetError" in reason:
        return "epsilon"
    named = re.findall(r"this site's policy has ([a-z-]+) = ", reason) or re.findall(
        r"policy: ([a-z-]+) = ", reason
    )
    return named[-1] if named and named[-1] in RULES else "other"


def _tail(audit: str) -> list[dict[str, Any]]:
    """The newest lines of an audit log."""
    found: list[dict[str, Any]] = []
    if audit:
        with suppress(OSError), Path(audit).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            for line in file.read().decode(errors="replace").splitlines():
                with suppress(ValueError):
                    if (
                        isinstance(each := json.loads(line), dict)
                        and {"time", "way", "run", "round", "kind", "bytes"} <= each.keys()
                    ):
                        found.append(each)
    return found
