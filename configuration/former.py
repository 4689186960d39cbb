"""The former flat keys, and where each stands now: for the error that names the new key."""

SECTION_OF = {
    "training": "lr lr-ratio lr-shape lr-steps optimizer weight-decay batch-size clip-norm",
    "partition": "iid-fraction classes-per-site size-ratio",
    "topology": "mixing lazy degree stride edges averaging-rate",
    "wire": "codec error-feedback cross-codec sealing collect-models",
    "computing": "device precision channels-last compile",
    "data": "label group image-size audio-seconds text-buckets test-part test-fraction augment",
    "results": "evaluate-every",
    "model": "norm",
    # Of the method, under its own name.
    "METHOD": "local-epochs max-local-epochs epsilon weighting lr-envelope local-steps schedule "
    "slack window server-lr staleness staleness-exponent staleness-border "
    "compensation mixing-rate proximal-mu buffer-size",
}
RENAMED = {
    "strategy-arguments": "flower.arguments",
    "results-dir": "results.folder",
    "model": "model.name",
    "data": "data.source",
    "data-path": "data.path",
    "partition": "partition.kind",
    "dirichlet-alpha": "partition.alpha",
    "topology": "topology.name",
    "codec-bits": "wire.bits",
    "codec-share": "wire.share",
    "base-optimizer": "gsgm.base",
    "server-momentum": "METHOD.momentum",
    "compensation-adaptive": "METHOD.compensation",
    "momentum-form": "dmsgd.form",
    "momentum-consensus-weight": "dmsgd.consensus-weight",
    "quasi-global-decay": "METHOD.decay",
    "cross-gradients": "METHOD.gradients",
    "cross-perturbation": "n-saddle.perturbed-by",
    "momentum": "training.momentum; of peers METHOD.momentum",
    "nesterov": "training.nesterov; of peers METHOD.nesterov",
    "sam-radius": "training.sam-radius; of q-saddle, n-saddle, dfedsam METHOD.rho",
}
FORMER = {
    key: f"{section}.{key}" for section, keys in SECTION_OF.items() for key in keys.split()
} | RENAMED


def new_key(key: str, method: str) -> str | None:
    """The present name of a former flat key, or None if it never was a key."""
    return FORMER[key].replace("METHOD", method) if key in FORMER else None
