"""From keys to actions: which keys a world's actions get, and which action several held keys are together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

IDLE = ("nothing", "noop", "no op", "idle", "wait")  # names of the action of who does nothing
# The keys of the first action whose name has these words; an earlier line has the first choice of its keys.
KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(move |walk |go )?(forward|ahead)", ("ArrowUp", "w")),
    (r"(move |walk |go )?back(ward)?s?", ("ArrowDown", "s")),
    (r"(turn|rotate|look) left", ("ArrowLeft", "a")),
    (r"(turn|rotate|look) right", ("ArrowRight", "d")),
    (r"((move |walk |go )?up|north)", ("ArrowUp", "w")),
    (r"((move |walk |go )?down|south)", ("ArrowDown", "s")),
    (r"((move |walk |go |strafe )?left|west)", ("ArrowLeft", "a", "q")),
    (r"((move |walk |go |strafe )?right|east)", ("ArrowRight", "d", "e")),
)
DIGITS = "1234567890"


def keys_of(actions: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The keys of each action, as a browser names them (`KeyboardEvent.key`).

    Arrows and WASD turn and walk. Q and E step sideways where left and right turn. Other actions get the digits in
    order. Doing nothing, and what two keys mean together (`held_action`), have none.
    """
    keys: dict[str, tuple[str, ...]] = dict.fromkeys(actions, ())
    free = set(itertools.chain.from_iterable(own for _, own in KEYS))
    for pattern, own in KEYS:
        for name in actions:
            left = tuple(key for key in own if key in free)
            if left and not keys[name] and re.fullmatch(pattern, name.lower()):
                # q and e are for steps to the side beside turns alone
                keys[name] = left if len(left) == 1 else tuple(key for key in left if key not in "qe")
                free -= set(keys[name])
                break
    digits = iter(DIGITS)
    for name in actions:
        if not keys[name] and name.lower() not in IDLE and not _is_combination(name, actions):
            keys[name] = tuple(itertools.islice(digits, 1))
    return keys


def held_action(actions: Sequence[str], held: Sequence[str]) -> str | None:
    """The action of what is held down, the newest last, as `World.vector` reads it.

    Two that are held are the action of both, such as "move forward and turn left", where the world has one. Otherwise
    the newest counts if the world has an action of doing nothing, since one of its actions is done at a time; and all
    count together if it has none.
    """
    idle = next((name for name in actions if name.lower() in IDLE), None)
    if not held:
        return idle
    for n in range(len(held), 1, -1):
        both = {" and ".join(order) for order in itertools.permutations(held[-n:])} if n <= 3 else set()
        if named := both & set(actions):
            return named.pop()
    return held[-1] if idle is not None else " + ".join(held)


def _is_combination(name: str, actions: Sequence[str]) -> bool:
    parts = name.split(" and ")
    return len(parts) > 1 and all(part in actions for part in parts)
