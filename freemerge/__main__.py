"""`python -m freemerge`: `merge` starts without Lightning, everything else with it."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    if sys.argv[1:2] == ["merge"]:
        from freemerge.merging import command

        return command.run(command.build_parser().parse_args(sys.argv[2:]))
    from freemerge import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
