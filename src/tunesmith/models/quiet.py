"""Loading without noise: transformers' progress bars and notices are off for a while."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

_ONE_AT_A_TIME = RLock()  # the switches are global, so two threads must not save and restore them


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers prints errors only and no progress; afterwards it is as it was.

    Libraries' notices of what they will rename are hidden too: only their authors can act on them.
    """
    import transformers

    logging: Any = transformers.utils.logging
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
