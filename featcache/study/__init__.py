"""Stage two: the questions that are asked of a store.

In: a `FeatureStore`. Out: predictors, evaluations, learning curves, findings, maps.
Here: training and comparing, learning curves, audits, two-dimensional maps.
May import: `featcache.predictor`, `featcache.results` and below.
"""
