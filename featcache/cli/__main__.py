"""The program `featcache`, which ``python -m featcache.cli`` is, too."""

import sys


def main() -> None:
    """Run a command; Ctrl-C while Python imports or prepares it ends it as it does later."""
    try:
        from featcache.cli.main import main as command

        command(prog_name="featcache")
    except KeyboardInterrupt:
        sys.exit(75)


if __name__ == "__main__":
    main()
