"""``python -m refine`` is the script ``refine``."""

import sys

from refine.commands import main

sys.exit(main())
