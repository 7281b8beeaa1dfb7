"""A user's script that raises in its training, with work of the device still under way: raising.py DEVICE"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain import Trainer

device = sys.argv[1]
if device == "cuda":  # as a script that was written for torchrun
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
net = nn.Linear(16, 4)
steps = 0


def fail(*_: object) -> None:
    global steps
    steps += 1
    if steps == 5:
        print("RAISES", time.time(), flush=True)
        raise RuntimeError("on purpose")


optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
optimizer.register_step_pre_hook(fail)
features = torch.randn(64, 16)
loader = DataLoader(TensorDataset(features, features[:, :4].argmax(1)), batch_size=8, num_workers=1)
Trainer(net, nn.CrossEntropyLoss(), optimizer, device=device, run_dir="run").fit(loader, epochs=2)
