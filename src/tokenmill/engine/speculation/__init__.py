"""Guessing the next tokens: who guesses, how many guesses are worth their rows, what became of them."""

__all__: list[str] = []
