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
AFTER = [*range(1, RATE_LIMIT + 1), RATE_LIMIT]


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


def five_ways(
    bit: Callable[[int, int], int], contexts: int, start: float
) -> Callable[[int, int, int, int, int, bool], int]:
    """Return the `code` of a `Mixer` of five ways, whose contexts are below `contexts` and given one by one.

    The same integers, written out: it is called for each level of a tensor, and takes a third of the time.
    """
    odds, seen = [int(start * ONE)] * contexts, [0] * contexts
    wa = wb = wc = wd = we = (1 << WEIGHT_BITS) * 6 // 25
    rates, tables, chances, after = RATES, ODDS, CHANCES, AFTER
    most, top = MOST, 2 * MOST

    def code(a: int, b: int, c: int, d: int, e: int, nonzero: bool) -> int:
        nonlocal wa, wb, wc, wd, we
        pa, pb, pc, pd, pe = odds[a], odds[b], odds[c], odds[d], odds[e]
        sa, sb, sc = tables[pa >> 8], tables[pb >> 8], tables[pc >> 8]
        sd, se = tables[pd >> 8], tables[pe >> 8]
        x = most + (wa * sa >> 16) + (wb * sb >> 16) + (wc * sc >> 16)
        x += (wd * sd >> 16) + (we * se >> 16)
        chance = chances[0 if x < 0 else top if x > top else x]
        value = bit(chance, nonzero)
        error, goal = (65536 - chance, ONE - 1) if value else (-chance, 0)
        wa += error * sa >> 16
        wb += error * sb >> 16
        wc += error * sc >> 16
        wd += error * sd >> 16
        we += error * se >> 16
        na, nb, nc, nd, ne = seen[a], seen[b], seen[c], seen[d], seen[e]
        odds[a] = pa + ((goal - pa) * rates[na] >> 16)
        odds[b] = pb + ((goal - pb) * rates[nb] >> 16)
        odds[c] = pc + ((goal - pc) * rates[nc] >> 16)
        odds[d] = pd + ((goal - pd) * rates[nd] >> 16)
        odds[e] = pe + ((goal - pe) * rates[ne] >> 16)
        seen[a], seen[b], seen[c] = after[na], after[nb], after[nc]
        seen[d], seen[e] = after[nd], after[ne]
        return value

    return code
