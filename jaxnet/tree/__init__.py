"""Trees by path: find, select, split, merge, change, count and print the leaves of any pytree.

The path of a leaf is its keys, joined by '/': `blocks/attn/query/kernel`, or `0/mu/hidden/bias` in
the state of an optimizer. A pattern is a path with wildcards: `*` is any name, and `**` any number
of names, including none. Within a name, `*` is any text, `?` any character, `[ab]` one of these
characters, and `[!ab]` any other. A pattern that matches an inner node selects everything below it:
`head` is all of the head, `**/bias` every bias.
"""

from jaxnet.tree.leaves import flatten, get, map_with_path, paths, put, unflatten
from jaxnet.tree.parts import mask, matches, merge, select, split
from jaxnet.tree.sizes import bytes_of, count, norm, norms, table

__all__ = [
    "bytes_of",
    "count",
    "flatten",
    "get",
    "map_with_path",
    "mask",
    "matches",
    "merge",
    "norm",
    "norms",
    "paths",
    "put",
    "select",
    "split",
    "table",
    "unflatten",
]
