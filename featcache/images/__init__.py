"""Which images there are: an `ImageSet`, listed and read by one module for each kind of source.

In: folders, CSV tables, tars, arrays, data sets. Out: tables of text, the bytes of each image.
Here: `image_set` for all; `folders`, `tars`, `arrays` list; `csv_tables`, `layout` label.
May import: `featcache.pixels`, `featcache.system`, `featcache.errors`.
"""
