"""Plot what a run of this job has learnt: python examples/rings/scatter.py RUN writes RUN/rings.png."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from rings import RingNet, rings
from torch.utils.data import DataLoader

from dtrain import Trainer, load_weights


def main(run: Path) -> None:
    points, truth = rings("all").tensors
    net = RingNet()
    load_weights(net, run / "weights" / "best.pt")
    logits = Trainer(net, device="cpu").predict(DataLoader(rings("all"), batch_size=1000))

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, title, inner in zip(
        figure.subplots(1, 2), ["truth", "prediction"], [truth == 1, logits > 0], strict=True
    ):
        for label, chosen in (("inner ring", inner[:, 0]), ("outer ring", ~inner[:, 0])):
            axes.scatter(*points[chosen].T, s=4, label=label)
        axes.set(title=title, aspect="equal")
        axes.legend(loc="upper right", markerscale=3)
    figure.savefig(run / "rings.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
