"""Decentralized SGD, with or without momentum, in both orders of gradient step and averaging.

    v = beta v - lr g                                  g at x
    u = v, or with Nesterov beta v - lr g
    adapt, then combine      x = sum_j w_ij (x_j + u_j)
    combine while adapting   x = sum_j w_ij x_j + u

Sources: D-PSGD (beta = 0): Lian et al., NeurIPS 2017, in the order of the code of Lin et al. 2021
(adapt, then combine). CDSGD (beta = 0) and CDMSGD, combining while adapting: Jiang et al.,
"Collaborative Deep Learning in Fixed Topology Networks", NeurIPS 2017, and its Keras code. With
momentum, adapting first, it is DSGDm-N; with SAM and several local steps, DFedSAM (Shi et al., ICML
2023; differs: momentum is not reset by an exchange). Fed with neighbourhood gradients
(:mod:`strategies.peer.neighbourhood`) it is NGM. Differs: a velocity keeps the learning rates of
its past steps, where a torch buffer applies the newest to all of them.
Special cases: one peer is SGD with momentum; complete graph, beta = 0, is model averaging.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from strategies.peer.algorithm import PeerAlgorithm, Vectors


class Descent(NamedTuple):
    """The state of a peer: its model and its velocity.

    Attributes:
        x: the model.
        start: the model of the last exchange; empty when adapting first.
        v: the velocity; empty without momentum.
    """

    x: Tensor
    start: Tensor
    v: Tensor


def dsgd(*, beta: float, nesterov: bool, adapt_first: bool) -> PeerAlgorithm[Descent]:
    """D-PSGD, CDSGD, CDMSGD, DSGDm-N.

    Args:
        beta: momentum.
        nesterov: look ahead.
        adapt_first: whether neighbours get the model after the local steps, or that of before them.
    """

    def init(x: Tensor) -> Descent:
        none = x.new_empty(0)
        return Descent(x, none if adapt_first else x, torch.zeros_like(x) if beta else none)

    def descend(state: Descent, gradient: Tensor, lr: float) -> Descent:
        if not beta:
            return state._replace(x=torch.sub(state.x, gradient, alpha=lr))
        v = (state.v * beta).sub_(gradient, alpha=lr)
        x = torch.add(state.x, v, alpha=beta).sub_(gradient, alpha=lr) if nesterov else state.x + v
        return state._replace(x=x, v=v)

    def outgoing(state: Descent) -> Vectors:
        return (state.x if adapt_first else state.start,)

    def mix(state: Descent, sent: Vectors, mixed: Vectors) -> Descent:
        x = state.x + (mixed[0] - sent[0])
        return state._replace(x=x, start=state.start if adapt_first else x)

    return PeerAlgorithm(init, descend, outgoing, mix)
