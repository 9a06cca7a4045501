"""Stage one: images in, a store of features out; decode, forward pass and writing overlap.

In: an `ImageSet` and a `Backbone`. Out: a finished `FeatureStore`.
Here: the order of a run, decoding workers, the stream of batches, reuse, several devices.
May import: `featcache.images`, `featcache.networks`, `featcache.store` and what they stand on.
"""
