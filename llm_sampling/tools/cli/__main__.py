"""``python -m llm_sampling.tools.cli``, the same as the command ``llm-sampling``."""

import sys

from llm_sampling.tools.cli import main

sys.exit(main())
