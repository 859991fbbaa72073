"""Every moment at which the daemon can die, one after the other.

world.py     the models that the tests' upstream has, and what a cache may therefore show
machine.py   the whole inside of a daemon over a directory: no process, no socket, no network
protocols.py what it does while it dies, and from what state of the disk
truth.py     what must hold afterwards, read from the disk by other means than the daemon's
power.py     a disk that forgets what nobody synced
zygote.py    fresh processes at a few milliseconds each
points.py    the enumeration: die before call 1, 2, 3 ... until nothing dies any more
"""
