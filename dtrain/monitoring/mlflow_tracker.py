"""MLflow as one of the trackers."""

from __future__ import annotations

from dtrain.monitoring.tracker import Tracker
from dtrain.monitoring.tracking_uri import VARIABLE, is_off
from dtrain.schema.packages import missing


class MlflowTracker(Tracker):
    """Runs in the store that job.yaml or MLFLOW_TRACKING_URI names."""

    name = "mlflow"
    title = "MLflow"
    module = "dtrain.trainer.tracking"

    def is_off(self) -> bool:
        """MLFLOW_TRACKING_URI is set, and empty."""
        return is_off()

    def lacking(self) -> str:
        """The package."""
        lacking = missing("mlflow")
        return f"{lacking}; or set {VARIABLE} to nothing" if lacking else ""


tracker = MlflowTracker()
