"""Features in an HDF5 file: its format, its reader and its writer.

In: tables of text and arrays of features. Out: a `FeatureStore`. It never sees an image set.
Here: the format, disk access, checksums, `FeatureStore`, the writer, splitting, export.
May import: `featcache.fingerprint`, `featcache.system`, `featcache.errors`.
"""
