"""What a pickled function is called, read from its bytes without unpickling anything.

Agents never unpickle what users send. But people want to read `simulate`, not the digest of its bytes, so its name is looked
for among the strings of the pickle. What is found is for people to read and for nothing else.
"""

from __future__ import annotations

import pickletools
from itertools import islice
from typing import Final

_OPS_MAX: Final = 4000
"""Steps of the pickle that are looked at: the name of a function is near the beginning."""
_NAME_MAX: Final = 80
_BY_VALUE: Final = ["cloudpickle.cloudpickle", "_make_function"]


def name_of(pickled: bytes) -> str | None:
    """The name of the function in these bytes, as people know it: `simulate`, `Mesh.refine`, `pow`.

    Returns:
        None: it has none that is easily found.
    """
    try:
        name = _find(pickled)
    except Exception:  # noqa: BLE001 - whatever is wrong with bytes of strangers: they have no name
        return None
    return None if name is None else name.replace("<locals>.", "")[:_NAME_MAX]


def _find(pickled: bytes) -> str | None:
    memo: list[str | None] = []
    strings: list[str] = []
    last: str | None = None
    wanted = by_name = False
    for code, argument, _at in islice(pickletools.genops(pickled), _OPS_MAX):
        op = code.name
        if op == "MEMOIZE":
            memo.append(last)
            continue
        last = None
        if op in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
            last = memo[argument] if argument < len(memo) else None
        elif isinstance(argument, str) and op.endswith("UNICODE"):
            last = argument
        if wanted and last is not None:
            return last  # what stands behind the word `__qualname__`, in the state of a function pickled by value
        wanted = last == "__qualname__" and strings[:2] == _BY_VALUE
        if last is not None:
            strings.append(last)
        elif op == "STACK_GLOBAL":
            by_name = len(strings) == 2  # `module` and `name`, and then nothing more
        elif op == "STOP":
            return strings[-1] if by_name else None
        else:
            by_name = False
    return None
