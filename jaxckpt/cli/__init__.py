"""The command line: data to stdout, words to stderr; exit 0 yes, 1 a clear no, 2 a call that makes no sense."""

from jaxckpt.cli.run import main as main
