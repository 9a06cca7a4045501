"""The two stages as runnable studies: what `make features` and `make classify` run."""
