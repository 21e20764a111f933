"""`python -m dynajax` is the command `dynajax`."""

from dynajax.cli import main

if __name__ == "__main__":
    main()
