"""Every bad job file is one clear line for each mistake; every good one survives a round trip."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dtrain.errors import Problem, UserError, nearest
from dtrain.schema.job import job_json_schema
from dtrain.schema.loading import LoadedJob, differences, dump_job, load_job
from dtrain.schema.targets import Target

GOOD = """\
name: digits
seed: 7
model: {_target_: collections.OrderedDict, width: 32}
data:
  train: {_target_: collections.OrderedDict, split: train}
  val: {_target_: collections.OrderedDict, split: val}
  batch_size: 128
loss: {_target_: collections.OrderedDict}
optimizer: {_target_: builtins.dict, lr: 1e-3}
fit:
  epochs: 10
  early_stopping: {monitor: val_loss, patience: 3}
slurm: {time: 01:00:00}
"""
SECTIONS = (
    "known keys: name, seed, model, init_from, data, loss, step, optimizer, scheduler, metrics, callbacks, fit, "
    "checkpoint, mlflow, launch, slurm, fsdp, deepspeed, script"
)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # restores sys.path, which check_job changes


def load(text: str | bytes, *overrides: str) -> LoadedJob:
    Path("job.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_job("job.yaml", overrides)


def mistakes(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def bomb() -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join(lines)


UNREADABLE = {
    "empty": ("", "job.yaml:1: expected a mapping with name, model, data and so on, found null"),
    "list": ("- 1\n", "job.yaml:1: expected a mapping with name, model, data and so on, found a list of 1"),
    "text": ("hello", "job.yaml:1: expected a mapping with name, model, data and so on, found 'hello'"),
    "syntax": (
        "name: x\nmodel: [1, 2\n",
        "job.yaml:3: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ),
    "tab": ("a:\n\t- b\n", "job.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
    "alias": ("name: a\nmodel: *b\n", "job.yaml:2: not valid YAML: found undefined alias 'b'"),
    "two documents": (
        "a: 1\n---\nb: 2\n",
        "job.yaml:2: not valid YAML: but found another document",
    ),
    "binary": (b"a: 1\n\xff\xfe\x00", "job.yaml:2: not text in UTF-8"),
    "NUL": (b"a: 1\nb: \x00\n", "job.yaml:2: character '\\x00' is not allowed"),
    "escape": ('a: "\\U00110000"\n', "job.yaml:1: not valid YAML: chr() arg not in range(0x110000)"),
    "deep flow": ("[" * 100_000, "job.yaml:1: not valid YAML: nested too deep"),
    "deep blocks": (
        "".join(" " * i + "a:\n" for i in range(200)),
        "job.yaml:50: not valid YAML: nested too deep",
    ),
    "own alias": ("name: x\nmodel: &a [*a]\n", "job.yaml:2: nested too deep"),
    "own merge": ("name: x\nmodel: &a {<<: *a}\n", "job.yaml:2: nested too deep"),
    "bomb": (bomb(), "job.yaml:1: more than 50000 values, aliases expanded"),
    "bomb of merges": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
        "job.yaml:1: more than 50000 values, aliases expanded",
    ),
    "large": ("#" * ((1 << 20) + 1), "job.yaml: larger than 1 MiB: this is not a job file"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_one_problem(kind: str):
    text, expected = UNREADABLE[kind]
    assert mistakes(text) == [expected]


INVALID = {
    "duplicate key": (GOOD + "seed: 1\n", ["job.yaml:14: seed: given twice, first on line 2"]),
    "unhashable key": (GOOD + "? [1]\n: 2\n", ["job.yaml:14: a mapping or list cannot be a key"]),
    "number as key": (
        GOOD.replace("width", "3"),
        ["job.yaml:3: model.3: expected a name as the key, found 3"],
    ),
    "python tag": (
        GOOD.replace("lr: 1e-3", "lr: !!python/object/apply:os.system [touch bad]"),
        ["job.yaml:9: optimizer.lr: tag !!python/object/apply:os.system is not allowed here"],
    ),
    "tag that does not fit": (
        GOOD.replace("seed: 7", "seed: !!int x"),
        [
            "job.yaml:2: seed: tag !!int is not allowed here",
            "job.yaml:2: seed: expected a whole number, found null",
        ],
    ),
    "unknown section": (GOOD + "zzz: 1\n", [f"job.yaml:14: zzz: unknown key; {SECTIONS}"]),
    "unknown key": (
        GOOD.replace("epochs", "epoch"),
        [
            "job.yaml:10: fit.epochs: missing; give epochs, steps, or both",
            "job.yaml:11: fit.epoch: unknown key; did you mean epochs?",
        ],
    ),
    "unknown nested key": (
        GOOD.replace("patience", "patince"),
        ["job.yaml:12: fit.early_stopping.patince: unknown key; did you mean patience?"],
    ),
    "text for a number": (
        GOOD.replace("epochs: 10", "epochs: abc"),
        ["job.yaml:11: fit.epochs: expected a whole number, found 'abc'"],
    ),
    "quoted number": (
        GOOD.replace("epochs: 10", 'epochs: "10"'),
        ["job.yaml:11: fit.epochs: expected a whole number, found '10'"],
    ),
    "fraction": (
        GOOD.replace("128", "0.5"),
        ["job.yaml:7: data.batch_size: expected a whole number, found 0.5"],
    ),
    "bool for a number": (
        GOOD.replace("seed: 7", "seed: true"),
        ["job.yaml:2: seed: expected a whole number, found true"],
    ),
    "YAML 1.1's yes": (
        GOOD + "checkpoint: {keep: yes}\n",
        ["job.yaml:14: checkpoint.keep: expected a whole number, found 'yes'"],
    ),
    "number for text": (
        GOOD.replace("digits", "3"),
        ["job.yaml:1: name: expected text, found 3"],
    ),
    "zero": (GOOD.replace("128", "0"), ["job.yaml:7: data.batch_size: expected a number above 0, found 0"]),
    "negative": (GOOD.replace("7\n", "-7\n"), ["job.yaml:2: seed: expected at least 0, found -7"]),
    "unsafe name": (
        GOOD.replace("digits", "../digits"),
        ["job.yaml:1: name: expected letters, digits, '_', '-' and '.' (the last two not first), found '../digits'"],
    ),
    "no such choice": (
        GOOD + "launch: {device: cud}\n",
        ["job.yaml:14: launch.device: expected auto, cpu or cuda, found 'cud'; did you mean cuda?"],
    ),
    "neither choice nor number": (
        GOOD + "checkpoint: {every: true}\n",
        [
            "job.yaml:14: checkpoint.every: expected epoch or a number of optimizer steps above 0, "
            "or text such as 5 epochs or 30 min, found true"
        ],
    ),
    "empty section": (GOOD + "mlflow:\n", ["job.yaml:14: mlflow: expected a mapping, found null"]),
    "no target": (
        GOOD.replace("_target_: builtins.dict, ", ""),
        ["job.yaml:9: optimizer._target_: missing"],
    ),
    "metric called loss": (
        GOOD + "metrics:\n  loss: {_target_: collections.OrderedDict}\n",
        [
            "job.yaml:15: metrics.loss: train_loss and val_loss are the losses; "
            "give this metric another name, found 'loss'"
        ],
    ),
    "monitor of nothing": (
        GOOD.replace("val_loss", "val_los"),
        [
            "job.yaml:12: fit.early_stopping.monitor: nothing is reported as val_los; did you mean val_loss? "
            "known: train_loss, val_loss"
        ],
    ),
    "monitor without validation": (
        GOOD.replace("  val:", "  #"),
        [
            "job.yaml:12: fit.early_stopping.monitor: nothing is reported as val_loss; "
            "without data.val there is no validation"
        ],
    ),
    "loss and step": (
        GOOD + "step: {_target_: operator.add}\n",
        ["job.yaml:14: step: returns its own loss; give either loss or step"],
    ),
    "neither loss nor step": (
        GOOD.replace("loss: {", "#"),
        ["job.yaml:1: loss: missing; give loss or step"],
    ),
    "DeepSpeed and the job": (
        GOOD.replace("epochs: 10", "epochs: 10\n  strategy: deepspeed")
        + """deepspeed:
  train_batch_size: 64
  train_micro_batch_size_per_gpu: auto
  gradient_clipping: 1.0
  gradient_accumulation_steps: 2
  zero_optimisation: {stage: 2}
  optimizer: {type: Adam, params: {lr: 0.1, betas: auto}}
  fp16: {enabled: false}
  bf16: {enabled: true}
""",
        [
            "job.yaml:16: deepspeed.train_batch_size: is 64, where data.batch_size is 128; make them agree",
            "job.yaml:18: deepspeed.gradient_clipping: is 1.0, where fit.clip_norm is null; make them agree",
            "job.yaml:19: deepspeed.gradient_accumulation_steps: follows from data.batch_size, fit.micro_batch_size "
            "and the number of ranks; leave it out",
            "job.yaml:20: deepspeed.zero_optimisation: unknown key; did you mean zero_optimization?",
            "job.yaml:21: deepspeed.optimizer.type: is Adam, where optimizer._target_ is dict; make them agree",
            "job.yaml:21: deepspeed.optimizer.params.lr: is 0.1, where optimizer.lr is 0.001; make them agree",
            "job.yaml:23: deepspeed.bf16: is on, where fit.precision is fp32; dtrain computes in 16 bits by autocast "
            "and keeps the weights in float32: leave it out, and set fit.precision: bf16",
        ],
    ),
    "what ZeRO can not have": (
        GOOD.replace("epochs: 10", "epochs: 10\n  strategy: deepspeed\n  precision: fp16\n  ema: 0.9")
        + """deepspeed:
  zero_optimization: {stage: 3, offload_param: {device: nvme}, zenflow: {topk_ratio: 0.1}}
  torch_autocast: {enabled: false}
  tensor_parallel: {autotp_size: 2}
""",
        [
            "job.yaml:13: fit.precision: fp16 is not supported with deepspeed; use bf16, or fsdp",
            "job.yaml:14: fit.ema: averages whole parameters, but stage 3 leaves each rank only a shard; use stage 2, "
            "or fsdp",
            "job.yaml:18: deepspeed.zero_optimization.offload_param.device: dtrain's checkpoints do not include state "
            "on NVMe; use cpu",
            "job.yaml:18: deepspeed.zero_optimization.zenflow: updates weights asynchronously, which is not exact; "
            "leave it out",
            "job.yaml:20: deepspeed.tensor_parallel: would give ranks the same samples, but dtrain gives each rank "
            "its own; leave it out",
        ],
    ),
    "a stage that there is not": (
        GOOD.replace("epochs: 10", "epochs: 10\n  strategy: deepspeed")
        + "deepspeed: {zero_optimization: {stage: 4}, torch_autocast: {enabled: true}}\n",
        [
            "job.yaml:15: deepspeed.torch_autocast.enabled: is True, where fit.precision is fp32",
            "job.yaml:15: deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, found 4",
        ],
    ),
    "no file for DeepSpeed": (
        GOOD.replace("epochs: 10", "epochs: 10\n  strategy: deepspeed") + "deepspeed: zero.json\n",
        ["job.yaml:15: deepspeed: zero.json: no such file"],
    ),
    "targets written otherwise": (
        GOOD.replace("{_target_: collections.OrderedDict, width: 32}", "net.Net").replace(
            "{_target_: builtins", "{target: builtins"
        ),
        [
            "job.yaml:3: model: expected a mapping, found 'net.Net'; write {_target_: net.Net}",
            "job.yaml:9: optimizer._target_: missing; write _target_ for target",
        ],
    ),
    "merge keys of no mapping": (
        GOOD.replace("width: 32", "<<: 3").replace(
            "{_target_: builtins.dict", "{<<: [{_target_: builtins.dict}, [1]], <<: {}"
        ),
        [
            "job.yaml:3: model.<<: expected a mapping, or a list of mappings, such as *anchor",
            "job.yaml:9: optimizer.<<: expected a mapping, or a list of mappings, such as *anchor",
            "job.yaml:9: optimizer.<<: given twice; to merge several, list them, the first takes precedence: "
            "<<: [*a, *b]",
        ],
    ),
    "a merged value": (
        GOOD.replace("128", "many")
        .replace("  train: {", "  train: &train {")
        .replace("split: train", "split: train, a: &a {_target_: 3}")
        .replace("{_target_: collections.OrderedDict, split: val}", "\n    <<: *train\n    split: val"),
        [
            "job.yaml:5: data.train.a._target_: expected an importable name, found 3",
            "job.yaml:5: data.val.a._target_: expected an importable name, found 3",
            "job.yaml:9: data.batch_size: expected a whole number, found 'many'",
        ],
    ),
    "settings of another strategy": (
        GOOD + "fsdp: {wrap: Block}\n",
        ["job.yaml:14: fsdp: settings for a strategy that fit.strategy does not select"],
    ),
}


@pytest.mark.parametrize("kind", INVALID)
def test_what_is_wrong_is_named_with_its_line(kind: str):
    text, expected = INVALID[kind]
    assert mistakes(text) == expected
    assert not Path("bad").exists()


def test_all_mistakes_are_told_at_once_those_of_targets_too():
    text = (
        GOOD.replace("val_loss", "val_los")
        .replace("128", "big")
        .replace("seed:", "sede:")
        .replace("split: train", "split: train, x: {_target_: collections.OrderDict}")
        .replace("optimizer: {_target_: builtins.dict, lr", "optimizer: {_target_: json.dumps, lr")
    )
    assert mistakes(text) == [
        "job.yaml:2: sede: unknown key; did you mean seed?",
        "job.yaml:5: data.train.x._target_: collections has no OrderDict; did you mean OrderedDict?",
        "job.yaml:7: data.batch_size: expected a whole number, found 'big'",
        "job.yaml:12: fit.early_stopping.monitor: nothing is reported as val_los; did you mean val_loss? "
        "known: train_loss, val_loss",
    ]


def test_a_broken_metric_leads_to_no_second_mistake():
    text = GOOD.replace("val_loss", "val_acc") + "metrics: {acc: {_target_: 3}}\n"
    assert mistakes(text) == ["job.yaml:14: metrics.acc._target_: expected text, found 3"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("zzz", "zzz: no such file"),
        ("jb.yaml", "jb.yaml: no such file; did you mean job.yaml?"),
        (".", ".: is a folder; name the job file in it"),
        ("a\0b", "a\0b: cannot be read: embedded null byte"),
        ("x" * 300, "x" * 300 + ": cannot be read: File name too long"),
    ],
)
def test_a_file_that_is_not_there(path: str, expected: str):
    Path("job.yaml").write_text(GOOD)
    with pytest.raises(UserError) as caught:
        load_job(path)
    assert str(caught.value) == expected
    assert caught.value.exit_code == 2


def test_scalars_are_those_of_yaml_1_2():
    text = GOOD.replace(
        "width: 32",
        "a: 1e-3, b: 01:00:00, c: on, d: yes, e: 2020-01-01, f: 0o17, g: 010, h: 0x1F, i: -.inf, j: ~, "
        "k: 1_000, l: .5, m: True, n: '1', o: 1., p: +3, q: , r: !!str 3, s: !!float 3",
    )
    assert load(text).job.model.arguments == {
        **{"a": 0.001, "b": "01:00:00", "c": "on", "d": "yes", "e": "2020-01-01", "f": 15, "g": 10, "h": 31},
        **{"i": float("-inf"), "j": None, "k": "1_000", "l": 0.5, "m": True, "n": "1", "o": 1.0, "p": 3},
        **{"q": None, "r": "3", "s": 3.0},
    }


def test_merge_keys():
    """A mapping's own value counts, else that of the first mapping that has one, itself or merged into it."""
    text = GOOD.replace("width: 32", "x: &x {a: 1, b: {c: 2}}, y: &y\n {<<: *x, a: 3, d: 4}, '<<': 5").replace(
        "lr: 1e-3", "\n  own: {b: 6, <<: *y},\n  several: {<<: [*x, *y]}"
    )
    loaded = load(text)
    assert loaded.job.model.arguments["<<"] == 5
    assert loaded.job.optimizer.arguments == {
        "own": {"a": 3, "b": 6, "d": 4},
        "several": {"a": 1, "b": {"c": 2}, "d": 4},
    }
    lines = {"own.a": 4, "own.b": 11, "own.b.c": 11, "several.b.c": 3, "several.d": 4, "several": 12}
    assert {key: loaded.locate(f"optimizer.{key}")[1] for key in lines} == lines
    assert load(dump_job(loaded.job)).job == loaded.job


def test_places():
    loaded = load(GOOD.replace("width: 32", "sizes: [1,\n 2]"), "fit.micro_batch_size=4", "slurm={time: 1}")
    assert loaded.locate("fit.epochs") == ("job.yaml", 12)
    assert loaded.locate("model.sizes.1") == ("job.yaml", 4)
    assert loaded.locate("data.val.split") == ("job.yaml", 7)
    assert loaded.locate("data.workers") == ("job.yaml", 5)  # not written: its section
    assert loaded.locate("seed") == ("job.yaml", 2)
    assert loaded.locate("launch.device") == ("job.yaml", 1)
    assert loaded.locate("fit.micro_batch_size") == ("override fit.micro_batch_size=4", None)
    assert loaded.locate("slurm.time") == ("override slurm={time: 1}", None)


def test_overrides_set_add_and_replace():
    loaded = load(
        GOOD,
        *["model.width=64", "model.depth=2", "model.sizes=[1, 2]", "model.sizes.1=3", "name=a"],
        *["slurm={partition: gpu}", "mlflow.run_name=first try", "fit.early_stopping=null", "fit.epochs=3"],
        *["slurm.time=01:00:00", "fit.epochs=4"],
    )
    job = loaded.job
    assert job.model.arguments == {"width": 64, "depth": 2, "sizes": [1, 3]}
    assert job.slurm.options == {"partition": "gpu", "time": "01:00:00"}
    assert (job.name, job.mlflow.run_name, job.fit.epochs) == ("a", "first try", 4)
    assert (job.fit.early_stopping, job.monitor, job.stopping.mode) == (None, "val_loss", "min")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("fit.epochs", "override fit.epochs: expected key=value, with a dotted key such as fit.epochs"),
        ("=3", "override =3: expected key=value, with a dotted key such as fit.epochs"),
        ("fit..epochs=3", "override fit..epochs=3: expected key=value, with a dotted key such as fit.epochs"),
        ("fit.epochs=x", "override fit.epochs=x: fit.epochs: expected a whole number, found 'x'"),
        ("fit.epochs.a=3", "override fit.epochs.a=3: fit.epochs is 10, which has no a"),
        ("model.s.2=1", "override model.s.2=1: model.s is a list of 2, which has no 2"),
        ("fit.epoch=3", "override fit.epoch=3: fit.epoch: unknown key; did you mean epochs?"),
        ("seed=[1", "override seed=[1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "fit.early_stopping.mode=mid",
            "override fit.early_stopping.mode=mid: fit.early_stopping.mode: "
            "expected min or max, found 'mid'; did you mean min?",
        ),
    ],
)
def test_a_wrong_override_is_named(override: str, expected: str):
    assert mistakes(GOOD.replace("width: 32", "s: [1, 2]"), override) == [expected]


def test_dump_loads_back_to_an_equal_job():
    awkward = [
        "1e-3",
        "on",
        "01:00:00",
        "0o17",
        "null",
        "",
        " a ",
        "é",
        "\ud800",
        "a: b",
        "2020-01-01",
        "*",
        "\n",
    ]
    first = load(GOOD + "checkpoint: {every: 50}\n", "fit.micro_batch_size=8").job
    values = {text: [text, 1e-10, 1e20, {"n": None}] for text in awkward}
    model = Target.model_validate({"_target_": "collections.OrderedDict", "values": values})
    first = first.model_copy(update={"model": model})
    again = load(dump_job(first)).job
    assert again == first
    assert dump_job(again) == dump_job(first)
    assert dump_job(first).splitlines()[2:4] == ["model:", "  _target_: collections.OrderedDict"]


def test_an_argument_may_have_any_name():
    job = load(GOOD.replace("width: 32", "target: 1, arguments: 2, copy: 3, _x: 4")).job
    assert job.model.arguments == {"target": 1, "arguments": 2, "copy": 3, "_x": 4}
    assert load(dump_job(job)).job == job


def test_a_run_of_before_says_which_parameters_may_be_unused_by_yes_or_no():
    for former, now in ((True, "allow"), (False, "refuse")):
        assert load(GOOD, f"fit.find_unused_parameters={str(former).lower()}").job.fit.unused_parameters == now
    assert "fit.find_unused_parameters: unknown key" in mistakes(GOOD, "fit.find_unused_parameters=some")[0]


def test_deepspeed_settings_come_from_a_file():
    Path("zero.json").write_text('{"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}')
    job = load(GOOD, "fit.strategy=deepspeed", "deepspeed=zero.json").job
    assert job.deepspeed == {"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}
    Path("job.yaml").write_text(dump_job(job))
    Path("zero.json").unlink()
    assert load_job("job.yaml").job == job
    Path("zero.json").write_text('{"zero_optimization": 1,\n!}')
    assert mistakes(GOOD, "fit.strategy=deepspeed", "deepspeed=zero.json")[0].startswith(
        "override deepspeed=zero.json: deepspeed: zero.json:2: not valid JSON: "
    )


def test_differences_that_keep_a_run_from_continuing():
    old = load(GOOD).job
    may = ["fit.epochs=20", "checkpoint.keep=9", "mlflow.experiment=x", "launch.device=cpu", "slurm={time: 1}"]
    assert differences(old, load(GOOD, *may, "data.workers=2").job) == []
    wrong = [
        "optimizer.lr=0.2",
        "model.width=null",
        "model.depth=[1]",
        "data.collate={_target_: x.y}",
        "seed=8",
    ]
    assert differences(old, load(GOOD, *wrong).job) == [
        "seed: 7 before, 8 now",
        "model.width: 32 before, null now",
        "data.collate: null before, absent now",
        "optimizer.lr: 0.001 before, 0.2 now",
        "model.depth.0: absent before, 1 now",
        'data.collate._target_: absent before, "x.y" now',
    ]
    assert differences(load(GOOD, "model.x=.nan").job, load(GOOD, "model.x=.nan").job) == []


@pytest.mark.parametrize(("metric", "reported"), [("", True), (", train: true", True), (", train: false", False)])
def test_a_monitor_of_a_training_metric(metric: str, reported: bool):
    text = GOOD.replace("val_loss", "train_acc") + f"metrics: {{acc: {{_target_: a.B{metric}}}}}\n"
    if reported:
        assert load(text).job.monitor == "train_acc"
    else:
        assert "nothing is reported as train_acc; did you mean" in mistakes(text)[0]


def test_fuzzed_files_raise_nothing_but_user_errors():
    choose = random.Random(0)
    pieces = [
        *GOOD.split(),
        "[",
        "]",
        "{",
        "}",
        ":",
        "- ",
        "&a",
        "*a",
        "!!int",
        "'",
        '"',
        "\n",
        "\t",
        "\x00",
        "~",
    ]
    outcomes = []
    for _ in range(1000):
        text = GOOD
        for _ in range(choose.randint(1, 3)):
            start = choose.randrange(len(text))
            text = text[:start] + choose.choice(pieces) + text[start + choose.randint(0, 8) :]
        try:
            load(text)
            outcomes.append("")
        except UserError as error:
            outcomes.append(str(error))
    assert outcomes.count("") > 10
    assert len(set(outcomes)) > 100


def test_every_field_is_described():
    schema = job_json_schema()
    sections = [schema, *schema["$defs"].values()]
    fields = {name: field for section in sections for name, field in section["properties"].items()}
    assert len(fields) > 30
    assert [name for name, field in fields.items() if not {"description", "$ref"} & field.keys()] == []


def test_problems_are_one_line():
    assert str(Problem("a\n b", "x.y", "job.yaml", 3, "try c")) == "job.yaml:3: x.y: a b; try c"
    assert str(UserError("a")) == "a"
    assert str(UserError([Problem("a"), Problem("b")])) == "a\nb"


def test_nearest():
    assert nearest("ADAM", ["Adam", "SGD"]) == "Adam"
    assert nearest("lrr", ["lr", "betas"]) == "lr"
    assert nearest("zzz", ["lr"]) is None
