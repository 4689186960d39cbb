"""Names are tied to formulas: what each method computes, taken by its public name.

The configuration is the public one. ``by_name.json`` holds, for every method and for every key of
its own changed in turn, the models after three rounds (arrivals, exchanges) on the golden problem
and what sites are told to do. The formulas themselves are tested against closed forms and
independent implementations elsewhere; here each name, key and switch of a builder leads to the
right one. After a change that is meant: ``python -m tests.equivalence.test_by_name``.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configuration.checks import kind_of, unused
from configuration.config import Config, configuration
from strategies.asynchronous.rule import Update
from strategies.keys import Only
from strategies.method import (
    AlonePlan,
    ArrivalPlan,
    ForeignPlan,
    LocalTraining,
    Mean,
    Method,
    PeerPlan,
    RoundPlan,
    RoundStart,
)
from strategies.methods import METHODS
from strategies.peer.algorithm import PeerAlgorithm
from strategies.schedules import decay
from strategies.topology import topology
from tests.equivalence.golden import LR, ORIGIN, RING, B, H, N, lockstep, models

STORED = Path(__file__).parent / "by_name.json"
AN_EPOCH, EPOCHS = 2, 60
ARRIVALS = 2 * (0, 1, 2, 3, 4, 0, 2, 4, 1, 3, 2, 0, 4, 4, 1)  # sites in the order of their arrivals
NEEDED = {"QFedAvg": {"flower.arguments": "client_learning_rate=0.05"}}
Values = dict[str, Any]
PATH = topology(
    "path", N, weights="metropolis", lazy=False, degree=4, stride=4, edges="", seed=1
).mixing(0)
# What keys need beside what Only names.
REQUIRES: dict[str, Values] = {"co-learning.max-local-epochs": {"co-learning.epsilon": 1e5}}


def of_local(local: LocalTraining) -> list[float]:
    return [float(value) for value in (*local[:1], *local.cycle, *local[2:])]


def of_rounds(plan: RoundPlan[Any]) -> Values:
    """Three rounds of full-batch steps of plain descent."""
    state, orders, done = plan.init(ORIGIN[0].clone()), [], 0.0
    memories = [plan.site.init(state.x) if plan.site else None for _ in range(N)]
    traced = []
    for number in range(1, 4):
        local = plan.instruct(state, RoundStart(number, done, EPOCHS, AN_EPOCH))
        orders.append(of_local(local))
        steps = local.steps or local.epochs * AN_EPOCH
        done += steps / AN_EPOCH
        sent = {"x": state.x, **plan.beside(state)}
        replies = []
        for site in range(N):
            y, rates = state.x.clone(), []
            for step in range(min(steps, 6)):
                rates.append(local.lr * decay("exponential", 0.25, local.cycle[0] + step / steps))
                g = H[site] * (y - B[site])
                y = y - rates[-1] * (plan.site.correct(memories[site], sent, g) if plan.site else g)
            reply = {"x": y}
            if plan.site:
                memories[site], beside = plan.site.finish(memories[site], sent, y, sum(rates))
                reply |= beside
            replies.append(reply)
        state = plan.absorb(
            state,
            Mean(
                {name: torch.stack([r[name] for r in replies]).mean(0) for name in replies[0]}, 0.8
            ),
        )
        traced.append(state.x.clone())
    return {
        "orders": orders,
        "weighting": plan.weighting,
        "pooled": plan.pooled,
        "values": rounded(torch.stack(traced)),
    }


def of_arrivals(plan: ArrivalPlan) -> Values:
    """Each site sends one gradient at the model that it was sent after its last arrival."""
    state = plan.rule.init(torch.zeros(2, dtype=torch.float64))
    held = {site: (state.x.clone(), state.version) for site in range(N)}
    traced = []
    for site in ARRIVALS:
        base, version = held[site]
        delta = LR * H[site] * (base - B[site])
        state = plan.rule.absorb(state, Update(delta, base, LR, state.version - version))
        held[site] = state.x.clone(), state.version
        traced.append(state.x.clone())
    fields = [*plan.schedule, plan.steps, plan.proximal, plan.least, plan.by_speed]
    return {"plan": fields, "values": rounded(torch.stack(traced))}


def of_peers(plan: PeerPlan) -> Values:
    """Three exchanges on the ring, or on a path what needs a tree."""
    mixing = RING if isinstance(plan.algorithm, PeerAlgorithm) else PATH
    found = models(lockstep(plan._replace(steps=min(plan.steps, 3)), 3, mixing))
    return {"plan": [*plan.gradient, plan.steps, plan.accumulates_errors], "values": rounded(found)}


def of(config: Config) -> Values:
    """What a configuration computes."""
    match config.plan:
        case RoundPlan() as plan:
            return of_rounds(plan)
        case ArrivalPlan() as plan:
            return of_arrivals(plan)
        case PeerPlan() as plan:
            return of_peers(plan)
        case AlonePlan(instruct, ensemble):
            return {
                "orders": of_local(instruct(RoundStart(2, 2.0, EPOCHS, AN_EPOCH))),
                "ensemble": ensemble,
            }
        case ForeignPlan(build, instruct, weighting):
            strategy = build()
            known = {
                key: value
                for key, value in sorted(vars(strategy).items())
                if isinstance(value, int | float)
            }
            order = of_local(instruct(RoundStart(2, 2.0, EPOCHS, AN_EPOCH)))
            return {
                "class": type(strategy).__name__,
                "orders": order,
                "weighting": weighting,
                "arguments": known,
            }
    raise TypeError(config.plan)


def rounded(x: Tensor) -> list[float]:
    return [round(float(value), 9) for value in x.reshape(-1)]


def other_values(method: Method[Any]) -> dict[str, Values]:
    """Each key of a method at each other value that it has (of numbers, one).

    With what the key needs to have an effect.
    """
    found: dict[str, Values] = {}
    for name, field in method.keys.model_fields.items():
        schema = method.keys.model_json_schema(by_alias=True)["properties"][str(field.alias)]
        needs: Values = REQUIRES.get(f"{method.table}.{field.alias}", {})
        for rule in field.metadata:
            if isinstance(rule, Only) and field.default is not None:
                for key, values in rule.values.items():
                    shipped = method.keys.model_fields[key]
                    needs = (
                        {}
                        if shipped.default in values
                        else {f"{method.table}.{shipped.alias}": values[0]}
                    )
        for value in schema.get("enum", [_other(name, schema["type"], field.default)]):
            if value != field.default:
                found[f"{field.alias} = {value}"] = {f"{method.table}.{field.alias}": value} | needs
                if needs:
                    found[base(needs)] = needs
    return found


def base(needs: Values) -> str:
    """What a key that needs others to have an effect is compared with."""
    return ", ".join(f"{key.partition('.')[2]} = {value}" for key, value in needs.items())


def _other(name: str, kind: str, default: Any) -> Any:
    if kind == "boolean":
        return not default
    if kind == "integer":
        return 3 if name == "max_local_epochs" else default + 1
    return 50.0 if name == "epsilon" else 0.3 if kind == "number" else default


def cases() -> dict[str, Values]:
    """Changes of the configuration by a name for each."""
    found: dict[str, Values] = {}
    for name, method in METHODS.items():
        needed = NEEDED.get(name, {})
        found[name] = {"strategy": name, **needed}
        if kind_of(method) == "peers" and "training.sam-radius" not in unused(name):
            found[f"{name}, sharpness-aware"] = {
                "strategy": name,
                "training.sam-radius": 0.1,
                **needed,
            }
        if not method.section:
            for key, changes in other_values(method).items():
                found[f"{name}, {key}"] = {"strategy": name, **needed, **changes}
    found["FedAdam, arguments"] = {"strategy": "FedAdam", "flower.arguments": "eta=0.3 beta_1=0.5"}
    found["FedAvg, local-epochs"] = {
        "strategy": "FedAvg",
        "flower.local-epochs": 3,
        "flower.weighting": "samples",
    }
    found["gsgm on dc-asgd-a"] = {
        "strategy": "gsgm",
        "gsgm.base": "dc-asgd-a",
        "gsgm.compensation": 2.0,
        "gsgm.window": 1,
    }
    return found


CASES = cases()
DEFAULTS = {name: case for name, case in CASES.items() if name in METHODS}


def compute(case: Values) -> Values:
    return dict(json.loads(json.dumps(of(configuration(num_sites=N, epochs=EPOCHS, **case)))))


@pytest.mark.parametrize("name", CASES)
def test_name_and_keys_lead_to_the_formula(name: str) -> None:
    wanted, found = json.loads(STORED.read_text())[name], compute(CASES[name])
    values = found.pop("values", []), wanted.pop("values", [])
    assert found == wanted
    assert values[0] == pytest.approx(values[1], rel=1e-6, abs=1e-8)


def test_no_two_methods_are_the_same_and_no_key_is_without_effect() -> None:
    """So that swapping two entries of the table, or a switch in a builder, fails the test above."""
    stored = {name: json.dumps(value) for name, value in json.loads(STORED.read_text()).items()}
    assert set(stored) == set(CASES)
    by_value: dict[str, list[str]] = {}
    for name in DEFAULTS:
        by_value.setdefault(stored[name], []).append(name)
    assert [names for names in by_value.values() if len(names) > 1] == []
    same = []
    for name, case in CASES.items():
        method = METHODS[str(case["strategy"])]
        own = {key: value for key, value in case.items() if key.startswith(f"{method.table}.")}
        for key in own:
            needs = {other: value for other, value in own.items() if other != key}
            compared = f"{method.name}, {base(needs)}" if needs else method.name
            if compared in stored and compared != name and stored[name] == stored[compared]:
                same.append(f"{name} is {compared}")
    assert same == []


if __name__ == "__main__":
    STORED.write_text(
        "{\n"
        + ",\n".join(f" {json.dumps(n)}: {json.dumps(compute(c))}" for n, c in CASES.items())
        + "\n}\n"
    )
