"""What both stages need of the machine: files, memory, console, tables.

In: paths, texts, signals. Out: files written whole, progress bars, tables.
May import: `featcache.errors`.
"""
