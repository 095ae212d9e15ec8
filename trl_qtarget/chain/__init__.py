"""`trl-qtarget chain`: stages from one YAML file, each of them an ordinary command.

May import `scripts`, `options`, `evaluation`, `compat`, `files`, `locking` and `user_code`. `run`, `plan` and `keys`
import no torch, so that a chain whose stages are all done says so at once.
"""
