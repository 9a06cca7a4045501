"""Which images there are: an `ImageSet`, listed and read by one module for each kind of source.

In: folders, CSV tables, tar shards, arrays, data sets. Out: ids, labels, and the bytes of each.
Here: one module for each kind of source, and the `ImageSet` that they make.
May import: `featcache.pixels`, `featcache.system`, `featcache.errors`.
"""
