"""The `featcache` command: flags become arguments, errors become messages.

In: what is typed. Out: results on standard output, messages on standard error.
Here: main (the group), extract, stores, train, predict, study (the commands), options, command
(what they share). The entry point is `featcache.cli.__main__:main`.
May import: everything, inside the commands.
"""
