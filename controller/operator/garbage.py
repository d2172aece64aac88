"""How often Python looks through all that the operator remembers.

Of 1,000 runs that train, every status that is written and told of makes enough new objects for a whole collection every nine
seconds, and each of these stopped everything for 0.2 s: what ended meanwhile waited. Hardly anything of it is garbage, since what
is not in a circle goes at once.
"""

import gc

TIMES = 100
"""Collections of what is younger before one of everything; Python's own are 10. With those of the youngest as they are."""


def collect_seldom() -> None:
    """To be called when all is imported: of that nothing will ever be garbage, and it is looked through no more."""
    youngest, middle, _ = gc.get_threshold()
    gc.set_threshold(youngest, middle, TIMES)
    gc.freeze()
