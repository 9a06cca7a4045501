"""The layers behind a cut in the network, trained on maps that a store keeps.

In: a `Backbone`, a `FeatureStore` of maps. Out: a trained suffix of the network, as a head.
Here: settings, cutting, training, checkpoints, the head, its search.
May import: `featcache.networks`, `featcache.store`, `featcache.heads` and what they stand on.
"""
