"""Speed at equal loss: cases, peers, statistics, tables (``python -m benchmarks``)."""
