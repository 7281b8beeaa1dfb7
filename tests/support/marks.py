"""Parameters of tests that `make test` leaves to `make faults`."""

from __future__ import annotations

import functools

import pytest

campaign = functools.partial(pytest.param, marks=pytest.mark.campaign)
