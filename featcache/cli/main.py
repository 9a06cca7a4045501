"""The `featcache` command: flags become arguments, errors become messages.

Nothing is computed here. Heavy imports stand inside the commands, or happen at the first use of
one of featcache's public names, so that ``featcache --help`` is instant. Results go to standard
output, progress and messages to standard error; ``--json`` prints one JSON object and nothing
else, ``--quiet`` leaves only errors on standard error, and ``-o -`` is standard output where text
is written. Exit status: 0 done, 1 a `FeatcacheError`, 2 wrong usage, 75 stopped by Ctrl-C, SIGTERM
or SIGHUP with everything committed (run the same command again).
"""

from __future__ import annotations

import click

from featcache.cli.command import Commands
from featcache.cli.extract import extract, layers
from featcache.cli.predict import evaluate, export_model, predict
from featcache.cli.stores import audit, export, info, similar, verify
from featcache.cli.study import study
from featcache.cli.train import compare, train
from featcache.version import __version__


@click.group(
    cls=Commands,
    # Help lists them in the order of the work.
    commands=[
        layers,
        extract,
        info,
        verify,
        train,
        compare,
        evaluate,
        predict,
        study,
        audit,
        similar,
        export,
        export_model,
    ],
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
    epilog="""\b
Examples:
  featcache extract flowers -o flowers.h5 --backbone resnet50
  featcache train flowers.h5 -o flowers.featcache
  featcache predict flowers.featcache new_photos
""",
)
@click.version_option(__version__, prog_name="featcache")
def main() -> None:
    """Compute image features once with a frozen network; train on them in seconds."""
