"""MLflow's system metrics of a training: processor, memory, disk, network and GPU, on the run's own page."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"  # MLflow's own variable; here they are on unless it is false.
PREFIX = "system/"


@contextmanager
def system_metrics(run_id: str, uri: str) -> Iterator[None]:
    """Record system metrics every 10 s, in a thread of MLflow's, until the block ends.

    Args:
        run_id: The run.
        uri: Of its store.
    """
    if os.environ.get(SWITCH, "true").lower() in ("false", "0", "no"):
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # What it says of a missing nvidia-ml-py, or of a store that is busy for a moment, is no concern of the training.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    monitor: Any = SystemMetricsMonitor(run_id, tracking_uri=uri)  # type: ignore[no-untyped-call]  # MLflow has no types.
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
