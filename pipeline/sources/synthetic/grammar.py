"""A seed in, distinct short English sentences out: numbers, times, colours, commands, places.

About 140 words, each in many sentences, so that a few hundred sentences show a projector every word often enough to
know it in a sentence it has never heard.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

MAX_SENTENCES = 5_000  # of about 14,000 that the grammar can make; rare templates are long exhausted there

SLOTS: dict[str, str] = {
    "number": "two three four five six seven eight nine ten twelve",
    "minute": "fifteen twenty thirty forty",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "part": "morning afternoon evening",
    "colour": "red blue green yellow black white brown purple",
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
    "turn {switch} the {colour} {device} in the {room}",
    "turn {switch} the {device} at {number} {minute}",
    "please {handle} the {colour} {thing} in the {room}",
    "{handle} the {thing} {near} the {furniture}",
    "the {vehicle} to {city} leaves at {number} {minute}",
    "the {vehicle} from {city} stops at the {place}",
    "wake me up at {number} {minute} on {day}",
    "call {name} on {day} {part}",
    "{name} {trade} {number} {fruit} in {city}",
    "{name} {trade} the {colour} {furniture}",
    "the {colour} {animal} {does} {near} the {furniture}",
    "the {animal} {does} {near} the {place}",
    "it was {weather} in {city} on {day} {part}",
    "bring {number} cups of {drink} to the {room}",
    "meet {name} at the {place} on {day}",
    "walk {number} steps and turn {side} at the {place}",
    "it is {weather} so drink some {drink} in the {room}",
    "buy {number} {fruit} and some {drink}",
    "put the {fruit} {near} the {colour} {thing}",
)
_SLOT = re.compile(r"\{(\w+)\}")


def sentences(n: int, seed: int) -> list[str]:
    """``n`` distinct sentences; those of a smaller ``n`` with the same seed come first.

    Words and templates are dealt like cards, each once before any comes again, so that all are about equally frequent.
    """
    rng = random.Random(seed)
    decks = {slot: _shuffled_cycle(words.split(), rng) for slot, words in SLOTS.items()}
    templates = _shuffled_cycle(list(TEMPLATES), rng)
    made: dict[str, None] = {}
    while len(made) < n:
        template = next(templates)
        made.setdefault(_SLOT.sub(lambda slot: next(decks[slot[1]]), template))
    return list(made)


def _shuffled_cycle(cards: list[str], rng: random.Random) -> Iterator[str]:
    """The cards, shuffled anew after each round. ``Random.random`` alone is the same in every version of Python."""
    while True:
        yield from sorted(cards, key=lambda _: rng.random())
