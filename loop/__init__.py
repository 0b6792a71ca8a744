"""persona-loop: which personas does a training loop itself select for?"""

__version__ = "0.1.0"
