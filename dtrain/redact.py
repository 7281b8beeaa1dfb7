"""Secrets that no file of a run may contain: passwords in addresses and commands, keys and credentials in the code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HIDDEN = "***"

# Files by their names, whatever their case.
SECRET_FILES: tuple[str, ...] = (
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.ppk"),
    *("*.keystore", "*.kdbx", "*.gpg", "*.asc", "*.env", "netrc", "_netrc", "*.netrc", "pgpass*", "*htpasswd"),
    *("credentials", "credentials.*", "*credentials.json", "client_secret*.json", "*service[-_]account*.json"),
    *("secret", "secrets", "secret.*", "secrets.*", "password*", "passwd*", "*vault[-_]pass*", "kaggle.json"),
    *("token", "token.*", "*.token", "*[-_]token", "*[-_]token.*", "*api[-_]key", "*api[-_]key.*"),
    *("*private[-_]key", "*private[-_]key.*", "*.tfvars", "*.publishsettings", "*.dockerconfigjson"),
)
_CODE = (".py", ".pyi", ".ipynb", ".md", ".rst")

_USER = re.compile(r"""(?<=://)[^/?#\s"']*@""")
_QUERY = re.compile(r"""(?i)(?<=[?&])((?:password|passwd|pwd|secret|(?:access_)?token|api_?key|sig)=)[^&#\s"']+""")
_PASSWORD = re.compile(r"(?:password|passwd|passphrase|secret|credential|authorization)s?$")
_TOKEN = re.compile(r"(?:^|_)(?:token|(?:api|access|private|secret)_?key)$")
_OPAQUE = re.compile(r"[^\s<>(){}\[\]]{8,}")  # a pad_token such as "<pad>" is no secret
_KEY = re.compile(r"(?:^|_)key$")  # often the name of a column
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w-]{20,}")
# Those of Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS and Google, and JSON web tokens, by how they begin.
_KNOWN_TOKEN = re.compile(
    r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza|ya29\.|eyJ[\w-]+\.eyJ)[\w.-]{16,}"
)
_NAME = re.compile(r"[A-Za-z_][\w.]*")  # in code, of a variable
_ASSIGNED = re.compile(r"""([\w-]+)(["']?\s*[:=]\s*)(["']?)([^\s"',;<>(){}\[\]]+)(?=["',;\s]|$)""")
_KEY_MARK = "[A-Z ]*PRIVATE KEY-----"
_PRIVATE_KEY = re.compile(rf"-----BEGIN {_KEY_MARK}(?:[\s\S]{{0,8000}}?-----END {_KEY_MARK}|.*)")


def hide_password(text: str) -> str:
    """The text without the user, the password and the tokens that its addresses may carry."""
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def _hide_in_text(text: str) -> str:
    """The text without what is secret by its own form: in addresses, private keys, known services' tokens."""
    return hide_password(_KNOWN_TOKEN.sub(HIDDEN, _PRIVATE_KEY.sub(HIDDEN, text)))


def hide_in_command(words: Sequence[str]) -> list[str]:
    """A command without the values of options and overrides that are passwords, nor slurm.env's."""
    return [_hide_word(word, before) for word, before in zip(words, ["", *words], strict=False)]


def _hide_word(word: str, before: str) -> str:
    key, equals, value = word.partition("=")
    if equals and (_is_secret(key.lstrip("-").rpartition(".")[2], value) or _is_environment(key)):
        return f"{key}={HIDDEN}"
    if before.startswith("-") and _is_secret(before.lstrip("-"), word):
        return HIDDEN
    return _hide_in_text(word)


def _is_environment(path: str) -> bool:
    return path in ("slurm", "slurm.env") or path.startswith("slurm.env.")


def hide_in_job(job: Any, path: str = "") -> Any:
    """A job's values in a form that others may see: without slurm.env's values and passwords."""
    if isinstance(job, dict):
        return {key: hide_in_job(value, f"{path}.{key}" if path else str(key)) for key, value in job.items()}
    if isinstance(job, list):
        return [hide_in_job(value, path) for value in job]
    if path.startswith("slurm.env."):
        return HIDDEN
    if not isinstance(job, str):
        return job
    return HIDDEN if _is_secret(path.rpartition(".")[2], job) else _hide_in_text(job)


def hide_in_diff(diff: str) -> str:
    """A diff without what looks like a password, a token or a private key."""

    def hide(found: re.Match[str]) -> str:
        key, between, quote, value = found.groups()
        is_variable = not quote and _NAME.fullmatch(value) and not _PASSWORD.search(key.lower())
        return f"{key}{between}{quote}{HIDDEN}" if _is_secret(key, value) and not is_variable else found[0]

    return _hide_in_text(_ASSIGNED.sub(hide, _PRIVATE_KEY.sub(HIDDEN, diff)))


def _is_secret(key: str, value: str) -> bool:
    """Whether a value is a secret, judging by its name."""
    name = key.lower().replace("-", "_")
    is_token = _TOKEN.search(name) and _OPAQUE.fullmatch(value)
    return bool(_PASSWORD.search(name) or is_token or (_KEY.search(name) and _RANDOM.fullmatch(value)))


def is_secret_file(file: Path) -> bool:
    """Whether a file, or what a link leads to, is a key or credentials: by name, or by a private key in it.

    Code is code.
    """
    names = {file.name.lower(), file.resolve().name.lower()}
    if file.suffix in _CODE:
        return False
    has_name = any(fnmatch(name, pattern) for name in names for pattern in SECRET_FILES)
    return has_name or b"PRIVATE KEY-----" in file.read_bytes()


def pathspecs_without_secrets() -> Iterator[str]:
    """Has git leave out hidden files, files with secret names, and job files, whose values belong to other runs."""
    left_out = (*SECRET_FILES, ".*", ".*/**", "*.yaml", "*.yml")
    return (f":(exclude,icase,glob)**/{pattern}" for pattern in left_out)
