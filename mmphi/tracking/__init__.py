"""The one place that talks to MLflow: where the store is, its runs, and the run that a stage records in.

Importing this imports mlflow, which takes seconds.
"""

from mmphi.tracking.run import RunTracker, SilentTracker
from mmphi.tracking.store import Store
from mmphi.tracking.uri import absolute_uri

__all__ = ["RunTracker", "SilentTracker", "Store", "absolute_uri"]
