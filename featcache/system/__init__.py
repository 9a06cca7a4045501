"""What both stages need of the machine: files, memory, console, tables.

In: paths, texts, signals. Out: files written whole, progress bars, tables.
Here: `console`, `files`, `memory`, `processes`, `tables`, one module for each.
May import: `featcache.errors`.
"""
