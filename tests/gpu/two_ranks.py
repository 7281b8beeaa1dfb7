"""A user's script with a process group of its own: two_ranks.py DEVICE, started for each rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain import Trainer

device = sys.argv[1]
dist.init_process_group("cpu:gloo,cuda:gloo" if device == "cuda" else "gloo")
torch.manual_seed(0)
features = torch.randn(25, 16)  # the last batch has one sample, and so the second rank none
samples = TensorDataset(features, features[:, :4].argmax(1))
net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
trainer = Trainer(
    net,
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0])),
    torch.optim.AdamW(net.parameters(), lr=0.01),
    device=device,
    run_dir="run",
)
train, val = DataLoader(samples, batch_size=8, shuffle=True), DataLoader(samples, batch_size=8)
rows = trainer.fit(train, val, epochs=3, ckpt_path="best.pt").to_dict("records")
if dist.get_rank() == 0:
    Path("history.json").write_text(json.dumps(rows))
dist.barrier()
dist.destroy_process_group()
