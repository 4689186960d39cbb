"""What is done to gradients, by hand; one peer's [d] and all peers' [n, d] alike."""

import pytest
import torch

from strategies.gradients import perturbed, regularised

X = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 3.0]], dtype=torch.float64)
G = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)  # norms 5, 0.5, 0


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 5.0, 7.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_clipping_shortens_and_never_lengthens_then_decay_is_added(
    clip_norm: float, weight_decay: float
) -> None:
    expected = []
    for g, x in zip(G, X, strict=True):
        norm = float(g.norm())
        expected.append((g * clip_norm / norm if 0 < clip_norm < norm else g) + weight_decay * x)
    before = G.clone(), X.clone()
    found = regularised(G, X, clip_norm=clip_norm, weight_decay=weight_decay)
    # 1e-6 stands in the denominator.
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    rows = [
        regularised(g, x, clip_norm=clip_norm, weight_decay=weight_decay)
        for g, x in zip(G, X, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(rows), rtol=0, atol=0)
    assert torch.equal(G, before[0])
    assert torch.equal(X, before[1])
    assert found.data_ptr() != G.data_ptr()


def test_a_perturbation_goes_rho_along_the_gradient_and_nowhere_without_one() -> None:
    found = perturbed(X, G, 0.25)
    torch.testing.assert_close(
        (found - X).norm(dim=1), torch.tensor([0.25, 0.25, 0.0], dtype=torch.float64)
    )
    torch.testing.assert_close(
        found[0], X[0] + 0.25 * torch.tensor([0.6, 0.8], dtype=torch.float64)
    )
    assert torch.equal(perturbed(X[1], G[1], 0.25), found[1])
