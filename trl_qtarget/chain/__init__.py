"""`trl-qtarget chain`: stages from one YAML file, each of them an ordinary command.

plan reads the file, keys says what a stage depends on, validate finds mistakes before anything starts, execute runs a
command and reads its log, run puts them together, page draws what came of it. plan and keys import no torch, so that
a chain that is done says so at once.
"""
