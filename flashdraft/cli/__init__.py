"""The command line: one file a journey; what is heavy is imported once a command is chosen."""

from flashdraft.cli.app import main

__all__ = ["main"]
