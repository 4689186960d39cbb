"""A site's own page: what it counts, what it says, and what it never says."""

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from client_app.policy import PolicyError, SiteFile, read_site
from client_app.privacy import Account, cost_of
from client_app.status import NEWEST, Status, rule_of

SITE: dict[str, Any] = {
    "site": 1,
    "socket": "/run/secret-socket",
    "data": {"source": "csv", "path": "/srv/secret.csv"},
}


def status(**keys: Any) -> Status:
    site = SiteFile.model_validate(SITE | keys)
    return Status(site, (100, 25), {"smallest-batch": "8"}, lambda: ("train of run 7", 3.2))


def request(way: str = "in", size: int = 10, **more: Any) -> dict[str, Any]:
    return {
        "time": "2026-11-27T00:00:00Z",
        "way": way,
        "run": 7,
        "round": 2,
        "kind": "train",
        "strategy": "fedavg",
        "bytes": size,
        **more,
    }


def test_requests_bytes_and_refused_ones_are_counted() -> None:
    page = status()
    for _ in range(NEWEST):
        page.add(request())
    page.add(request("out", 7, norms={"x": 1.5}))
    page.add(
        request(
            "out",
            0,
            rule="refused by this site's policy: strategy = 'gsgm': "
            "this site's policy has strategies = ['a']",
        )
    )
    shown = page.data({})["site"]
    assert (shown["requests"], shown["bytes"]) == (NEWEST, {"in": 10 * NEWEST, "out": 7})
    assert shown["refused"] == {"strategies": 1}
    assert len(shown["newest"]) == NEWEST
    assert shown["newest"][1]["norms"] == {"x": 1.5}
    assert (shown["train"], shown["test"], shown["doing"], shown["privacy"]) == (
        100,
        25,
        "train of run 7",
        None,
    )
    assert "secret" not in json.dumps(shown)
    registry = CollectorRegistry()
    registry.register(page)
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }
    assert found["archipelago_bytes_total", "1", "in"] == 10 * NEWEST
    assert found["archipelago_refused_total", "1", "strategies"] == 1
    assert (
        found["archipelago_site_up", "1"],
        found["archipelago_round",],
        found["archipelago_train_examples",],
    ) == (1, 2, 100)


def test_privacy_that_is_spent(tmp_path: Path) -> None:
    privacy = {"clip-norm": 1.0, "noise-multiplier": 8.0, "epsilon": 8.0}
    page = status(state=str(tmp_path), privacy=privacy)
    account = Account(tmp_path, 1e-5)
    account.charge(3 * cost_of(8.0))
    assert page.data({})["site"]["privacy"] == {
        "spent": account.epsilon(),
        "epsilon": 8.0,
        "delta": 1e-5,
    }


def test_requests_before_this_service_started_are_read_from_the_audit_log(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    lines = [json.dumps(request(size=number)) for number in range(NEWEST + 5)]
    audit.write_text("\n".join([*lines, "no JSON", "[1]", '{"time": "cut']))
    assert [each["bytes"] for each in status(audit=str(audit)).data({})["site"]["newest"]] == list(
        range(NEWEST + 4, 4, -1)
    )


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        (
            (
                "refused by this site's policy: a model of 7 parameters: "
                "this site's policy has largest-model = 6"
            ),
            "largest-model",
        ),
        (
            "refused by this site's policy: runs-a-day = 3: so many began in the last 24 hours",
            "runs-a-day",
        ),
        ("BudgetError: privacy.epsilon = 8: with this answer it would be 8.1", "epsilon"),
        (
            (
                "refused by this site's policy: run 7 has another configuration "
                "than in its first request"
            ),
            "other",
        ),
        ("refused by this site's policy: a = 'x': this site's policy has made-up = '1'", "other"),
    ],
)
def test_rules_are_the_policys_keys(message: str, rule: str) -> None:
    assert rule_of(message) == rule


@pytest.mark.parametrize(
    "wrong", ["8081", "127.0.0.1", "127.0.0.1:99999", "http://127.0.0.1:1", "::1:80", "a b:80"]
)
def test_address_that_is_none_is_refused(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "site.toml"
    file.write_text(f'site = 0\nsocket = "s"\npage = "{wrong}"\n[data]\nsource = "digits"\n')
    with pytest.raises(
        PolicyError, match=r"page: .*an address with a port is expected, such as 127.0.0.1:8081"
    ):
        read_site(file)
