"""Generate distinct short English sentences from a seed: numbers, times, colors, commands, places.

The vocabulary has about 140 words, each in many sentences. A few hundred sentences contain every word often enough for
a projector to recognize it in an unseen sentence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

MAX_SENTENCES = 5_000  # of about 14,000 in the grammar; rare templates are exhausted well before that

SLOTS: dict[str, str] = {
    "number": "two three four five six seven eight nine ten twelve",
    "minute": "fifteen twenty thirty forty",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "part": "morning afternoon evening",
    "color": "red blue green yellow black white brown purple",
    "city": "london paris berlin rome boston tokyo",
    "place": "library museum station market hospital school",
    "room": "kitchen bedroom garden office garage hall",
    "name": "anna peter maria james lucy david",
    "vehicle": "train bus ferry plane",
    "device": "lamp radio heater fan",
    "switch": "on off",
    "furniture": "table chair bed sofa",
    "animal": "dog cat horse rabbit",
    "does": "sleeps sits waits eats",
    "near": "under behind near beside",
    "thing": "door window box book coat",
    "handle": "open close clean find",
    "trade": "bought sold lost painted",
    "fruit": "apples oranges lemons onions",
    "drink": "coffee tea milk water",
    "weather": "sunny rainy windy cloudy",
    "side": "left right",
}
TEMPLATES = (
    "turn {switch} the {color} {device} in the {room}",
    "turn {switch} the {device} at {number} {minute}",
    "please {handle} the {color} {thing} in the {room}",
    "{handle} the {thing} {near} the {furniture}",
    "the {vehicle} to {city} leaves at {number} {minute}",
    "the {vehicle} from {city} stops at the {place}",
    "wake me up at {number} {minute} on {day}",
    "call {name} on {day} {part}",
    "{name} {trade} {number} {fruit} in {city}",
    "{name} {trade} the {color} {furniture}",
    "the {color} {animal} {does} {near} the {furniture}",
    "the {animal} {does} {near} the {place}",
    "it was {weather} in {city} on {day} {part}",
    "bring {number} cups of {drink} to the {room}",
    "meet {name} at the {place} on {day}",
    "walk {number} steps and turn {side} at the {place}",
    "it is {weather} so drink some {drink} in the {room}",
    "buy {number} {fruit} and some {drink}",
    "put the {fruit} {near} the {color} {thing}",
)
_SLOT = re.compile(r"\{(\w+)\}")


def sentences(n: int, seed: int) -> list[str]:
    """Return ``n`` distinct sentences; the result for a smaller ``n`` with the same seed is a prefix.

    Words and templates are drawn without replacement until all are used, so all are about equally frequent.
    """
    rng = random.Random(seed)
    words_by_slot = {slot: _shuffled_cycle(words.split(), rng) for slot, words in SLOTS.items()}
    templates = _shuffled_cycle(list(TEMPLATES), rng)
    distinct: dict[str, None] = {}
    while len(distinct) < n:
        template = next(templates)
        distinct.setdefault(_SLOT.sub(lambda slot: next(words_by_slot[slot[1]]), template))
    return list(distinct)


def _shuffled_cycle(items: list[str], rng: random.Random) -> Iterator[str]:
    """Yield the items in random order, endlessly, reshuffled after each round.

    Uses only ``Random.random``, whose values are the same in every version of Python.
    """
    while True:
        yield from sorted(items, key=lambda _: rng.random())
