"""What people look at: a page that opens from disk, and plots.

In: evaluations, leaderboards, stores. Out: one HTML file, matplotlib figures.
Here: the data of the page, its text and assets, its pictures, plots.
May import: `featcache.study` and below.
"""
