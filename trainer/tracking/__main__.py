"""`python -m dtrain.trainer.tracking RUN`: MLflow's tracker. By hand, it completes the copy of a run long over."""

from __future__ import annotations

import sys

from .mlflow import main

sys.exit(main())
