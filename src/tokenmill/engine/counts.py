"""What an engine has done since its start, for whoever watches it."""

from dataclasses import dataclass

__all__ = ["EngineCounts"]


@dataclass(kw_only=True)
class EngineCounts:
    """Sums that only grow.

    `num_prompt_tokens` were brought by sequences that started; of these `num_queried_tokens` were looked for
    in the prefix cache and `num_hit_tokens` found. `num_output_tokens` were made. Of `num_draft_tokens`
    guesses that were computed `num_accepted_tokens` stood. `num_preempted` counts each time that a sequence
    gave its blocks back.
    """

    num_prompt_tokens: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_output_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preempted: int = 0
