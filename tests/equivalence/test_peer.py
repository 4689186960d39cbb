"""Peer algorithms, in float64.

Contract rows over all of them, limit cases, closed forms, invariants, golden values.

The numbers are derived in docs/explanation/golden-values.md, apart from this code.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.codecs import Codec, codec
from strategies.method import Neighbourhood, PeerPlan
from strategies.peer.algorithm import exchange
from strategies.peer.channel import Channel, channel
from strategies.peer.dmsgd import dmsgd, growth
from strategies.peer.dsgd import dsgd
from strategies.peer.gradient_tracking import gradient_tracking
from strategies.peer.noloco import noloco
from strategies.peer.qgm import qgm
from strategies.peer.state import Peer
from strategies.peer.step import encode, encode_gradient
from strategies.topology import topology
from tests.equivalence.golden import (
    EXACT,
    LR,
    OPTIMUM,
    ORIGIN,
    RING,
    Algorithm,
    B,
    H,
    N,
    gossip_round,
    gradient,
    lockstep,
    models,
)

ALGORITHMS: dict[str, Algorithm] = {
    "dpsgd": dsgd(beta=0.0, nesterov=False, adapt_first=True),
    "cdsgd": dsgd(beta=0.0, nesterov=False, adapt_first=False),
    "cdmsgd": dsgd(beta=0.9, nesterov=False, adapt_first=False),
    "cdmsgd-nesterov": dsgd(beta=0.9, nesterov=True, adapt_first=False),
    "dsgdm": dsgd(beta=0.9, nesterov=False, adapt_first=True),
    "dmsgd-position": dmsgd(beta=0.9, omega=0.5, velocity=False),
    "dmsgd-velocity": dmsgd(beta=0.9, omega=0.5, velocity=True),
    "qgm": qgm(beta=0.9, mu=0.9, nesterov=False),
    "qgm-nesterov": qgm(beta=0.9, mu=0.9, nesterov=True),
    "gt": gradient_tracking(adapt_first=True),
    "gt-awc": gradient_tracking(adapt_first=False),
    "noloco": noloco(alpha=0.5, beta=0.7, gamma=0.9),
    "noloco-momentum": noloco(alpha=0.5, beta=0.7, gamma=0.9, momentum=0.9),
}
each = pytest.mark.parametrize("name", ALGORITHMS)


def weights(name: str, n: int) -> Tensor:
    return topology(
        name, n, weights="metropolis", lazy=False, degree=4, stride=4, edges="", seed=1
    ).mixing(0)


def run(
    algorithm: Algorithm,
    steps: int,
    mixing: Tensor = RING,
    grad: Callable[[Tensor], Tensor] = gradient,
    x: Tensor | None = None,
    lr: float = LR,
) -> Any:
    state = algorithm.init(ORIGIN if x is None else x)
    for _ in range(steps):
        state = gossip_round(algorithm, state, grad, lr, mixing)
    return state


CDSGD = ALGORITHMS["cdsgd"]
NGM = dsgd(beta=0.9, nesterov=False, adapt_first=False)
GOLDEN: dict[str, tuple[PeerPlan, str]] = {
    "D-PSGD": (
        PeerPlan(ALGORITHMS["dpsgd"]),
        (
            "0.395556 -0.527778 0.328889 -0.367778 0.575556 -0.537778 "
            "0.706667 -0.818889 0.600000 -0.694444"
        ),
    ),
    "CDSGD": (
        PeerPlan(ALGORITHMS["cdsgd"]),
        (
            "0.200000 -0.300000 0.293333 -0.256667 0.513333 -0.586667 "
            "0.880000 -0.770000 0.693333 -1.006667"
        ),
    ),
    "CDMSGD": (
        PeerPlan(ALGORITHMS["cdmsgd"]),
        (
            "0.200000 -0.300000 0.473333 -0.346667 0.693333 -0.946667 "
            "1.420000 -1.040000 1.053333 -1.726667"
        ),
    ),
    "CDMSGD Nesterov": (
        PeerPlan(ALGORITHMS["cdmsgd-nesterov"]),
        (
            "0.380000 -0.570000 0.650933 -0.551567 1.103133 -1.301867 "
            "1.952800 -1.654700 1.572933 -2.287067"
        ),
    ),
    **{
        f"DMSGD {form} {omega}": (
            PeerPlan(dmsgd(beta=0.9, omega=omega, velocity=form == "velocity")),
            values,
        )
        for form in ("position", "velocity")
        for omega, values in (
            (
                0.0,
                (
                    "0.200000 -0.300000 0.473333 -0.346667 0.693333 -0.946667 "
                    "1.420000 -1.040000 1.053333 -1.726667"
                ),
            ),
            (
                0.5,
                (
                    "0.290000 -0.435000 0.443333 -0.376667 0.753333 -0.886667 "
                    "1.330000 -1.130000 1.023333 -1.531667"
                ),
            ),
            (
                1.0,
                (
                    "0.380000 -0.570000 0.413333 -0.406667 0.813333 -0.826667 "
                    "1.240000 -1.220000 0.993333 -1.336667"
                ),
            ),
        )
    },
    "QGM": (
        PeerPlan(ALGORITHMS["qgm"]),
        (
            "0.415556 -0.552778 0.348889 -0.389778 0.601556 -0.565778 "
            "0.738667 -0.852889 0.628000 -0.729444"
        ),
    ),
    "QGM Nesterov": (
        PeerPlan(ALGORITHMS["qgm-nesterov"]),
        (
            "0.740156 -0.960028 0.613489 -0.662298 1.058216 -1.001258 "
            "1.313787 -1.513329 1.111880 -1.274794"
        ),
    ),
    "Q-SADDLe": (
        PeerPlan(ALGORITHMS["qgm"], Neighbourhood(rho=0.1)),
        (
            "0.429131 -0.560739 0.364371 -0.398241 0.624308 -0.584216 "
            "0.757160 -0.875587 0.642019 -0.739371"
        ),
    ),
    "NGM, data variant": (
        PeerPlan(NGM, Neighbourhood("data")),
        (
            "0.575556 -0.797778 0.457778 -0.533333 0.866667 -0.782222 "
            "1.062222 -1.244444 0.900000 -1.024444"
        ),
    ),
    "NGM, model variant": (
        PeerPlan(NGM, Neighbourhood("model")),
        (
            "0.180000 -0.240000 0.486667 -0.340000 0.680000 -0.973333 "
            "1.460000 -1.020000 1.060000 -1.813333"
        ),
    ),
    "N-SADDLe": (
        PeerPlan(NGM, Neighbourhood("data", 0.1)),
        (
            "0.595290 -0.811645 0.479205 -0.547954 0.899646 -0.808168 "
            "1.088127 -1.277468 0.919763 -1.040712"
        ),
    ),
    "gradient tracking": (
        PeerPlan(ALGORITHMS["gt"]),
        (
            "0.417778 -0.505556 0.417778 -0.445556 0.531111 -0.582222 "
            "0.662222 -0.696667 0.577778 -0.716667"
        ),
    ),
    "gradient tracking, combining": (
        PeerPlan(ALGORITHMS["gt-awc"]),
        (
            "0.400000 -0.600000 0.226667 -0.323333 0.646667 -0.453333 "
            "0.680000 -0.970000 0.626667 -0.573333"
        ),
    ),
}


def table(values: str) -> Tensor:
    return torch.tensor([float(value) for value in values.split()], dtype=torch.float64).view(N, 2)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_after_two_rounds(name: str) -> None:
    plan, values = GOLDEN[name]
    # Six decimals are known.
    torch.testing.assert_close(models(lockstep(plan, 2)), table(values), rtol=0, atol=6e-7)


@each
def test_steps_of_peers_are_the_exchange_in_the_open(name: str) -> None:
    """What the app runs, and what most tests here run."""
    x = vectors(d=2)
    found = models(lockstep(PeerPlan(ALGORITHMS[name]), 4, x=x))
    torch.testing.assert_close(found, run(ALGORITHMS[name], 4, x=x).x, rtol=0, atol=1e-13)


def compressed(
    algorithm: Algorithm, way: Channel, steps: int, gamma: float, mixing: Tensor = RING
) -> tuple[Any, Tensor, Tensor]:
    """Rounds with one channel; the state, and the sums of what was sent and of what was wanted."""
    state = algorithm.init(ORIGIN)
    memory = [way.init(row) for row in state.x]
    sent_sum = wanted_sum = ORIGIN
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        state = algorithm.descend(state, gradient(state.x), LR)
        (wanted,) = algorithm.outgoing(state)
        rows = []
        for peer in range(N):
            _, memory[peer], own = way.encode(memory[peer], wanted[peer], generator)
            rows.append(own)
        sent = torch.stack(rows)
        sent_sum, wanted_sum = sent_sum + sent, wanted_sum + wanted
        state = exchange(algorithm, state, (sent,), (mixing @ sent,), gamma)
    return state, sent_sum + torch.stack(memory) if memory[0].numel() else sent_sum, wanted_sum


TOP_1 = codec("top-k", (2,), bits=8, share=0.5)


@pytest.mark.parametrize(
    ("feedback", "values"),
    [
        (
            "deep-squeeze",
            (
                "0.050800 -0.182400 0.262400 -0.298000 0.583200 -0.524800 "
                "0.787200 -0.874800 0.912400 -1.056000"
            ),
        ),
        (
            "choco",
            (
                "0.119400 -0.153800 0.333200 -0.227200 0.441600 -0.666400 "
                "0.990600 -0.662400 0.711200 -1.226200"
            ),
        ),
    ],
)
def test_golden_values_of_error_feedback(feedback: str, values: str) -> None:
    states = lockstep(
        PeerPlan(ALGORITHMS["dpsgd"]), 2, way=channel(TOP_1, feedback), averaging_rate=0.3
    )
    torch.testing.assert_close(models(states), table(values), rtol=0, atol=6e-7)


def test_golden_values_of_an_averaging_rate() -> None:
    states = lockstep(PeerPlan(ALGORITHMS["qgm"]), 2, averaging_rate=0.5)
    values = (
        "0.251222 -0.347528 0.326056 -0.293028 0.541556 -0.619111 "
        "0.901167 -0.799972 0.699333 -1.017694"
    )
    torch.testing.assert_close(models(states), table(values), rtol=0, atol=6e-7)


# Contract rows: every algorithm.


def vectors(seed: int = 3, d: int = 4) -> Tensor:
    return torch.randn(N, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def warm(name: str, grad: Callable[[Tensor], Tensor] = gradient) -> Any:
    """A state in the middle of a run."""
    return run(ALGORITHMS[name], 3, grad=grad)


@each
def test_zero_gradient_keeps_the_mean_of_the_models(name: str) -> None:
    """From the start; in the middle, momentum moves the mean on."""
    x = vectors()
    found = run(ALGORITHMS[name], 4, grad=torch.zeros_like, x=x)
    torch.testing.assert_close(found.x.mean(0), x.mean(0))


@each
def test_mean_moves_by_no_more_than_what_was_descended(name: str) -> None:
    """An exchange keeps the mean of every vector that is exchanged, with any codec.

    No mean of ``mixed - sent`` is left over.
    """
    algorithm, state = ALGORITHMS[name], warm(name)
    state = algorithm.descend(state, gradient(state.x), LR)
    alone = algorithm.mix(state, algorithm.outgoing(state), algorithm.outgoing(state))
    # These stand for whatever a codec made of them.
    sent = tuple(vectors(seed, 2) for seed, _ in enumerate(algorithm.outgoing(state)))
    mixed = algorithm.mix(state, sent, tuple(RING @ vector for vector in sent))
    torch.testing.assert_close(mixed.x.mean(0), alone.x.mean(0))


@each
def test_identity_matrix_leaves_every_peer_alone(name: str) -> None:
    together = run(ALGORITHMS[name], 5, torch.eye(N, dtype=torch.float64))
    for peer in range(N):
        own = run(
            ALGORITHMS[name],
            5,
            torch.eye(1, dtype=torch.float64),
            lambda x, peer=peer: H[peer] * (x - B[peer]),  # type: ignore[misc]
            torch.zeros(1, 2, dtype=torch.float64),
        )
        torch.testing.assert_close(together.x[peer], own.x[0])


@each
def test_relabelling_peers_relabels_the_result(name: str) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = run(ALGORITHMS[name], 5, RING[order][:, order], lambda x: H[order] * (x - B[order]))
    torch.testing.assert_close(moved.x, run(ALGORITHMS[name], 5).x[order])


@each
def test_agreement_with_zero_gradient_is_a_fixed_point(name: str) -> None:
    x = vectors()[:1].expand(N, -1).clone()
    torch.testing.assert_close(run(ALGORITHMS[name], 3, grad=torch.zeros_like, x=x).x, x)


@each
def test_inputs_are_not_written(name: str) -> None:
    algorithm, state = ALGORITHMS[name], warm(name)
    before = [part.clone() for part in state]
    g = gradient(state.x)
    kept = g.clone()
    stepped = algorithm.descend(state, g, LR)
    after_step = [part.clone() for part in stepped]
    sent = algorithm.outgoing(stepped)
    mixed = tuple(RING @ vector for vector in sent)
    offered = [part.clone() for part in (*sent, *mixed)]
    algorithm.mix(stepped, sent, mixed)
    for now, then in zip(
        [*state, g, *stepped, *sent, *mixed], [*before, kept, *after_step, *offered], strict=True
    ):
        assert torch.equal(now, then)


@each
def test_one_peer_computes_what_its_row_does(name: str) -> None:
    """[d] and [n, d] are the same code."""
    algorithm = ALGORITHMS[name]
    many, one = algorithm.init(vectors(d=2)), algorithm.init(vectors(d=2)[1])
    for _ in range(3):
        many = algorithm.descend(many, gradient(many.x), LR)
        one = algorithm.descend(one, H[1] * (one.x - B[1]), LR)
        sent = algorithm.outgoing(many)
        mixed = tuple(RING @ vector for vector in sent)
        many = algorithm.mix(many, sent, mixed)
        one = algorithm.mix(one, algorithm.outgoing(one), tuple(vector[1] for vector in mixed))
    torch.testing.assert_close(one.x, many.x[1])


@each
def test_complete_graph_with_like_data_is_one_peer(name: str) -> None:
    like = lambda x: 1.5 * (x - 2)  # noqa: E731
    found = run(ALGORITHMS[name], 6, weights("complete", N), like)
    alone = run(
        ALGORITHMS[name],
        6,
        torch.eye(1, dtype=torch.float64),
        like,
        torch.zeros(1, 2, dtype=torch.float64),
    )
    torch.testing.assert_close(found.x, alone.x.expand(N, -1))


@each
def test_several_local_steps_are_taken_between_exchanges(name: str) -> None:
    """Two local steps before an exchange; those of D-PSGD and CDSGD are compared by hand."""
    algorithm, state = ALGORITHMS[name], ALGORITHMS[name].init(ORIGIN)
    for _ in range(2):
        state = algorithm.descend(state, gradient(state.x), LR)
    sent = algorithm.outgoing(state)
    found = algorithm.mix(state, sent, tuple(RING @ vector for vector in sent))
    assert torch.isfinite(found.x).all()
    by_hand = -LR * gradient(ORIGIN)
    second = by_hand - LR * gradient(by_hand)
    if name in ("dpsgd", "cdsgd"):
        torch.testing.assert_close(found.x, RING @ second if name == "dpsgd" else second)


# Limit cases and equivalences.


def same(
    one: Algorithm,
    other: Algorithm,
    grad: Callable[[Tensor], Tensor] = gradient,
    mixing: Tensor = RING,
) -> None:
    for steps in (1, 2, 7):
        torch.testing.assert_close(
            run(one, steps, mixing, grad).x, run(other, steps, mixing, grad).x
        )


@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize("omega", [0.0, 0.5, 1.0])
def test_dmsgd_without_momentum_is_cdsgd(omega: float, velocity: bool) -> None:
    same(dmsgd(beta=0.0, omega=omega, velocity=velocity), ALGORITHMS["cdsgd"])


def test_dmsgd_in_velocity_form_without_omega_is_cdmsgd() -> None:
    same(dmsgd(beta=0.9, omega=0.0, velocity=True), ALGORITHMS["cdmsgd"])


@pytest.mark.parametrize(("omega", "vectors"), [(0.0, 1), (0.5, 2)])
def test_momentum_is_sent_only_where_it_is_shared(omega: float, vectors: int) -> None:
    algorithm = dmsgd(beta=0.9, omega=omega, velocity=False)
    assert len(algorithm.outgoing(algorithm.init(ORIGIN))) == vectors


@pytest.mark.parametrize("omega", [0.0, 0.3, 1.0])
def test_dmsgd_with_identity_matrix_is_heavy_ball_in_both_forms(omega: float) -> None:
    eye = torch.eye(N, dtype=torch.float64)
    position, velocity = (
        run(dmsgd(beta=0.9, omega=omega, velocity=form), 9, eye).x for form in (False, True)
    )
    x = torch.nn.Parameter(ORIGIN.clone())
    reference = torch.optim.SGD([x], LR, momentum=0.9)
    for _ in range(9):
        x.grad = gradient(x.detach())
        reference.step()
    torch.testing.assert_close(position, x.detach())
    torch.testing.assert_close(velocity, x.detach())


@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize("omega", [0.0, 0.3, 1.0])
def test_mean_of_dmsgd_is_centralized_heavy_ball_whatever_omega_and_form(
    omega: float, velocity: bool
) -> None:
    """With a common Hessian the mean of the gradients is the gradient at the mean."""
    h = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = run(dmsgd(beta=0.9, omega=omega, velocity=velocity), 12, grad=lambda x: h * (x - B))
    x = previous = torch.zeros(2, dtype=torch.float64)
    for _ in range(12):
        x, previous = x - LR * h * (x - B.mean(0)) + 0.9 * (x - previous), x
    torch.testing.assert_close(found.x.mean(0), x, rtol=0, atol=1e-12)


SPREADS = [(False, 0.0, 0.50986), (False, 0.5, 0.50986), (False, 1.0, 0.50986)]
SPREADS += [(True, 0.0, 2.27586), (True, 0.5, 1.19842), (True, 1.0, 0.87931)]


@pytest.mark.parametrize(("velocity", "omega", "spread"), SPREADS)
def test_fixed_points_tell_the_two_forms_of_dmsgd_apart(
    velocity: bool, omega: float, spread: float
) -> None:
    """Exact gradients, h = 1, b = 0 .. 4.

    The position form has the bias of CDSGD, the velocity form amplifies it.
    """
    b = torch.arange(N).double()[:, None]
    found = run(
        dmsgd(beta=0.9, omega=omega, velocity=velocity),
        3000,
        grad=lambda x: x - b,
        x=torch.zeros_like(b),
    )
    assert float(found.x.max() - found.x.min()) == pytest.approx(spread, abs=5e-6)
    eye = torch.eye(N, dtype=torch.float64)
    partly = (1 - omega) * eye + omega * RING
    pull = (eye - 0.9 * partly if velocity else eye) @ (eye - RING) + LR * eye
    torch.testing.assert_close(found.x, torch.linalg.solve(pull, LR * b))


@pytest.mark.parametrize(("omega", "factor"), [(0.0, 0.94868), (1.0, 0.69671)])
def test_sharing_momentum_makes_consensus_faster(omega: float, factor: float) -> None:
    """Disagreement shrinks by the largest root of z^2 - (lambda + beta lt) z + beta lt.

    There are no gradients; lambda is W's second eigenvalue, lt = 1 - omega + omega lambda.
    """
    algorithm = dmsgd(beta=0.9, omega=omega, velocity=False)
    sizes = []
    state = algorithm.init(vectors())
    for _ in range(80):
        state = gossip_round(algorithm, state, torch.zeros_like, LR, RING)
        sizes.append(float((state.x - state.x.mean(0)).norm()))
    # The disagreement oscillates.
    assert (max(sizes[50:80]) / max(sizes[10:40])) ** (1 / 40) == pytest.approx(factor, abs=0.015)


def test_qgm_without_momentum_is_dpsgd() -> None:
    same(qgm(beta=0.0, mu=0.0, nesterov=False), ALGORITHMS["dpsgd"])


def test_qgm_alone_is_quasi_hyperbolic_momentum() -> None:
    """Decay mu + (1 - mu) beta = 0.99: x -= lr (g + beta m_hat), m_hat = 0.99 m_hat + 0.1 g."""
    x = m = ORIGIN
    for _ in range(8):
        g = gradient(x)
        x, m = x - LR * (g + 0.9 * m), 0.99 * m + 0.1 * g
    torch.testing.assert_close(run(ALGORITHMS["qgm"], 8, torch.eye(N, dtype=torch.float64)).x, x)


def test_qgm_with_mu_zero_is_the_adapt_first_twin_of_dmsgd() -> None:
    """X+ = W (X - lr G) + beta W (X - X_previous)."""
    x = previous = ORIGIN
    for _ in range(10):
        x, previous = RING @ (x - LR * gradient(x) + 0.9 * (x - previous)), x
    torch.testing.assert_close(run(qgm(beta=0.9, mu=0.0, nesterov=False), 10).x, x)


def test_qgm_divides_a_move_by_the_rates_of_all_its_local_steps() -> None:
    """A constant gradient of 1: the first move per unit of rate is 1.

    Whatever the number of steps between exchanges.
    """
    algorithm = qgm(beta=0.0, mu=0.5, nesterov=False)
    state = algorithm.init(ORIGIN)
    for lr in (0.1, 0.3, 0.2):
        state = algorithm.descend(state, torch.ones(N, 2, dtype=torch.float64), lr)
    (sent,) = algorithm.outgoing(state)
    torch.testing.assert_close(
        algorithm.mix(state, (sent,), (RING @ sent,)).m_hat, torch.full_like(sent, 0.5)
    )


def test_exchange_without_a_local_step_teaches_qgm_nothing() -> None:
    algorithm, state = ALGORITHMS["qgm"], warm("qgm")
    (sent,) = algorithm.outgoing(state)
    mixed = algorithm.mix(state, (sent,), (RING @ sent,))
    assert torch.isfinite(mixed.m_hat).all()
    torch.testing.assert_close(mixed.m_hat, state.m_hat)


@pytest.mark.parametrize("name", ["gt", "gt-awc"])
def test_gradient_tracking_reaches_the_common_optimum(name: str) -> None:
    common = (H * B).sum(0) / H.sum(0)
    torch.testing.assert_close(run(ALGORITHMS[name], 3000, lr=0.05).x, common.expand(N, -1))


@pytest.mark.parametrize(("name", "bias"), [("dpsgd", 0.2832), ("qgm", 0.2832), ("ngm", 0.7455)])
def test_bias_of_those_that_do_not(name: str, bias: float) -> None:
    """The largest error against (2, -2) after 5,000 rounds."""

    def mean_of_neighbourhood(x: Tensor) -> Tensor:
        return (RING @ H) * x - RING @ (H * B)

    algorithm, grad = (
        (NGM, mean_of_neighbourhood) if name == "ngm" else (ALGORITHMS[name], gradient)
    )
    assert float((run(algorithm, 5000, grad=grad).x - OPTIMUM).abs().max()) == pytest.approx(
        bias, abs=5e-5
    )


def test_dsgdm_alone_is_torchs_sgd_with_nesterov() -> None:
    x = torch.nn.Parameter(ORIGIN.clone())
    reference = torch.optim.SGD([x], LR, momentum=0.9, nesterov=True)
    for _ in range(6):
        x.grad = gradient(x.detach())
        reference.step()
    eye = torch.eye(N, dtype=torch.float64)
    for adapt_first in (False, True):
        torch.testing.assert_close(
            run(dsgd(beta=0.9, nesterov=True, adapt_first=adapt_first), 6, eye).x, x.detach()
        )


def test_noloco_without_outer_momentum_is_d_psgd_with_local_steps() -> None:
    plans = [
        PeerPlan(each, steps=3)
        for each in (noloco(alpha=0.0, beta=1.0, gamma=1.0), ALGORITHMS["dpsgd"])
    ]
    one, other = (models(lockstep(plan, 4, x=vectors(d=2))) for plan in plans)
    torch.testing.assert_close(one, other)


def test_noloco_alone_is_an_outer_heavy_ball_on_what_its_local_steps_made() -> None:
    found = models(
        lockstep(
            PeerPlan(noloco(alpha=0.5, beta=0.7, gamma=0.9), steps=3),
            5,
            torch.eye(N, dtype=torch.float64),
        )
    )
    theta = torch.nn.Parameter(ORIGIN.clone())
    outer = torch.optim.SGD([theta], 0.7, momentum=0.5)
    for _ in range(5):
        x = theta.detach()
        for _ in range(3):
            x = x - LR * gradient(x)
        theta.grad = theta.detach() - x
        outer.step()
    torch.testing.assert_close(found, theta.detach())


def test_momentum_of_local_steps_outlives_an_exchange_of_noloco() -> None:
    plan = PeerPlan(noloco(alpha=0.0, beta=1.0, gamma=1.0, momentum=0.9), steps=3)
    x = torch.nn.Parameter(ORIGIN.clone())
    reference = torch.optim.SGD([x], LR, momentum=0.9)
    for _ in range(9):
        x.grad = gradient(x.detach())
        reference.step()
    torch.testing.assert_close(
        models(lockstep(plan, 3, torch.eye(N, dtype=torch.float64))), x.detach()
    )


def test_noloco_by_its_equations_on_matchings() -> None:
    """With dictionaries in the place of messages, a partner at a time."""
    found = topology("matching", N, weights="metropolis", lazy=False, seed=1)
    theta, d, alpha, beta, gamma = (
        vectors(d=2),
        torch.zeros(N, 2, dtype=torch.float64),
        0.5,
        0.7,
        0.9,
    )
    for number in range(6):
        x = theta - LR * gradient(theta)
        moved = theta - (x - LR * gradient(x))
        d_new = torch.zeros_like(d)
        for i in range(N):
            both = [i, *found.neighbours(number, i)]
            d_new[i] = (
                alpha * d[i] - beta * moved[both].mean(0) - gamma * (theta[i] - theta[both].mean(0))
            )
        theta, d = theta + d_new, d_new
    plan = PeerPlan(noloco(alpha=alpha, beta=beta, gamma=gamma), steps=2)
    torch.testing.assert_close(models(lockstep(plan, 6, found.matrices, vectors(d=2))), theta)


def test_peers_of_noloco_come_to_agree_on_matchings_and_their_mean_keeps_still() -> None:
    found, x = topology("matching", N, weights="metropolis", lazy=False, seed=1), vectors()
    algorithm = noloco(alpha=0.5, beta=0.7, gamma=0.9)
    state = algorithm.init(x)
    for number in range(200):
        state = gossip_round(algorithm, state, torch.zeros_like, LR, found.mixing(number))
    torch.testing.assert_close(state.x, x.mean(0).expand(N, -1), rtol=0, atol=1e-3)


# Neighbourhood gradients: the steps that run, against the definition.

MIXING = torch.eye(N, dtype=torch.float64) * 0.55  # doubly stochastic, and not symmetric
MIXING += 0.3 * torch.eye(N, dtype=torch.float64).roll(1, 1) + 0.15 * torch.eye(
    N, dtype=torch.float64
).roll(-1, 1)
SHRUNK = channel(
    Codec(lambda vector, _: {"values": vector * 0.9}, lambda payload: payload["values"]), "none"
)
VARIANTS = [
    (at, by) for at in ("data", "model") for by in ("owner-of-data", "none", "owner-of-model")
]
VARIANTS.remove(("model", "owner-of-model"))  # neighbours would be sent both models


def followed(plan: PeerPlan, x: Tensor, **changes: Any) -> Tensor:
    """The gradient [n, d] that peers follow in their first exchange.

    CDSGD moves by ``-lr g`` more than with rate 0.
    """
    settings: dict[str, Any] = {"mixing": MIXING, "x": x} | changes
    still, moved = (models(lockstep(plan, 1, **settings, lr=lr)) for lr in (0.0, LR))
    return (still - moved) / LR


@pytest.mark.parametrize(("at", "by"), VARIANTS)
@pytest.mark.parametrize("way", [EXACT, SHRUNK], ids=["exact", "shrunk"])
def test_neighbourhood_gradients_by_the_definition(at: Any, by: Any, way: Channel) -> None:
    """Peer by peer, with loops; an asymmetric W.

    The own model is taken as it is, the others' as they are received.
    """
    x, rho, decay = vectors(d=2), 0.3, 0.2
    received = x * 0.9 if way is SHRUNK else x

    def at_point(point: Tensor, owner: int) -> Tensor:
        return H[owner] * (point - B[owner])

    def worst(point: Tensor, owner: int) -> Tensor:
        g = at_point(point, owner)
        return point + g * (rho / float(g.norm()))

    expected = torch.zeros_like(x)
    for i in range(N):
        for j in range(N):
            model, owner = (i, j) if at == "data" else (j, i)
            point = x[model] if i == j else received[model]
            match by:
                case "owner-of-data":
                    g = at_point(worst(point, owner), owner)
                case "none":
                    g = at_point(worst(point, owner) if i == j else point, owner)
                case _:
                    g = at_point(point + worst(x[model], model) - x[model], owner)
            expected[i] += MIXING[i, j] * (g + decay * point)
    found = followed(PeerPlan(CDSGD, Neighbourhood(at, rho, by)), x, way=way, weight_decay=decay)
    # 1e-12 stands in the denominator of a perturbation.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at", ["data", "model"])
def test_equal_models_and_complete_graph_give_the_mean_gradient(at: Any) -> None:
    x = vectors(d=2)[:1].expand(N, -1)
    found = followed(PeerPlan(CDSGD, Neighbourhood(at)), x, mixing=weights("complete", N))
    torch.testing.assert_close(
        found, gradient(x).mean(0).expand(N, -1) if at == "data" else gradient(x)
    )


@pytest.mark.parametrize(("at", "by"), VARIANTS)
def test_identity_matrix_is_the_own_sharpness_aware_gradient(at: Any, by: Any) -> None:
    x = vectors(d=2)
    g = gradient(x)
    own = gradient(x + 0.1 * g / g.norm(dim=1, keepdim=True))
    found = followed(
        PeerPlan(CDSGD, Neighbourhood(at, 0.1, by)), x, mixing=torch.eye(N, dtype=torch.float64)
    )
    torch.testing.assert_close(found, own)


def test_only_neighbourhoods_perturb_as_they_say() -> None:
    """A peer that follows its own gradient perturbs it itself.

    Whatever ``perturbed_by`` says of others.
    """
    x = vectors(d=2)
    found = [
        followed(PeerPlan(CDSGD, Neighbourhood("own", 0.1, by)), x)
        for by in ("owner-of-data", "none", "owner-of-model")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0)


@pytest.mark.parametrize("at", ["own", "data", "model"])
def test_a_model_that_is_not_finite_ends_the_step(at: Any) -> None:
    with pytest.raises(ValueError, match=r"this site's x is not finite; a smaller training\.lr"):
        lockstep(PeerPlan(CDSGD, Neighbourhood(at)), 1, x=vectors(d=2) * 1e3, lr=1e308)


# Channels.


def test_what_is_drawn_differs_by_peer_step_and_reader() -> None:
    way = channel(codec("random-k", (100,), share=0.1), "none")
    one = Peer(PeerPlan(CDSGD), way, way, lambda g, x: g, 1.0, number=1, seed=1)
    vector = torch.ones(100)
    seeds = [
        int(encode(peer, (), (vector,), step)[0]["0.seed"])
        for peer in (one, one._replace(number=2))
        for step in (3, 4)
    ]
    seeds += [
        int(encode_gradient(peer, way.init(vector), vector, reader, step)[0]["seed"])
        for peer in (one, one._replace(number=2))
        for reader in (5, 6)
        for step in (3, 4)
    ]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("name", ["identity", "top-k", "qsgd", "sign", "random-k"])
def test_what_was_sent_and_what_is_remembered_is_what_was_wanted(name: str) -> None:
    """Deep-Squeeze, over 20 rounds; so nothing is lost for ever."""
    way = channel(codec(name, (2,), bits=4, share=0.5), "deep-squeeze")
    _, sent, wanted = compressed(ALGORITHMS["dpsgd"], way, 20, 0.3)
    torch.testing.assert_close(sent, wanted)


def test_choco_hats_reach_a_vector_that_stands_still() -> None:
    way = channel(codec("top-k", (6,), bits=8, share=0.34), "choco")
    vector = torch.randn(6, dtype=torch.float64)
    memory, last = way.init(vector), torch.zeros_like(vector)
    for _ in range(3):
        payload, memory, own = way.encode(memory, vector, torch.Generator())
        last = way.decode(payload, last)
        assert torch.equal(last, own)  # neighbours have what the sender thinks they have
    torch.testing.assert_close(own, vector)


@pytest.mark.parametrize("feedback", ["none", "deep-squeeze", "choco"])
@each
def test_identity_codec_changes_no_algorithm(name: str, feedback: str) -> None:
    way = channel(codec("identity", (2,), bits=8, share=1.0), feedback)
    algorithm = ALGORITHMS[name]
    if len(algorithm.outgoing(algorithm.init(vectors()))) > 1:
        return
    torch.testing.assert_close(compressed(algorithm, way, 6, 1.0)[0].x, run(algorithm, 6).x)


@pytest.mark.parametrize("feedback", ["none", "deep-squeeze", "choco"])
def test_codecs_keep_the_mean(feedback: str) -> None:
    """D-PSGD with a common Hessian: its mean is gradient descent, whatever was lost on the way."""
    state, _, _ = compressed(ALGORITHMS["cdsgd"], channel(TOP_1, feedback), 1, 0.3)
    torch.testing.assert_close(state.x.mean(0), (LR * H * B).mean(0))


@pytest.mark.parametrize(
    ("name", "n", "omega", "expected"),
    [
        ("torus", 16, 1.0, 1.5),  # the root of z^2 - 1.9 lambda z + 0.9 lambda at lambda = -3/5
        ("torus", 16, 0.0, 0.9**0.5),
        ("exponential", 8, 0.0, None),
        ("exponential", 16, 0.5, None),
        ("one-peer-exponential", 16, 1.0, None),
        ("ring", 10, 0.5, None),
    ],
)
def test_growth_of_disagreement_in_the_position_form(
    name: str, n: int, omega: float, expected: float | None
) -> None:
    found = topology(
        name, n, weights="metropolis", lazy=False, degree=4, stride=4, edges="", seed=1
    )
    factor = growth(found.matrices, beta=0.9, omega=omega)
    if expected is not None:
        assert factor == pytest.approx(expected, abs=1e-9)
    algorithm = dmsgd(beta=0.9, omega=omega, velocity=False)
    state = algorithm.init(
        torch.randn(n, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    sizes = []
    for number in range(240):
        state = gossip_round(algorithm, state, torch.zeros_like, 0.1, found.mixing(number))
        sizes.append(float(torch.linalg.vector_norm(state.x - state.x.mean(0))))
    assert (sizes[-1] / sizes[119]) ** (1 / 120) == pytest.approx(factor, rel=0.01)
