"""`python -m dtrain.trainer.tracking RUN`: MLflow's tracker. Run by hand, it completes the copy of an old run."""

from __future__ import annotations

import sys

from .mlflow import main

sys.exit(main())
