"""The version of featcache."""

__version__ = "0.1.0"
