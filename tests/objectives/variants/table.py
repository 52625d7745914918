"""All rows of the table, and those that no objective of tokens, sequences, pairs or a batch can express."""

from __future__ import annotations

from tests.objectives.variants import (
    of_candidates,
    of_likelihood,
    of_policy,
    of_preferences,
    of_sequences,
    of_sums,
    of_the_rest,
)

ROWS = [
    *of_likelihood.ROWS,
    *of_policy.ROWS,
    *of_sums.ROWS,
    *of_sequences.ROWS,
    *of_preferences.ROWS,
    *of_candidates.ROWS,
    *of_the_rest.ROWS,
]

LAST = 198

SECOND_ROW = "a second row of logits"
PART_OF_ROW = "a statistic of a part of the row"
SEVERAL_TARGETS = "several targets a row"

ABSENT = {
    15: "multi-token prediction: one call a head",
    16: "label smoothing: the mean of z with a gradient",
    17: PART_OF_ROW,
    18: PART_OF_ROW,
    19: SECOND_ROW,
    81: "keep masks of a sampler: the caller masks the logits",
    91: SECOND_ROW,
    162: "log sum of p^2: weights of pairs, as in row 198, from token_observations",
    169: SECOND_ROW,
    175: SEVERAL_TARGETS,
    176: SEVERAL_TARGETS,
    177: SEVERAL_TARGETS,
    178: SECOND_ROW,
    179: SECOND_ROW,
    180: SECOND_ROW,
    181: SECOND_ROW,
    182: SECOND_ROW,
    183: "another vocabulary",
    184: "a second temperature of the same row",
}
"""Rows by their number, and what they need."""
