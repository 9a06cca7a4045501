"""``python -m featcache.cli`` is the `featcache` command."""

from featcache.cli.main import main

main(prog_name="featcache")
