"""``python -m jaxnet`` and the ``jaxnet`` script."""

import io
import sys


def main() -> None:
    """Run the command line, if its packages are here."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks λ shows a question mark in its place.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        from jaxnet.lab import cli
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "rich"):
            raise
        print(f"jaxnet: the command line needs {error.name}: pip install 'jaxnet[app]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(cli.run(sys.argv[1:]))


if __name__ == "__main__":
    main()
