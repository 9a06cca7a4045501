"""Which images there are: an `ImageSet`, listed and read by one module for each kind of source.

In: folders, tables, tars, Parquet files, arrays, data sets. Out: tables of text, images' bytes.
Here: `image_set`; `folders`, `tars`, `parquet`, `arrays` list; `csv_tables`, `layout` label;
`given` takes whatever a call was given for images.
May import: `featcache.pixels`, `featcache.system`, `featcache.errors`.
"""
