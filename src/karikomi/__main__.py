"""``python -m karikomi``: the command line where its script is not on the search path."""

from karikomi.cli.app import main

if __name__ == "__main__":
    main(prog_name="karikomi")
