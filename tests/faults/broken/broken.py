"""A small job in which one rank breaks: in one of KINDS ways, at one of MOMENTS."""

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

MOMENTS = ("init", "loading", "forward", "backward", "validation")
EPOCHS, EPOCH_STEPS = 2, 5


def exception():
    raise ValueError("the flux capacitor is empty")


def sys_exit():
    sys.exit(9)


def os_exit():
    os._exit(9)


def sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


def segfault():
    ctypes.string_at(0)


def abort():
    os.abort()


def out_of_memory():
    """A limit, as `ulimit -v` and some clusters set it: 256 MiB more than there are."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), resource.RLIM_INFINITY))
    torch.ones(1 << 30)


def bus_error():
    os.kill(os.getpid(), signal.SIGBUS)


# What the screen says of each.
KINDS = {
    exception: "ValueError: the flux capacitor is empty",
    sys_exit: "exit code 9",
    os_exit: "exit code 9",
    sigkill: "SIGKILL",
    segfault: "SIGSEGV",
    abort: "SIGABRT",
    out_of_memory: "memory",
    bus_error: "SIGBUS",
}


class Fault:
    """Strikes the first time that this rank is at that moment, after so many of them."""

    def __init__(self, kind, moment, rank, skip):
        self.kind, self.moment, self.rank, self.left = kind, moment, rank, skip

    def at(self, moment):
        if moment != self.moment or os.environ["RANK"] != str(self.rank):
            return
        self.left -= 1
        if self.left < 0:
            Path("struck").write_text(str(time.time()))
            globals()[self.kind]()


class Net(nn.Module):
    """[batch, 4] to [batch, 2]."""

    def __init__(self, **fault):
        super().__init__()
        self.fault = Fault(**fault)
        self.fault.at("init")
        self.first, self.second = nn.Linear(4, 64), nn.Linear(64, 2)
        self.first.weight.register_hook(lambda _: self.fault.at("backward"))

    def forward(self, x):
        self.fault.at("forward" if self.training else "validation")
        return self.second(torch.tanh(self.first(x)))


class Points(Dataset):
    """(features, class)."""

    def __init__(self, size, **fault):
        self.features = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
        self.fault = Fault(**fault) if fault else None

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        if self.fault:
            self.fault.at("loading")
        return self.features[index], int(self.features[index, 0] > 0)
