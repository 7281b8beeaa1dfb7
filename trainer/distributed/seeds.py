"""Random numbers: which seed each rank draws from, and its generators' states for a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand
from numpy.typing import NDArray

_LOADING_BITS = np.random.MT19937(0)  # numpy's generator while this process loads; always seeded before it is used


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, the same on every platform; different parts give unrelated seeds."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and GPUs), numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def sample_seeds(positions: NDArray[np.int64], key: int) -> NDArray[np.uint64]:
    """A 64-bit seed for each position: SplitMix64's outputs number `positions` from the state `key`.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (OOPSLA 2014).
    """
    states = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    seeds: NDArray[np.uint64] = np.empty(len(positions), np.uint64)
    split_mix(states, np.uint64(key), seeds, np.empty_like(seeds))
    return seeds


def split_mix(
    values: NDArray[np.uint64], key: np.uint64, mixed: NDArray[np.uint64], scratch: NDArray[np.uint64]
) -> None:
    """Write SplitMix64's output at the states `values + key` to `mixed`; all arrays have the same shape."""
    np.add(values, key, out=mixed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(mixed, shift, out=scratch)
        mixed ^= scratch
        mixed *= factor
    np.right_shift(mixed, 31, out=scratch)
    mixed ^= scratch


def seed_loading(seed: int) -> None:
    """Seed what a dataset draws from (torch on the CPU, numpy, random), in a few microseconds. `seed` has 64 bits."""
    # torch and numpy are the same generator: from the same 32 bits they would draw the same numbers.
    torch.default_generator.manual_seed(seed & 0xFFFFFFFF)
    np.random.seed(seed >> 32)
    random.seed(seed)


@contextlib.contextmanager
def loading_apart() -> Iterator[None]:
    """Within the block, this process loads samples: its draws and seeds do not affect the training's random numbers.

    As `rng_kept`, at a fifth of the time: numpy's generator is exchanged, since copying its state takes long. (But
    for the second of a pair of normals, which numpy keeps for the next call and forgets at an exchange.)
    """
    torch_state, random_state, bits = (
        torch.default_generator.get_state(),
        random.getstate(),
        mtrand.get_bit_generator(),
    )
    mtrand.set_bit_generator(_LOADING_BITS)
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(random_state)
        mtrand.set_bit_generator(bits)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators, in types that torch.load(weights_only=True) reads."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "random": [version, list(internal), gauss_next],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["random"]
    random.setstate((version, tuple(internal), gauss_next))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """The generators continue after the block as if it had drawn nothing."""
    state = rng_state(device)
    yield
    set_rng_state(state, device)


def be_deterministic() -> None:
    """Have CUDA use only kernels that give the same bits each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")  # switches, which add in the order in which numbers arrive
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
