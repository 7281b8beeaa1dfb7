"""A job's values may refer to each other; what can't be meant is refused with its line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dtrain.errors import UserError
from dtrain.references.marks import STEPS, STEPS_PER_EPOCH, about_the_run, fill
from dtrain.schema.job import Job, job_json_schema
from dtrain.schema.loading import LoadedJob, LoadedScript, changes, dump_job, load_job
from dtrain.schema.loading import load as load_file

GOOD = """\
name: digits
model: {_target_: collections.OrderedDict, width: 32, sizes: [1, 2.5, {a: true}], none: null}
data:
  train: {_target_: collections.OrderedDict, split: train}
  val: {_target_: collections.OrderedDict, token: aToken123456}
  batch_size: 128
loss: {_target_: collections.OrderedDict}
optimizer: {_target_: builtins.dict, lr: 1e-3}
metrics: {acc.1: {_target_: operator.sub}}
fit:
  epochs: 10
scheduler:
  _target_: builtins.dict
"""
AT = GOOD.count("\n") + 1  # the line of what is written after it


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # restores sys.path, which check_job changes


def load(text: str, *overrides: str) -> LoadedJob:
    Path("job.yaml").write_text(text)
    return load_job("job.yaml", overrides)


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def filled(job: Job, **numbers: int) -> Job:
    """As the ranks build it."""
    return Job.model_validate(fill(job.model_dump(by_alias=True), {f"run.{name}": n for name, n in numbers.items()}))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("${fit.epochs}", 10),
        ("${ data.batch_size }", 128),
        ("${optimizer.lr}", 0.001),
        ("${model.sizes.1}", 2.5),
        ("${model.sizes[2].a}", True),
        ("${metrics[acc.1]._target_}", "operator.sub"),
        ("${data.train}", {"_target_": "collections.OrderedDict", "split": "train"}),
        ("${model.sizes}", [1, 2.5, {"a": True}]),
        ("['${fit.epochs}', {y: '${name}'}]", [10, {"y": "digits"}]),
        ("${seed}", 0),
        ("${data.workers}", 0),
        ("${checkpoint.every}", "epoch"),
        ("${model.none}", None),
        ("runs/${name}-${optimizer.lr}-${model.sizes.2.a}", "runs/digits-0.001-true"),
        (r"\${fit.epochs}", "${fit.epochs}"),
        (r"a\\${fit.epochs}", r"a\10"),
        (r"a\\\${fit.epochs}", r"a\${fit.epochs}"),
        (r"\d{2}$ {x} $x", r"\d{2}$ {x} $x"),
    ],
)
@pytest.mark.parametrize("section", ["scheduler", "data.train"])  # built by the ranks alone, and of what is known
def test_what_a_reference_stands_for(written: str, meant: object, section: str):
    text = f"{GOOD}  x: {written}\n"
    if section == "data.train":
        text = GOOD.replace("  train: {_t", f"  train:\n    x: {written}\n    _t").replace(
            ", split: train}", "\n    split: train"
        )
        text = text.replace("scheduler:\n  _target_: builtins.dict\n", "")
        if written == "${data.train}":
            return
    job = load(text).job
    target = job.data.train if section == "data.train" else filled(job).scheduler
    found = target.arguments["x"]
    assert (found, type(found)) == (meant, type(meant))


def test_overrides_come_first_and_references_are_followed():
    overrides = [
        "fit.epochs=30",
        "model.width=${scheduler.x}",
        "data.val=${data.train}",
        "model.split=${data.val.split}",
    ]
    job = load(GOOD + "  x: ${fit.epochs}\n", *overrides, "seed=${model.width}").job
    assert (job.scheduler.arguments["x"], job.model.arguments["width"], job.seed) == (30, 30, 30)
    assert job.data.val == job.data.train
    assert job.model.arguments["split"] == "train"


def test_the_runs_numbers_are_filled_in_by_the_ranks():
    lines = [
        "x: ${run.steps}",
        r"y: \${run.steps} \\${run.steps_per_epoch}/${scheduler.x} ${ run.steps }",
        r"z: ${model.slash}${scheduler.x}${scheduler.w}${model.slash}",
        r"w: \\\${run.steps}",
        r"v: \\${model.slash}${run.steps}${fit.epochs}",
    ]
    job = load(GOOD.replace("width: 32", r"width: 32, slash: '\'") + "".join(f"  {line}\n" for line in lines)).job
    assert about_the_run(job.model_dump(by_alias=True)) == {
        "scheduler.x": [STEPS],
        "scheduler.y": [STEPS_PER_EPOCH, STEPS, STEPS],
        "scheduler.z": [STEPS],
        "scheduler.v": [STEPS],
    }
    assert filled(job, steps=70, steps_per_epoch=7).scheduler.arguments == {
        "x": 70,
        "y": r"${run.steps} \7/70 70",
        "z": "\\70\\${run.steps}\\",
        "w": r"\${run.steps}",
        "v": r"\\7010",
    }


REFUSED = {
    "an unknown name": ("${fit.epoch}", "there is no fit.epoch in the job; did you mean fit.epochs?"),
    "a name without its section": ("${batch_size}", "there is no batch_size in the job; did you mean data.batch_size?"),
    "an item too many": ("${model.sizes.3}", "there is no model.sizes.3 in the job; did you mean model.sizes.2?"),
    "within a number": ("${fit.epochs.x}", "there is no fit.epochs.x in the job; did you mean fit.epochs?"),
    "of the run": ("${run.step}", "there is no run.step in the job; did you mean run.steps?"),
    "a variable": ("${HOME}/x", r"there is no HOME in the job; for the text itself write \${HOME}"),
    "arithmetic": (
        "${fit.epochs*2}",
        "${fit.epochs*2} is no reference: expected the name of one of the job's values, such as ${fit.epochs}; "
        r"no arithmetic, no environment variables; for the text itself write \${",
    ),
    "a resolver": (
        "${oc.env:HOME}",
        "${oc.env:HOME} is no reference: expected the name of one of the job's values, such as ${fit.epochs}; "
        r"no arithmetic, no environment variables; for the text itself write \${",
    ),
    "no end": (
        "${fit.epochs",
        "${ is no reference: expected the name of one of the job's values, such as ${fit.epochs}; "
        r"no arithmetic, no environment variables; for the text itself write \${",
    ),
    "a section in text": ("a ${data.train}", "${data.train} is a mapping, which can't be a part of text"),
    "null in text": ("a ${model.none}", "${model.none} is null, which can't be a part of text"),
    "itself": ("${scheduler.x}", "refers to itself: scheduler.x -> scheduler.x"),
    "what holds it": ("${scheduler}", "refers to itself: scheduler -> scheduler"),
    "a secret": (
        "${data.val.token}",
        "data.val.token is or holds a secret, which a reference would copy to where it is shown",
    ),
    "what holds a secret": (
        "${data.val}",
        "data.val is or holds a secret, which a reference would copy to where it is shown",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str):
    written, message = REFUSED[kind]
    assert mistakes(f"{GOOD}  x: {written}\n") == [f"job.yaml:{AT}: scheduler.x: {message}"]
    assert "aToken" not in message


def test_all_mistakes_are_told_at_once_each_where_it_is_written():
    text = GOOD + "  a: ${scheduler.b}\n  b: ${scheduler.c}\n  c: ${scheduler.a}\n  d: ${scheduler.a}\n"
    assert mistakes(text, "data.batch_size=${batch}", "model.x=${data.batch_size}", "zzz=1")[:3] == [
        f"job.yaml:{AT}: scheduler.a: refers to itself: scheduler.b -> scheduler.c -> scheduler.a -> scheduler.b",
        r"override data.batch_size=${batch}: data.batch_size: there is no batch in the job; "
        r"for the text itself write \${batch}",
        "override zzz=1: zzz: unknown key; known keys: name, seed, model, init_from, data, loss, step, optimizer, "
        "scheduler, metrics, callbacks, fit, checkpoint, mlflow, launch, slurm, fsdp, deepspeed, script",
    ]


def test_the_runs_numbers_stand_only_in_what_the_ranks_build():
    text = GOOD + "  x: ${run.steps}\ncheckpoint: {every: '${run.steps_per_epoch}'}\n"
    known = "is known only when the training data is there: it can stand in the arguments of "
    known += "model, loss, step, optimizer, scheduler and callbacks"
    assert mistakes(text, "data.train.x=${scheduler.x}", "model.x=${checkpoint.every}") == [
        f"job.yaml:{AT + 1}: checkpoint.every: run.steps_per_epoch {known}",
        f"override data.train.x=${{scheduler.x}}: data.train.x: run.steps {known}",
    ]


def test_a_reference_must_be_of_the_kind_that_is_needed():
    assert mistakes(GOOD, "fit.epochs=${name}", "data.val=${fit.clip_norm}") == [
        "override fit.epochs=${name}: fit.epochs: expected a whole number, found 'digits'"
    ]


def test_shell_is_left_alone():
    lines = ["cd ${HOME}/${SLURM_JOB_ID}", "export A=${name:-${x[0]}} B=${y%.tar.gz}"]
    text = GOOD + f"slurm: {{setup: {lines}, env: {{A: '${{name}}'}}}}\n"
    job = load(text).job
    assert job.slurm.setup == lines
    assert job.slurm.env == {"A": "digits"}
    assert load(dump_job(job)).job == job
    assert mistakes(text, 'slurm.setup=["echo ${fit.epochs}"]') == [
        'override slurm.setup=["echo ${fit.epochs}"]: slurm.setup.0: is shell, where ${fit.epochs} means nothing: '
        "nothing is replaced here"
    ]


def test_a_script_job_refers_too():
    Path("job.yaml").write_text("name: x\nscript: [train.py, '${name}', '${seed}', '\\${HOME}']\n")
    assert load_file("job.yaml", ["script.2=${restarts}"]).job.script == ["train.py", "x", "0", "${HOME}"]
    with pytest.raises(UserError, match=r"job.yaml:2: script\.2: there is no seed in the job; for the text"):
        load_file("job.yaml")


def test_quotes_are_asked_for_where_yaml_needs_them():
    text = GOOD.replace("lr: 1e-3", "lr: ${fit.epochs}")
    assert mistakes(text) == [
        "job.yaml:8: not valid YAML: expected ',' or '}', but got '{'; "
        'within {} and [] put a reference into quotes: "${...}"'
    ]


TOO_MUCH = {
    "values": ("[1, 1, 1, 1, 1]", lambda last: "[" + f"'{last}', " * 9 + "]", 8),
    "characters": ("xxxxxxxxxxxxxxxxxxxx", lambda last: last * 9, 20),
    "depth": ("1", lambda last: last, 99),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_few_lines_do_not_stand_for_billions(kind: str):
    first, following, count = TOO_MUCH[kind]
    lines = [f"  a0: {first}", *(f"  a{i}: {following(f'${{scheduler.a{i - 1}}}')}" for i in range(1, count))]
    [line] = mistakes(GOOD + "\n".join(lines))
    expected = "nested too deep" if kind == "depth" else "more than 50000 values"
    assert line.endswith(f"{expected}, with all that is referred to")


def test_what_follows_something_that_may_differ_may_differ():
    text = GOOD.replace("lr: 1e-3", "lr: 1e-3, x: '${data.workers}', y: '${run.steps}'") + "  x: ${fit.epochs}\n"
    old = load(text).job
    assert changes(old, load(text)) == []
    plain = text.replace("${data.workers}", "0").replace("${run.steps}", "7")
    old = load(plain).job
    assert changes(load(dump_job(old)).job, load(plain, "fit.epochs=20", "checkpoint.every=5")) == []
    assert changes(old, load(plain, "scheduler.x=10")) == []
    assert changes(old, load(plain, "scheduler.x=20", "fit.epochs=20")) == ["scheduler.x: 10 before, 20 now"]
    assert changes(old, load(plain, "scheduler.x=${data.batch_size}")) == ["scheduler.x: 10 before, 128 now"]
    # The optimizer's settings are state: those of the checkpoint stay.
    assert changes(load(text).job, load(text, "fit.epochs=20", "data.workers=2")) == [
        "optimizer.x: 0 before, 2 now",
        "optimizer.y: run.steps of another length before",
    ]


def test_a_script_job_may_differ_where_it_may():
    Path("job.yaml").write_text("name: x\nscript: [train.py, '${restarts}']\n")
    old, new = load_file("job.yaml"), load_file("job.yaml", ["restarts=2"])
    assert isinstance(new, LoadedScript)
    assert changes(old.job, new) == []


def test_whatever_is_written_survives_a_round_trip():
    choose = random.Random(0)
    pieces = ["${", "}", "\\", "$", "{", "fit.epochs", "run.steps", "${run.steps}", "${name}", "\\${", " ", "x"]
    loaded = 0
    for _ in range(300):
        text = "".join(choose.choice(pieces) for _ in range(choose.randint(1, 7)))
        quoted = "'" + text + "'"
        try:
            job = load(f"{GOOD}  x: {quoted}\nslurm: {{comment: {quoted}}}\n").job
        except UserError:
            continue
        loaded += 1
        assert load(dump_job(job)).job == job, text
        comment = job.slurm.options["comment"] if "run." not in text else None
        if comment is not None and "${name}" not in text:
            assert filled(job).scheduler.arguments["x"] == comment
    assert loaded > 30


def test_editors_accept_references():
    size = job_json_schema()["$defs"]["Data"]["properties"]["batch_size"]
    assert size["description"] == "Samples per optimizer step, over all ranks."
    assert [kind["type"] for kind in size["anyOf"]] == ["integer", "string"]
    assert {"_args_", "_partial_"} <= job_json_schema()["$defs"]["SchedulerTarget"]["properties"].keys()
