"""The commands that are scripts, one module each with `make_parser` and `main`, as in `trl.scripts`.

May import every room but `chain` and `cli`.
"""
