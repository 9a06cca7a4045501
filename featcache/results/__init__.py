"""Figures as values: the evaluation of a predictor, and the leaderboard of several.

In: labels and probabilities. Out: accuracies with intervals, tables of them.
Here: evaluation, leaderboard.
May import: `featcache.system`, `featcache.errors`.
"""
