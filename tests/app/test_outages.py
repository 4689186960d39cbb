"""Sites come and go at any time: a run ends, with a model or with the reason why there is none."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from configuration.config import configuration
from server_app.discovery import RunError
from simulation.laboratory import simulate
from simulation.world import Lognormal, World
from strategies.method import PeerPlan

METHODS = ("fedavg", "scaffold", "asgd", "fedbuff", "gsgm", "d-psgd", "dmsgd", "q-saddle", "noloco")
WORLDS = st.builds(
    World,
    samples_per_s=st.builds(
        Lognormal, median=st.sampled_from([20.0, 60.0, 300.0]), sigma=st.sampled_from([0.2, 1.0])
    ),
    bandwidth_mbps=st.sampled_from([0.5, 10.0]),
    mean_up_s=st.sampled_from([20.0, 60.0, 200.0]),
    mean_down_s=st.sampled_from([5.0, 50.0, 70.0, 200.0]),
)
KEYS = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(METHODS),
        "gsgm.schedule": st.sampled_from(["list", "refill", "local"]),
        "num-sites": st.sampled_from([2, 3, 5]),
        "min-sites": st.sampled_from([1, 2]),
        "timeout-s": st.sampled_from([30.0, 300.0, 3600.0]),
        "training.batch-size": st.sampled_from([64, 128]),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(KEYS, WORLDS, st.booleans())
def test_a_run_ends_whoever_comes_and_goes(
    keys: dict[str, Any], world: World, together: bool
) -> None:
    if keys["strategy"] != "gsgm":
        del keys["gsgm.schedule"]
    keys |= {"epochs": 1, "model.name": "mlp"}
    peers = isinstance(configuration(**keys).plan, PeerPlan)
    engine = "batched" if together and not peers else "app"
    try:
        run = simulate(engine=engine, world=world, progress=False, **keys)
    except RunError:
        return  # nobody was there for long enough
    assert run.finished
    assert run.history["accuracy"].notna().all()
