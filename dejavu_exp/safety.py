"""What must not be written down, and who may change what is: secrets among the values of a run, and permissions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from dejavu_exp.errors import ConfigError

USER_IN_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]+@", re.IGNORECASE)
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
LEAST_SECRET = 16
"""Characters of an environment variable's value that is taken for a secret; shorter ones could be words of a path."""
NOT_BY_OTHERS = 0o002
"""The bit of a umask that keeps all users but owner and group from changing a file."""


def refuse_secrets(value: object, key: str = "") -> None:
    """Refuse what would be written into files of a run, and perhaps sent to Weights & Biases, and must not be.

    Args:
        value: a configuration, or a part of one, or words of a command line.
        key: where it is, for the error.

    Raises:
        ConfigError: a text has a URL with a user name or a password, or holds the value of an environment variable
            whose name ends in KEY, TOKEN, SECRET, PASSWORD or PASSWD. The message does not repeat the value.
    """
    for place, text in _texts(value, key):
        if USER_IN_URL.search(text):
            raise ConfigError(
                f"{place or 'the command line'}: a URL with a user name or a password would be written into the run's "
                "files. Leave both out of it: download the file first, or let the tool that fetches it log in."
            )
        for name in _secrets_within(text):
            raise ConfigError(
                f"{place or 'the command line'}: holds the value of the environment variable {name}, which would be "
                "written into the run's files. The libraries that need it read it from the environment: leave it out."
            )


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    """All texts in a value, also names of keys, each with its place."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield key, str(name)
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str):
        yield key, value
    elif isinstance(value, Sequence):
        for index, item in enumerate(value):
            yield from _texts(item, f"{key}.{index}" if key else "")


def _secrets_within(text: str) -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= LEAST_SECRET and SECRET_NAME.search(name) and value in text:
            yield name


def keep_others_from_writing() -> int:
    """Let nobody but owner and group change what this process will write, whatever the umask was; gives the old one."""
    before = os.umask(0o077)
    os.umask(before | NOT_BY_OTHERS)
    return before


@contextmanager
def written_safely() -> Iterator[None]:
    """`keep_others_from_writing` for a while, in a process that is not ours alone."""
    before = keep_others_from_writing()
    try:
        yield
    finally:
        os.umask(before)
