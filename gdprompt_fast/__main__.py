"""``python -m gdprompt_fast`` is the command line too."""

import sys

from .cli.main import main

sys.exit(main())
