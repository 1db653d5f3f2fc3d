"""The command line: `jaxnet inspect FILE`, `jaxnet verify FILE...`, `jaxnet diff A B`, `jaxnet
convert IN OUT`.

Each subcommand is two functions: one adds its parser, and the other runs it and returns the exit
code. The running function imports the slow modules, so that `--help` and errors in the command
appear at once.
"""

import argparse
import traceback
from collections.abc import Sequence
from typing import NoReturn

import jaxnet
from jaxnet.cli.commands import add_diff, add_inspect, add_verify
from jaxnet.cli.convert import add_convert
from jaxnet.cli.output import complain, is_damage, open_streams, say

__all__ = ["main"]

DESCRIPTION = (
    "Tools for the checkpoints of jaxnet, a library for functional neural networks on JAX."
)
EPILOG = """examples:
  jaxnet inspect run/state.safetensors                   paths, shapes, types and sizes
  jaxnet inspect --stats --pattern '**/kernel' model.safetensors
  jaxnet verify run/*.safetensors                        read all bytes and check them
  jaxnet diff old.safetensors new.safetensors            which leaves differ, and how far
  jaxnet convert net.pt net.safetensors                  PyTorch's names and layouts to jaxnet's

exit codes: 0 success, or no differences; 1 the file is damaged or not a checkpoint, the files
differ, or the file cannot be converted; 2 the command is wrong, or a file cannot be opened
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
      argv: the arguments of the command; those of the process by default.

    Returns:
      The exit code, as the help text lists them.

    Raises:
      SystemExit: the command is wrong, or it asks for help or the version.
    """
    from jaxnet.checkpoint import CheckpointError

    open_streams()
    try:
        args = _parser().parse_args(argv)
    finally:
        # argparse has printed the text of --help, and reports no error when the reader of the pipe
        # is gone.
        say()
    try:
        return args.run(args)
    except (CheckpointError, OSError, ImportError, ValueError) as e:
        complain(args.command, e)
        if args.command == "convert":
            return 1 if isinstance(e, CheckpointError) else 2
        return 1 if is_damage(e) and args.command != "diff" else 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        # Python itself would exit with 1, the code for a damaged file.
        complain(args.command, traceback.format_exc())
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from jaxnet.checkpoint.words import shown

        super().error(shown(message, 3000))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="jaxnet", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"jaxnet {jaxnet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_inspect(commands)
    add_verify(commands)
    add_diff(commands)
    add_convert(commands)
    return parser
