"""From a job to sbatch's arguments and script. Pure: nothing is read or run here.

Values reach sbatch as arguments of their own, and the script as quoted words: nothing that was meant as data is ever
executed. Only `slurm.setup` is shell.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.clusters.cluster import Array, Submittable
from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.schema.sbatch import CPUS, to_arguments, to_text
from dtrain.schema.sections import Slurm

MOST_STALLS = 3  # starts in a row without a new checkpoint, after which a run is no longer requeued
SIGNAL = "B:USR2@120"  # to the batch shell, this many seconds before the time limit

_TEMPLATE = Path(__file__).with_name("batch.sh")
_PLACEHOLDER = re.compile(r"@([a-z_]+)@")


@dataclass(frozen=True)
class BatchScript:
    """sbatch's arguments, and the script that it reads."""

    arguments: tuple[str, ...]
    script: str


def render(
    wanted: Submittable,
    slurm: Slurm,
    run: Path,
    folder: Path,
    *,
    dtrain: Sequence[str],
    array: Array | None = None,
    cpus: int | None = None,
) -> BatchScript:
    """The submission of one run, or of an array of runs.

    Args:
        wanted: what to submit; its GPUs are a node's processes, where it requests CPUs and no GPUs.
        run: the run folder, absolute; of an array, the folder of its run folders.
        folder: from which it is submitted, and in which it runs, absolute.
        dtrain: the command on the nodes; in a container, of the image.
        cpus: per node, besides GPUs.
    """
    nodes, gpus, on_cpu = wanted.nodes, wanted.gpus, wanted.is_on_cpu
    arguments = [
        "--parsable",
        f"--job-name={wanted.name}",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--requeue",  # a node that fails, and preemption
        f"--chdir={folder}",
        f"--output={_literal(run)}{'/%a' if array else ''}/{RunDir('').slurm_log}",
        "--open-mode=append",
    ]
    if array is not None:
        arguments.append(f"--array={_array(array)}")
    if "signal" not in slurm.options:
        arguments.append(f"--signal={SIGNAL}")
    asked = slurm.options
    others = to_text(asked.pop("gres")) if "gres" in asked else ""
    if resources := ",".join(filter(None, ["" if on_cpu else f"gpu:{gpus}", others])):
        arguments.append(f"--gres={resources}")
    cpus = gpus.count if on_cpu else cpus
    if cpus is not None and not CPUS & asked.keys():
        arguments.append(f"--cpus-per-task={cpus}")
    arguments += to_arguments(asked)

    values = {
        "run": shlex.quote(str(run)) + ("/$SLURM_ARRAY_TASK_ID" if array else ""),
        "setup": "\n".join(slurm.setup),
        "env": "\n".join(_environment(slurm)),
        "nodes": str(nodes),
        "step": "".join(f" {shlex.quote(each)}" for each in in_pyxis(slurm, (run, folder))),
        "dtrain": shlex.join(_command(dtrain, slurm, (run, folder), on_cpu=on_cpu)),
        "gpus": str(gpus.count),
        "options": "".join(f" {shlex.quote(each)}" for each in wanted.options),
        "target": '"$run/job.yaml"' if wanted.target is None else shlex.join(wanted.target),
        "requeue_on_failure": "yes" if slurm.requeue_on_failure else "no",
        "most_stalls": str(MOST_STALLS),
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    return BatchScript(tuple(arguments), _PLACEHOLDER.sub(lambda found: values[found[1]], text))


def probe(slurm: Slurm, folder: Path, token: Path, *, dtrain: Sequence[str]) -> str:
    """A script for a node: it prints `sees it` if the file `token` exists, and the version of its dtrain."""
    command = _command(dtrain, slurm, (folder,), on_cpu=True)
    lines = [*slurm.setup, *_environment(slurm), f"[[ -e {shlex.quote(str(token))} ]] && echo sees it"]
    return "\n".join([*lines, shlex.join([*command, "--version"])])


def in_pyxis(slurm: Slurm, folders: Sequence[Path]) -> list[str]:
    """srun's options for a Pyxis container: it mounts the folders, and runs in the last of them."""
    asked = slurm.pyxis
    if not asked:
        return []
    if wrong := [folder for folder in folders if re.search("[,:]", str(folder))]:
        raise UserError(f"{wrong[0]}: Pyxis can't mount a folder with a comma or a colon in its name")
    mounts = [f"{folder}:{folder}" for folder in folders]
    if "container-mounts" in asked:
        mounts.append(to_text(asked["container-mounts"]))
    return to_arguments({**asked, "container-mounts": mounts, "container-workdir": folders[-1]})


def _environment(slurm: Slurm) -> list[str]:
    """A container gets this environment and usually the home directory: its python would find modules there."""
    own = ["unset PYTHONPATH PYTHONHOME; export PYTHONNOUSERSITE=1"] if slurm.is_in_container else []
    return own + [f"export {key}={shlex.quote(value)}" for key, value in slurm.env.items()]


def _command(dtrain: Sequence[str], slurm: Slurm, folders: Sequence[Path], *, on_cpu: bool) -> list[str]:
    """dtrain on a node, in its container if there is one."""
    return [*dtrain] if slurm.container is None else [*_in_container(slurm.container, folders, on_cpu=on_cpu), *dtrain]


def _array(array: Array) -> str:
    """As sbatch has it: 0-3,7%2."""
    runs = itertools.groupby(enumerate(array.numbers), lambda pair: pair[1] - pair[0])
    ranges = [[number for _, number in group] for _, group in runs]
    texts = [str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in ranges]
    return ",".join(texts) + (f"%{array.max_parallel}" if array.max_parallel else "")


def _literal(path: Path) -> str:
    """A path that sbatch takes as it is: % begins a pattern there."""
    return str(path).replace("%", "%%")


def _in_container(image: str, folders: Sequence[Path], *, on_cpu: bool) -> list[str]:
    """The image's own python, with the folders mounted, running in the last of them."""
    gpu = [] if on_cpu else ["--nv"]
    binds = [argument for folder in folders for argument in ("--bind", str(folder))]
    return ["apptainer", "exec", *gpu, *binds, "--pwd", str(folders[-1]), image]
