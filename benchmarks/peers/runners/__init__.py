"""One program a system, each in the environment of that system; they share `serve` and nothing else.

Nothing here imports the rest of the package: a peer's environment has the peer and numpy.
"""
