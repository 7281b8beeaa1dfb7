"""`python -m dtrain` is `dtrain`."""

from dtrain.launcher.cli import main

if __name__ == "__main__":
    main()
