"""The pipeline's stages, one module each, and the adapters to the outside world."""

import sys

from components import interrupt

if sys.argv[:1] == ["-m"]:  # `python -m components.<stage>` begins here
    interrupt.tell_in_one_line()
