"""Activation checkpointing: a network's blocks are computed twice, to hold less in memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(network: nn.Module, compiled: bool = False) -> None:
    """Hold the input of each block only; the backward pass computes the rest again.

    It does so with the same random numbers: gradients stay what they are, and BatchNorm's running
    statistics and other buffers are written once only.

    Args:
        network: changed in place, at its :func:`blocks`.
        compiled: whether it will be compiled; torch.compile cannot keep buffers from being written
            twice.

    Raises:
        ValueError: it has no blocks, or buffers in those that are compiled.
    """
    found = blocks(network)
    if not found:
        raise ValueError(
            "computing.checkpointing = True: this network has no blocks (modules of layers in a "
            "list); allowed: False"
        )
    for block in found:
        writes = any(True for _ in block.buffers())
        if writes and compiled:
            raise ValueError(
                "computing.checkpointing = True: not with computing.compile and BatchNorm; "
                "allowed: model.norm = 'group'"
            )
        more = {"context_fn": partial(_contexts, block)} if writes else {}
        # Not a module around it, which would give the parameters other names.
        setattr(block, "forward", partial(checkpoint, block.forward, use_reentrant=False, **more))  # noqa: B010


def blocks(network: nn.Module) -> list[nn.Module]:
    """The modules of several layers that stand in a Sequential or ModuleList.

    Where one is inside another, the inner ones.
    """
    found: list[nn.Module] = []
    for child in network.children():
        listed = isinstance(network, nn.Sequential | nn.ModuleList) and any(
            True for _ in child.children()
        )
        found += blocks(child) or [child] * listed
    return found


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first and for the second time that a block is computed."""
    return nullcontext(), _unchanged(block)


@contextmanager
def _unchanged(block: nn.Module) -> Iterator[None]:
    saved = [buffer.clone() for buffer in block.buffers()]
    try:
        yield
    finally:  # torch ends the second time with an exception as soon as it has what it needs
        for buffer, value in zip(block.buffers(), saved, strict=True):
            buffer.copy_(value)
