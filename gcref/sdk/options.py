"""What an executor's options may be, and how a SUBMIT says them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcref.errors import ConfigError


def checked_options(
    retries: int, walltime_s: float | None, resource_specification: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The options as a SUBMIT has them.

    Raises:
        ConfigError: one cannot be.
    """
    opts: dict[str, Any] = {}
    if not is_whole(retries) or retries < 0:
        raise ConfigError(f"retries is {retries!r}; it must be a whole number, not below 0", key="retries")
    if retries:
        opts["retries"] = retries
    if walltime_s is not None:
        if not _is_number(walltime_s) or not 0 < walltime_s < float("inf"):
            raise ConfigError(
                f"walltime_s is {walltime_s!r}; it must be a number of seconds above 0", key="walltime_s"
            )
        opts["walltime_s"] = float(walltime_s)
    if resource_specification:
        opts["resources"] = _plain_table(resource_specification)
    return opts


def is_whole(value: object) -> bool:
    """Whether it is a whole number."""
    return type(value) is int  # True is no number of retries


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _plain_table(table: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(table)
    for key, value in found.items():
        if type(key) is not str or type(value) not in (str, int, float, bool):
            raise ConfigError(
                f"resource_specification has {key!r}: {value!r}; use texts and numbers",
                key="resource_specification",
            )
    return found
