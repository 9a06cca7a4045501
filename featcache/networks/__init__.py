"""A frozen network: how it is found, loaded, read at its taps, and run fast.

In: a name, a checkpoint, or a module. Out: a `Backbone`, and features for a batch of pixels.
Here: families of networks, checkpoints, tracing, taps, the forward pass, surgery.
May import: `featcache.pixels`, `featcache.fingerprint`, `featcache.system`, `featcache.errors`.
"""
