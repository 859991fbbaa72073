"""The cache against a plain model: whatever happens to it in whatever order, the invariants hold after each step.

universe.py  what the upstream has: repositories, commits, branches that move, bytes
life.py      one life of the real daemon's parts over a real directory, from its start to its stop or its death
truth.py     what is on the disk, read by nobody's code but its own
plain.py     the model: a few dictionaries, and the rules in as many lines
machine.py   what can happen, and what must hold then
"""
