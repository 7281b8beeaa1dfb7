"""Samples that show which they are and what was drawn for them."""

import os
import random

import fault
import numpy as np
import torch
from torch.utils.data import Dataset


class Points(Dataset):
    """(features, class); the features are the sample's number, what was drawn for it, and what is learned from.

    They are numbered from `first` on.

    With `entropy`, one of the draws is none that a seed decides: such a run can't be repeated.
    """

    def __init__(self, size, training=False, entropy=False, first=0):
        self.features = torch.randn(size, fault.FEATURES, generator=torch.Generator().manual_seed(size))
        self.target = (self.features + self.features.roll(1, 0) / 2)[:, :3].argmax(1)  # not all of it can be learned
        self.training, self.entropy, self.first = training, entropy, first

    def __len__(self):
        return len(self.target)

    def __getitem__(self, index):
        if self.training:
            fault.moment("load")
        drawn = [float(torch.rand(())), os.urandom(1)[0] if self.entropy else np.random.rand(), random.random()]
        return torch.cat([torch.tensor([self.first + index, *drawn]), self.features[index]]), self.target[index]
