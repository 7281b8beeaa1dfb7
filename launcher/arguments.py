"""Arguments: --gpus, and those of `dtrain launch`, its own or the script's, with torchrun's names for options."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click

from dtrain.errors import UserError

GPUS = click.option("--gpus", default="auto", metavar="N", help="Processes, one GPU each; auto: all visible GPUs.")

_TORCHRUN = {"--nproc-per-node": "--gpus", "--nnodes": "--nodes", "--rdzv-endpoint": "--rendezvous"}
_NEEDLESS = "--standalone"  # torchrun's, accepted without effect: it is dtrain's default
_MEETING = "on several nodes, --rendezvous HOST:PORT, the address of node 0, is all that is needed"
_PRINTED = "the ranks' output goes to the run folder's logs/; --show-ranks selects what is shown on the screen"
_INSTEAD = {  # what replaces the torchrun options that dtrain does not have
    **dict.fromkeys(("--master-addr", "--master-port", "--rdzv-backend", "--rdzv-id", "--rdzv-conf"), _MEETING),
    **dict.fromkeys(("--log-dir", "--redirects", "--tee"), _PRINTED),
    "--no-python": "each rank runs a Python script; start the program from one",
}


class LaunchCommand(click.Command):
    """Options that dtrain does not have belong to the script if they follow its name, as under torchrun."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """click's own, after inserting `--` before a script's arguments."""
        own, dashes, rest = list(args), [], []
        if "--" in args:
            at = args.index("--")
            own, dashes, rest = args[:at], ["--"], args[at + 1 :]
        place = next((at for at, word in self._walk(own) if not word.startswith("-")), None)
        for word in own[:place]:
            name = word.partition("=")[0]
            if instead := _INSTEAD.get(name.replace("_", "-")):
                raise UserError(f"{name} is a torchrun option that dtrain does not have: {instead}")
        if place is not None and not dashes and _is_script(own[: place + 1]):
            after = own[place + 1 :]
            foreign = any(self._option(word) is None for _, word in self._walk(after))
            if foreign and not ctx.resilient_parsing:  # the shell completes a word
                self._require_plain(own[: place + 1], after)
                own, dashes, rest = own[: place + 1], ["--"], after
        words = [self._option(word) or word for word in own]
        return super().parse_args(ctx, [word for word in words if word != _NEEDLESS] + dashes + rest)

    def _walk(self, args: list[str]) -> Iterator[tuple[int, str]]:
        """The arguments with their positions, without the values of dtrain's options."""
        flags = {name for each in self.params if getattr(each, "is_flag", False) for name in each.opts}
        is_value = False
        for at, word in enumerate(args):
            if is_value:
                is_value = False
                continue
            name = self._option(word)
            is_value = name is not None and "=" not in name and name not in flags and name != _NEEDLESS
            yield at, word

    def _option(self, word: str) -> str | None:
        """The word with dtrain's name for the option (torchrun's --nproc_per_node is --gpus); None if unknown."""
        if not word.startswith("-"):
            return None
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        name = _TORCHRUN.get(name, name)
        known = {name for each in self.get_params(click.Context(self)) for name in each.opts}
        return name + equals + value if name in {*known, _NEEDLESS} else None

    def _require_plain(self, before: list[str], after: list[str]) -> None:
        """Raise UserError if any of these script arguments may have been meant for dtrain."""
        for _, word in self._walk(after):
            if self._option(word) is not None:
                target, whole = before[-1], shlex.join(["dtrain", "launch", *before, "--", *after])
                raise UserError(
                    f"{word.partition('=')[0]} follows {target}: if it is meant for dtrain, put it before {target}; "
                    f"if it is the script's own: {whole}"
                )


def _is_script(words: list[str]) -> bool:
    """Whether the last of these words names a script or a module, rather than a job file."""
    return words[-1].endswith(".py") or "-m" in words or "--module" in words


def check_gpus(gpus: str) -> None:
    """Raise UserError unless it is auto or a positive number."""
    if gpus != "auto" and not (gpus.isdecimal() and int(gpus) > 0):
        which = ""
        if "," in gpus:
            which = f"; to choose GPUs, set CUDA_VISIBLE_DEVICES={gpus}"
        raise UserError(f"--gpus {gpus}: expected a number above 0, or auto{which}")
