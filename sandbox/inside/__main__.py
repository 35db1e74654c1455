"""Starts a worker, as host.py does: python sandbox/inside OPTIONS, with the options as JSON."""
import json
import os
import sys

sys.path[0] = os.path.dirname(os.path.realpath(sys.path[0]))
from inside import worker  # noqa: E402

worker.supervise(json.loads(sys.argv[1]))
