"""The commands that `python -m` can run too: one module each with `make_parser`, as in `trl.scripts`.

May import every room but `chain` and `cli`.
"""
