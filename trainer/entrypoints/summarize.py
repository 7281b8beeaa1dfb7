"""One rank that summarizes a job's model, with the job's first samples.

Run as dtrain.trainer.entrypoints.train is, with a `Summarize`.
"""

from __future__ import annotations

import sys

from dtrain.errors import UserError
from dtrain.files import write_text
from dtrain.run.rank_request import Summarize

from ..summary import summary
from .first_samples import call_of, first_samples
from .train import begin, build_source, build_trainer, settle

SAMPLES = 1


def main() -> int:
    """Write the summary; the exit code."""
    run, job = begin(Summarize.read())
    trainer = build_trainer(settle(job)[0])
    batch, samples = first_samples(build_source(job, "train", training=False), SAMPLES)
    args, kwargs = call_of(trainer.net, trainer.predict_step, batch, samples)
    if kwargs or len(args) != 1:
        raise UserError("the model is called with several arguments; a summary needs a model that takes one")
    write_text(run.answer, str(summary(trainer.net, features=args[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
