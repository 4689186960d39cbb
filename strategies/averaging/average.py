"""Means of the metrics of several sites."""

from flwr.app import MetricRecord, RecordDict

from strategies.averaging.mean import weighted_mean

NUM_EXAMPLES, CHANGE = "num-examples", "model-change"


def weighted_metrics(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    """Means of the sites' metrics, weighted by ``weight_key``; independent of the sites' order."""
    records = [next(iter(content.metric_records.values())) for content in contents]
    rows = [
        {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
        for record in records
    ]
    return MetricRecord(dict(weighted_mean(rows, weight_key)))
