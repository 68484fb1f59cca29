"""``python -m jaxnet`` and the ``jaxnet`` script."""

import sys


def main() -> None:
    """Run the command line, if its packages are here."""
    try:
        from jaxnet import cli

        sys.exit(cli.run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "rich"):
            raise
        print(f"jaxnet: the command line needs {error.name}: pip install 'jaxnet[app]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
