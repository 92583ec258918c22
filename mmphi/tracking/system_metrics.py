"""MLflow's system metrics of a training: CPU, memory, disk, network and GPU, on the run's page."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"  # MLflow's variable; unlike in MLflow, the default is true.
PREFIX = "system/"


@contextmanager
def system_metrics(run_id: str, uri: str) -> Iterator[None]:
    """Record system metrics every 10 s in a background thread of MLflow until the block ends.

    Args:
        run_id: ID of the run.
        uri: URI of its store.
    """
    if os.environ.get(SWITCH, "true").lower() in ("false", "0", "no"):
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # Warnings about a missing nvidia-ml-py or a temporarily busy store do not concern the training.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    monitor: Any = SystemMetricsMonitor(run_id, tracking_uri=uri)  # type: ignore[no-untyped-call]  # MLflow is untyped.
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
