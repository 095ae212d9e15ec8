"""The commands of `trl-qtarget`: one module each, with `make_parser` and `main`, as in `trl.scripts`."""
