"""Command lines: flat --name=value flags, help that fits 100 columns, and a wrong flag's nearest right one.

    python -c 'import flags; flags.parse(flags.parser("Says hello.\\n"))' --help
"""
import argparse
import difflib
import textwrap

import rows


def parser(description):
    """An argparse parser that shows `description`, a script's docstring: its paragraphs wrapped, the indented as is."""
    parts = [part if "\n  " in f"\n{part}" else textwrap.fill(part, 98) for part in description.strip().split("\n\n")]
    return argparse.ArgumentParser(description="\n\n".join(parts), allow_abbrev=False, formatter_class=lambda prog: (
        argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=100)))


def parse(parser):
    """The arguments; exits with 2 and one line for what is wrong with them."""
    parser.error = lambda message: rows.fail(f"{message}; see --help")
    args, unknown = parser.parse_known_args()
    for flag in unknown:
        names = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(flag.split("=")[0], names, 1)
        rows.fail(f"no such flag: {flag}{f'; did you mean {near[0]}?' if near else ''}; see --help")
    return args
