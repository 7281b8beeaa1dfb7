"""Batches whose samples depend on each other: each rank's share makes something else of a sample, which is said."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr
from typing import Any

import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training import prepare

from dtrain import Trainer
from dtrain.run.folder import RUN_DIR_VARIABLE
from dtrain.trainer.fit.sample_mixing import look_for_mixing
from dtrain.trainer.fit_folder import _fits


class Texts(Dataset):
    """Samples of several lengths; what it has drawn goes into them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.ones(1 + index % 5, 3) + torch.rand(()), torch.tensor(index % 2)


class Pooled(nn.Module):
    def __init__(self, masks: bool) -> None:
        super().__init__()
        self.masks, self.layer = masks, nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.layer(tokens)
        counts = (tokens != 0).any(-1, keepdim=True) if self.masks else torch.ones_like(scores[..., :1])
        return (scores * counts).sum(1) / counts.sum(1)


def padded(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, target = zip(*samples, strict=True)
    return nn.utils.rnn.pad_sequence(tokens, batch_first=True), torch.stack(target)


def mixed(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, target = padded(samples)
    return (tokens + tokens.flip(0)) / 2, target


def failing(samples: Any) -> Any:
    if len(samples) == 2:
        raise ValueError("not two")
    return padded(samples)


class Centred(nn.Module):
    """Looks across its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.drop(x) - x.mean(0))


class Frozen(nn.Sequential):
    """Keeps its batch norm in evaluation mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[1].eval()
        return self


def normed(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    return kind(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def said(rank: int, world_size: int, folder: str) -> dict[str, list[str]]:
    os.environ[RUN_DIR_VARIABLE] = folder
    found: dict[str, list[str]] = {}
    for masks, collate, workers in ((True, padded, 1), (True, mixed, 0), (True, failing, 0), (False, padded, 0)):
        torch.manual_seed(0)
        net = Pooled(masks)
        loader = DataLoader(Texts(), 6, collate_fn=collate, num_workers=workers)
        trainer = Trainer(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1), device="cpu")
        warnings = found.setdefault(f"{collate.__name__}, {masks}", [])
        look_for_mixing(trainer.model, trainer.step, loader, 0, warnings.append, is_coarse=False)
    errors = io.StringIO()
    with redirect_stderr(errors):
        trainer.fit(loader, epochs=1)
    found["fit"] = errors.getvalue().splitlines()
    frozen, left_frozen = normed(Frozen), normed()
    left_frozen[1].eval()
    for name, net, size in (
        *(("centred", Centred(), 12), ("small", normed(), 12), ("enough", normed(), 32)),
        *(("frozen", frozen, 12), ("left frozen", left_frozen, 12)),
    ):
        _fits.clear()  # as in another process
        trainer = Trainer(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1), device="cpu")
        loader = DataLoader(TensorDataset(torch.randn(size, 3), torch.arange(size) % 2), size)
        with redirect_stderr(errors := io.StringIO()):
            trainer.fit(loader, epochs=1, run_dir=f"{folder}-{name}")
        found[name] = [line for line in errors.getvalue().splitlines() if "warning" in line]
    assert frozen[1].num_batches_tracked == left_frozen[1].num_batches_tracked == 0
    return found


def test_samples_that_depend_on_the_others_in_their_batch_are_found(tmp_path):
    prepare(tmp_path / "run", 2)
    found, other = run_ranks(2, said, str(tmp_path / "run"))
    assert found["padded, True"] == found["failing, True"] == other["fit"] == []
    for name in ("padded, False", "mixed, True"):
        assert found[name] == other[name]
        assert found[name][0].startswith("the loss of 4 training samples is ")
        assert "as two: what comes of a sample depends on the others in its batch (padding" in found[name][0]
    assert found["enough"] == found["frozen"] == found["left frozen"] == other["centred"] == other["small"] == []
    assert found["centred"][0].startswith("warning: the loss of 6 training samples is ")
    assert ["12 samples on 2 ranks are 6 a rank" in line for line in found["small"]] == [True]
    assert found["fit"][0] == f"warning: {found['padded, False'][0]}"
