"""Functions of whole networks."""

from jaxnet.transform.capturing import capture
from jaxnet.transform.summaries import summary
from jaxnet.transform.walking import replace, walk

__all__ = ["capture", "replace", "summary", "walk"]
