"""Metrics of several sites as one, and their names."""

import math

from flwr.app import MetricRecord, RecordDict

NUM_EXAMPLES, CHANGE = "num-examples", "model-change"


def weighted_metrics(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    """Means of the sites' metrics, weighted by ``weight_key`` and independent of the order of the sites."""
    records = [next(iter(content.metric_records.values())) for content in contents]
    weights = [float(record[weight_key]) for record in records]  # type: ignore[arg-type]
    total = math.fsum(weights)
    means = {
        key: math.fsum(w * float(record[key]) for w, record in zip(weights, records, strict=True)) / total  # type: ignore[arg-type]
        for key in records[0]
        if key != weight_key
    }
    return MetricRecord({**means, weight_key: total})
