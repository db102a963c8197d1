"""How many tokens to propose: as many as pay, by what was measured of acceptance and of steps.

A step in which S sequences decode and n tokens are proposed takes seconds(S + n) and the time to
draft, and gives S tokens and as many more as are accepted: the sum of the probabilities that each
is reached.  The n with the most tokens a second is taken, over the whole batch; tokens of all
sequences are taken in order of these probabilities.  With prompts in the step, a token is worth
the time that it takes in a step without them, and the n of the largest profit is taken.

**Estimates may be wrong**, so there is an account of the time gained against plain steps, by what
was measured; when it is overdrawn nothing is proposed for some time.  From it come probes: a few
tokens that do not seem to pay, which show when things have changed.

**A proposer may be behind**: a draft model has to compute a sequence's prompt before its first
draft.  That is done where what drafts save pays for it within as many tokens as the sequence has
by now, and before these within EXPECTED; a sequence that goes on without drafts proves to be long.
The account lends the time.
"""

from __future__ import annotations

import math
from collections import Counter

from compress.core.errors import InputError
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.account import Account
from compress.runtime.speculation.proposer import Proposer
from compress.runtime.speculation.step_cost import StepCost

MOST_FIXED = 64
MARGIN = 0.01  # of expected gain, below which nothing is proposed

SLIGHTLY = 0.5  # plain steps behind: that needs no thought
EXPECTED = 128  # tokens of a sequence that has fewer
WAIT = 8  # steps until those behind are looked at again

MOST_TOGETHER = 256  # tokens proposed in one step
SIZES = frozenset((*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 224, 256))
DOUBLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PLAIN_SOON, PLAIN_LATE = 4, 64  # steps with proposals before a plain one, to see what these take
GAIN_AT_BEST = 0.05  # for each proposed token; below it a batch is not looked at
REST = 32  # steps until it is looked at again
UNASKED_SEEN = 8  # one step in so many that were not asked about: to see takes up to 2% of a step
NEW = 4  # steps of a size that are seen at once; the others so many together:
TOGETHER = 8  # one alone takes many times as long, its code and numbers not being in caches
PROBES = (1, 2, 4)  # tokens, in turn
PROBE_SOON, PROBE_LATE = 16, 256  # steps between probes: doubled, as long as nothing pays
UNASKED = 4  # steps in a row that are not asked about, to see what they take,
UNASKED_SOON, UNASKED_LATE = 8, 256  # after so many that were, which are doubled from the first
OVERLAP_RATE = 0.1  # of a surprise
DEARNESS_RATE, STALLED = 0.02, 8.0  # of a surprise; how large one counts
BEHIND_RATE, BEHIND_STALLED = 0.3, 2.0


class FixedLength:
    """Always `tokens`, or as many as there are proposals for."""

    idle = False

    def __init__(self, tokens: int) -> None:
        if not 1 <= tokens <= MOST_FIXED:
            raise InputError(
                f"num_speculative_tokens = {tokens}; allowed is 1 to {MOST_FIXED}, or auto"
            )
        self.tokens = tokens

    def plan(
        self, sequences: list[Sequence], others: int, outlooks: list[list[float]]
    ) -> list[int]:
        """Tokens to propose for each sequence."""
        return [min(self.tokens, len(outlook)) for outlook in outlooks]

    def observe(
        self, tokens: int, sequences: int, seconds: float, drafting: float, asking: float
    ) -> None:
        """Nothing is learned."""


class AdaptiveLength:
    """As many as pay; see the module.

    overlaps  whether a step is faster when it need not be asked about: a model on a device is
              given one before the tokens of the last are known, unless proposals need them
    """

    def __init__(self, proposer: Proposer, cost: StepCost, overlaps: bool = False) -> None:
        self._proposer = proposer
        self._cost = cost
        self._account = Account()
        self._overlaps = overlaps
        self._overlap = 1.0  # time of a step that was not asked about, to that of one that was
        self._largest = 1  # tokens of a step so far
        self._steep, self._steep_size, self._steep_steps = 0.0, 0, 0
        self._rest, self._rest_size = 0, 0  # steps left, for at least so many sequences
        self._wait, self._wait_size = 0, 0  # the same, for who is behind
        self._unseen: list[tuple[int, float]] = []  # tokens and seconds of steps
        self._steps: Counter[int] = Counter()  # by their tokens
        self._since_plain = self._since_probe = self._probes = 0
        self._since_unasked, self._unasked_after = 0, UNASKED_SOON
        self._plain_after, self._probe_after = PLAIN_SOON, PROBE_SOON
        self._asked: list[Sequence] | None = None  # whose step is under way
        self._known = 0  # their tokens before it
        self._estimate = 0.0  # the proposer's, of the time to draft for it,
        self._behind = 0.0  # and of what it does before
        self._dearness = self._behind_dearness = 1.0  # of either, to the proposer's estimates

    @property
    def idle(self) -> bool:
        """Whether the next step need not be asked about."""
        return self._account.overdrawn or self._rest > 0

    def plan(
        self, sequences: list[Sequence], others: int, outlooks: list[list[float]]
    ) -> list[int]:
        """Tokens to propose for each sequence that decodes, beside `others` of prompts."""
        counts = [0] * len(sequences)
        self._estimate = self._behind = 0.0
        self._account.settle(sequences)
        if not self.idle and self._since_plain < self._plain_after:
            behind = [
                self._proposer.behind(sequence) if outlook else 0.0
                for sequence, outlook in zip(sequences, outlooks, strict=True)
            ]
            for place in self._chosen(sequences, others, outlooks, behind):
                counts[place] += 1
            for place, count in enumerate(counts):
                if count and behind[place]:
                    self._behind += behind[place]
                    self._account.lend(sequences[place], behind[place] * self._behind_dearness)
            if any(counts):
                self._estimate = self._proposer.seconds([count for count in counts if count])
        self._asked, self._known = sequences, _tokens_of(sequences)
        return counts

    def observe(
        self, tokens: int, sequences: int, seconds: float, drafting: float, asking: float
    ) -> None:
        """Take note of a step of decodes alone (see Lengths)."""
        asked, self._asked = self._asked, None
        proposed = tokens - sequences
        self._since_probe += 1
        self._largest = max(self._largest, tokens)
        if proposed:
            self._since_plain += 1
        elif self._since_plain:
            self._since_plain = 0
            self._plain_after = min(2 * self._plain_after, PLAIN_LATE)
        self._rest = self._rest - 1 if sequences >= self._rest_size else 0
        self._since_unasked = self._since_unasked + 1 if asked is not None else 0
        if self._overlaps and self._since_unasked >= self._unasked_after:
            self._rest, self._rest_size = UNASKED, 1
            self._unasked_after = min(2 * self._unasked_after, UNASKED_LATE)
        if asked is None and self._overlaps:
            usual = self._overlap * self._cost.seconds(sequences)
            self._overlap *= 1 + OVERLAP_RATE * max(-0.5, min(0.5, math.log(seconds / usual)))
            self._overlap = min(1.0, self._overlap)
        elif asked is not None or self._since_probe % UNASKED_SEEN == 0:
            self._see(tokens, seconds)
        plain = self._cost.seconds(sequences) * self._overlap
        gain = 0.0
        if asked is not None:
            produced = _tokens_of(asked) - self._known if proposed else sequences
            spent = self._cost.seconds(tokens) + self._drafted(drafting) + asking
            gain = produced * plain / sequences - spent
        self._account.add(gain, plain)
        if self._account.overdrawn:
            self._plain_after = PLAIN_SOON

    def _see(self, tokens: int, seconds: float) -> None:
        """Learn what a step takes."""
        self._steps[tokens] += 1
        self._unseen.append((tokens, seconds))
        if self._steps[tokens] <= NEW or len(self._unseen) == TOGETHER:
            for step in self._unseen:
                self._cost.observe(*step)
            self._unseen.clear()

    def _chosen(
        self,
        asked: list[Sequence],
        others: int,
        outlooks: list[list[float]],
        behind: list[float],
    ) -> list[int]:
        """Of each token to propose, the place of its sequence."""
        sequences = len(outlooks)
        steepness = self._steepness(sequences)
        if steepness > 1 - GAIN_AT_BEST:
            self._rest, self._rest_size = REST, sequences
        least = steepness / 2
        ready = self._worth_it(asked, outlooks, behind, least) if any(behind) else outlooks
        found = _candidates(ready, least)
        del found[2 * max(self._largest, sequences) - sequences :]  # estimates end there
        number = self._best_number(sequences, others, found)
        if number:
            self._probe_after = PROBE_SOON
            return [place for _, place in found[:number]]
        return [] if others else self._probe(outlooks, behind)

    def _worth_it(
        self,
        asked: list[Sequence],
        outlooks: list[list[float]],
        behind: list[float],
        least: float,
    ) -> list[list[float]]:
        """The outlooks; [] where drafts do not pay for what comes before the first.

        Drafting takes hardly longer for several sequences than for one, so that all that are behind
        are looked at together, and otherwise the half of them that is least behind, and so on.
        """
        sequences, plain = len(asked), self._cost.seconds(len(asked))
        late = [seconds * self._behind_dearness for seconds in behind]
        ready = [
            outlook if seconds <= max(SLIGHTLY * plain, self._account.owed(sequence)) else []
            for sequence, outlook, seconds in zip(asked, outlooks, late, strict=True)
        ]
        waiting = sorted(
            (late[place], place)
            for place, outlook in enumerate(outlooks)
            if outlook and not ready[place]
        )
        self._wait = self._wait - 1 if sequences == self._wait_size else 0
        if not waiting or self._wait > 0:
            return ready
        saved = self._saved(ready, least)
        while waiting:
            lent, worth, tokens = 0.0, list(ready), 0
            for seconds, place in waiting:
                lent += seconds
                worth[place] = outlooks[place]
                sequence = asked[place]
                room = sequence.request.limit - sequence.produced
                tokens += min(room, max(EXPECTED, sequence.produced))
            more = self._saved(worth, least) - saved
            if lent < more * tokens * sequences / len(waiting) and self._account.lends(lent, plain):
                return worth
            del waiting[len(waiting) // 2 :]
        if any(ready):
            self._wait, self._wait_size = WAIT, sequences
        else:
            self._rest, self._rest_size = WAIT, sequences
        return ready

    def _saved(self, outlooks: list[list[float]], least: float) -> float:
        """Seconds that drafts save for each token of the batch."""
        seconds, sequences = self._cost.seconds, len(outlooks)
        plain = seconds(sequences) / sequences
        options = self._options(sequences, _candidates(outlooks, least))
        times = [
            (seconds(sequences + number) + drafting) / (sequences + gained)
            for number, gained, drafting in options
        ]
        return max(0.0, plain - min(times, default=plain))

    def _best_number(self, sequences: int, others: int, found: list[tuple[float, int]]) -> int:
        """How many of the candidates to propose, for the most profit."""
        seconds, options = self._cost.seconds, self._options(sequences, found)
        worth = seconds(sequences) / sequences  # seconds that a token takes, at best
        for number, gained, drafting in options:
            together = seconds(sequences + number) + drafting
            worth = min(worth, together / (sequences + gained))
        alone = seconds(sequences + others)
        best, most = 0, MARGIN * worth * sequences
        for number, gained, drafting in options:
            profit = worth * gained - drafting - seconds(sequences + others + number) + alone
            if profit > most:
                best, most = number, profit
        return best

    def _options(
        self, sequences: int, found: list[tuple[float, int]]
    ) -> list[tuple[int, float, float]]:
        """How many of the candidates there may be: number, tokens to expect, time to draft."""
        counts, gained, options = [0] * sequences, 0.0, []
        free = not self._proposer.seconds([1])
        for number, (reach, place) in enumerate(found, 1):
            gained += reach
            counts[place] += 1
            if number in SIZES or number == len(found):
                options.append((number, gained, 0.0 if free else self._price(counts)))
        return options

    def _steepness(self, sequences: int) -> float:
        """The least time that a proposed token takes, to that of a token of a plain step.

        From 1 on none can pay, whatever is accepted.  It is good for some steps.
        """
        if sequences == self._steep_size and self._steep_steps:
            self._steep_steps -= 1
            return self._steep
        seconds = self._cost.seconds
        plain, least = seconds(sequences), math.inf
        for number in DOUBLES:
            if number < sequences / 4:  # too few to tell
                continue
            if number > max(MOST_TOGETHER, sequences):
                break
            drafting = self._price([max(1, number // sequences)] * min(number, sequences))
            least = min(least, (seconds(sequences + number) - plain + drafting) / number)
        self._steep, self._steep_size, self._steep_steps = least * sequences / plain, sequences, 16
        return self._steep

    def _probe(self, outlooks: list[list[float]], behind: list[float]) -> list[int]:
        """A few tokens that do not seem to pay, now and then, if the account has as much."""
        if self._since_probe < self._probe_after:
            return []
        place = max(
            range(len(outlooks)),
            key=lambda place: (bool(outlooks[place]), -behind[place], outlooks[place][:1]),
        )
        number = min(PROBES[self._probes % len(PROBES)], len(outlooks[place]))
        sequences = len(outlooks)
        taken = self._cost.seconds(sequences + number) - self._cost.seconds(sequences)
        taken += self._behind_dearness * behind[place]
        if not number or not self._account.has(taken + self._price([number])):
            return []
        self._probes += 1
        self._since_probe = 0
        self._probe_after = min(2 * self._probe_after, PROBE_LATE)
        return [place] * number

    def _price(self, counts: list[int]) -> float:
        """Estimated seconds to draft so many tokens for the sequences."""
        return self._dearness * self._proposer.seconds([count for count in counts if count])

    def _drafted(self, drafting: float) -> float:
        """What a step's drafting is charged with, but for what was lent.

        Learns how good the proposer's estimates are: of what comes before drafts, where that is
        most of the time, and otherwise of drafts.
        """
        if not self._estimate:
            return drafting
        drafts, before = self._estimate * self._dearness, self._behind * self._behind_dearness
        if before > drafts:
            most = BEHIND_STALLED * self._behind_dearness
            took = min(max(0.0, drafting - drafts) / self._behind, most)
            self._behind_dearness += BEHIND_RATE * (took - self._behind_dearness)
            return drafts
        took = min(max(0.0, drafting - before) / self._estimate, STALLED * self._dearness)
        self._dearness += DEARNESS_RATE * (took - self._dearness)
        return self._estimate * self._dearness


def _candidates(outlooks: list[list[float]], least: float) -> list[tuple[float, int]]:
    """Of each token worth a thought: how likely it is reached, and the place of its sequence.

    The likeliest come first, so those of one sequence come in order.
    """
    most = max(1, MOST_TOGETHER // len(outlooks))
    found = []
    for place, outlook in enumerate(outlooks):
        reach = 1.0
        for probability in outlook[:most]:
            reach *= probability
            if reach < least:
                break
            found.append((reach, place))
    found.sort(reverse=True)
    return found


def _tokens_of(sequences: list[Sequence]) -> int:
    return sum([len(sequence.tokens) for sequence in sequences])
