"""A trial of the campaign that `make faults` runs by the hundred; and what the campaign does not overlook."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
from faults.campaign import Campaign, summary
from faults.history import History, continued, differences, lost_and_repeated
from faults.job.fault import Fault
from faults.trial import LOOP, MOMENTS, VARIANTS, Trial, draw, run_trial, unexpected

from dtrain.run.folder import RunDir

SEED, NUMBER = 0, 1767
OWN_LOOP = 509
KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, store: str) -> Campaign:
    return Campaign(SEED, tmp_path_factory.mktemp("faults"), store)


@pytest.fixture
def history(campaign: Campaign) -> History:
    return campaign.expected(draw(SEED, NUMBER).config)


@pytest.mark.campaign
@pytest.mark.parametrize("number", [NUMBER, OWN_LOOP])
def test_a_run_that_was_struck_has_the_history_of_one_that_was_not(number, campaign):
    result = campaign.run(number)
    assert result.clean, result
    assert len(result.struck) == len(draw(SEED, number).faults)
    assert "1 trials, 1 clean, 1 bit-identical" in summary([result])


def test_the_trial_is_a_hard_one():
    trial = draw(SEED, NUMBER)
    assert (trial.config.ranks, trial.config.workers, trial.config.micro_batch_size) == (3, 2, 3)
    assert {fault.victim for fault in trial.faults} == {"ranks", "agent", "group"}
    assert {fault.signal for fault in trial.faults} == {KILL, TERM}


def test_the_own_loop_is_one_with_a_cut_model():
    trial = draw(SEED, OWN_LOOP)
    assert (trial.config.program, trial.config.overrides) == (LOOP, ("--strategy=fsdp",))
    assert [(fault.victim, fault.moment) for fault in trial.faults] == [("group", "backward")]


def test_the_campaign_draws_trials_of_all_kinds():
    trials = [draw(SEED, number) for number in range(200)]
    faults = [fault for trial in trials for fault in trial.faults]
    assert {fault.moment for fault in faults} == set(MOMENTS)
    assert {fault.victim for fault in faults} == {"rank", "ranks", "agent", "group", "loader"}
    assert {fault.signal for fault in faults} == {KILL, TERM, signal.SIGABRT}
    assert {trial.config.every for trial in trials} == {"epoch", 3}
    assert {(trial.config.program, trial.config.overrides) for trial in trials} == set(VARIANTS)


def test_the_uninterrupted_run_is_worth_comparing_with(history):
    assert [row["step"] for row in history.rows] == [8, 16, 24]
    assert history.weights.keys() == {"last.pt", "best.pt", "swa.pt"}
    assert lost_and_repeated(history) == ([], [])
    passes = [parts for (training, _, _), parts in history.seen.items() if training]
    draws = {tuple(sample[1:]) for parts in passes for part in parts for sample in part}
    assert len(draws) == 3 * 100
    monitored = [row["val_rest_acc"] for row in history.rows]
    assert monitored.index(max(monitored)) != 2, "best.pt is last.pt: it would not be missed"


@pytest.mark.campaign
def test_a_run_that_cannot_be_repeated_and_a_fault_that_never_strikes_are_reported(tmp_path, store, history):
    config = replace(draw(SEED, NUMBER).config, overrides=("data.train.entropy=true",))
    never = Fault("forward", "rank", KILL, step=1000)
    result = run_trial(Trial(config, (never,)), tmp_path, store, history)
    assert result.problems["missed"] == [str(never)]
    different = set(result.problems["different"])
    assert {"row 1 of metrics.jsonl", "first.weight in last.pt", "rank 1 in step 0"} <= different
    assert not any(result.problems[name] for name in ("lost", "repeated", "orphans", "unusable", "wrong"))


def test_a_validation_that_goes_on_is_one_with_its_beginning():
    first, second, third = ([[float(2 * i), 0.5], [2.0 * i + 1, 0.5]] for i in range(3))
    again = [[sample[0], 0.25] for sample in second]
    assert continued([first, second], [again, third]) == [first, again, third]


def changed(history: History, key: tuple[bool, int, int], samples: list[list[float]]) -> History:
    return replace(history, seen={**history.seen, key: [samples]})


def test_samples_that_differ_are_named(history):
    key = (True, 9, 1)  # in the second epoch, on the second rank
    [*parts] = history.seen[key]
    one, two, *others = [sample for part in parts for sample in part]
    index, other = int(one[0]), int(two[0])
    twice = changed(history, key, [one, one, *others])
    assert differences(twice, history) == ["rank 1 in step 9"]
    assert lost_and_repeated(twice) == ([f"{other} in training of epoch 2"], [f"{index} in training of epoch 2"])
    drawn_otherwise = changed(history, key, [[one[0], 0.5, *one[2:]], two, *others])
    assert differences(drawn_otherwise, history) == ["rank 1 in step 9"]
    assert lost_and_repeated(drawn_otherwise) == ([], [])
    gone = replace(history, seen={key: parts for key, parts in history.seen.items() if key != (False, 24, 0)})
    assert differences(gone, history) == ["rank 0 validating after step 24"]
    assert len(lost_and_repeated(gone)[0]) == sum(map(len, history.seen[False, 24, 0]))


@pytest.mark.parametrize(
    ("victim", "number", "step", "code", "state", "right"),
    [
        ("rank", KILL, 3, 1, "failed", True),
        ("rank", TERM, 3, 0, "finished", False),
        ("agent", KILL, 3, -9, "killed", True),
        ("agent", TERM, None, -15, "killed", True),
        ("agent", TERM, 3, -15, "killed", False),
        ("group", TERM, 3, 75, "stopped", True),
        ("group", TERM, 3, 0, "finished", False),
        ("group", TERM, 23, 0, "finished", True),
    ],
)
def test_an_end_that_is_not_the_contracts_is_reported(victim, number, step, code, state, right, tmp_path):
    run = RunDir(tmp_path)
    (run.checkpoints / "step-000000004").mkdir(parents=True)
    run.status_file.write_text(json.dumps({"state": state, "epoch": 1, "step": 4}))
    assert (unexpected(Fault("forward", victim, number), step, code, run) == []) == right
