"""What processes get that a test starts to kill them, or to let them run out of disk."""

import os

# JAX writes an entry of its compile cache in place. A process that dies meanwhile would leave half
# an entry to all later tests, so such a process only reads the cache.
READS_CACHE = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "inf"}
