"""Numbers beside those of a plain loop, in float64 or on the CPU."""

from __future__ import annotations

import copy
import itertools
from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from checks import Job, LeftOut, Place, apart, below, check, difference
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain import Trainer
from dtrain.errors import UserError

Batches = list[tuple[Tensor, Tensor]]
Make = Callable[[Any], torch.optim.Optimizer]


class Recurrent(nn.Module):
    """An LSTM, and a layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(48, 64, batch_first=True), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.Tanh(), nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16 * 16, 8))


def data(*shape: int, samples: int = 64, batch_size: int = 16) -> DataLoader[tuple[Tensor, ...]]:
    """In their order, without a shuffle."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(samples, *shape, generator=generator)
    return DataLoader(TensorDataset(features, torch.arange(samples) % 8), batch_size=batch_size)


def plain_loop(net: nn.Module, loader: Any, make: Make, dtype: torch.dtype) -> nn.Module:
    """The model after an epoch on the CPU."""
    net = copy.deepcopy(net).to(dtype)
    optimizer = make(net.parameters())
    for features, target in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(features.to(dtype)), target).backward()
        optimizer.step()
    return net


def trained(place: Place, name: str, net: nn.Module, loader: Any, make: Make, **options: Any) -> nn.Module:
    """The model after an epoch of Trainer."""
    trainer = Trainer(
        net, nn.CrossEntropyLoss(), make(net.parameters()), device=place.device, run_dir=place.folder / name, **options
    )
    trainer.fit(loader, epochs=1)
    return trainer.net


def furthest(net: nn.Module, expected: nn.Module) -> float:
    pairs = zip(net.parameters(), expected.parameters(), strict=True)
    return max(difference(one.data, other.data) for one, other in pairs)


@check(5, "fp32: convolution, LSTM, after an epoch of SGD, against float64")
def fp32(place: Place) -> str:
    torch.manual_seed(0)
    figures = []
    for name, net, shape in (("convolution", convolutional(), (3, 32, 32)), ("LSTM", Recurrent(), (10, 48))):
        loader = data(*shape)

        def make(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=0.05)

        expected = plain_loop(net, loader, make, torch.float64)
        found = trained(place, name, net, loader, make)
        figures.append(below(name, furthest(found, expected), 1e-5))
    return ", ".join(figures)


@check(6, "tf32 of a compiled model, and what torch says of it", limit_s=180)
def tf32(place: Place) -> str:
    torch.manual_seed(0)
    loader, net = data(3, 32, 32), convolutional()

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05)

    expected = plain_loop(net, loader, make, torch.float64)
    backend = "inductor" if place.has_gpu else "aot_eager"  # the CPU may have no compiler
    compiled = torch.compile(net, backend=backend)
    found = trained(place, "tf32", compiled, loader, make, precision="tf32")
    figures = [below("weights", furthest(found, expected), 1e-2)]
    x = torch.randn(512, 512, device=place.device)
    error = difference(x @ x, x.double() @ x.double())
    if place.has_gpu:
        assert 1e-5 < error < 1e-2, f"a product's error is {error:.1e}: this is not TF32"
        assert torch.backends.cuda.matmul.allow_tf32  # which libraries ask, and may raise
    return f"{figures[0]}, a product {error:.1g}"


@check(9, "Adagrad against a plain loop")
def adagrad(place: Place) -> str:
    torch.manual_seed(0)
    loader, net = data(3, 32, 32), convolutional()

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(parameters, lr=0.001)

    expected = plain_loop(net, loader, make, torch.float64)
    # The first steps divide by the gradient itself, so that rounding is magnified.
    return below("weights", furthest(trained(place, "run", net, loader, make), expected), 1e-3)


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """As a tokenizer makes them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(50, (64, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].sum() % 8}


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1))


@check(10, "batches of Hugging Face's BatchEncoding")
def batch_encoding(place: Place) -> str:
    try:
        from transformers import BatchEncoding as Encoding
    except ImportError:
        Encoding = UserDict  # what it is made of
    torch.manual_seed(0)
    net = Reader()
    expected = copy.deepcopy(net).double()
    seen = set()

    def collate(samples: list[dict[str, Tensor]]) -> Any:
        return Encoding({key: torch.stack([sample[key] for sample in samples]) for key in samples[0]})

    def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        seen.add(batch["input_ids"].device.type)
        predictions = model(batch["input_ids"])
        return {"loss": nn.functional.cross_entropy(predictions, batch["labels"])}

    loader = DataLoader(Texts(), batch_size=16, collate_fn=collate)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = Trainer(net, optimizer=optimizer, step=step, device=place.device, run_dir=place.folder / "run")
    trainer.fit(loader, epochs=1)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for batch in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(batch["input_ids"]), batch["labels"]).backward()
        optimizer.step()
    assert seen == {place.device}, f"batches are on {seen}"
    return f"{Encoding.__name__}: " + below("weights", furthest(trainer.net, expected), 1e-5)


@check(11, "fp16: overflow, growth, and a resume with the scaler as it was", limit_s=150)
def fp16(place: Place) -> str:
    loader, net = data(3, 32, 32, samples=256), convolutional()
    options = {"device": place.device, "precision": "fp16", "run_dir": place.folder / "run"}
    try:
        trainer = Trainer(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.05), **options)
    except UserError as refused:
        if place.has_gpu:
            raise
        raise LeftOut(f"refused on a CPU: {refused}") from None
    scaler = torch.amp.GradScaler(place.device, init_scale=2.0**28, growth_interval=4)
    trainer.precision.scaler = scaler
    scales: list[float] = []
    original = scaler.update

    def update(*args: Any) -> None:
        original(*args)
        scales.append(scaler.get_scale())

    scaler.update = update
    rows = trainer.fit(loader, epochs=4).to_dict("records")
    assert scales[0] < 2.0**28, "the first step did not overflow"
    assert any(later > before for before, later in itertools.pairwise(scales)), "the scale never grew"
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] < 100, f"{[row['train_loss'] for row in rows]}"
    settings = ["fit.precision=fp16", "fit.deterministic=true", "model.acts=raises", "model.at=12"]
    straight, stopped = Job(place, "straight", *settings), Job(place, "stopped", *settings)
    straight.go()
    expected = straight.train()
    stopped.train_until_it_fails()
    stopped.go()
    resumed = apart(stopped.train("--resume"), expected, ("train_loss", "val_loss"))
    return f"scale {scales[0]:.2g} to {min(scales):.2g} to {scales[-1]:.2g}, " + below("resumed", resumed, 1e-6)
