"""Classifiers on features, each with its own search over hyper-parameters.

In: arrays of features and labels, and folds. Out: fitted estimators with their out-of-fold scores.
Here: the table of heads, one module for each kind, and what they share.
May import: `featcache.system`, `featcache.errors`; nothing of networks, stores or extraction.
"""
