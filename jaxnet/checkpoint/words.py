"""Make text safe for errors and terminals. Names come from files and may hold any characters."""

__all__ = ["bounded", "printable", "shown"]

# The most characters of an error: a few hundred lines.
MOST = 50_000


def printable(text: str, keep: str = "") -> str:
    """Escape control characters, direction marks and lone surrogates, except the characters in
    `keep`.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def shown(name: object, most: int = 300) -> str:
    """A name on one line, shortened to about `most` characters."""
    text = str(name)
    half = most // 2
    return printable(text if len(text) <= most else f"{text[:half]}...{text[-half:]}")


def bounded(text: str) -> str:
    """Make several lines printable, and cut long lines and lines beyond `MOST` characters."""
    lines, left, size = text.split("\n"), [], 0
    for line in lines:
        left.append(shown(line, 3000))
        size += len(left[-1])
        if size > MOST:
            break
    if len(lines) > len(left):
        left.append(f"  ... and {len(lines) - len(left):,} more lines")
    return "\n".join(left)
