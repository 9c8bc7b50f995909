"""Probabilities that are learnt per context and mixed in the logistic domain, in integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

PRECISION = 22
"""Bits of a learnt probability; a coded one has 16, and the logarithm of its odds 8 behind the point."""
ONE = 1 << PRECISION
CODED, STEPS, OCTAVES = 16, 256, 12
MOST = OCTAVES * STEPS - 1
LEAST_CHANCE = 16
LOOK_UP = 14
WEIGHT_BITS, LEARNING = 16, 16
RATE_LIMIT = 1023
# round(2**(1 / 256) * 2**30)
ROOT = 1076653044


def _chances() -> list[int]:
    """Return 2**16 / (1 + 2**(-x / 256)) for x in -MOST .. MOST."""
    power, powers = 1 << 30, []
    for _ in range(STEPS):
        powers.append(power)
        power = power * ROOT >> 30
    found = []
    for x in range(-MOST, MOST + 1):
        octave, part = divmod(abs(x), STEPS)
        rest = (1 << CODED + 30) // ((1 << 30) + (powers[part] << octave))
        chance = rest if x < 0 else (1 << CODED) - rest
        found.append(min(max(chance, LEAST_CHANCE), (1 << CODED) - LEAST_CHANCE))
    return found


def _odds(chances: list[int]) -> list[int]:
    """Return for each probability in 2**14ths the `x` of the first of `chances` that is not below it."""
    found, place = [], 0
    for p in range(1 << LOOK_UP):
        while place < len(chances) - 1 and chances[place] < (p << CODED - LOOK_UP) + 2:
            place += 1
        found.append(place - MOST)
    return found


CHANCES = _chances()
ODDS = _odds(CHANCES)
RATES = [2 * (1 << 16) // (2 * n + 3) for n in range(RATE_LIMIT + 1)]


class Mixer:
    """Codes bits, each in `ways` contexts at once.

    A context's probability moves towards each bit by ``1 / (n + 1.5)`` of the distance, `n` being how many it has seen;
    the weights of the logarithms of the odds follow the gradient of the code length.
    """

    __slots__ = ("bit", "odds", "seen", "start", "weights")

    def __init__(self, bit: Callable[[int, int], int], ways: int, start: float = 0.5) -> None:
        self.bit = bit
        self.start = int(start * ONE)
        self.odds: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.weights = [(1 << WEIGHT_BITS) * 6 // (5 * ways)] * ways

    def code(self, contexts: Sequence[int], value: int) -> int:
        """Return the bit, coded under the mixed probability of these contexts."""
        odds, weights, start = self.odds, self.weights, self.start
        chances = [odds.get(context, start) for context in contexts]
        stretched = [ODDS[chance >> PRECISION - LOOK_UP] for chance in chances]
        x = MOST
        for weight, part in zip(weights, stretched, strict=True):
            x += weight * part >> WEIGHT_BITS
        chance = CHANCES[0 if x < 0 else 2 * MOST if x > 2 * MOST else x]
        value = self.bit(chance, value)
        error = (value << CODED) - chance
        self.weights = [
            w + (error * s >> LEARNING) for w, s in zip(weights, stretched, strict=True)
        ]
        seen, goal = self.seen, ONE - 1 if value else 0
        for context, chance in zip(contexts, chances, strict=True):
            count = seen.get(context, 0)
            odds[context] = chance + ((goal - chance) * RATES[count] >> 16)
            if count < RATE_LIMIT:
                seen[context] = count + 1
        return value
