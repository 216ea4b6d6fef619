"""Chi-square of sampled texts with guesses of each kind, 20,000 texts a kind."""

import pytest

from tests.fast.test_speculated_distribution import GUESSERS, check_guesser


@pytest.mark.parametrize("name", GUESSERS)
def test_guesses_of_a_kind_leave_the_distribution_as_it_is(name: str) -> None:
    check_guesser(name)
