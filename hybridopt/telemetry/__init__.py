"""What users see of a run: events, metrics, a live display, a report."""

from hybridopt.telemetry.metrics import MetricsSink, read_metrics

__all__ = ["MetricsSink", "read_metrics"]
