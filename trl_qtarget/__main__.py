"""`python -m trl_qtarget` is `trl-qtarget`."""

from .cli.main import main


if __name__ == "__main__":
    raise SystemExit(main())
