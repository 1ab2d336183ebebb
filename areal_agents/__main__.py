"""``python -m areal_agents`` is the command ``areal-agents``."""

import sys

from areal_agents.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
