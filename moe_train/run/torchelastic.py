"""Why a rank ends, told to the torchrun that started it.

torchrun closes a failed job with a report of the first rank that fell, and quotes what that rank
left in the file that ``TORCHELASTIC_ERROR_FILE`` names; without one it points to a page on how to
get tracebacks, below which the reason has scrolled away.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress

FILE = "TORCHELASTIC_ERROR_FILE"


def leave(text: str) -> None:
    """Give `text` to torchrun; without one, nothing happens.

    The form is that of ``torch.distributed.elastic.multiprocessing.errors.ErrorHandler``, whose
    import would cost a refused run the seconds that torch takes.
    """
    path = os.environ.get(FILE)
    if not path:
        return
    # The message is shown only where there is no call stack, and the exit code goes into it.
    word = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    # The reason has been told on stderr; an end must not fail for this copy of it.
    with suppress(OSError), open(path, "w", encoding="utf-8") as stream:
        json.dump(word, stream)
