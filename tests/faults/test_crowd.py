"""Launches beside each other, and one trial of each campaign that `make faults` runs at length."""

from __future__ import annotations

from faults.crowd import launch_together, succeeded
from faults.headlines import draw, run_trial


def test_launches_at_the_same_time_do_not_meet(tmp_path):
    ends = launch_together(tmp_path, launches=3, ranks=2)
    assert [succeeded(done, number, 2) for number, done in enumerate(ends)] == [True] * 3, ends


def test_a_trial_of_the_headlines(tmp_path, store):
    trial = draw(0, 0)
    wrong, _ = run_trial(trial, tmp_path, store)
    assert wrong == []
