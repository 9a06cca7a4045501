"""The campaign: attacks on everything that featcache writes and reads, with a seed for each.

``python -m tests.campaign`` runs all stages and prints a table; ``python -m tests.campaign kills
--trials 500 --seed 7`` one of them. A trial is a command of featcache in a process of its own, a
fork of one that has imported everything, while something happens to it: a kill, an error of the
disk, a signal, a flipped bit, another process. What comes of it is compared with an uninterrupted
run that no fault came near.
"""
