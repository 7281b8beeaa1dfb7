"""Mirroring a run elsewhere, in a process of its own: `python -m dtrain.trainer.tracking RUN`, into MLflow."""
