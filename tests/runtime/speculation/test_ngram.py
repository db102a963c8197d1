"""Prompt look-up against a search by hand, and whether its probabilities come true."""

import random
from array import array

import pytest

from compress.runtime.speculation.ngram import LONGEST, NgramProposer


class Text:
    """As much of a sequence as the proposer looks at."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = array("q", tokens)


def longest_match(tokens: list[int]) -> tuple[int, int]:
    """The place after the longest match, the most recent of these, and its length; or (-1, 0)."""
    end, best, length = len(tokens), -1, 0
    for place in range(end - 1, 0, -1):
        same = 0
        while same < min(place, LONGEST) and tokens[place - 1 - same] == tokens[end - 1 - same]:
            same += 1
        if same > length:
            best, length = place, same
    return best, length


def continued(tokens: list[int], place: int, count: int) -> list[int]:
    """A copy token by token, which reads what it has written."""
    written = list(tokens)
    for ahead in range(count):
        written.append(written[place + ahead])
    return written[len(tokens) :]


def proposed(proposer: NgramProposer, text: Text, count: int) -> list[int]:
    [draft] = proposer.propose([(text, count)])
    assert draft.probabilities is None
    return draft.tokens


@pytest.mark.parametrize("seed", range(30))
def test_copies_what_followed_the_longest_match(seed: int) -> None:
    """At each length of a text that grows by some tokens at once, as accepted drafts make it."""
    source = random.Random(seed)
    letters = source.choice([1, 2, 3, 5, 9])
    proposer = NgramProposer()
    text = Text([source.randrange(letters) for _ in range(source.randint(1, 20))])
    while len(text.tokens) < 60:
        tokens = text.tokens.tolist()
        outlook, draft = proposer.outlook(text, 9), proposed(proposer, text, 9)
        place, length = longest_match(tokens)
        if place < 0:
            assert outlook == draft == []
        else:
            assert 1 <= len(outlook) <= 9 == len(draft)
            assert all(0 < probability < 1 for probability in outlook)
            if length < LONGEST:  # else there may be several
                assert draft == continued(tokens, place, 9)
        grown = [*draft[: source.randint(0, 9)], source.randrange(letters)]
        text.tokens.extend(grown)


def test_goes_on_into_what_it_proposed() -> None:
    assert proposed(NgramProposer(), Text([7, 1, 2, 3, 1, 2, 3, 1]), 7) == [2, 3, 1, 2, 3, 1, 2]


def test_the_longer_match_wins_over_the_more_recent_one() -> None:
    text = Text([1, 2, 3, 4, 50, 9, 3, 4, 60, 8, 2, 3, 4])
    assert proposed(NgramProposer(), text, 1) == [50]


def test_forgotten_sequences_leave_nothing_and_may_come_back() -> None:
    proposer, text = NgramProposer(), Text([1, 2, 3, 1, 2])
    before = proposed(proposer, text, 4)
    proposer.forget(text)
    proposer.forget(text)
    assert not proposer._indices
    assert proposed(proposer, text, 4) == before == [3, 1, 2, 3]


def test_probabilities_come_true() -> None:
    """Texts that copy themselves and stray from time to time, much unlike what priors are from.

    After some texts, what was claimed of a next token, by tenths, is how often it was right: to
    0.1, as 100 draws of probability one half are to two standard deviations.
    """
    source, proposer = random.Random(5), NgramProposer()
    claims: dict[int, list[tuple[float, bool]]] = {}
    for number in range(12):
        text = Text([source.randrange(300) for _ in range(200)])
        at, stray = 0, 0.05 * (1 + number % 4)
        for place in range(600):
            if source.random() < stray:
                at = source.randrange(len(text.tokens))
            token = text.tokens[at]
            outlook = proposer.outlook(text, 1)
            if number >= 4 and place > 50 and outlook:
                right = proposed(proposer, text, 1) == [token]
                claims.setdefault(int(10 * outlook[0]), []).append((outlook[0], right))
            text.tokens.append(token)
            at += 1
    told = [several for several in claims.values() if len(several) >= 100]
    assert len(told) >= 3
    for several in told:
        claimed, right = (sum(column) / len(several) for column in zip(*several, strict=True))
        assert claimed == pytest.approx(right, abs=0.1)


def test_repetition_is_learned_within_a_text() -> None:
    """After some periods the whole of a draft is expected, whatever was learned before."""
    proposer, source = NgramProposer(), random.Random(1)
    other = Text([source.randrange(20) for _ in range(30)])
    for _ in range(300):
        proposer.outlook(other, 1)
        other.tokens.append(source.randrange(20))
    text = Text([1, 2, 3])
    for place in range(60):
        proposer.outlook(text, 1)
        text.tokens.append(1 + place % 3)
    outlook = proposer.outlook(text, 16)
    assert len(outlook) == 16
    assert min(outlook) > 0.8
