"""tunesmith: get an open language model, talk to it, tune it, and see what changed.

Importing the package loads neither torch nor transformers.
"""

__version__ = "0.1.0"
