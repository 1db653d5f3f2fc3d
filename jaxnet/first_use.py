"""Import the public names of a package on first use: `import jaxnet` costs next to nothing."""

import importlib
import sys

# Type checkers take this name as true. `collections.abc` would take longer than all of the rest.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["resolver"]


def resolver(package: str, homes: "Mapping[str, str]") -> "Callable[[str], object]":
    """Make the `__getattr__` of a package. It imports a name once; later accesses find the name in
    the package itself.

    Args:
      package: the full name of the package, its `__name__`.
      homes: the module of each name. For a submodule, that is the submodule itself.

    Returns:
      A function from a name to its value.

    Raises:
      AttributeError: when it is called, the package has no such name.

    Example:
      >>> resolver("jaxnet", {"tree": "jaxnet.tree"})("tree").__name__
      'jaxnet.tree'
    """

    def resolve(name: str) -> object:
        module = sys.modules[package]
        if name not in homes:
            # With `name` and `obj`, the traceback proposes the closest name.
            raise AttributeError(
                f"module '{package}' has no attribute '{name}'", name=name, obj=module
            )
        home = importlib.import_module(homes[name])
        value = home if homes[name] == f"{package}.{name}" else getattr(home, name)
        setattr(module, name, value)
        return value

    return resolve
