"""Run the `trl-qtarget` command as `python -m trl_qtarget`."""

from .cli.main import main


if __name__ == "__main__":
    raise SystemExit(main())
