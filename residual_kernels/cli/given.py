"""Which options did the user write out?

Those disagree with a cache that was read otherwise; defaults do not.
"""

from contextvars import ContextVar

# Names of the parameters, of the command that runs.
GIVEN: ContextVar[frozenset[str]] = ContextVar("parameters that were given", default=frozenset())
